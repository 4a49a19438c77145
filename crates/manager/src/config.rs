//! Flags and environment, checked before anything starts. The names of chall-manager's environment are accepted.

use std::{ffi::OsString, fmt, net::SocketAddr, num::NonZeroU32, path::PathBuf, str::FromStr, time::Duration};

use clap::{CommandFactory as _, Parser, error::ErrorKind};
use gauntlet_startup::{duration, size};
use tokio::sync::Semaphore;

use crate::connections::Limits;

/// What etcd does not go below.
const SHORTEST_LEASE: Duration = Duration::from_secs(2);
/// How long one call to etcd may take unless told otherwise.
const ETCD_DEADLINE: Duration = Duration::from_secs(5);

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

/// Runs challenge instances on demand, over gRPC, gRPC-web and REST on one port.
///
/// Without flags it runs embedded: state in one file below --dir, no etcd, no collector. With --etcd-endpoints several managers share one
/// etcd. OpenTelemetry is configured by the standard OTEL_* environment.
#[derive(Debug, Clone, Parser)]
#[command(name = "gauntlet-manager", version, about, long_about)]
pub struct Config {
    /// The address to listen on.
    #[arg(long, env = "BIND", default_value = "0.0.0.0", value_name = "ADDRESS")]
    pub bind: std::net::IpAddr,
    /// The port of gRPC, gRPC-web and REST; 0 picks a free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Where the debug page listens; it shows traces, so keep it off the network. "off" for none.
    #[arg(long, env = "DEBUG_ADDRESS", default_value = "127.0.0.1:8081", value_name = "ADDRESS", value_parser = debug_address)]
    pub debug_address: DebugAddress,
    /// Where everything is kept that is not in etcd: instances, scenarios, the embedded store, the flag key.
    #[arg(long, env = "DIR", default_value = "gauntlet-data", value_name = "DIR")]
    pub dir: PathBuf,
    /// What this replica is called in locks and logs; the host's name and the process id unless given.
    #[arg(long, env = "REPLICA", value_name = "NAME")]
    pub replica: Option<String>,

