//! Credentials from docker's `config.json`, with credential helpers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use super::{allowed::Host, login::Login};

/// The time limit of a credential helper.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most that is read from a helper or from the configuration, in bytes.
const MAX_OUTPUT: u64 = 64 << 10;
const MAX_CONFIG: u64 = 1 << 20;
/// The name under which docker keeps the login of its default registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// The environment of helpers: where they find programs, keyrings and their cloud's configuration.
const ENVIRONMENT: [&str; 8] =
    ["PATH", "HOME", "USER", "LANG", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "GNUPGHOME"];
const ENVIRONMENT_PREFIXES: [&str; 4] = ["AWS_", "AZURE_", "CLOUDSDK_", "GOOGLE_"];

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    /// `user:password` in base64.
    auth: Option<SecretString>,
    username: Option<String>,
    password: Option<SecretString>,
    identitytoken: Option<SecretString>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: SecretString,
}

/// Returns the login for a registry: of its helper, else of the default store, else the one in the file. `config` is the file or its
/// directory.
///
/// # Errors
/// The file can't be read or parsed, or a helper fails or exceeds its time limit. The text names the file or the helper.
pub(crate) async fn login(config: &Path, registry: &Host) -> Result<Option<Login>, String> {
    let is_dir = tokio::fs::metadata(config).await.is_ok_and(|meta| meta.is_dir());
    let path = if is_dir { config.join("config.json") } else { config.to_owned() };
    let config = read(path).await?;
    let registry = registry.to_string();
    let hub = matches!(registry.as_str(), "docker.io" | "index.docker.io" | "registry-1.docker.io");
    let server = if hub { DOCKER_HUB } else { registry.as_str() };
    let helper =
        config.cred_helpers.get(server).or_else(|| config.cred_helpers.get(&registry)).or(config.creds_store.as_ref());
    if let Some(helper) = helper.filter(|helper| !helper.is_empty())
        && let Some(login) = ask(helper, server).await?
    {
        return Ok(Some(login));
    }
    // Keys are hosts, or URLs that older versions of docker wrote.
    let host = |key: &str| {
        let key = key.trim_start_matches("https://").trim_start_matches("http://");
        key.split('/').next().unwrap_or(key).to_ascii_lowercase()
    };
    let found = config.auths.iter().find(|(key, _)| *key == server || host(key) == host(server));
    found.map_or(Ok(None), |(_, auth)| auth.login(&registry))
}

async fn read(path: PathBuf) -> Result<Config, String> {
    let failed = |error: &dyn std::fmt::Display| {
        format!("cannot use docker's configuration {} (--docker-config): {error}", path.display())
    };
    let file = tokio::fs::File::open(&path).await.map_err(|error| failed(&error))?;
    let bytes = bounded(file, MAX_CONFIG).await.map_err(|error| failed(&error))?;
    // Only the position: the text of the error may quote a secret.
    serde_json::from_slice(&bytes)
        .map_err(|error| failed(&format!("invalid JSON in line {}, column {}", error.line(), error.column())))
}

impl Auth {
    fn login(&self, registry: &str) -> Result<Option<Login>, String> {
        let given = |secret: &Option<SecretString>| secret.clone().filter(|secret| !secret.expose_secret().is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Login::Identity(token)));
        }
        if let (Some(username), Some(password)) = (&self.username, given(&self.password)) {
            return Ok(Some(Login::Password(username.clone(), password)));
        }
        let Some(auth) = given(&self.auth) else { return Ok(None) };
        let decoded = BASE64_STANDARD.decode(auth.expose_secret()).ok().map(Zeroizing::new);
        decoded
            .as_ref()
            .and_then(|bytes| std::str::from_utf8(bytes).ok()?.split_once(':'))
            .map(|(username, password)| {
                Some(Login::Password(username.to_owned(), password.trim_end_matches('\0').into()))
            })
            .ok_or_else(|| {
                format!("docker's configuration has an auth for {registry} that is not user:password in base64")
            })
    }
}

/// Reads to the end.
///
/// # Errors
/// I/O errors; `InvalidData` if there are more than `limit` bytes.
async fn bounded(from: impl AsyncRead + Unpin, limit: u64) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    from.take(limit + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > limit {
        let problem = format!("holds more than {limit} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, problem));
    }
    Ok(bytes)
}

/// Asks `docker-credential-NAME`, which must be in PATH.
async fn ask(name: &str, server: &str) -> Result<Option<Login>, String> {
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!(
            "docker's configuration names the credential helper {name:?}; a name has letters, digits, '.', '_' and '-'"
        ));
    }
    run(&format!("docker-credential-{name}"), server, HELPER_TIMEOUT).await
}

