//! Encodes messages with the contract's field presence and order. `prost-reflect` encodes the well-known types.

use std::collections::BTreeMap;

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage, Value};
use serde::ser::{Error, Serialize, SerializeMap, Serializer};

/// A message as a JSON object: an optional `@type`, then all fields.
pub(crate) struct Fields<'a> {
    type_url: Option<&'a str>,
    message: &'a DynamicMessage,
}

impl<'a> Fields<'a> {
    pub(crate) fn of(message: &'a DynamicMessage) -> Self {
        Self { type_url: None, message }
    }

    pub(crate) fn with_type(type_url: &'a str, message: &'a DynamicMessage) -> Self {
        Self { type_url: Some(type_url), message }
    }
}

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let descriptor = self.message.descriptor();
        if descriptor.package_name() == "google.protobuf" {
            return self.message.serialize(serializer);
        }
        let mut map = serializer.serialize_map(None)?;
        if let Some(type_url) = self.type_url {
            map.serialize_entry("@type", type_url)?;
        }
        for field in descriptor.fields() {
            if field.supports_presence() && !self.message.has_field(&field) {
                // protoc puts each `optional` field into a oneof of its own.
                if field.containing_oneof().is_none() {
                    map.serialize_entry(field.json_name(), &())?;
                }
                continue;
            }
            let value = self.message.get_field(&field);
            map.serialize_entry(field.json_name(), &FieldValue { value: &value, field: &field })?;
        }
        map.end()
    }
}

struct FieldValue<'a> {
    value: &'a Value,
    /// The field that contains the value; for a map's value, the value field of the map's entry.
    field: &'a FieldDescriptor,
}

impl Serialize for FieldValue<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let field = self.field;
        match (self.value, field.kind()) {
            (Value::Bool(value), _) => serializer.serialize_bool(*value),
            (Value::I32(value), _) => serializer.serialize_i32(*value),
            (Value::U32(value), _) => serializer.serialize_u32(*value),
            (Value::I64(value), _) => serializer.collect_str(value),
            (Value::U64(value), _) => serializer.collect_str(value),
            (Value::String(value), _) => serializer.serialize_str(value),
            (Value::EnumNumber(number), Kind::Enum(kind)) => match kind.get_value(*number) {
                Some(value) => serializer.serialize_str(value.name()),
                None => serializer.serialize_i32(*number),
            },
            (Value::Message(message), _) => Fields::of(message).serialize(serializer),
            (Value::List(values), _) => serializer.collect_seq(values.iter().map(|value| FieldValue { value, field })),
            (Value::Map(values), Kind::Message(entry)) => {
                let field = &entry.map_entry_value_field();
                let ordered: BTreeMap<&str, &Value> = values
                    .iter()
                    .filter_map(|(key, value)| match key {
                        MapKey::String(key) => Some((key.as_str(), value)),
                        _ => None,
                    })
                    .collect();
                serializer.collect_map(ordered.into_iter().map(|(key, value)| (key, FieldValue { value, field })))
            }
            // A test makes sure that the contract uses only the kinds above.
            (_, kind) => {
                Err(Error::custom(format_args!("{} is a {kind:?}, which the v1 API has none of", field.full_name())))
            }
        }
    }
}
