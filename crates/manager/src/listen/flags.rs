//! The flags of the listeners.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{ArgAction, Args, builder::BoolishValueParser};

use super::{Endpoint, ListenUrl, Listener, Means, check, tls::TlsFiles};
use crate::origin::{HostName, Hosts, Origin, OriginPolicy};

// No doc comment: clap would show it instead of that of the command.
#[derive(Debug, Clone, Args)]
pub(crate) struct ListenFlags {
    /// The address to listen on, without TLS: short for --listen tcp://ADDRESS:PORT. Off loopback it needs --insecure-no-auth.
    #[arg(long, env = "BIND", default_value = "127.0.0.1", value_name = "ADDRESS", help_heading = "Listeners")]
    bind: IpAddr,
    /// The port for gRPC, gRPC-web and REST; 0 picks a free port.
    #[arg(long, env = "PORT", default_value_t = 8080, help_heading = "Listeners")]
    port: u16,
    /// A listener for gRPC, gRPC-web and REST instead of --bind and --port: tcp://ADDRESS:PORT, tls://ADDRESS:PORT or unix:///PATH. May be
    /// given several times; in the variable, separate them by commas. ?anonymous=none|read|operate|admin is what callers without credentials
    /// may do [default: admin on loopback and unix sockets unless authentication is configured, else none]. With tls://,
    /// client-certificate=required refuses clients without one. With unix://, mode=0660 sets the permissions of the socket [default: 0600].
    #[arg(long, env = "LISTEN", value_delimiter = ',', conflicts_with_all = ["bind", "port"], value_name = "URL", help_heading = "Listeners")]
    listen: Vec<ListenUrl>,
    /// Let callers without credentials in on listeners that other machines reach, also without TLS. Everybody who reaches such a listener can
    /// run code as the manager's user.
    #[arg(long, env = "INSECURE_NO_AUTH", value_parser = BoolishValueParser::new(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, value_name = "BOOL", help_heading = "Listeners")]
    insecure_no_auth: bool,
    /// The certificate of tls:// listeners, followed by those of intermediate CAs, PEM. The file is reloaded when it changes.
    #[arg(long, env = "TLS_CERT", requires = "tls_key", value_name = "FILE", help_heading = "Listeners")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, PEM. The file is reloaded when it changes.
    #[arg(long, env = "TLS_KEY", requires = "tls_cert", value_name = "FILE", help_heading = "Listeners")]
    tls_key: Option<PathBuf>,
    /// The CA that certificates of clients are checked against, PEM. The file is reloaded when it changes.
    #[arg(long, env = "TLS_CLIENT_CA", requires = "tls_cert", value_name = "FILE", help_heading = "Listeners")]
    tls_client_ca: Option<PathBuf>,
    /// The origins of web pages on other hosts that may call the API, such as https://ctf.example, separated by commas. Pages of all other
    /// origins are refused.
    #[arg(long, env = "ALLOW_ORIGIN", value_delimiter = ',', value_name = "ORIGIN,...", help_heading = "Listeners")]
    pub(crate) allow_origin: Vec<Origin>,
    /// The host names by which clients reach this manager, separated by commas. A listener on loopback always accepts localhost and loopback
    /// addresses, and refuses other names. Other listeners accept every name unless this is set.
    #[arg(long, env = "ALLOW_HOST", value_delimiter = ',', value_name = "HOST,...", help_heading = "Listeners")]
    allow_host: Vec<HostName>,
}

impl ListenFlags {
    /// Listens on `address` only, in plaintext, whatever the flags said.
    pub(crate) fn replace(&mut self, address: SocketAddr) {
        (self.bind, self.port) = (address.ip(), address.port());
        self.listen.clear();
    }

    /// The listeners with their policies. `authentication` is whether callers can have credentials.
    ///
    /// # Errors
    /// See [`check`].
    pub(crate) fn listeners(&self, authentication: bool) -> Result<Vec<Listener>, String> {
        let means = Means {
            insecure: self.insecure_no_auth,
            authentication,
            certificate: self.tls_files().is_some(),
            client_ca: self.tls_client_ca.is_some(),
        };
        check(&self.urls(), means).map_err(|problem| format!("cannot listen on {problem}"))
    }

