//! The v1 wire contract: generated types, JSON mapping, error details.
