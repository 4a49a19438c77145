//! The manager's configuration: flags and environment variables, checked before anything starts. chall-manager's variables are accepted.

mod access;

use std::{ffi::OsString, net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

pub use access::{AccessConfig, KeySource, Oidc, Openness};
use clap::{CommandFactory as _, Parser, error::ErrorKind};
use gauntlet_domain::Limits as InstanceLimits;
use gauntlet_provision::process::{Level, LimitBackend};
use gauntlet_scenario::parse_limits;
use gauntlet_startup::{duration, size};
use gauntlet_telemetry::log_level;
use secrecy::SecretString;
use tokio::sync::Semaphore;

use crate::{
    connections::{Limits, PeerLimits},
    listen::{Listener, flags::ListenFlags},
    password::password,
    registries::Registries,
};

/// The shortest lease that etcd grants.
const MIN_LEASE_TTL: Duration = Duration::from_secs(2);
/// The default deadline of one call to etcd.
const DEFAULT_ETCD_DEADLINE: Duration = Duration::from_secs(5);

/// Runs challenge instances on demand, over gRPC, gRPC-web and REST on one port.
///
/// Without flags it needs no etcd and no collector: it keeps its state in one file in --dir. With --etcd-endpoints, several managers share
/// one etcd cluster. OpenTelemetry is configured with the standard OTEL_* variables.
#[derive(Debug, Clone, Parser)]
#[command(name = "gauntlet-manager", version, about, long_about)]
pub struct Config {
    #[command(flatten)]
    pub(crate) listen: ListenFlags,
    /// The address of the debug page, or "off". The page shows traces without asking for a password: keep it off public networks.
    #[arg(long, env = "DEBUG_ADDRESS", default_value = "127.0.0.1:8081", value_name = "ADDRESS", value_parser = debug_address)]
    pub debug_address: DebugAddress,
    /// The data directory: instances, cached scenarios, the flag key and, without etcd, the store.
    #[arg(long, env = "DIR", default_value = "gauntlet-data", value_name = "DIR")]
    pub dir: PathBuf,
    /// The name of this replica in locks and logs [default: host name and process id].
    #[arg(long, env = "REPLICA", value_name = "NAME")]
    pub replica: Option<String>,

    /// Who may call the API.
    #[command(flatten)]
    pub access: AccessConfig,

    /// The etcd cluster, as host:port or URL, separated by commas. Without it the store is a file in --dir. chall-manager's ETCD_ENDPOINT
    /// also works.
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',', value_name = "URL,...", help_heading = "etcd")]
    pub etcd_endpoints: Vec<String>,
    /// chall-manager's name for it.
    #[arg(long, env = "ETCD_ENDPOINT", value_delimiter = ',', hide = true)]
    etcd_endpoint: Vec<String>,
    /// The user name for etcd.
    #[arg(long, env = "ETCD_USERNAME", value_name = "NAME", help_heading = "etcd")]
    pub etcd_username: Option<String>,
    /// The password for etcd. Prefer --etcd-password-file: other users can see the flags of a process.
    #[arg(long, env = "ETCD_PASSWORD", hide_env_values = true, value_name = "PASSWORD", help_heading = "etcd")]
    pub etcd_password: Option<SecretString>,
    /// A file with the password for etcd.
    #[arg(long, env = "ETCD_PASSWORD_FILE", value_name = "FILE", help_heading = "etcd")]
    pub etcd_password_file: Option<PathBuf>,
    /// The CA certificate that etcd's certificate is checked against, PEM [default: the system's CAs]. The file is reloaded when it changes.
    #[arg(long, env = "ETCD_CA", value_name = "FILE", help_heading = "etcd")]
    pub etcd_ca: Option<PathBuf>,
    /// The client certificate for etcd, PEM. The file is reloaded when it changes.
    #[arg(long, env = "ETCD_CERT", requires = "etcd_key", value_name = "FILE", help_heading = "etcd")]
    pub etcd_cert: Option<PathBuf>,
    /// The private key of the client certificate, PEM. The file is reloaded when it changes.
    #[arg(long, env = "ETCD_KEY", requires = "etcd_cert", value_name = "FILE", help_heading = "etcd")]
    pub etcd_key: Option<PathBuf>,
    /// The prefix of all keys in etcd.
    #[arg(long, env = "ETCD_PREFIX", default_value = "gauntlet/", value_name = "PREFIX", help_heading = "etcd")]
    pub etcd_prefix: String,
    /// How long a replica that stopped responding keeps its locks; at least 2s.
    #[arg(long, env = "LEASE_TTL", default_value = "10s", value_parser = duration, value_name = "DURATION", help_heading = "etcd")]
    pub lease_ttl: Duration,
    /// How long one call to etcd may take, over all endpoints that it tries. Must be shorter than --lease-ttl [default: 5s, or 90% of
    /// --lease-ttl if that is less].
    #[arg(long, env = "ETCD_DEADLINE", value_parser = duration, value_name = "DURATION", help_heading = "etcd")]
    pub etcd_deadline: Option<Duration>,

    /// Which registries are allowed, and their credentials.
    #[command(flatten)]
    pub registries: Registries,
    /// The directory that file:// scenarios may be in. Without it, scenarios come from registries only.
    #[arg(long, env = "SCENARIO_ROOT", value_name = "DIR", help_heading = "Scenarios")]
    pub scenario_root: Option<PathBuf>,
    /// The size of the scenario cache, in B, KiB, MiB or GiB. When it is exceeded, the least recently used scenarios that no challenge or
    /// instance refers to are removed; they are pulled again when needed.
    #[arg(long, env = "SCENARIO_KEEP", default_value = "10GiB", value_parser = size, value_name = "SIZE", help_heading = "Scenarios")]
    pub scenario_keep: u64,
    /// The file with the keys that flags are derived from, one of 64 hexadecimal characters per line; new instances use the last one (see
    /// `gauntlet flags rotate`). All replicas must have the same keys; changes are noticed [default: flag.key in --dir, generated on first start].
    #[arg(long, env = "FLAG_KEY_FILE", value_name = "FILE", help_heading = "Scenarios")]
    pub flag_key_file: Option<PathBuf>,

    /// The host name or address that players connect to; part of the connection info of instances.
    #[arg(long, env = "INSTANCE_HOST", default_value = "127.0.0.1", value_name = "HOST", help_heading = "Instances")]
    pub instance_host: String,
    /// The range of ports for instances.
    #[arg(long, env = "INSTANCE_PORTS", default_value = "20000-29999", value_parser = ports, value_name = "FIRST-LAST", help_heading = "Instances")]
    pub instance_ports: (u16, u16),
    /// Directories to search for the programs of scenarios before the system's. Instances see all files in them, read-only.
    #[arg(long, env = "INSTANCE_PATH", value_delimiter = ':', value_name = "DIR:...", help_heading = "Instances")]
    pub instance_path: Vec<PathBuf>,
    /// The limits of instances whose scenario sets none: names and values as process.limits in scenario.yaml, or none. Those left out are
    /// memory=512MiB,processes=256,cpu_quota=100%,disk=256MiB,open_files=1024,output=1MiB.
    #[arg(long, env = "LIMIT_DEFAULT", default_value = "", hide_default_value = true, value_parser = parse_limits, value_name = "NAME=VALUE,...", help_heading = "Instances")]
    pub limit_default: InstanceLimits,
    /// The highest limits that a scenario may set, such as memory=2GiB,processes=1024. Scenarios that ask for more are not launched [default:
    /// none].
    #[arg(long, env = "LIMIT_MAX", default_value = "", hide_default_value = true, value_parser = parse_limits, value_name = "NAME=VALUE,...", help_heading = "Instances")]
    pub limit_max: InstanceLimits,
    /// Refuse to start unless the memory, processes and CPU share of whole instances are limited by at least this: cgroup2, cgroup1, or rlimit,
    /// which limits them hardly.
    #[arg(long, env = "REQUIRE_LIMITS", default_value = "rlimit", value_name = "BACKEND", help_heading = "Instances")]
    pub require_limits: LimitBackend,
    /// The isolation of instances: uid (namespaces and a user per instance; needs root), userns (namespaces), landlock, none, or auto: the
    /// strongest that this machine allows. Any other value is required, and the most that a scenario can ask for.
    #[arg(long, env = "ISOLATION", default_value = "auto", value_parser = isolation, value_name = "LEVEL", help_heading = "Instances")]
    pub isolation: Isolation,
    /// Refuse to start if instances would be isolated less than this. Scenarios may ask for this and anything stronger [default: the level
    /// of --isolation].
    #[arg(long, env = "REQUIRE_ISOLATION", value_name = "LEVEL", help_heading = "Instances")]
    pub require_isolation: Option<Level>,
    /// The directory whose usr isolated instances see, read-only.
    #[arg(long, env = "INSTANCE_ROOT", default_value = "/", value_name = "DIR", help_heading = "Instances")]
    pub instance_root: PathBuf,
    /// The range of user ids of instances at level uid. Nothing else on this machine may have them; managers with another --dir need
    /// another range.
    #[arg(long, env = "INSTANCE_UIDS", default_value = "1900000000-1900099999", value_parser = uids, value_name = "FIRST-LAST", help_heading = "Instances")]
    pub instance_uids: (u32, u32),
    /// The upper limit of a pool's `min` and `max`. Challenges stored with a higher value are treated as if they had this one.
    #[arg(long, env = "POOL_MAX", default_value_t = 1000, value_name = "COUNT", help_heading = "Instances")]
    pub pool_max: u32,

    /// The maximum number of open connections of each port. Further ones are closed, and counted in gauntlet.server.refused.
    #[arg(long, env = "MAX_CONNECTIONS", default_value = "1000", value_name = "COUNT", help_heading = "Limits")]
    pub max_connections: NonZeroU32,
    /// The maximum number of open connections of one address, on each port. Loopback and unix sockets are not limited.
    #[arg(long, env = "MAX_PEER_CONNECTIONS", default_value = "500", value_name = "COUNT", help_heading = "Limits")]
    pub max_peer_connections: NonZeroU32,
    /// The maximum number of calls per second of one address, on average; for a moment, twice as many. Further ones fail with
    /// RESOURCE_EXHAUSTED (429). Loopback and unix sockets are not limited.
    #[arg(long, env = "MAX_PEER_CALLS", default_value = "2000", value_name = "COUNT", help_heading = "Limits")]
    pub max_peer_calls: NonZeroU32,
    /// The maximum number of changes that run or wait for locks, also those whose client has disconnected. Further ones fail with
    /// UNAVAILABLE (503).
    #[arg(long, env = "MAX_CHANGES", default_value = "2000", value_name = "COUNT", help_heading = "Limits")]
    pub max_changes: NonZeroU32,
    /// The maximum number of concurrent calls of each port, over all connections. Further ones fail with UNAVAILABLE (503), and are counted
    /// in gauntlet.server.refused.
    #[arg(long, env = "MAX_CALLS", default_value = "1000", value_name = "COUNT", help_heading = "Limits")]
    pub max_calls: NonZeroU32,
    /// How long a client may take to send the headers of a request. HTTP/1 connections that are idle for this long are closed.
    #[arg(long, env = "HEADER_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub header_timeout: Duration,
    /// How long a client may stop reading a response before its connection is closed.
    #[arg(long, env = "STALL_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub stall_timeout: Duration,
    /// How often idle HTTP/2 connections are pinged. A client must answer within the same time, at most 20s.
    #[arg(long, env = "KEEPALIVE", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub keepalive: Duration,

    /// How long a call waits for locks in all, before it fails with UNAVAILABLE (503).
    #[arg(long, env = "LOCK_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Limits")]
    pub lock_timeout: Duration,

    /// How often to look for unfinished work that a crash left behind.
    #[arg(long, env = "RECONCILE_EVERY", default_value = "30s", value_parser = duration, value_name = "DURATION", help_heading = "Background")]
    pub reconcile_every: Duration,
    /// How long running calls may take to finish at shutdown. The rest of the shutdown takes up to 4s more. Docker kills a container 10s
    /// after it is told to stop: if you raise this, also raise Docker's --stop-timeout (Compose: stop_grace_period). A second signal exits
    /// at once.
    #[arg(long, env = "DRAIN", default_value = "5s", value_parser = duration, value_name = "DURATION", help_heading = "Background")]
    pub drain: Duration,
    /// The log level, or a list with levels of modules, such as info,gauntlet_manager=debug.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = log_level, value_name = "LEVEL", help_heading = "Background")]
    pub log_level: String,
}

