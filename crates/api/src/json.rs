//! The proto3 JSON mapping of the v1 REST API.
//!
//! Output ([`to_string`]) contains every field: lowerCamelCase names ordered by field number, maps ordered by key, 64-bit
//! integers as strings, enum values by name (an unknown one by number), durations as `"600s"` or `"1.500s"`, timestamps as
//! RFC 3339 in UTC with `Z`, both with 0, 3, 6 or 9 fractional digits. Unset messages are `null`; unset `optional` fields are
//! omitted.
//!
//! Input ([`from_slice`]) accepts lowerCamelCase and snake_case names, integers as numbers or strings (`3`, `"3"`, `3.0`,
//! `"3e2"`), enum values by name or number, timestamps in any offset. `null` means unset. Unknown fields and unknown
//! enum value names are ignored. A field that is given twice, under either name, is rejected as ambiguous.

mod decode;
mod encode;

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde::Serialize;

pub use decode::DecodeError;
pub(crate) use encode::Fields;

use crate::v1;

/// The descriptors of all messages with a JSON form: the API's, and those of `google.rpc` in error details.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let mut pool = DescriptorPool::new();
    for set in [v1::FILE_DESCRIPTOR_SET, tonic_types::pb::FILE_DESCRIPTOR_SET] {
        #[allow(clippy::expect_used, reason = "both sets are built in; a test loads them")]
        pool.decode_file_descriptor_set(set).expect("built-in descriptors are valid");
    }
    pool
});

/// Why a message can't be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The message isn't part of the API.
    #[error("message {0} is not of the v1 API")]
    UnknownMessage(String),
    /// A duration or timestamp is out of JSON's range.
    #[error("message {message} has no JSON form: {reason}")]
    Value {
        /// The full name of the message.
        message: String,
        /// The problem.
        reason: String,
    },
}

/// Encodes a message of the API as one line of JSON, without a line feed.
///
/// # Errors
/// A timestamp is outside of the years 1 to 9999, a duration is outside of ±315,576,000,000 s, or `M` isn't part of the API.
pub fn to_string<M: Message + Name>(message: &M) -> Result<String, EncodeError> {
    let dynamic = reflect(message)?;
    serde_json::to_string(&Fields::of(&dynamic))
        .map_err(|error| EncodeError::Value { message: M::full_name(), reason: error.to_string() })
}

/// Encodes a message as an item of a stream: `{"result":{...}}` and a line feed.
///
/// # Errors
/// As [`to_string`].
pub fn stream_line<M: Message + Name>(message: &M) -> Result<String, EncodeError> {
    #[derive(Serialize)]
    struct Item<'a> {
        result: Fields<'a>,
    }
    let dynamic = reflect(message)?;
    let item = Item { result: Fields::of(&dynamic) };
    let mut line = serde_json::to_string(&item)
        .map_err(|error| EncodeError::Value { message: M::full_name(), reason: error.to_string() })?;
    line.push('\n');
    Ok(line)
}

/// Decodes a message of the API from JSON.
///
/// Rejects nesting deeper than 128 levels; the caller must limit the size. Accepts durations within ±315,576,000,000 s and timestamps within
/// the years 1 to 9999 without judging them.
///
/// # Errors
/// The text isn't JSON, is followed by other text, or a field is invalid. The error names the field and the position.
pub fn from_slice<M: Message + Name + Default>(json: &[u8]) -> Result<M, DecodeError> {
    let Some(descriptor) = descriptor(&M::full_name()) else {
        return Err(DecodeError::other(format!("message {} is not of the v1 API", M::full_name())));
    };
    decode::message(&descriptor, json)?.transcode_to().map_err(|error| DecodeError::other(error.to_string()))
}

pub(crate) fn descriptor(full_name: &str) -> Option<MessageDescriptor> {
    POOL.get_message_by_name(full_name)
}

fn reflect<M: Message + Name>(message: &M) -> Result<DynamicMessage, EncodeError> {
    let descriptor = descriptor(&M::full_name()).ok_or_else(|| EncodeError::UnknownMessage(M::full_name()))?;
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic
        .transcode_from(message)
        .map_err(|error| EncodeError::Value { message: M::full_name(), reason: error.to_string() })?;
    Ok(dynamic)
}

#[cfg(test)]
mod tests;
