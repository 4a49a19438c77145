//! Bringing instances up and down: the process backend.