/// The address of the debug page; `None` turns it off.
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

/// The isolation of instances; `None` is the strongest that the machine allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isolation(pub Option<Level>);

fn isolation(text: &str) -> Result<Isolation, String> {
    if text == "auto" {
        return Ok(Isolation(None));
    }
    text.parse().map(|level| Isolation(Some(level))).map_err(|error| format!("{error}; or auto"))
}

fn uids(text: &str) -> Result<(u32, u32), String> {
    // From 2^31 on, parts of the kernel take ids for negative numbers. 0 to 65535 belong to the machine's users.
    text.split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
        .filter(|(first, last)| *first > 65_535 && first <= last && *last < 1 << 31)
        .ok_or_else(|| {
            format!("expected FIRST-LAST from 65536 to 2147483647, such as 1900000000-1900099999; got {text:?}")
        })
}

/// A number of permits.
fn count(count: NonZeroU32) -> usize {
    usize::try_from(count.get()).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

impl Config {
    /// Parses flags and environment.
    ///
    /// # Errors
    /// An invalid value, with its flag and the expected form; also `--help` and `--version`, with their text. Print it with
    /// [`gauntlet_startup::print_parse_error`].
    pub fn from_command_line() -> Result<Self, clap::Error> {
        let config = Self::checked(std::env::args_os())?;
        match config.listeners() {
            Ok(_) => Ok(config),
            Err(problem) => Err(Self::command().error(ErrorKind::ValueValidation, problem)),
        }
    }

    /// Parses the environment without flags: for a program that embeds the manager.
    ///
    /// # Errors
    /// A variable has an invalid value; the text names it and the fix.
    pub fn from_environment() -> Result<Self, clap::Error> {
        Self::checked(["gauntlet-manager"])
    }

    /// Parses, and checks flags against each other.
    pub(crate) fn checked(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut config = Self::try_parse_from(arguments)?;
        // Empty variables count as unset: compose files set them.
        config.etcd_endpoints.retain(|endpoint| !endpoint.is_empty());
        if config.etcd_endpoints.is_empty() {
            config.etcd_endpoints =
                config.etcd_endpoint.iter().filter(|endpoint| !endpoint.is_empty()).cloned().collect();
        }
        config.etcd_username.take_if(|name| name.is_empty());
        let invalid = |text: String| Err(Self::command().error(ErrorKind::ValueValidation, text));
        if let Err(problem) = config.access.check() {
            return invalid(problem);
        }
        if config.lease_ttl < MIN_LEASE_TTL {
            return invalid(format!(
                "--lease-ttl (LEASE_TTL) is {:?}; it must be at least {MIN_LEASE_TTL:?}",
                config.lease_ttl
            ));
        }
        match config.etcd_deadline {
            Some(deadline) if deadline >= config.lease_ttl => invalid(format!(
                "--etcd-deadline (ETCD_DEADLINE) is {deadline:?}, and --lease-ttl (LEASE_TTL) is {:?}: a call must end before the lease \
                 can expire; pass a shorter deadline or a longer lease",
                config.lease_ttl
            )),
            _ => Ok(config),
        }
    }

    /// The deadline of one call to etcd.
    pub(crate) fn etcd_deadline(&self) -> Duration {
        self.etcd_deadline.unwrap_or_else(|| DEFAULT_ETCD_DEADLINE.min(self.lease_ttl * 9 / 10))
    }

    /// The user name and password for etcd, if there is a user name. Reads the password file.
    pub(crate) fn etcd_credentials(&self) -> anyhow::Result<Option<(String, SecretString)>> {
        let Some(username) = self.etcd_username.clone() else { return Ok(None) };
        let password = password("etcd", self.etcd_password.as_ref(), self.etcd_password_file.as_deref())?;
        Ok(Some((username, password)))
    }

    /// Whether other machines can reach the API.
    pub(crate) fn listens_beyond_loopback(&self) -> bool {
        self.listen.reach_beyond_loopback()
    }

    /// Listens on `address` only, without TLS, whatever flags and environment say: for a program that embeds the manager.
    pub fn listen_on(&mut self, address: SocketAddr) {
        self.listen.replace(address);
    }

    /// The listeners of the API.
    ///
    /// # Errors
    /// One of them is not secure, or nobody could use it; the text names it and the fix.
    pub(crate) fn listeners(&self) -> Result<Vec<Listener>, String> {
        self.listen.listeners(self.access.has_authentication())
    }

    /// How many changes may run at the same time.
    pub(crate) fn changes(&self) -> usize {
        count(self.max_changes)
    }

    /// The limits of each port.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            connections: count(self.max_connections),
            calls: count(self.max_calls),
            peer: PeerLimits { connections: count(self.max_peer_connections), calls: self.max_peer_calls.get() },
            header_timeout: self.header_timeout,
            stall_timeout: self.stall_timeout,
            keepalive: self.keepalive,
        }
    }

    /// The directory of the process provisioner.
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
        assert_eq!(config.debug_address, DebugAddress(Some(([127, 0, 0, 1], 8081).into())));
    }

    #[test]
    fn default_limits_are_those_of_the_domain() {
        let (config, domain) = (parse(&[]).unwrap(), gauntlet_domain::Settings::default());
        assert_eq!((config.lock_timeout, config.pool_max), (domain.lock_timeout, domain.pool_max));
        assert_eq!(config.lock_timeout, Duration::from_secs(30));
    }

    #[test]
    fn instance_limits_are_parsed_and_their_defaults_are_in_the_help() {
        let config = parse(&["--limit-default", "memory=1GiB", "--limit-max", "memory=2GiB,processes=9"]).unwrap();
        assert_eq!((config.limit_default.memory, config.limit_default.processes), (Some(1 << 30), None));
        assert_eq!((config.limit_max.memory, config.limit_max.processes), (Some(2 << 30), Some(9)));
        assert_eq!(parse(&["--require-limits", "cgroup1"]).unwrap().require_limits, LimitBackend::Cgroup1);
        assert!(parse(&["--require-limits", "cgroup"]).unwrap_err().to_string().contains("expected cgroup2, cgroup1"));
        let error = parse(&["--limit-max", "memroy=2GiB"]).unwrap_err().to_string();
        assert!(error.contains("--limit-max") && error.contains("did you mean memory?"), "{error}");
        let command = Config::command();
        let argument = command.get_arguments().find(|argument| argument.get_id() == "limit_default").unwrap();
        let help = argument.get_help().unwrap().to_string();
        let documented = help.split_whitespace().find(|word| word.starts_with("memory=")).unwrap();
        let documented = parse_limits(documented.trim_end_matches('.')).unwrap();
        assert_eq!(documented, gauntlet_provision::process::default_limits(LimitBackend::Cgroup2));
    }

    #[test]
    fn default_timeouts() {
        let config = parse(&[]).unwrap();
        let seconds =
            [config.reconcile_every, config.header_timeout, config.stall_timeout, config.keepalive, config.drain];
        assert_eq!(seconds.map(|timeout| timeout.as_secs()), [30, 30, 30, 30, 5]);
    }

    #[test]
    fn default_shutdown_fits_into_ten_seconds() {
        let config = parse(&[]).unwrap();
        let total = config.drain + crate::STORE_SHUTDOWN_TIMEOUT + gauntlet_telemetry::SHUTDOWN_TIMEOUT;
        assert!(total < Duration::from_secs(10), "{total:?}");
    }

    #[test]
    fn scenario_cache_is_ten_gibibytes_by_default() {
        assert_eq!(parse(&[]).unwrap().scenario_keep, 10 << 30);
    }

    #[test]
    fn empty_values_count_as_unset() {
        let credentials = ["--etcd-username", "", "--etcd-password", ""];
        let config = parse(&[&["--etcd-endpoints", ""], &credentials[..]].concat()).unwrap();
        assert!(config.etcd_endpoints.is_empty());
        assert_eq!(config.etcd_username, None);
    }

    #[test]
    fn both_names_set_the_endpoints() {
        for (arguments, endpoints) in [
            (&["--etcd-endpoint", "a:1,b:2"][..], &["a:1", "b:2"][..]),
            (&["--etcd-endpoint", "a:1", "--etcd-endpoints", "c:3"], &["c:3"]),
        ] {
            assert_eq!(parse(arguments).unwrap().etcd_endpoints, endpoints);
        }
    }

    #[test]
    fn invalid_values_are_reported_with_flag_and_fix() {
        for (arguments, part) in [
            (["--lock-timeout", "soon"], "expected a duration above zero such as 30s"),
            (["--instance-ports", "9-3"], "expected FIRST-LAST"),
            (["--instance-ports", "0-9"], "expected FIRST-LAST"),
            (["--isolation", "root"], "expected uid, userns, landlock or none"),
            (["--require-isolation", "auto"], "expected uid, userns, landlock or none"),
            (["--instance-uids", "1000-2000"], "expected FIRST-LAST from 65536"),
            (["--instance-uids", "1900000000-4294967295"], "to 2147483647"),
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
    fn etcd_deadline_is_shorter_than_the_lease() {
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
