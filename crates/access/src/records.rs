//! Files with one JSON object per line.

use serde::de::DeserializeOwned;

/// What is wrong with a file, and where. The caller adds the file's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct FileError {
    /// The line, from 1.
    pub line: usize,
    /// The field, what is wrong with it, and the fix.
    pub problem: String,
}

/// Returns the lines that have a record, with their numbers from 1.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    numbered.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// Parses the record of one line. The error doesn't quote the line, which could hold a secret by mistake.
pub(crate) fn parse<R: DeserializeOwned>(line: usize, text: &str) -> Result<R, FileError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { format!("{path}: ") };
        (field, error.into_inner())
    });
    let parsed = parsed.and_then(|record| json.end().map(|()| record).map_err(|error| (String::new(), error)));
    parsed.map_err(|(field, error)| {
        let column = error.column();
        // serde_json adds its own position, whose line is always 1.
        let text = error.to_string();
        let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
        FileError { line, problem: format!("{field}{problem} (column {column}); each line is one JSON object") }
    })
}