    /// etcd, as host:port or URL, comma-separated; none runs the embedded store. ETCD_ENDPOINT, chall-manager's name, says the same.
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',', value_name = "URL,...", help_heading = "etcd")]
    pub etcd_endpoints: Vec<String>,
    /// The same by chall-manager's name.
    #[arg(long, env = "ETCD_ENDPOINT", value_delimiter = ',', hide = true)]
    etcd_endpoint: Vec<String>,
    /// The user of etcd.
    #[arg(long, env = "ETCD_USERNAME", requires = "etcd_password", value_name = "NAME", help_heading = "etcd")]
    pub etcd_username: Option<String>,
    /// Its password; better given by the environment.
    #[arg(long, env = "ETCD_PASSWORD", hide_env_values = true, value_name = "PASSWORD", help_heading = "etcd")]
    pub etcd_password: Option<Secret>,
    /// The authority that signed etcd's certificate, PEM; those that the system trusts unless given. Read again when it changes, as are the
    /// certificate and its key.
    #[arg(long, env = "ETCD_CA", value_name = "FILE", help_heading = "etcd")]
    pub etcd_ca: Option<PathBuf>,
    /// The certificate to show to etcd, PEM.
    #[arg(long, env = "ETCD_CERT", requires = "etcd_key", value_name = "FILE", help_heading = "etcd")]
    pub etcd_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, env = "ETCD_KEY", requires = "etcd_cert", value_name = "FILE", help_heading = "etcd")]
    pub etcd_key: Option<PathBuf>,
    /// What every key in etcd begins with.
    #[arg(long, env = "ETCD_PREFIX", default_value = "gauntlet/", value_name = "PREFIX", help_heading = "etcd")]
    pub etcd_prefix: String,
    /// How long a replica that went silent keeps what it owns, at least 2s.
    #[arg(long, env = "LEASE_TTL", default_value = "10s", value_parser = duration, value_name = "DURATION", help_heading = "etcd")]
    pub lease_ttl: Duration,
    /// How long one call to etcd may take, over all endpoints tried; shorter than --lease-ttl. 5s, or nine tenths of that if it is less,
    /// unless given.
    #[arg(long, env = "ETCD_DEADLINE", value_parser = duration, value_name = "DURATION", help_heading = "etcd")]
    pub etcd_deadline: Option<Duration>,

    /// Speak plain HTTP with registries.
    #[arg(long, env = "OCI_INSECURE", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, value_name = "BOOL", help_heading = "Scenarios")]
    pub oci_insecure: bool,
    /// The user of registries.
    #[arg(long, env = "OCI_USERNAME", requires = "oci_password", value_name = "NAME", help_heading = "Scenarios")]
    pub oci_username: Option<String>,
    /// Its password; better given by the environment.
    #[arg(long, env = "OCI_PASSWORD", hide_env_values = true, value_name = "PASSWORD", help_heading = "Scenarios")]
    pub oci_password: Option<Secret>,
    /// The directory below which `file://` scenarios are allowed; none allows no local scenario.
    #[arg(long, env = "SCENARIO_ROOT", value_name = "DIR", help_heading = "Scenarios")]
    pub scenario_root: Option<PathBuf>,
    /// How much of scenarios is kept on the disk, as a number of B, KiB, MiB or GiB. Beyond that, those used longest ago that no challenge
    /// and no instance refers to are removed; they are fetched again when they are wanted again.
    #[arg(long, env = "SCENARIO_KEEP", default_value = "10GiB", value_parser = size, value_name = "SIZE", help_heading = "Scenarios")]
    pub scenario_keep: u64,
    /// The key that varies flags, 64 hexadecimal characters; made on first use below --dir unless given. Replicas must share it.
    #[arg(long, env = "FLAG_KEY_FILE", value_name = "FILE", help_heading = "Scenarios")]
    pub flag_key_file: Option<PathBuf>,

    /// What players call this host in connection infos.
    #[arg(long, env = "INSTANCE_HOST", default_value = "127.0.0.1", value_name = "HOST", help_heading = "Instances")]
    pub instance_host: String,
    /// The ports instances listen on, as FIRST-LAST.
    #[arg(long, env = "INSTANCE_PORTS", default_value = "20000-29999", value_parser = ports, value_name = "FIRST-LAST", help_heading = "Instances")]
    pub instance_ports: (u16, u16),
    /// More directories to look for the programs of scenarios in, before PATH.
    #[arg(long, env = "INSTANCE_PATH", value_delimiter = ':', value_name = "DIR:...", help_heading = "Instances")]
    pub instance_path: Vec<PathBuf>,
    /// The most that `min` or `max` of a challenge's pool may be. One stored with more is treated as if it had this.
    #[arg(long, env = "POOL_MAX", default_value_t = 1000, value_name = "COUNT", help_heading = "Instances")]
    pub pool_max: u32,

    /// How many connections a port has at once; those beyond it are closed at once, and counted.
    #[arg(long, env = "MAX_CONNECTIONS", default_value = "1000", value_name = "COUNT", help_heading = "Limits")]
    pub max_connections: NonZeroU32,
    /// How many calls a port serves at once, over all connections; those beyond it are told to try again (UNAVAILABLE, 503), and counted.
    #[arg(long, env = "MAX_CALLS", default_value = "1000", value_name = "COUNT", help_heading = "Limits")]
    pub max_calls: NonZeroU32,
    /// How long a client may take to send the head of a request; an HTTP/1 connection that is idle for as long is closed.
    #[arg(long, env = "HEADER_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub header_timeout: Duration,
    /// How long a client may leave an answer unread before its connection is closed.
    #[arg(long, env = "STALL_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub stall_timeout: Duration,
    /// How often an HTTP/2 client is asked whether it is still there; it has as long to answer, 20s at most.
    #[arg(long, env = "KEEPALIVE", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub keepalive: Duration,

    /// How long a call waits for locks in all before it fails with UNAVAILABLE.
    #[arg(long, env = "LOCK_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Background")]
    pub lock_timeout: Duration,
    /// How often to look for work that a crash left.
    #[arg(long, env = "RECONCILE_EVERY", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Background")]
    pub reconcile_every: Duration,
    /// How long calls under way may take to end at shutdown, which takes up to 4s more. Docker kills what takes longer than 10s in all: give
    /// its --stop-timeout (Compose: stop_grace_period) more than that where this is longer. A second signal ends at once.
    #[arg(long, env = "DRAIN", default_value = "5s", value_parser = duration, value_name = "DURATION", help_heading = "Background")]
    pub drain: Duration,
    /// What to log, as LEVEL or tracing directives.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_name = "LEVEL", help_heading = "Background")]
    pub log_level: String,
}

