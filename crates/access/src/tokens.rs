//! The token file: a record for each token, without its secret.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::Arc,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    Challenges, FileError, Kind, Name, Principal, Scope, Token, TokenId,
    records::{lines, parse},
    token::SecretHash,
};

/// One line of the token file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// The id of the token.
    pub id: TokenId,
    /// Who holds it.
    pub name: Name,
    /// What its holder may do.
    pub scope: Scope,
    /// The only challenges that its holder sees and changes. `None`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenges: Option<BTreeSet<Name>>,
    /// When it was created. For people: nothing depends on it.
    pub created: Timestamp,
    /// From when on it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    sha256: SecretHash,
}

impl TokenRecord {
    /// The record of a new token, for every challenge and without an end.
    pub fn new(token: &Token, name: Name, scope: Scope, created: Timestamp) -> Self {
        Self { id: token.id(), name, scope, challenges: None, created, expires: None, sha256: token.hash() }
    }
}

/// Why a token was refused. The caller of the API learns whether it has expired, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No token has this id: it was revoked, or is another manager's.
    #[error("the token {0} is not in the token file")]
    Unknown(TokenId),
    /// The id is that of a token, and the secret is not.
    #[error("the secret of the token {0} is wrong")]
    WrongSecret(TokenId),
    /// The token was right until it expired.
    #[error("the token {0} has expired")]
    Expired(TokenId),
}

/// The tokens of a file. A look-up takes the same time for any number of tokens.
#[derive(Debug, Default)]
pub struct TokenFile {
    records: Vec<TokenRecord>,
    by_id: HashMap<TokenId, Accepted>,
}

#[derive(Debug)]
struct Accepted {
    hash: SecretHash,
    expires: Option<Timestamp>,
    principal: Arc<Principal>,
}

impl TokenFile {
    /// Parses a file.
    ///
    /// # Errors
    /// A line is not a record, or has the id of an earlier one.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let mut file = Self::default();
        for (line, text) in lines(text) {
            let record: TokenRecord = parse(line, text)?;
            if record.challenges.as_ref().is_some_and(BTreeSet::is_empty) {
                return Err(FileError { line, problem: EMPTY_CHALLENGES.to_owned() });
            }
            let Entry::Vacant(vacant) = file.by_id.entry(record.id) else {
                let problem = format!("id: {} is on an earlier line; remove one of the two", record.id);
                return Err(FileError { line, problem });
            };
            vacant.insert(Accepted {
                hash: record.sha256,
                expires: record.expires,
                principal: Arc::new(Principal {
                    name: record.name.clone(),
                    kind: Kind::Token(record.id),
                    scope: record.scope,
                    challenges: Challenges::from(record.challenges.clone()),
                }),
            });
            file.records.push(record);
        }
        Ok(file)
    }

    /// The records, in the order of the file.
    pub fn records(&self) -> &[TokenRecord] {
        &self.records
    }

    /// Returns the holder of a token. Compares secrets in constant time.
    ///
    /// # Errors
    /// The token is unknown, its secret is wrong, or it has expired at `now`.
    pub fn authenticate(&self, token: &Token, now: Timestamp) -> Result<Arc<Principal>, Rejection> {
        let id = token.id();
        let accepted = self.by_id.get(&id).ok_or(Rejection::Unknown(id))?;
        if !accepted.hash.matches(&token.hash()) {
            return Err(Rejection::WrongSecret(id));
        }
        if accepted.expires.is_some_and(|expires| expires <= now) {
            return Err(Rejection::Expired(id));
        }
        Ok(accepted.principal.clone())
    }
}

/// An empty list would be a principal that may do nothing: more likely it is a mistake for one that may do everything.
pub(crate) const EMPTY_CHALLENGES: &str = "challenges: the list is empty; name a challenge, or leave it out for all";

/// Returns the text of a token file with one more record. Keeps all other lines as they are.
pub fn append_record(text: &str, record: &TokenRecord) -> Result<String, serde_json::Error> {
    let line = serde_json::to_string(record)?;
    let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    Ok(format!("{text}{separator}{line}\n"))
}