/// Runs a credential helper. It gets few variables, and is killed at its time limit.
///
/// # Cancel safety
/// Dropping the future kills the helper.
async fn run(program: &str, server: &str, timeout: Duration) -> Result<Option<Login>, String> {
    let environment = std::env::vars_os().filter(|(name, _)| {
        name.to_str().is_some_and(|name| {
            ENVIRONMENT.contains(&name) || ENVIRONMENT_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        })
    });
    let mut child = Command::new(program)
        .arg("get")
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot start {program}: {error}"))?;
    let exchange = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that doesn't read it fails in its own way.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let stdout = child.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?;
        let output = bounded(stdout, MAX_OUTPUT).await?;
        Ok::<_, std::io::Error>((output, child.wait().await?))
    };
    let (output, status) = tokio::time::timeout(timeout, exchange)
        .await
        .map_err(|_| format!("{program} timed out after {timeout:?}"))?
        .map_err(|error| format!("{program}: {error}"))?;
    if !status.success() {
        // Helpers say on standard output that they have no credentials.
        let missing = String::from_utf8_lossy(&output).contains("credentials not found");
        return if missing { Ok(None) } else { Err(format!("{program} failed: {status}")) };
    }
    let Ok(Helped { username, secret }) = serde_json::from_slice(&output) else {
        return Err(format!("{program} printed something else than JSON with Username and Secret"));
    };
    if secret.expose_secret().is_empty() {
        return Ok(None);
    }
    Ok(Some(if username == "<token>" { Login::Identity(secret) } else { Login::Password(username, secret) }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// Held from writing a helper to its end: a process started meanwhile inherits the open file, and then the helper can't be executed.
    static WRITING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// Runs a helper with this shell script.
    async fn helper(script: &str, timeout: Duration) -> Result<Option<Login>, String> {
        let _writing = WRITING.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("docker-credential-test");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        run(program.to_str().unwrap(), "registry.test:5000", timeout).await
    }

    #[tokio::test]
    async fn helper_is_asked_for_the_registry_and_sees_no_other_variables() {
        // Cargo sets CARGO_MANIFEST_DIR for tests, as an operator sets OCI_PASSWORD for a manager.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let script = r#"test "$1" = get && test -n "$PATH" && printf '{"Username":"%s","Secret":"[%s]"}' "$(cat)" "$CARGO_MANIFEST_DIR""#;
        let Some(Login::Password(username, secret)) = helper(script, HELPER_TIMEOUT).await.unwrap() else {
            unreachable!("the helper has a password")
        };
        assert_eq!((username.as_str(), secret.expose_secret()), ("registry.test:5000", "[]"));
        let token = helper(r#"echo '{"Username":"<token>","Secret":"t"}'"#, HELPER_TIMEOUT).await.unwrap();
        assert!(matches!(&token, Some(Login::Identity(_))) && format!("{token:?}") == "Some(Identity(hidden))");
    }

    #[tokio::test]
    async fn failing_helpers_are_reported_without_their_output() {
        assert!(
            helper("echo credentials not found in native keychain; exit 1", HELPER_TIMEOUT).await.unwrap().is_none()
        );
        for (script, timeout, part) in [
            ("echo hunter2; exit 3", HELPER_TIMEOUT, "failed: exit status: 3"),
            ("echo hunter2", HELPER_TIMEOUT, "something else than JSON"),
            ("echo hunter2; exec sleep 60", Duration::from_millis(100), "timed out after 100ms"),
            (
                "while :; do echo hunter2hunter2hunter2hunter2hunter2; done",
                HELPER_TIMEOUT,
                "holds more than 65536 bytes",
            ),
        ] {
            let error = helper(script, timeout).await.unwrap_err();
            assert!(error.contains(part) && !error.contains("hunter2"), "{error}");
        }
    }

    #[tokio::test]
    async fn helper_names_are_no_paths() {
        for name in ["../evil", "a b", "/bin/sh"] {
            assert!(ask(name, "registry.test").await.unwrap_err().contains("names the credential helper"), "{name}");
        }
    }

    #[test]
    fn auth_is_read_from_each_of_its_forms() {
        let login = |text: &str| serde_json::from_str::<Auth>(text).unwrap().login("registry.test");
        for text in [r#"{"auth":"dTpwOnc="}"#, r#"{"username":"u","password":"p:w"}"#, r#"{"auth":"dTpwOncAAA=="}"#] {
            let Some(Login::Password(username, password)) = login(text).unwrap() else { unreachable!("{text}") };
            assert_eq!((username.as_str(), password.expose_secret()), ("u", "p:w"), "{text}");
        }
        assert!(matches!(login(r#"{"auth":"dTpw","identitytoken":"t"}"#).unwrap(), Some(Login::Identity(_))));
        assert!(login("{}").unwrap().is_none() && login(r#"{"auth":""}"#).unwrap().is_none());
        for text in [r#"{"auth":"!"}"#, r#"{"auth":"aHVudGVyMg=="}"#] {
            let error = login(text).unwrap_err();
            assert!(error.contains("registry.test") && !error.contains("hunter2"), "{error}");
        }
    }
}
