//! Callers whose credentials have been checked.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::{Scope, TokenId};

/// A caller, and what it may do. Has no secret: it may be logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The name in the token file, the subject file or the JWT.
    pub name: Name,
    /// How the caller was authenticated.
    pub kind: Kind,
    /// What the caller may do.
    pub scope: Scope,
    /// With which challenges.
    pub challenges: Challenges,
}

impl Principal {
    /// A caller without credentials, on a listener that gives such callers `scope`.
    pub fn anonymous(scope: Scope) -> Self {
        Self { name: Name("anonymous".to_owned()), kind: Kind::Anonymous, scope, challenges: Challenges::All }
    }
}

/// How a caller was authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not at all: the listener lets callers in without credentials.
    Anonymous,
    /// By a bearer token of the token file.
    Token(TokenId),
    /// By a client certificate.
    Certificate,
    /// By a JWT of the OpenID Connect issuer.
    Jwt,
}

impl Kind {
    /// The id of the token, if it was one.
    pub const fn token_id(self) -> Option<TokenId> {
        match self {
            Self::Token(id) => Some(id),
            Self::Anonymous | Self::Certificate | Self::Jwt => None,
        }
    }

    /// The name of the kind in logs and spans.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Token(_) => "token",
            Self::Certificate => "certificate",
            Self::Jwt => "jwt",
        }
    }
}

/// The challenges that a principal sees and changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Challenges {
    /// Every challenge.
    #[default]
    All,
    /// Those with these ids, whether they exist or not.
    Only(BTreeSet<String>),
}

impl Challenges {
    /// Whether the principal sees and changes the challenge with this id.
    pub fn contain(&self, id: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(ids) => ids.contains(id),
        }
    }
}

impl From<Option<BTreeSet<Name>>> for Challenges {
    fn from(ids: Option<BTreeSet<Name>>) -> Self {
        ids.map_or(Self::All, |ids| Self::Only(ids.into_iter().map(|id| id.0).collect()))
    }
}

/// A name of 1 to 256 bytes without control characters: it is written to logs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(pub(crate) String);

/// The text is not a [`Name`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 256 bytes and no control characters; got {0:?}")]
pub struct InvalidName(String);

impl Name {
    /// Checks a name.
    ///
    /// # Errors
    /// It is empty, too long, or has a control character.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidName> {
        let text = text.into();
        if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
            let shown = text.get(..text.floor_char_boundary(256)).unwrap_or_default();
            return Err(InvalidName(shown.to_owned()));
        }
        Ok(Self(text))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::new(text)
    }
}

impl std::str::FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::new(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
