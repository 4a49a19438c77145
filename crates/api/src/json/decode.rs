//! Decodes messages along their descriptor, so that every error names its field. `prost-reflect` decodes the well-known types.

use std::{collections::HashMap, fmt};

use prost_reflect::{DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};
use serde::de::{
    self, DeserializeSeed, Deserializer, Error, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};

/// The length limit of a text quoted in an error, in characters.
const MAX_QUOTED_CHARS: usize = 64;

/// Why a JSON text can't be decoded: the problem, its field and its position.
///
/// It may quote invalid numbers, durations, timestamps, masks and enum names, but never the value of a string field, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeError {
    field: Option<String>,
    position: Option<(usize, usize)>,
    reason: String,
}

impl DecodeError {
    pub(super) fn other(reason: String) -> Self {
        Self { field: None, position: None, reason }
    }

    /// The path of the field, such as `additional.key`; `None` if the text isn't JSON.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        self.field.as_deref()
    }

    /// The line, from 1, and the column of the last byte read, 0 before the first.
    #[must_use]
    pub fn position(&self) -> Option<(usize, usize)> {
        self.position
    }

    fn new(path: &serde_path_to_error::Path, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let suffix = format!(" at line {} column {}", error.line(), error.column());
        Self {
            field: (error.is_data() && path.iter().len() > 0).then(|| cut(&path.to_string())),
            position: (error.line() > 0).then(|| (error.line(), error.column())),
            reason: text.strip_suffix(&suffix).unwrap_or(&text).to_owned(),
        }
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Some(field) => write!(f, "Field {field:?}")?,
            None => write!(f, "Malformed JSON")?,
        }
        if let Some((line, column)) = self.position {
            write!(f, " (line {line}, column {column})")?;
        }
        write!(f, ": {}.", self.reason)
    }
}

impl std::error::Error for DecodeError {}

pub(super) fn message(descriptor: &MessageDescriptor, json: &[u8]) -> Result<DynamicMessage, DecodeError> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut reader, &mut track);
    let message = match MessageSeed(descriptor).deserialize(tracked) {
        Ok(message) => message,
        Err(error) => return Err(DecodeError::new(&track.path(), &error)),
    };
    match reader.end() {
        Ok(()) => Ok(message),
        Err(error) => Err(DecodeError::new(&track.path(), &error)),
    }
}

struct MessageSeed<'a>(&'a MessageDescriptor);

impl<'de> DeserializeSeed<'de> for MessageSeed<'_> {
    type Value = DynamicMessage;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0.package_name() == "google.protobuf" {
            deserializer.deserialize_any(WellKnownVisitor(self.0))
        } else {
            deserializer.deserialize_map(self)
        }
    }
}

impl<'de> Visitor<'de> for MessageSeed<'_> {
    type Value = DynamicMessage;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut message = DynamicMessage::new(self.0.clone());
        let mut seen = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let field = self.0.get_field_by_json_name(&name).or_else(|| self.0.get_field_by_name(&name));
            let Some(field) = field else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if seen.contains(&field.number()) {
                return map.next_value_seed(Rejected(format!("given twice; give {} once", field.json_name())));
            }
            seen.push(field.number());
            if let Some(value) = map.next_value_seed(OptionSeed(&field))? {
                message.set_field(&field, value);
            }
        }
        Ok(message)
    }
}

/// Fails in place of reading a value, so that the error has the field's path and position.
struct Rejected(String);

impl<'de> DeserializeSeed<'de> for Rejected {
    type Value = DynamicMessage;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_ignored_any(IgnoredAny)?;
        Err(D::Error::custom(self.0))
    }
}

/// A field's value, `None` for `null`.
struct OptionSeed<'a>(&'a FieldDescriptor);

impl<'de> DeserializeSeed<'de> for OptionSeed<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for OptionSeed<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or null")
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0.is_list() {
            deserializer.deserialize_any(ListVisitor(self.0)).map(Some)
        } else if self.0.is_map() {
            deserializer.deserialize_any(MapVisitor(self.0)).map(Some)
        } else {
            ValueSeed(self.0).deserialize(deserializer)
        }
    }
}

