//! `gauntlet scenario`: for authors of scenarios.

use std::{
    io::{IsTerminal as _, Read as _},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use gauntlet_scenario::{Access, Credentials, Progress, Report};

use super::{failure::Failure, output::write, printable::printable};

pub(super) const EXAMPLES: &str = "\
Examples:
  gauntlet scenario validate ./web
  gauntlet scenario push ./web registry.lan:5000/web:1 --insecure
  gauntlet scenario push ./web ghcr.io/team/web:1 --username ci --password-stdin < password";

/// The most that is read from standard input as a password, in bytes: more is a mistake.
const MAX_PASSWORD_SIZE: u64 = 64 << 10;

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Validate a scenario: its scenario.yaml, templates and files.
    Validate {
        /// The scenario's directory.
        dir: PathBuf,
    },
    /// Validate a scenario, push it, and print its reference with the digest.
    Push(Push),
}

/// The scenario to push, and where to.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// The scenario's directory.
    dir: PathBuf,
    /// The reference to push to: registry/repository:tag.
    #[arg(value_name = "REF")]
    reference: String,
    /// Use plain HTTP for the registry.
    #[arg(long, env = "OCI_INSECURE", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, value_name = "BOOL", hide_default_value = true)]
    insecure: bool,
    /// The user name for the registry. The password is read from OCI_PASSWORD or, with --password-stdin, from standard input.
    #[arg(long, env = "OCI_USERNAME", value_name = "NAME")]
    username: Option<String>,
    /// Read the password from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Docker's config.json, or its directory: where `docker login` keeps credentials. Used without --username.
    #[arg(long, env = "DOCKER_CONFIG", value_name = "FILE")]
    docker_config: Option<PathBuf>,
}

pub(super) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Validate { dir } => {
            let report = gauntlet_scenario::validate(&dir)?;
            warn(&report);
            if !report.is_valid() {
                return Err(Failure::Invalid(report));
            }
            write(&contents(&report))
        }
        Command::Push(push) => {
            let access = Access {
                insecure: push.insecure,
                credentials: credentials(&push)?.into_iter().collect(),
                docker_config: push.docker_config.clone().filter(|path| !path.as_os_str().is_empty()),
                ..Access::default()
            };
            warn(&gauntlet_scenario::validate(&push.dir)?);
            let reference = gauntlet_scenario::push(&push.dir, &push.reference, &access, &progress).await?;
            write(&printable(&reference))
        }
    }
}

fn credentials(push: &Push) -> Result<Option<Credentials>, Failure> {
    let Some(username) = push.username.clone().filter(|username| !username.is_empty()) else { return Ok(None) };
    let password = if push.password_stdin {
        let mut text = String::new();
        std::io::stdin().lock().take(MAX_PASSWORD_SIZE).read_to_string(&mut text).map_err(Failure::Io)?;
        text.trim_end_matches(['\r', '\n']).to_owned()
    } else {
        std::env::var("OCI_PASSWORD").unwrap_or_default()
    };
    if password.is_empty() {
        return Err(Failure::Usage("--username needs a password; set OCI_PASSWORD or pass --password-stdin"));
    }
    // A reference without a registry is refused before anything is sent.
    let registry = push.reference.split_once('/').and_then(|(registry, _)| registry.parse().ok());
    Ok(registry.map(|registry| Credentials { registry, username, password: password.into() }))
}

fn warn(report: &Report) {
    for warning in &report.warnings {
        anstream::eprintln!("warning: {}", printable(warning));
    }
}

fn contents(report: &Report) -> String {
    let bytes: u64 = report.files.iter().map(|file| file.size).sum();
    let mut lines = vec![match report.files.len() {
        1 => format!("The scenario is valid: 1 file, {bytes} bytes."),
        files => format!("The scenario is valid: {files} files, {bytes} bytes."),
    }];
    lines.extend(report.files.iter().map(|file| {
        let executable = if file.executable { "  executable" } else { "" };
        format!("  {:>10}  {}{executable}", file.size, printable(&file.path))
    }));
    lines.join("\n")
}

/// Prints progress to standard error if that is a terminal.
fn progress(progress: Progress) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    match progress {
        Progress::File { path, done, of, known } => {
            let how = if known { "already there" } else { "uploaded" };
            anstream::eprintln!("{done}/{of} {} {how}", printable(&path));
        }
        Progress::Manifest { digest } => anstream::eprintln!("pushed {digest}"),
    }
}