    /// The listeners as the operator described them.
    fn urls(&self) -> Cow<'_, [ListenUrl]> {
        if self.listen.is_empty() {
            vec![ListenUrl::tcp(SocketAddr::new(self.bind, self.port))].into()
        } else {
            (&self.listen).into()
        }
    }

    /// Whether other machines can reach one of the listeners.
    pub(crate) fn reach_beyond_loopback(&self) -> bool {
        self.urls().iter().any(|url| !url.endpoint.is_local())
    }

    /// The files of tls:// listeners.
    pub(crate) fn tls_files(&self) -> Option<TlsFiles> {
        let (certificate, key) = (self.tls_cert.clone()?, self.tls_key.clone()?);
        Some(TlsFiles { certificate, key, client_ca: self.tls_client_ca.clone() })
    }

    /// What a listener accepts from web pages.
    pub(crate) fn origins(&self, endpoint: &Endpoint) -> OriginPolicy {
        let any = match endpoint {
            Endpoint::Unix { .. } => true,
            Endpoint::Tcp(_) | Endpoint::Tls(_) => !endpoint.is_local() && self.allow_host.is_empty(),
        };
        OriginPolicy {
            allowed_origins: self.allow_origin.clone().into(),
            allowed_hosts: self.allow_host.clone().into(),
            hosts: if any { Hosts::Any } else { Hosts::Listed },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use clap::Parser;
    use gauntlet_access::Scope;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: ListenFlags,
    }

    fn parse(arguments: &[&str]) -> Result<ListenFlags, clap::Error> {
        Command::try_parse_from(std::iter::once("test").chain(arguments.iter().copied())).map(|command| command.flags)
    }

    fn listeners(arguments: &[&str]) -> Result<Vec<Listener>, String> {
        parse(arguments).unwrap().listeners(false)
    }

    #[test]
    fn default_listener_is_on_loopback() {
        let listeners = listeners(&[]).unwrap();
        let endpoints: Vec<_> = listeners.iter().map(|listener| listener.endpoint.to_string()).collect();
        assert_eq!(endpoints, ["tcp://127.0.0.1:8080"]);
    }

    #[test]
    fn other_machines_reach_a_manager_without_authentication_only_when_that_is_said() {
        let error = listeners(&["--bind", "0.0.0.0"]).unwrap_err();
        assert!(
            error.starts_with("cannot listen on tcp://0.0.0.0:8080") && error.contains("--insecure-no-auth"),
            "{error}"
        );
        let insecure = listeners(&["--bind", "0.0.0.0", "--insecure-no-auth"]).unwrap();
        assert_eq!(insecure.first().unwrap().policy.anonymous, Some(Scope::Admin));
        assert!(listeners(&["--bind", "0.0.0.0", "--insecure-no-auth=false"]).is_err());
    }

    #[test]
    fn several_listeners() {
        let arguments = ["--listen", "tcp://127.0.0.1:1", "--listen", "unix:///a,unix:///b?anonymous=read"];
        let endpoints: Vec<_> =
            listeners(&arguments).unwrap().iter().map(|listener| listener.endpoint.to_string()).collect();
        assert_eq!(endpoints, ["tcp://127.0.0.1:1", "unix:///a", "unix:///b"]);
        let mut flags = parse(&arguments).unwrap();
        flags.replace(([127, 0, 0, 1], 7).into());
        assert_eq!(flags.listeners(false).unwrap().len(), 1);
    }

    #[test]
    fn flags_that_exclude_or_need_each_other() {
        for (arguments, part) in [
            (&["--listen", "unix:///a", "--port", "1"][..], "cannot be used with"),
            (&["--listen", "unix:///a", "--bind", "127.0.0.1"], "cannot be used with"),
            (&["--tls-cert", "a"], "--tls-key"),
            (&["--tls-client-ca", "a"], "--tls-cert"),
            (&["--listen", "127.0.0.1:1"], "expected tcp://ADDRESS:PORT"),
            (&["--allow-origin", "ctf.example"], "expected an origin such as"),
            (&["--allow-host", "a:80"], "expected a host name such as"),
        ] {
            let error = parse(arguments).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn hosts_are_checked_on_loopback_or_when_listed() {
        let hosts = |arguments: &[&str], url: &str| {
            parse(arguments).unwrap().origins(&url.parse::<ListenUrl>().unwrap().endpoint).hosts
        };
        for url in ["tcp://127.0.0.1:1", "tls://[::1]:1", "tcp://[::ffff:127.0.0.1]:1"] {
            assert_eq!(hosts(&[], url), Hosts::Listed, "{url}");
        }
        assert_eq!(hosts(&[], "tls://0.0.0.0:1"), Hosts::Any);
        assert_eq!(hosts(&["--allow-host", "gauntlet.example"], "tls://0.0.0.0:1"), Hosts::Listed);
        assert_eq!(hosts(&["--allow-host", "gauntlet.example"], "unix:///a"), Hosts::Any);
    }
}