/// Where the debug page listens, if anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugAddress(pub Option<SocketAddr>);

fn debug_address(text: &str) -> Result<DebugAddress, String> {
    if text == "off" {
        return Ok(DebugAddress(None));
    }
    text.parse()
        .map(|address| DebugAddress(Some(address)))
        .map_err(|_| format!("expected HOST:PORT such as 127.0.0.1:8081, or \"off\"; got {text:?}"))
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    text.split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
        .filter(|(first, last)| *first > 0 && first <= last)
        .ok_or_else(|| format!("expected FIRST-LAST such as 20000-29999; got {text:?}"))
}

fn credentials(username: Option<&String>, password: Option<&Secret>) -> Option<(String, String)> {
    Some((username?.clone(), password?.reveal().to_owned()))
}

impl Config {
    /// Reads flags and environment.
    ///
    /// # Errors
    /// A wrong value, named with the expected form; also `--help` and `--version`, with their text. See
    /// [`gauntlet_startup::print_parse_error`].
    pub fn from_command_line() -> Result<Self, clap::Error> {
        Self::checked(std::env::args_os())
    }

    /// The environment over the defaults, no flags: for a program that embeds the manager.
    ///
    /// # Errors
    /// A variable with a wrong value; the text names it and the fix.
    pub fn from_environment() -> Result<Self, clap::Error> {
        Self::checked(["gauntlet-manager"])
    }

    /// Parses, and checks what no flag can be checked for alone.
    fn checked(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        let mut config = Self::try_parse_from(arguments)?;
        // A variable that is set to nothing, as compose files do, says nothing.
        config.etcd_endpoints.retain(|endpoint| !endpoint.is_empty());
        if config.etcd_endpoints.is_empty() {
            config.etcd_endpoints =
                config.etcd_endpoint.iter().filter(|endpoint| !endpoint.is_empty()).cloned().collect();
        }
        for username in [&mut config.etcd_username, &mut config.oci_username] {
            username.take_if(|name| name.is_empty());
        }
        let wrong = |text: String| Err(Self::command().error(ErrorKind::ValueValidation, text));
        if config.lease_ttl < SHORTEST_LEASE {
            return wrong(format!(
                "--lease-ttl (LEASE_TTL) is {:?}: give it at least {SHORTEST_LEASE:?}",
                config.lease_ttl
            ));
        }
        match config.etcd_deadline {
            Some(deadline) if deadline >= config.lease_ttl => wrong(format!(
                "--etcd-deadline (ETCD_DEADLINE) is {deadline:?}, and --lease-ttl (LEASE_TTL) is {:?}: a call must end before the lease \
                 that it is made under can; give a shorter deadline or a longer lease",
                config.lease_ttl
            )),
            _ => Ok(config),
        }
    }

    /// How long one call to etcd may take.
    pub(crate) fn etcd_deadline(&self) -> Duration {
        self.etcd_deadline.unwrap_or_else(|| ETCD_DEADLINE.min(self.lease_ttl * 9 / 10))
    }

    /// The user and the password of etcd.
    pub(crate) fn etcd_credentials(&self) -> Option<(String, String)> {
        credentials(self.etcd_username.as_ref(), self.etcd_password.as_ref())
    }

