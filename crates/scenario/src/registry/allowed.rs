//! Which registries scenarios may come from.

use std::{fmt, str::FromStr};

use reqwest::Url;

/// A registry's host and port, as in references: `registry.example.org`, `127.0.0.1:5000`. Compared without case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    name: String,
    port: Option<u16>,
}

impl Host {
    /// The host of a URL.
    pub(crate) fn of(url: &Url) -> Option<Self> {
        Some(Self { name: url.host_str()?.to_ascii_lowercase(), port: url.port() })
    }

    /// Whether a URL leads to this host and port.
    pub(crate) fn is_of(&self, url: &Url) -> bool {
        Self::of(url).as_ref() == Some(self)
    }
}

/// Returns the IP address that the host of a URL is, if it is one.
pub(crate) fn address(host: &str) -> Option<std::net::IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// The text isn't a host, or not a pattern of a registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}; got {given:?}")]
pub struct InvalidPattern {
    expected: &'static str,
    given: String,
}

impl FromStr for Host {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let expected = "a host such as ghcr.io or registry.lan:5000";
        let invalid = || InvalidPattern { expected, given: text.to_owned() };
        if text.is_empty() || text.contains(['/', '@', '?', '#', '*', '\\']) || text.contains(char::is_whitespace) {
            return Err(invalid());
        }
        Url::parse(&format!("https://{text}")).ok().as_ref().and_then(Self::of).ok_or_else(invalid)
    }
}

/// A registry, or the repositories of a registry below a prefix: `ghcr.io`, `ghcr.io/team`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryPattern {
    host: Host,
    /// Whole path components, without slashes at the ends; empty for all repositories.
    prefix: String,
}

impl RegistryPattern {
    /// The registry.
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn matches(&self, host: &Host, repository: &str) -> bool {
        let rest = repository.strip_prefix(self.prefix.as_str());
        self.host == *host
            && (self.prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    }
}

impl fmt::Display for RegistryPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host.fmt(f)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

impl FromStr for RegistryPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let expected = "a registry, or the start of a repository's path, such as ghcr.io or ghcr.io/team";
        let invalid = || InvalidPattern { expected, given: text.to_owned() };
        let (host, prefix) = text.split_once('/').unwrap_or((text, ""));
        let prefix = prefix.trim_end_matches('/');
        let plain = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if !prefix.is_empty() && !prefix.split('/').all(plain) {
            return Err(invalid());
        }
        Ok(Self { host: host.parse().map_err(|_| invalid())?, prefix: prefix.to_owned() })
    }
}

/// The registries that scenarios may come from.
///
/// A host that is allowed may be at a private or loopback address. A server that is only reached because an allowed registry redirects to
/// it may not, unless it is listed too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// Any registry: for callers that could run the scenario themselves.
    Any,
    /// Only these.
    Only(Vec<RegistryPattern>),
}

impl Allowed {
    pub(crate) fn allows(&self, host: &Host, repository: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Only(patterns) => patterns.iter().any(|pattern| pattern.matches(host, repository)),
        }
    }

    /// Whether the operator named this host.
    pub(crate) fn lists(&self, url: &Url) -> bool {
        match self {
            Self::Any => false,
            Self::Only(patterns) => patterns.iter().any(|pattern| pattern.host.is_of(url)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_match_whole_path_components() {
        let allowed = Allowed::Only(["ghcr.io/team", "Registry.LAN:5000"].map(|text| text.parse().unwrap()).into());
        for (host, repository, expected) in [
            ("ghcr.io", "team", true),
            ("ghcr.io", "team/web", true),
            ("GHCR.io", "team/web/deep", true),
            ("ghcr.io", "team2/web", false),
            ("ghcr.io", "other", false),
            ("ghcr.io:444", "team/web", false),
            ("ghcr.io.evil.test", "team/web", false),
            ("registry.lan:5000", "anything", true),
            ("registry.lan", "anything", false),
        ] {
            assert_eq!(allowed.allows(&host.parse().unwrap(), repository), expected, "{host}/{repository}");
        }
        assert!(!Allowed::Only(Vec::new()).allows(&"ghcr.io".parse().unwrap(), "team"));
    }

    #[test]
    fn spellings_of_an_address_are_one_host() {
        for text in ["127.1:5000", "0x7f.0.0.1:5000", "0177.0.0.1:5000"] {
            assert_eq!(text.parse::<Host>().unwrap().to_string(), "127.0.0.1:5000");
        }
    }

    #[test]
    fn invalid_patterns_are_rejected() {
        for text in [
            "",
            "/team",
            "ghcr.io/Team",
            "ghcr.io//team",
            "ghcr.io/*",
            "*.io",
            "https://ghcr.io",
            "u@ghcr.io",
            "a b",
            "ghcr.io:x",
        ] {
            assert!(text.parse::<RegistryPattern>().unwrap_err().to_string().contains("such as ghcr.io"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn displayed_pattern_parses_to_itself(text in "[a-z]{1,5}\\.[a-z]{2,3}(:[1-9][0-9]{3})?(/[a-z0-9]{1,4}){0,3}") {
            let pattern: RegistryPattern = text.parse().unwrap();
            prop_assert_eq!(pattern.to_string(), text);
        }

        #[test]
        fn parsing_never_panics(text in "\\PC{0,40}") { let _ = text.parse::<RegistryPattern>(); }
    }
}
