//! `gauntlet flags`: edits the file with the keys that flags are derived from. Talks to no manager.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use gauntlet_scenario::FlagKeys;

use super::{arguments::path, failure::Failure, output::write};

pub(super) const EXAMPLES: &str = "\
New instances use the last key of the file; each instance keeps its own until it is gone. Managers notice a new key at their next create. \
Managers that share a store need the same keys: give a new one to all of them before the next create.

Examples:
  gauntlet flags rotate --flag-key-file /var/lib/gauntlet/flag.key
  gauntlet flags list --flag-key-file /var/lib/gauntlet/flag.key";

/// The file to edit.
#[derive(Debug, Args)]
pub(crate) struct File {
    /// The key file of the managers: flag.key in their --dir, unless they have --flag-key-file.
    #[arg(long, env = "FLAG_KEY_FILE", global = true, value_parser = path, value_name = "FILE")]
    flag_key_file: Option<PathBuf>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Add a random key for new instances, and print its id.
    Rotate,
    /// List the ids of the keys, the oldest first.
    List,
}

pub(super) fn run(file: &File, command: &Command) -> Result<(), Failure> {
    let Some(file) = &file.flag_key_file else {
        return Err(Failure::Usage("the key file is missing; pass --flag-key-file FILE, or set FLAG_KEY_FILE"));
    };
    match command {
        Command::Rotate => write(&FlagKeys::rotate(file).map_err(Failure::Io)?),
        // Reading must not create a file.
        Command::List if !file.exists() => Err(Failure::Io(std::io::ErrorKind::NotFound.into())),
        Command::List => write(&FlagKeys::load_or_create(file).map_err(Failure::Io)?.ids().join("\n")),
    }
}