    /// The user and the password of registries.
    pub(crate) fn registry_credentials(&self) -> Option<(String, String)> {
        credentials(self.oci_username.as_ref(), self.oci_password.as_ref())
    }

    /// What the clients of each port may use up.
    pub(crate) fn limits(&self) -> Limits {
        let count = |count: NonZeroU32| usize::try_from(count.get()).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Limits {
            connections: count(self.max_connections),
            calls: count(self.max_calls),
            header_timeout: self.header_timeout,
            stall_timeout: self.stall_timeout,
            keepalive: self.keepalive,
        }
    }

    /// The directory instances are kept in.
    pub(crate) fn instances_dir(&self) -> PathBuf {
        self.dir.join("process")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, clap::Error> {
        Config::checked(std::iter::once("gauntlet-manager").chain(arguments.iter().copied()))
    }

    #[test]
    fn defaults_run_embedded() {
        let config = parse(&[]).unwrap();
        assert!(config.etcd_endpoints.is_empty());
        assert_eq!(config.port, 8080);
        assert_eq!(config.debug_address, DebugAddress(Some(([127, 0, 0, 1], 8081).into())));
    }

    #[test]
    fn default_shutdown_fits_into_ten_seconds() {
        let config = parse(&[]).unwrap();
        let whole = config.drain + crate::STORE_WITHIN + gauntlet_telemetry::SHUTDOWN_TIMEOUT;
        assert!(whole < Duration::from_secs(10), "{whole:?}");
    }

    #[test]
    fn scenarios_keep_ten_gibibytes_by_default() {
        assert_eq!(parse(&[]).unwrap().scenario_keep, 10 << 30);
    }

    #[test]
    fn empty_is_as_good_as_not_given() {
        let credentials = ["--etcd-username", "", "--etcd-password", "", "--oci-username", "", "--oci-password", ""];
        let config = parse(&[&["--etcd-endpoints", ""], &credentials[..]].concat()).unwrap();
        assert!(config.etcd_endpoints.is_empty());
        assert_eq!((config.etcd_username, config.oci_username), (None, None));
    }

    #[test]
    fn endpoints_by_either_name() {
        for (arguments, endpoints) in [
            (&["--etcd-endpoint", "a:1,b:2"][..], &["a:1", "b:2"][..]),
            (&["--etcd-endpoint", "a:1", "--etcd-endpoints", "c:3"], &["c:3"]),
        ] {
            assert_eq!(parse(arguments).unwrap().etcd_endpoints, endpoints);
        }
    }

    #[test]
    fn wrong_values_name_themselves_and_the_fix() {
        for (arguments, part) in [
            (["--lock-timeout", "soon"], "expected a duration above zero such as 30s"),
            (["--instance-ports", "9-3"], "expected FIRST-LAST"),
            (["--debug-address", "8081"], "expected HOST:PORT"),
            (["--port", "70000"], "70000"),
            (["--scenario-keep", "10GB"], "expected a size such as 500MiB or 10GiB"),
            (["--lease-ttl", "1s"], "at least 2s"),
            (["--etcd-deadline", "10s"], "--lease-ttl (LEASE_TTL) is 10s: a call must end before"),
        ] {
            let text = parse(&arguments).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains(arguments[0]), "{text}");
        }
    }

    #[test]
    fn a_call_to_etcd_ends_before_its_lease() {
        for (arguments, deadline) in [
            (&["--lease-ttl", "10s"][..], 5000),
            (&["--lease-ttl", "3s"], 2700),
            (&["--lease-ttl", "3s", "--etcd-deadline", "2s"], 2000),
        ] {
            assert_eq!(parse(arguments).unwrap().etcd_deadline(), Duration::from_millis(deadline), "{arguments:?}");
        }
        assert!(parse(&["--lease-ttl", "3s", "--etcd-deadline", "3s"]).is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        let config = parse(&["--etcd-username", "root", "--etcd-password", "hunter2"]).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
