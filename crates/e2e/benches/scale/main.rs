//! Measures the cost of operations while thousands of instances run. `cargo xtask bench scale` runs it.
#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a bench")]

mod cluster;
mod level;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use cluster::Cluster;
use level::{Effort, Level};

const HELP: &str = "\
Measures create, claim, renew, delete, a restart of the manager, a reconcile pass and a full list, first on an empty store and then while
instances run. Uses one manager, one etcd and real processes.

  --instances N,N,...  Numbers of running instances to measure with, after the empty store; `none` measures only the empty store
                       [default: 1000,4000]
  --operations N       Calls of each operation by one client; 64 concurrent clients make four times as many [default: 200]
  --json FILE          File for the figures [default: target/bench/scale.json]
";

struct Arguments {
    levels: Vec<usize>,
    operations: usize,
    json: PathBuf,
}

impl Arguments {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let json = workspace.join("target/bench/scale.json");
        let mut parsed = Self { levels: vec![1000, 4000], operations: 200, json };
        while let Some(name) = args.next() {
            // `cargo bench` adds this flag.
            if name == "--bench" {
                continue;
            }
            let value = args.next().ok_or_else(|| HELP.to_owned())?;
            let number = |text: &str| {
                let positive = text.trim().parse::<usize>().ok().filter(|number| *number > 0);
                positive.ok_or_else(|| format!("{name} {value}: {text:?} is not a number above 0\n\n{HELP}"))
            };
            match name.as_str() {
                "--instances" if value == "none" => parsed.levels.clear(),
                "--instances" => parsed.levels = value.split(',').map(number).collect::<Result<_, _>>()?,
                "--operations" => parsed.operations = number(&value)?,
                "--json" => parsed.json = value.into(),
                _ => return Err(HELP.to_owned()),
            }
        }
        parsed.levels.sort_unstable();
        Ok(parsed)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(help) => {
            eprintln!("{help}");
            return ExitCode::FAILURE;
        }
    };
    let mut cluster = Cluster::start().await;
    let effort = Effort::of(arguments.operations);
    // Opens connections and fills caches before the first level.
    eprintln!("warming up");
    Level::measure(&mut cluster, &Effort::of(20)).await;
    let mut levels = Vec::new();
    for running in std::iter::once(0).chain(arguments.levels) {
        cluster.fill(running).await;
        eprintln!("measuring with {running} running instances");
        levels.push((running, Level::measure(&mut cluster, &effort).await));
    }
    table::print(&levels);
    match table::write(&levels, &arguments.json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write {}: {error}", arguments.json.display());
            ExitCode::FAILURE
        }
    }
}
