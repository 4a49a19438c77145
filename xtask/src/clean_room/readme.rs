//! The commands in README.md.

use std::fs;

use anyhow::{Context as _, Result};
use gauntlet_stack::workspace_root;

/// The address of the API in the README's commands.
const ADDRESS: &str = "localhost:8080";

#[derive(Debug)]
pub(super) struct Readme {
    /// The first command, which starts Gauntlet.
    pub(super) start: String,
    /// The second command, which runs the tests.
    pub(super) test: String,
    /// The call that creates an instance.
    pub(super) create: String,
    /// The other calls of the API, in order.
    pub(super) others: Vec<String>,
    /// The Debian packages that it lists.
    pub(super) packages: Vec<String>,
}

impl Readme {
    pub(super) fn read() -> Result<Readme> {
        let path = workspace_root().join("README.md");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Readme::parse(&text).context("README.md does not contain the commands that clean-room looks for")
    }

    fn parse(text: &str) -> Option<Readme> {
        let code: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
        let starting = |start: &'static str| {
            code.iter().filter(move |line| line.starts_with(start)).map(|line| (*line).to_owned())
        };
        let mut commands = starting("cargo xtask ");
        let (start, test) = (commands.next()?, commands.next()?);
        let calls: Vec<String> = starting("curl ").filter(|line| line.contains(ADDRESS)).collect();
        let (mut creates, others): (Vec<_>, Vec<_>) = calls.into_iter().partition(|line| line.contains("/instance -d"));
        let packages = starting("apt-get install ").next()?;
        let packages = packages.split_whitespace().skip(2).map(str::to_owned).collect();
        Some(Readme { start, test, create: creates.pop()?, others, packages })
    }

    /// A call of the API on another port. It fails when the API responds with an error.
    pub(super) fn with_port(&self, line: &str, port: u16) -> String {
        line.replace(ADDRESS, &format!("localhost:{port}")).replacen("curl -s", "curl -sf", 1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn readme_contains_the_commands() {
        let readme = Readme::read().unwrap();
        assert_eq!((readme.start.as_str(), readme.test.as_str()), ("cargo xtask dev", "cargo xtask test"));
        assert!(readme.packages.iter().any(|package| package == "build-essential"), "{readme:?}");
        assert!(readme.others.len() >= 3, "{readme:?}");
        assert!(readme.with_port(&readme.create, 1234).contains("localhost:1234/api/v1/instance -d"), "{readme:?}");
    }
}
