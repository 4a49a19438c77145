//! The v1 API: messages, clients and servers, generated from `proto/api/v1`.

/// Both packages and what they import, as an encoded `google.protobuf.FileDescriptorSet`: for reflection and the JSON mapping.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/api.v1.binpb"));

/// `api.v1.challenge`: challenges, and the service `ChallengeStore`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
pub mod challenge {
    tonic::include_proto!("api.v1.challenge");
}

/// `api.v1.instance`: instances, and the service `InstanceManager`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
pub mod instance {
    tonic::include_proto!("api.v1.instance");
}
