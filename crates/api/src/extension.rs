//! What the v1 API lacks, generated from `proto/gauntlet/v1`: `gauntlet.v1.Sweeper`, which lists what has expired and
//! deletes it if it still has.
//!
//! A server of the v1 API alone answers its calls with `UNIMPLEMENTED`.

/// The package and what it imports, as an encoded `google.protobuf.FileDescriptorSet`: for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gauntlet.v1.binpb"));

pub use generated::*;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
mod generated {
    tonic::include_proto!("gauntlet.v1");
}
