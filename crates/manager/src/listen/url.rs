//! The values of `--listen`: `tcp://ADDRESS:PORT`, `tls://ADDRESS:PORT` or `unix:///PATH`, with parameters after `?`.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use gauntlet_access::Scope;

use super::Endpoint;

/// The permission bits of a unix socket by default: only the manager's user may connect.
const DEFAULT_MODE: u32 = 0o600;
/// The longest path of a unix socket, in bytes, without the terminating zero.
const MAX_PATH: usize = 107;
const FORMS: &str = "expected tcp://ADDRESS:PORT, tls://ADDRESS:PORT or unix:///PATH, such as tls://0.0.0.0:8080";

/// A listener as the operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListenUrl {
    pub(crate) endpoint: Endpoint,
    /// The scope of callers without credentials; `None` within: credentials are required.
    pub(crate) anonymous: Option<Option<Scope>>,
    pub(crate) requires_certificate: bool,
    /// As written, for messages.
    text: String,
}

impl ListenUrl {
    /// A plaintext listener, as `--bind` and `--port` describe it.
    pub(crate) fn tcp(address: SocketAddr) -> Self {
        let endpoint = Endpoint::Tcp(address);
        Self { text: endpoint.to_string(), endpoint, anonymous: None, requires_certificate: false }
    }
}

impl fmt::Display for ListenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ListenUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{FORMS}; got {text:?}");
        let (place, parameters) = text.split_once('?').unwrap_or((text, ""));
        let (scheme, place) = place.split_once("://").ok_or_else(wrong)?;
        let address = || place.parse().map_err(|_| wrong());
        let mut endpoint = match scheme {
            "tcp" => Endpoint::Tcp(address()?),
            "tls" => Endpoint::Tls(address()?),
            "unix" => Endpoint::Unix { path: socket_path(place)?, mode: DEFAULT_MODE },
            _ => return Err(wrong()),
        };
        let (mut anonymous, mut requires_certificate) = (None, false);
        let mut seen = Vec::new();
        for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            if seen.contains(&name) {
                return Err(format!("{name} is given twice in {text:?}"));
            }
            seen.push(name);
            match (name, &mut endpoint) {
                ("anonymous", _) => anonymous = Some(scope(value)?),
                ("mode", Endpoint::Unix { mode, .. }) => *mode = permission_bits(value)?,
                ("client-certificate", Endpoint::Tls(_)) => requires_certificate = required(value)?,
                _ => {
                    return Err(format!(
                        "{scheme}:// has no parameter {name:?}; use anonymous, with unix:// mode, or with tls:// client-certificate"
                    ));
                }
            }
        }
        Ok(Self { endpoint, anonymous, requires_certificate, text: text.to_owned() })
    }
}

fn socket_path(text: &str) -> Result<PathBuf, String> {
    if !Path::new(text).is_absolute() || text.ends_with('/') {
        return Err(format!("expected an absolute path such as unix:///run/gauntlet/api.sock; got unix://{text}"));
    }
    if text.len() > MAX_PATH || text.contains('\0') {
        return Err(format!("the path of a socket has at most {MAX_PATH} bytes; unix://{text} has {}", text.len()));
    }
    Ok(text.into())
}

fn scope(text: &str) -> Result<Option<Scope>, String> {
    match text {
        "none" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| format!("anonymous is {text:?}; use none, read, operate or admin")),
    }
}

fn permission_bits(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| format!("mode is {text:?}; use permission bits in octal, such as 0660"))
}

fn required(text: &str) -> Result<bool, String> {
    match text {
        "required" => Ok(true),
        "optional" => Ok(false),
        _ => Err(format!("client-certificate is {text:?}; use required or optional")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> ListenUrl {
        text.parse().unwrap()
    }

    #[test]
    fn schemes_and_parameters() {
        assert_eq!(parse("tcp://127.0.0.1:8080"), ListenUrl::tcp(([127, 0, 0, 1], 8080).into()));
        let tls = parse("tls://[::]:0?anonymous=none&client-certificate=required");
        assert_eq!(tls.endpoint, Endpoint::Tls("[::]:0".parse().unwrap()));
        assert_eq!((tls.anonymous, tls.requires_certificate), (Some(None), true));
        let unix = parse("unix:///run/api.sock?mode=0660&anonymous=operate");
        assert_eq!(unix.endpoint, Endpoint::Unix { path: "/run/api.sock".into(), mode: 0o660 });
        assert_eq!(unix.anonymous, Some(Some(Scope::Operate)));
        assert_eq!(parse("unix:///a").endpoint, Endpoint::Unix { path: "/a".into(), mode: 0o600 });
    }

    #[test]
    fn invalid_values_are_reported_with_the_fix() {
        let long = format!("unix:///{}", "a".repeat(200));
        for (text, part) in [
            ("8080", FORMS),
            ("127.0.0.1:8080", FORMS),
            ("http://127.0.0.1:8080", FORMS),
            ("tcp://localhost:8080", FORMS),
            ("tcp://127.0.0.1", FORMS),
            ("unix://run/a", "absolute path"),
            ("unix:///run/", "absolute path"),
            (&long, "at most 107 bytes"),
            ("tcp://127.0.0.1:1?mode=0600", "no parameter \"mode\""),
            ("tcp://127.0.0.1:1?client-certificate=required", "no parameter \"client-certificate\""),
            ("tls://127.0.0.1:1?client-certificate=yes", "use required or optional"),
            ("unix:///a?mode=0999", "in octal"),
            ("unix:///a?mode=4755", "in octal"),
            ("unix:///a?anonymous=root", "use none, read, operate or admin"),
            ("unix:///a?anonymous=read&anonymous=admin", "given twice"),
        ] {
            let error = text.parse::<ListenUrl>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(tcp|tls|unix|)(://)?\\PC{0,60}") {
            if let Ok(url) = text.parse::<ListenUrl>() {
                prop_assert_eq!(url.to_string(), text);
            }
        }
    }
}
