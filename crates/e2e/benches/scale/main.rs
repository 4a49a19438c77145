//! What operations cost beside thousands of running instances, in one run. `cargo xtask bench scale` runs it.
#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a bench")]

mod cluster;
mod level;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use cluster::Cluster;
use level::{Effort, Level};

const HELP: &str = "\
Measures create, claim, renew, delete, a restart of the manager, a reconcile pass and a full list: on an empty store first, then beside
running instances. One manager, one real etcd, real processes.

  --instances N,N,...  How many instances run at each level after the first, which has none; `none` measures that one only
                       [default: 1000,4000]
  --operations N       How often each operation is done by one client; four times as often by 64 [default: 200]
  --json FILE          Where the figures go [default: target/bench/scale.json]
";

struct Arguments {
    levels: Vec<usize>,
    operations: usize,
    json: PathBuf,
}

impl Arguments {
    fn read(mut from: impl Iterator<Item = String>) -> Result<Self, String> {
        let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let json = workspace.join("target/bench/scale.json");
        let mut read = Self { levels: vec![1000, 4000], operations: 200, json };
        while let Some(name) = from.next() {
            // `cargo bench` adds this one.
            if name == "--bench" {
                continue;
            }
            let value = from.next().ok_or_else(|| HELP.to_owned())?;
            let number = |text: &str| {
                let parsed = text.trim().parse::<usize>().ok().filter(|number| *number > 0);
                parsed.ok_or_else(|| format!("{name} {value}: {text:?} is not a number above 0\n\n{HELP}"))
            };
            match name.as_str() {
                "--instances" if value == "none" => read.levels.clear(),
                "--instances" => read.levels = value.split(',').map(number).collect::<Result<_, _>>()?,
                "--operations" => read.operations = number(&value)?,
                "--json" => read.json = value.into(),
                _ => return Err(HELP.to_owned()),
            }
        }
        read.levels.sort_unstable();
        Ok(read)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = match Arguments::read(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(help) => {
            eprintln!("{help}");
            return ExitCode::FAILURE;
        }
    };
    let mut cluster = Cluster::start().await;
    let effort = Effort::of(arguments.operations);
    // Connections, caches, the first pages of everything: not part of any level.
    eprintln!("warming up");
    Level::measure(&mut cluster, &Effort::of(20)).await;
    let mut levels = Vec::new();
    for running in std::iter::once(0).chain(arguments.levels) {
        cluster.fill(running).await;
        eprintln!("{running} instances run: measuring");
        levels.push((running, Level::measure(&mut cluster, &effort).await));
    }
    table::print(&levels);
    match table::write(&levels, &arguments.json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", arguments.json.display());
            ExitCode::FAILURE
        }
    }
}
