//! The text of bearer tokens.

use std::{fmt, str::FromStr};

use secrecy::{ExposeSecret as _, SecretBox, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// The length of an id, in bytes.
const ID: usize = 6;
/// The length of a secret, in bytes.
const SECRET: usize = 32;
/// The length of a checksum, in bytes.
const CHECKSUM: usize = 4;
const PREFIX: &str = "gnt_";

/// A bearer token: `gnt_`, an id of 12 hexadecimal characters, `_`, a secret of 64 and a checksum of 8.
///
/// The prefix and the checksum let a scanner find a token that has leaked, and a mistyped or truncated one be refused without a look-up. The id is
/// not secret: logs have it.
pub struct Token {
    id: TokenId,
    secret: SecretBox<[u8; SECRET]>,
}

/// The id of a token, 12 hexadecimal characters. Not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenId([u8; ID]);

/// The SHA-256 of a secret. A secret has 256 random bits, so there is no dictionary to try: a slow hash would only make each call slower.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct SecretHash([u8; 32]);

/// Why a text is not a token. None of the texts quote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// It does not begin like a token.
    #[error("a token begins with gnt_; check that the whole token was given, and nothing else")]
    Prefix,
    /// It begins like a token, but is too short, too long or has other characters.
    #[error("a token has 89 characters, gnt_ID_SECRET; it was truncated, or something was added to it")]
    Form,
    /// Some of its characters are wrong.
    #[error("the checksum of the token is wrong: it was mistyped or truncated")]
    Checksum,
}

impl Token {
    /// How many random bytes a token is made of.
    pub const RANDOM_BYTES: usize = ID + SECRET;

    /// Makes a token of bytes from a cryptographic random number generator.
    pub fn generate(random: &[u8; Self::RANDOM_BYTES]) -> Self {
        let (mut id, mut secret) = ([0; ID], Box::new([0; SECRET]));
        for (to, from) in id.iter_mut().chain(secret.iter_mut()).zip(random) {
            *to = *from;
        }
        Self { id: TokenId(id), secret: SecretBox::new(secret) }
    }

    /// Whether a text is meant to be a token, valid or not.
    pub fn has_prefix(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// The id.
    pub fn id(&self) -> TokenId {
        self.id
    }

    /// The text to give to the holder, once.
    pub fn reveal(&self) -> SecretString {
        let body = format!("{PREFIX}{}_{}", self.id, hex::encode(self.secret.expose_secret()));
        let checksum = hex::encode(checksum(&body));
        SecretString::from(body + &checksum)
    }

    pub(crate) fn hash(&self) -> SecretHash {
        SecretHash(Sha256::digest(self.secret.expose_secret()).into())
    }
}

/// The first bytes of the SHA-256 of what comes before the checksum.
fn checksum(body: &str) -> [u8; CHECKSUM] {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(body));
    [a, b, c, d]
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let rest = text.strip_prefix(PREFIX).ok_or(InvalidToken::Prefix)?;
        let (id, rest) = rest.split_once('_').ok_or(InvalidToken::Form)?;
        let (secret, check) = rest.split_at_checked(2 * SECRET).ok_or(InvalidToken::Form)?;
        let mut bytes = Box::new([0; SECRET]);
        let mut expected = [0; CHECKSUM];
        let id: TokenId = id.parse().map_err(|_| InvalidToken::Form)?;
        if !is_lower_hex(secret) || !is_lower_hex(check) {
            return Err(InvalidToken::Form);
        }
        hex::decode_to_slice(secret, bytes.as_mut_slice()).map_err(|_| InvalidToken::Form)?;
        hex::decode_to_slice(check, &mut expected).map_err(|_| InvalidToken::Form)?;
        let body = text.get(..text.len().saturating_sub(2 * CHECKSUM)).ok_or(InvalidToken::Form)?;
        if checksum(body) != expected {
            return Err(InvalidToken::Checksum);
        }
        Ok(Self { id, secret: SecretBox::new(bytes) })
    }
}

/// Shows the id alone.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One secret has one form: upper case is refused.
fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The text is not an id of a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the id of a token has 12 hexadecimal characters in lower case; `gauntlet token list` shows the ids")]
pub struct InvalidId;

impl FromStr for TokenId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let mut id = [0; ID];
        if !is_lower_hex(text) {
            return Err(InvalidId);
        }
        hex::decode_to_slice(text, &mut id).map_err(|_| InvalidId)?;
        Ok(Self(id))
    }
}

impl TryFrom<String> for TokenId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<TokenId> for String {
    fn from(id: TokenId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl SecretHash {
    /// Compares in constant time.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl TryFrom<String> for SecretHash {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).map_err(|_| "a SHA-256 has 64 hexadecimal characters")?;
        Ok(Self(hash))
    }
}

impl From<SecretHash> for String {
    fn from(hash: SecretHash) -> Self {
        hex::encode(hash.0)
    }
}

/// The hash is not shown either: nobody needs it in a log.
impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hash]")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn token() -> String {
        Token::generate(&[7; Token::RANDOM_BYTES]).reveal().expose_secret().to_owned()
    }

    #[test]
    fn token_has_prefix_id_secret_and_checksum() {
        let text = token();
        assert_eq!(text.len(), 89);
        assert!(text.starts_with("gnt_070707070707_0707"), "{text}");
    }

    #[test]
    fn debug_shows_the_id_alone() {
        let shown = format!("{:?}", token().parse::<Token>().unwrap());
        assert_eq!(shown, "Token { id: 070707070707, .. }");
    }

    #[test]
    fn invalid_token_says_what_is_wrong() {
        let text = token();
        for (wrong, error) in [
            (String::new(), InvalidToken::Prefix),
            (text.to_uppercase(), InvalidToken::Prefix),
            (format!(" {text}"), InvalidToken::Prefix),
            (format!("{text} "), InvalidToken::Form),
            (text.get(..50).unwrap().to_owned(), InvalidToken::Form),
            (text.replacen("07_", "0é_", 1), InvalidToken::Form),
            (text.replacen("_07", "_08", 1), InvalidToken::Checksum),
        ] {
            assert_eq!(wrong.parse::<Token>().err(), Some(error), "{wrong:?}");
            assert!(!error.to_string().contains("0707"));
        }
    }

    proptest! {
        #[test]
        fn every_token_round_trips(random in proptest::array::uniform32(any::<u8>()), id in proptest::array::uniform6(any::<u8>())) {
            let bytes: Vec<u8> = id.into_iter().chain(random).collect();
            let token = Token::generate(&bytes.try_into().unwrap());
            let parsed: Token = token.reveal().expose_secret().parse().unwrap();
            prop_assert_eq!(parsed.id(), token.id());
            prop_assert!(parsed.hash().matches(&token.hash()));
        }

        #[test]
        fn no_text_panics(text in ".*", tail in ".{0,100}") {
            let _ = text.parse::<Token>();
            let _ = format!("gnt_070707070707_{tail}").parse::<Token>();
        }

        #[test]
        fn truncated_token_is_refused(length in 0..88_usize) {
            prop_assert!(token().get(..length).unwrap().parse::<Token>().is_err());
        }

        #[test]
        fn token_with_another_character_is_refused(at in 0..89_usize, character in "[0-9a-f_]") {
            let mut text = token();
            text.replace_range(at..=at, &character);
            prop_assert_eq!(text.parse::<Token>().is_ok(), text == token());
        }
    }
}
