//! `cargo xtask deny`: checks the crates in `Cargo.lock` with cargo-deny.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;
use gauntlet_stack::Tools;

use crate::cargo_tool;
use crate::command::run;

/// Where cargo-deny fetches the advisories from.
const DATABASE: &str = "https://github.com/RustSec/advisory-db";

#[derive(Debug, Args)]
#[command(
    after_help = "Checks licences, banned and duplicate crates, and sources, as CI does; this needs crates.io only. deny.toml has the rules.\n\n\
                  With --advisories it also checks the RustSec database, which is fetched. Where it cannot be fetched, clone \
                  https://github.com/RustSec/advisory-db elsewhere at a commit that you review, copy the clone, and name it with --database."
)]
pub(crate) struct Deny {
    /// Also check for vulnerable, unsound, unmaintained and yanked crates
    #[arg(long)]
    advisories: bool,
    /// A clone of the RustSec database, with its branch `main`, to use instead of the network
    #[arg(long, value_name = "DIR", requires = "advisories")]
    database: Option<PathBuf>,
}

impl Deny {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let tools = Tools::from_env();
        check(&tools)?;
        if self.advisories {
            check_advisories(&tools, self.database.as_deref())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Checks licences, bans and sources. cargo downloads crates that it has not, also those of other platforms.
///
/// # Errors
/// When a crate breaks a rule of deny.toml; cargo-deny has printed which.
pub(crate) fn check(tools: &Tools) -> Result<()> {
    run(Command::new(cargo_tool::DENY.ensure(tools)?).args([
        "--locked",
        "--log-level",
        "error",
        "check",
        "--hide-inclusion-graph",
        "licenses",
        "bans",
        "sources",
    ]))
}

fn check_advisories(tools: &Tools, database: Option<&Path>) -> Result<()> {
    let mut deny = Command::new(cargo_tool::DENY.ensure(tools)?);
    deny.args(["--locked", "check", "--hide-inclusion-graph", "advisories"]);
    if let Some(database) = database {
        let database = database.canonicalize().with_context(|| format!("find {}", database.display()))?;
        // cargo-deny takes only addresses with a host; git, which fetches for it, replaces the address.
        deny.env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", format!("url.file://{}.insteadOf", database.display()))
            .env("GIT_CONFIG_VALUE_0", DATABASE);
    }
    run(&mut deny)
}