/// A value of a field's kind; `None` for an unknown enum value name.
struct ValueSeed<'a>(&'a FieldDescriptor);

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.0.kind() {
            Kind::String => de::Deserialize::deserialize(deserializer).map(|text| Some(Value::String(text))),
            Kind::Int64 => deserializer.deserialize_any(IntegerVisitor).map(|number| Some(Value::I64(number))),
            Kind::Enum(descriptor) => deserializer.deserialize_any(EnumVisitor(&descriptor)),
            Kind::Message(descriptor) => {
                MessageSeed(&descriptor).deserialize(deserializer).map(|message| Some(Value::Message(message)))
            }
            // A test makes sure that the contract uses only the kinds above.
            kind => Err(D::Error::custom(format_args!(
                "{} is a {kind:?}, which the v1 API has none of",
                self.0.full_name()
            ))),
        }
    }
}

struct ListVisitor<'a>(&'a FieldDescriptor);

impl<'de> Visitor<'de> for ListVisitor<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(ValueSeed(self.0))? {
            values.extend(value);
        }
        Ok(Value::List(values))
    }
}

struct MapVisitor<'a>(&'a FieldDescriptor);

impl<'de> Visitor<'de> for MapVisitor<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = HashMap::new();
        let Kind::Message(entry) = self.0.kind() else {
            return Err(A::Error::custom("not a map"));
        };
        let value_field = entry.map_entry_value_field();
        while let Some(key) = map.next_key::<String>()? {
            let Some(value) = map.next_value_seed(ValueSeed(&value_field))? else {
                continue;
            };
            if values.insert(MapKey::String(key), value).is_some() {
                return Err(A::Error::custom("a key is given twice; give it once"));
            }
        }
        Ok(Value::Map(values))
    }
}

struct IntegerVisitor;

impl Visitor<'_> for IntegerVisitor {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number of 64 bits, plain or as a string")
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<i64, E> {
        Ok(number)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<i64, E> {
        i64::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<i64, E> {
        // Beyond 2^53, a double may have been rounded from another integer.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if number.fract() == 0.0 && number.abs() <= EXACT {
            #[allow(clippy::cast_possible_truncation, reason = "whole and in range, as just checked")]
            return Ok(number as i64);
        }
        Err(E::invalid_value(de::Unexpected::Float(number), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<i64, E> {
        let invalid = || E::invalid_value(de::Unexpected::Str(&cut(text)), &self);
        if text.trim() != text {
            return Err(invalid());
        }
        let number: serde_json::Number = text.parse().map_err(|_| invalid())?;
        match (number.as_i64(), number.is_f64(), number.as_f64()) {
            (Some(number), ..) => Ok(number),
            (None, true, Some(number)) => IntegerVisitor.visit_f64(number).map_err(|_: E| invalid()),
            _ => Err(invalid()),
        }
    }
}

struct EnumVisitor<'a>(&'a EnumDescriptor);

impl Visitor<'_> for EnumVisitor<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name or the number of one of")?;
        for (index, value) in self.0.values().enumerate() {
            write!(f, "{} {}", if index > 0 { "," } else { "" }, value.name())?;
        }
        Ok(())
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.get_value_by_name(name).map(|value| Value::EnumNumber(value.number())))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        i32::try_from(number)
            .map(|number| Some(Value::EnumNumber(number)))
            .map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
        i32::try_from(number)
            .map(|number| Some(Value::EnumNumber(number)))
            .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }
}

/// A duration, timestamp or field mask: the library parses the string, and this visitor words the error.
struct WellKnownVisitor<'a>(&'a MessageDescriptor);

impl Visitor<'_> for WellKnownVisitor<'_> {
    type Value = DynamicMessage;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.name() {
            "Duration" => {
                "a duration: seconds with up to 9 decimals and an \"s\", as in \"600s\" or \"1.5s\", within 315576000000s"
            }
            "Timestamp" => {
                "a time in RFC 3339 within the years 1 to 9999, with up to 9 decimals, as in \"2026-01-31T18:00:00Z\""
            }
            "FieldMask" => {
                "field names in lowerCamelCase separated by commas, as in \"scenario,additional\""
            }
            other => other,
        })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        // The library ignores digits beyond nanoseconds.
        let decimals =
            text.split_once('.').map_or(0, |(_, after)| after.bytes().take_while(u8::is_ascii_digit).count());
        if decimals > 9 {
            return Err(E::invalid_value(de::Unexpected::Str(&cut(text)), &self));
        }
        let deserializer: de::value::StrDeserializer<'_, de::value::Error> = text.into_deserializer();
        DynamicMessage::deserialize(self.0.clone(), deserializer)
            .map_err(|_| E::invalid_value(de::Unexpected::Str(&cut(text)), &self))
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
