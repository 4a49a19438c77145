//! Additions to the v1 API, generated from `proto/gauntlet/v1`: `gauntlet.v1.Sweeper` lists expired instances and deletes those that
//! are still expired.
//!
//! Servers that implement only the v1 API return `UNIMPLEMENTED`.

/// The package and what it imports, as an encoded `google.protobuf.FileDescriptorSet`: for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gauntlet.v1.binpb"));

pub use generated::*;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
mod generated {
    tonic::include_proto!("gauntlet.v1");
}
