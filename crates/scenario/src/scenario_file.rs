//! Reads the `scenario.yaml` of a directory.

use std::{io::Read as _, path::Path};

use crate::{
    document::Document,
    yaml::{self, Problem},
};

/// Why a `scenario.yaml` can't be used.
pub(crate) enum Unread {
    /// The document is invalid or missing.
    Invalid(Vec<Problem>),
    /// The file can't be read.
    Io(std::io::Error),
}

/// Reads and checks the `scenario.yaml` of a directory. Blocks on the file system.
pub(crate) fn read_document(dir: &Path) -> Result<Document, Unread> {
    let file = match std::fs::File::open(dir.join("scenario.yaml")) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(invalid(other_kind(dir))),
        Err(error) => return Err(Unread::Io(error)),
    };
    let mut bytes = Vec::new();
    file.take(yaml::MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(Unread::Io)?;
    let text = String::from_utf8(bytes).map_err(|_| invalid("scenario.yaml is not UTF-8"))?;
    Document::parse(&text).map_err(Unread::Invalid)
}

fn invalid(text: &str) -> Unread {
    Unread::Invalid(vec![Problem { line: None, field: String::new(), text: text.to_owned() }])
}

fn other_kind(dir: &Path) -> &'static str {
    let has = |name: &str| dir.join(name).exists();
    if has("Pulumi.yaml") || has("Pulumi.yml") {
        "is a Pulumi scenario (Pulumi.yaml); this release runs scenarios with a scenario.yaml, Pulumi scenarios come with a later one"
    } else if has("scenario.yml") {
        "has scenario.yml; rename it to scenario.yaml"
    } else {
        "has neither scenario.yaml nor Pulumi.yaml at its top"
    }
}
