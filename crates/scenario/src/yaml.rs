//! Parses YAML into a tree with line numbers, and collects problems while the tree is read.

use std::{collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// The largest document, in bytes.
pub(crate) const MAX_BYTES: usize = 64 * 1024;

/// A problem in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line in `scenario.yaml`, from 1; `None` if it concerns no line.
    pub line: Option<u64>,
    /// The field, such as `process.command`; empty for the whole document.
    pub field: String,
    /// What is wrong and how to fix it.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.text)
    }
}

/// A value and its line.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) line: u64,
    pub(crate) value: Value,
}

#[derive(Debug)]
pub(crate) enum Value {
    Null,
    Bool,
    Int(i128),
    Float,
    Text(String),
    List(Vec<Node>),
    Map(Vec<(u64, String, Node)>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool => "true or false",
            Self::Int(_) | Self::Float => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// Parses a document within limits on size, depth, nodes and aliases. Rejects merge keys and unknown tags.
pub(crate) fn parse(text: &str) -> Result<Node, Problem> {
    let whole = |text: String| Problem { line: None, field: String::new(), text };
    if text.len() > MAX_BYTES {
        return Err(whole(format!("holds {} bytes; at most {MAX_BYTES} are read", text.len())));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 16,
            max_nodes: 8192,
            max_events: 32_768,
            max_aliases: 64,
            max_anchors: 64,
            max_documents: 1,
            flow_nesting_limit: 16,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 8192, max_replay_stack_depth: 8 },
        // Reported by `Problems::map`, with the other problems.
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options::<Spanned<Value>>(text, options).map(Node::from).map_err(|error| {
        let line = error.location().map(|at| at.line()).filter(|line| *line > 0);
        // The library appends the position, which `Problem` shows already.
        let text = error.to_string();
        let text = text.split_once(" at line ").map_or(text.as_str(), |(text, _)| text);
        Problem { line, field: String::new(), text: format!("not valid YAML: {text}") }
    })
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        Self { line: spanned.referenced.line(), value: spanned.value }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any YAML value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
                Ok(Value::Bool)
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
                Ok(Value::Int(value))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Float)
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<Value, E> {
                Ok(Value::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut nodes = Vec::new();
                while let Some(node) = list.next_element::<Spanned<Value>>()? {
                    nodes.push(node.into());
                }
                Ok(Value::List(nodes))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    entries.push((key.referenced.line(), key.value, map.next_value::<Spanned<Value>>()?.into()));
                }
                Ok(Value::Map(entries))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// The problems found while a document is read.
#[derive(Debug, Default)]
pub(crate) struct Problems(pub(crate) Vec<Problem>);

impl Problems {
    pub(crate) fn at(&mut self, line: u64, field: &str, text: impl Into<String>) {
        self.0.push(Problem { line: Some(line), field: field.to_owned(), text: text.into() });
    }

    fn expected(&mut self, node: &Node, field: &str, what: &str) {
        self.at(node.line, field, format!("must be {what}, not {}", node.value.kind()));
    }

    pub(crate) fn text(&mut self, node: Node, field: &str) -> Option<(u64, String)> {
        match node.value {
            Value::Text(text) => Some((node.line, text)),
            Value::Int(number) => Some((node.line, number.to_string())),
            Value::Bool | Value::Float => {
                self.at(node.line, field, format!("reads as {}; write it in quotes", node.value.kind()));
                None
            }
            _ => {
                self.expected(&node, field, "text");
                None
            }
        }
    }

    pub(crate) fn integer(&mut self, node: Node, field: &str, min: i128, max: i128) -> Option<i128> {
        match node.value {
            Value::Int(number) if (min..=max).contains(&number) => Some(number),
            Value::Int(number) => {
                let range = if min == max { min.to_string() } else { format!("{min} to {max}") };
                self.at(node.line, field, format!("must be {range}, not {number}"));
                None
            }
            _ => {
                self.expected(&node, field, "a whole number");
                None
            }
        }
    }

    pub(crate) fn list(&mut self, node: Node, field: &str) -> Option<(u64, Vec<Node>)> {
        match node.value {
            Value::List(nodes) => Some((node.line, nodes)),
            _ => {
                self.expected(&node, field, "a list");
                None
            }
        }
    }

    /// Reads a mapping with keys chosen by the author. Reports duplicate keys.
    pub(crate) fn map(&mut self, node: Node, field: &str) -> Option<Vec<(u64, String, Node)>> {
        match node.value {
            Value::Map(mut entries) => {
                let mut seen = BTreeSet::new();
                entries.retain(|(line, name, _)| {
                    let first = seen.insert(name.clone());
                    if !first {
                        self.at(*line, &join(field, name), "is given twice; remove one");
                    }
                    first
                });
                Some(entries)
            }
            // `flags:` with nothing after it.
            Value::Null => Some(Vec::new()),
            _ => {
                self.expected(&node, field, "a mapping");
                None
            }
        }
    }

    /// Reads a mapping with `known` keys and returns their values in that order. Reports unknown keys, with the most similar known one.
    pub(crate) fn fields<const N: usize>(
        &mut self,
        node: Node,
        field: &str,
        known: [&str; N],
    ) -> Option<[Option<Node>; N]> {
        let entries = self.map(node, field)?;
        let mut found = [const { None }; N];
        for (line, name, node) in entries {
            match found.iter_mut().zip(known).find(|(_, known)| *known == name) {
                Some((slot, _)) => *slot = Some(node),
                None => {
                    let near = nearest(&name, &known);
                    let fix = match near {
                        Some(near) => format!("did you mean {near}?"),
                        None => format!("known here: {}", known.join(", ")),
                    };
                    self.at(line, &join(field, &name), format!("unknown field; {fix}"));
                    // Read as the intended field, so that one typo is one problem.
                    if let Some((slot, _)) = found.iter_mut().zip(known).find(|(_, known)| near == Some(known)) {
                        slot.get_or_insert(node);
                    }
                }
            }
        }
        Some(found)
    }
}

/// The path of a nested field.
pub(crate) fn join(field: &str, name: &str) -> String {
    if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") }
}

/// Returns the most similar of `known`, if one is similar.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let far = (name.chars().count() / 2).clamp(1, 3);
    known
        .iter()
        .map(|known| (strsim::levenshtein(name, known), *known))
        .min()
        .filter(|(d, _)| *d <= far)
        .map(|(_, known)| known)
}
