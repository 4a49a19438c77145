//! Identifiers of challenges, sources and running instances.

use std::fmt;

/// Why a text is not a valid identifier. The messages name the rule and not the field, which only the caller knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// The text is empty.
    #[error("must not be empty")]
    Empty,
    /// The text has more than [`MAX_BYTES`] bytes of UTF-8. Carries its length.
    #[error("must be at most {MAX_BYTES} bytes, got {0}")]
    TooLong(usize),
    /// The text has a control character at this byte offset.
    #[error("must not contain control characters (found one at byte {0})")]
    Control(usize),
    /// The text is not 16 lowercase hexadecimal characters.
    #[error("must be 16 lowercase hexadecimal characters")]
    NotAnIdentity,
}

/// The maximum length of an identifier, in bytes of UTF-8.
pub(crate) const MAX_BYTES: usize = 256;

fn validate(text: &str) -> Result<(), InvalidId> {
    if text.is_empty() {
        return Err(InvalidId::Empty);
    }
    if text.len() > MAX_BYTES {
        return Err(InvalidId::TooLong(text.len()));
    }
    match text.char_indices().find(|(_, c)| c.is_control()) {
        Some((at, _)) => Err(InvalidId::Control(at)),
        None => Ok(()),
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Accepts any text of 1 to 256 bytes without control characters.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                validate(&text)?;
                Ok(Self(text))
            }

            /// The text as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

text_id! {
    /// The platform's name of a challenge. Any text, so it must be escaped before it becomes part of a path.
    ChallengeId
}
text_id! {
    /// The user or team that an instance is for, as the platform names it. By convention, "0" is the shared instance.
    SourceId
}

/// The random label of an instance's resources: 16 lowercase hexadecimal characters, usable as a DNS label. Scenarios see it and never the
/// source.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(String);

impl Identity {
    /// Creates an identity from 64 random bits.
    pub fn from_bits(bits: u64) -> Self {
        Self(format!("{bits:016x}"))
    }

    /// Reads an identity that was written before.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 16 && text.bytes().all(hex) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId::NotAnIdentity)
        }
    }

    /// The sixteen characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_empty_long_and_control_characters() {
        assert_eq!(ChallengeId::new(""), Err(InvalidId::Empty));
        assert_eq!(ChallengeId::new("a\nb"), Err(InvalidId::Control(1)));
        assert!(SourceId::new("x".repeat(256)).is_ok());
        assert_eq!(SourceId::new("x".repeat(257)), Err(InvalidId::TooLong(257)));
        assert!(ChallengeId::new("../../etc/passwd").is_ok(), "an id is text, never a path");
    }

    proptest! {
        #[test]
        fn identities_read_back(bits: u64) {
            let identity = Identity::from_bits(bits);
            prop_assert_eq!(Identity::parse(identity.as_str()).unwrap(), identity);
        }

        #[test]
        fn ids_keep_their_text(text in "\\PC{1,64}") {
            if let Ok(id) = ChallengeId::new(text.clone()) {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
