//! Deletes what has expired.
