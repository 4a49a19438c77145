//! `cargo xtask doctor`: which toolchains and components are installed, which are missing, and how to get them.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use gauntlet_sandbox::Level;
use gauntlet_stack::{Tool, Tools, pages};

use crate::stack;

/// A user that nobody has, as instances get.
const PROBE_UID: u32 = 1_900_000_000;

pub(crate) fn run() -> Result<ExitCode> {
    let tools = Tools::from_env();
    let mut missing = Vec::new();
    println!("Toolchains");
    for (name, argument, hint) in [
        ("cargo", "--version", "install Rust with rustup"),
        ("go", "version", "install Go 1.26 or newer; it builds etcd, the collector and Jaeger"),
        ("git", "--version", "install the Debian package git"),
    ] {
        match first_line(name, argument) {
            Some(version) => row(true, name, version_number(&version), ""),
            None => {
                row(false, name, "missing", "");
                missing.push(format!("{name}: {hint}"));
            }
        }
    }
    println!("Components");
    let mut pages = Vec::new();
    for tool in Tool::ALL {
        match tools.find(tool) {
            Some(path) => {
                let version = tool.version(&path).unwrap_or_else(|| "unknown version".to_owned());
                row(true, tool.binary(), version_number(&version), &path.display().to_string());
                if let Some(reason) = pages::missing_from(&tools, tool, &path) {
                    pages.push((tool.binary(), reason.to_owned()));
                }
            }
            None => {
                row(false, tool.binary(), "missing", "");
                if let Err(error) = tools.require(tool) {
                    missing.push(error.to_string());
                }
            }
        }
    }
    let running = stack::running()?;
    if let Some(ports) = &running {
        pages = pages::lines(ports).to_vec();
    }
    if !pages.is_empty() {
        println!("Pages");
        for (name, line) in pages {
            println!("     {name:<24} {line}");
        }
    }
    println!("Isolation of instances");
    let probe =
        gauntlet_sandbox::probe(&std::env::current_exe()?, Path::new("/"), PROBE_UID, Level::Uid, Command::spawn);
    let landlock = if probe.landlock { "with Landlock" } else { "without Landlock, which this kernel lacks" };
    row(probe.best.has_namespaces(), probe.best.name(), landlock, "");
    for (level, failure) in &probe.refused {
        row(false, level.name(), "not here", &failure.to_string());
    }
    println!("Optional");
    match first_line("docker", "info") {
        Some(_) => row(true, "docker", "running", "not needed; deploy/compose runs the same stack with it"),
        None => row(false, "docker", "not running", "not needed; cargo xtask stack works without it"),
    }
    println!("Built components are in {}", tools.cache.display());
    if missing.is_empty() {
        println!("Nothing is missing.");
        return Ok(ExitCode::SUCCESS);
    }
    println!("\nMissing:");
    for line in missing {
        println!("  {line}");
    }
    println!("`cargo xtask dev --no-stack` needs only cargo.");
    Ok(ExitCode::FAILURE)
}

fn row(is_found: bool, name: &str, version: &str, detail: &str) {
    let mark = if is_found { "ok" } else { "--" };
    println!("  {mark} {name:<24} {version:<18} {detail}");
}

/// The first part of a text that looks like a version number, or the text if there is none.
fn version_number(text: &str) -> &str {
    let mut numbers = text.split(|c: char| !(c.is_ascii_digit() || c == '.')).map(|number| number.trim_matches('.'));
    numbers.find(|number| number.contains('.')).unwrap_or(text)
}

fn first_line(program: impl AsRef<Path>, argument: &str) -> Option<String> {
    let output = Command::new(program.as_ref()).arg(argument).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then(|| text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::version_number;

    #[test]
    fn version_numbers_are_found_in_program_output() {
        for (output, version) in [
            ("cargo 1.95.0 (f2d3ce0bd 2026-03-21)", "1.95.0"),
            ("/usr/bin/docker-registry github.com/docker/distribution 2.8.2+ds1", "2.8.2"),
            (r#"{"gitCommit":"","gitVersion":"v2.13.0","buildDate":""}"#, "2.13.0"),
            ("ip utility, iproute2-6.1.0, libbpf 1.1.2", "6.1.0"),
            ("unknown version", "unknown version"),
        ] {
            assert_eq!(version_number(output), version);
        }
    }
}
