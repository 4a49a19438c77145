//! The v1 wire contract: generated types, JSON mapping, error details.
//!
//! [`v1`] holds the types, gRPC clients and servers of `proto/api`; [`extension`] those that Gauntlet adds. [`json`] maps the messages to JSON for
//! REST. [`error`] builds the errors of both APIs. The crate contains no decisions.

pub mod error;
pub mod extension;
pub mod json;
pub mod v1;
