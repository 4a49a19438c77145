//! Copies of deployed files with some texts replaced, for components that read no environment variables (Prometheus, Alertmanager). The
//! deployed files stay the source of truth: a text that they no longer contain is an error.

use std::path::Path;

use crate::{Error, Result, read, write};

/// Copies `from` to `to`, replacing every occurrence of each text.
///
/// # Errors
/// [`Error::Drift`] if the file doesn't contain one of the texts.
pub(crate) fn render(from: &Path, to: &Path, replacements: &[(&str, String)]) -> Result<()> {
    let mut text = read(from)?;
    for (old, new) in replacements {
        if !text.contains(old) {
            return Err(Error::Drift { file: from.to_path_buf(), text: (*old).to_owned() });
        }
        text = text.replace(old, new);
    }
    write(to, &text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn replaces_every_occurrence_and_reports_a_missing_text() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "a: x:1\nb: x:1\n").unwrap();
        render(&from, &to, &[("x:1", "127.0.0.1:7".into())]).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "a: 127.0.0.1:7\nb: 127.0.0.1:7\n");
        let error = render(&from, &to, &[("y:1", String::new())]).unwrap_err().to_string();
        assert!(error.contains("does not contain \"y:1\""), "{error}");
    }
}
