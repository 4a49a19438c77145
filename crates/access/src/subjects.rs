//! The subject file: what the holders of client certificates may do.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    Challenges, FileError, Kind, Name, Principal, Scope,
    records::{lines, parse},
    tokens::EMPTY_CHALLENGES,
};

/// The kinds of names that a rule may have.
const KINDS: [&str; 4] = ["CN:", "DNS:", "URI:", "EMAIL:"];

/// One line of the subject file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    subject: String,
    name: Name,
    scope: Scope,
    #[serde(default)]
    challenges: Option<BTreeSet<Name>>,
}

/// The rules of a file. A look-up takes the same time for any number of rules.
#[derive(Debug, Default)]
pub struct SubjectFile(HashMap<String, (usize, Arc<Principal>)>);

impl SubjectFile {
    /// Parses a file. A rule has a `subject`, `name`, `scope` and optionally `challenges`. The subject is a name of the certificate with its kind in
    /// front: `CN:ctfd`, `DNS:ctfd.example`, `URI:spiffe://ctf/ctfd` or `EMAIL:ops@example`. It is compared as a whole, byte by byte.
    ///
    /// # Errors
    /// A line is not a rule, or has the subject of an earlier one.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let mut rules = HashMap::new();
        for (line, text) in lines(text) {
            let Rule { subject, name, scope, challenges } = parse(line, text)?;
            let wrong = |problem: String| Err(FileError { line, problem });
            if challenges.as_ref().is_some_and(BTreeSet::is_empty) {
                return wrong(EMPTY_CHALLENGES.to_owned());
            }
            if !KINDS.iter().any(|kind| subject.len() > kind.len() && subject.starts_with(kind)) {
                return wrong(format!("subject: expected CN:, DNS:, URI: or EMAIL: and a name; got {subject:?}"));
            }
            let Entry::Vacant(vacant) = rules.entry(subject) else {
                return wrong("subject: it is on an earlier line; remove one of the two".to_owned());
            };
            let challenges = Challenges::from(challenges);
            vacant.insert((line, Arc::new(Principal { name, kind: Kind::Certificate, scope, challenges })));
        }
        Ok(Self(rules))
    }

    /// Returns the holder of a certificate with these names, each with its kind in front. Of several rules that apply, the first in the file counts.
    pub fn find<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Option<Arc<Principal>> {
        let rules = names.into_iter().filter_map(|name| self.0.get(name));
        rules.min_by_key(|(line, _)| line).map(|(_, principal)| principal.clone())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const FILE: &str = r#"
# the platform
{"subject":"URI:spiffe://ctf/ctfd","name":"ctfd","scope":"operate","challenges":["web"]}
{"subject":"CN:admin","name":"admin","scope":"admin"}
"#;

    #[test]
    fn holder_of_a_certificate_is_found_by_a_whole_name() {
        let rules = SubjectFile::parse(FILE).unwrap();
        let found = |names: &[&str]| rules.find(names.iter().copied()).map(|found| found.name.as_str().to_owned());
        assert_eq!(found(&["CN:x", "URI:spiffe://ctf/ctfd"]).as_deref(), Some("ctfd"));
        assert_eq!(found(&["CN:admin", "URI:spiffe://ctf/ctfd"]).as_deref(), Some("ctfd"));
        assert_eq!(found(&["CN:admin"]).as_deref(), Some("admin"));
        for other in ["DNS:admin", "CN:Admin", "CN:admin2", "admin", "URI:spiffe://ctf/ctfd/"] {
            assert_eq!(found(&[other]), None, "{other}");
        }
    }

    #[test]
    fn wrong_rule_is_reported_with_line_field_and_fix() {
        for (wrong, part) in [
            (r#"{"subject":"admin","name":"a","scope":"read"}"#, "subject: expected CN:, DNS:, URI: or EMAIL:"),
            (r#"{"subject":"CN:","name":"a","scope":"read"}"#, "subject: expected"),
            (r#"{"subject":"CN:admin","name":"a","scope":"read"}"#, "subject: it is on an earlier line"),
            (r#"{"subject":"CN:a","name":"a","scope":"all"}"#, "scope: unknown scope"),
            (r#"{"subject":"CN:a","name":"a","scope":"read","challenges":[]}"#, "challenges: the list is empty"),
            (r#"{"subject":"CN:a","name":"a"}"#, "missing field `scope`"),
        ] {
            let error = SubjectFile::parse(&format!("{FILE}{wrong}")).unwrap_err();
            assert!(error.line == 5 && error.problem.contains(part), "{wrong}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_file_panics(text in "(.|\n)*") {
            let _ = SubjectFile::parse(&text);
        }
    }
}
