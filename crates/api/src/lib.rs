//! The v1 wire contract: generated types, JSON mapping, error details.
//!
//! [`v1`] is what `proto/api` says, as Rust types with gRPC clients and servers; [`extension`] is what this product adds to it. [`json`] is how the same messages look over
//! REST. [`error`] builds each error a client can meet, for both. Nothing here decides anything: callers do.

pub mod error;
pub mod extension;
pub mod json;
pub mod v1;