/// Returns the text of a token file without the record with this id, and `None` if there is none. Keeps all other lines as they are, also those
/// that are not records.
pub fn remove_record(text: &str, id: TokenId) -> Option<String> {
    let is_record = |line: &str| parse::<TokenRecord>(1, line.trim()).is_ok_and(|record| record.id == id);
    let kept: String = text.split_inclusive('\n').filter(|line| !is_record(line)).collect();
    (kept.len() < text.len()).then_some(kept)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use jiff::ToSpan as _;
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn token(byte: u8) -> Token {
        Token::generate(&[byte; Token::RANDOM_BYTES])
    }

    fn record(byte: u8) -> TokenRecord {
        TokenRecord::new(&token(byte), Name::new(format!("holder {byte}")).unwrap(), Scope::Operate, NOW)
    }

    fn file(records: &[TokenRecord]) -> String {
        records.iter().fold("# tokens\n\n".to_owned(), |text, record| append_record(&text, record).unwrap())
    }

    #[test]
    fn holder_of_a_token_is_found() {
        let bound = Some(BTreeSet::from([Name::new("web").unwrap()]));
        let tokens = TokenFile::parse(&file(&[record(1), TokenRecord { challenges: bound, ..record(2) }])).unwrap();
        let principal = tokens.authenticate(&token(2), NOW).unwrap();
        assert_eq!(
            (principal.name.as_str(), principal.kind, principal.scope),
            ("holder 2", Kind::Token(token(2).id()), Scope::Operate)
        );
        assert!(principal.challenges.contain("web") && !principal.challenges.contain("other"));
        assert!(tokens.authenticate(&token(1), NOW).unwrap().challenges.contain("other"));
    }

    #[test]
    fn unknown_wrong_and_expired_tokens_are_refused() {
        let expires = Some(NOW + 1.second());
        let tokens = TokenFile::parse(&file(&[TokenRecord { expires, ..record(1) }])).unwrap();
        assert_eq!(tokens.authenticate(&token(2), NOW), Err(Rejection::Unknown(token(2).id())));
        let mut random = [1; Token::RANDOM_BYTES];
        random[Token::RANDOM_BYTES - 1] = 2;
        assert_eq!(tokens.authenticate(&Token::generate(&random), NOW), Err(Rejection::WrongSecret(token(1).id())));
        assert!(tokens.authenticate(&token(1), NOW).is_ok());
        assert_eq!(tokens.authenticate(&token(1), NOW + 1.second()), Err(Rejection::Expired(token(1).id())));
    }

    #[test]
    fn wrong_line_is_reported_with_field_and_fix() {
        let good = file(&[record(1)]);
        let line = good.lines().last().unwrap();
        for (wrong, part) in [
            (line.replace("operate", "root"), r#"scope: unknown scope "root": use read, operate or admin"#),
            (line.replace("holder 1", ""), "name: a name has 1 to 256 bytes"),
            (line.replace("\"name\"", "\"nam\""), "nam: unknown field `nam`, expected one of"),
            (line.replace("\"name\":\"holder 1\",", ""), "missing field `name`"),
            (line.replace("1970-01-01T00:00:00Z", "yesterday"), "created: "),
            (line.replace("010101010101\"", "01\""), "id: the id of a token has 12 hexadecimal characters"),
            (line.replace("\"scope\"", "\"challenges\":[],\"scope\""), "challenges: the list is empty"),
            (line.replace("\"scope\"", "\"challenges\":[\"\"],\"scope\""), "challenges[0]: a name has"),
            (line.to_owned(), "id: 010101010101 is on an earlier line"),
            (format!("{line} {line}"), "trailing characters"),
            ("gnt_0101".to_owned(), "each line is one JSON object"),
        ] {
            let error = TokenFile::parse(&format!("{good}{wrong}\n")).unwrap_err();
            let text = error.to_string();
            assert!(error.line == 4 && text.starts_with("line 4: ") && text.contains(part), "{wrong}: {text}");
            assert!(!text.contains("gnt_") && !text.contains(&"0".repeat(20)), "{text}");
        }
    }

    #[test]
    fn other_lines_survive_an_edit() {
        let text = "# kept\r\n\nnot a record";
        let added = append_record(text, &record(1)).unwrap();
        assert!(added.starts_with("# kept\r\n\nnot a record\n{\"id\":\"010101010101\""), "{added}");
        assert_eq!(remove_record(&added, token(1).id()).unwrap(), "# kept\r\n\nnot a record\n");
        assert_eq!(remove_record(&added, token(2).id()), None);
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "(.|\n)*", line in "\\{\"id\":.{0,200}\\}") {
            let _ = TokenFile::parse(&text);
            let _ = TokenFile::parse(&line);
        }

        #[test]
        fn any_record_round_trips(byte: u8, name in "\\PC{1,60}", challenges in proptest::option::of(proptest::collection::btree_set("\\PC{1,60}", 1..5)), second in proptest::option::of(0..253_000_000_000_i64)) {
            let challenges = challenges.map(|ids| ids.into_iter().map(|id| Name::new(id).unwrap()).collect());
            let expires = second.map(|second| Timestamp::from_second(second).unwrap());
            let record = TokenRecord { name: Name::new(name).unwrap(), challenges, expires, ..record(byte) };
            let parsed = TokenFile::parse(&append_record("", &record).unwrap()).unwrap();
            prop_assert_eq!(parsed.records(), &[record]);
        }
    }
}
