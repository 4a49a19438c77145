//! proto3 JSON, in the forms the v1 REST API has always had.
//!
//! Output has every field ([`to_string`]): lowerCamelCase names in the order of the field numbers, maps in key order, 64-bit
//! integers as strings, enum values by name (an unknown one by number), durations as `"600s"` or `"1.500s"`, timestamps as
//! RFC 3339 in UTC with `Z`, both with 0, 3, 6 or 9 fractional digits. An unset message is `null`, an unset `optional` field is
//! left out.
//!
//! Input ([`from_slice`]) takes both lowerCamelCase and snake_case names, integers as numbers or strings (`3`, `"3"`, `3.0`,
//! `"3e2"`), enum values by name or number, timestamps in any offset. `null` is unset. Unknown fields and unknown names of enum
//! values are ignored. A field given twice, by either name, is refused: which one is meant cannot be known.

mod decode;
mod encode;

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde::Serialize;

pub use decode::DecodeError;
pub(crate) use encode::Fields;

use crate::v1;

/// Every message that has a JSON form: those of the API, and those of `google.rpc` that errors carry.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let mut pool = DescriptorPool::new();
    for set in [v1::FILE_DESCRIPTOR_SET, tonic_types::pb::FILE_DESCRIPTOR_SET] {
        #[allow(clippy::expect_used, reason = "both sets are built in; a test loads them")]
        pool.decode_file_descriptor_set(set).expect("built-in descriptors are valid");
    }
    pool
});

/// Why a message has no JSON form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The message is not one of the API.
    #[error("message {0} is not of the v1 API")]
    UnknownMessage(String),
    /// A value JSON cannot carry: a duration or a timestamp out of range.
    #[error("message {message} has no JSON form: {reason}")]
    Value {
        /// Full name of the message.
        message: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A message of the API as one line of JSON, without line end.
///
/// # Errors
/// When a timestamp is out of the years 1 to 9999 or a duration out of ±315,576,000,000 s, or when `M` is not of the API.
pub fn to_string<M: Message + Name>(message: &M) -> Result<String, EncodeError> {
    let dynamic = reflect(message)?;
    serde_json::to_string(&Fields::of(&dynamic))
        .map_err(|error| EncodeError::Value { message: M::full_name(), reason: error.to_string() })
}

/// A message as an item of a stream: `{"result":{...}}` and a line end.
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

/// Reads a message of the API from JSON.
///
/// Bounds: nesting deeper than 128 levels is refused; the caller bounds the size. Durations within ±315,576,000,000 s and
/// timestamps within the years 1 to 9999 are taken as they are; whether they make sense is not decided here.
///
/// # Errors
/// When the text is not JSON, is followed by something else, or a field does not fit. The error names field and position.
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
