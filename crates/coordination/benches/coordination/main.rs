//! Compares coordination with one raw transaction of its store. `cargo xtask bench coordination` runs it.
#![allow(clippy::expect_used, reason = "a bench")]

mod measure;
mod noop;
mod store;
mod workloads;

use std::{
    num::{ParseFloatError, ParseIntError},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use measure::Row;
use store::Backend;

const HELP: &str = "\
Compares coordination with one raw transaction of its store (a compare, a put of 256 bytes, a get). Both run in turns.

  --backend etcd|embedded   The store [default: etcd]
  --seconds N               How long to measure each of the two, per row [default: 8]
  --only NAME               Measures only the rows whose name starts with NAME
  --listing CHALLENGES      Instead measures listings of this many challenges with ten instances each
  --json FILE               Where to write the rows [default: target/bench/coordination.json]
";

struct Arguments {
    backend: Backend,
    seconds: f64,
    only: String,
    listing: Option<usize>,
    json: PathBuf,
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let json = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bench/coordination.json").into();
        let mut parsed = Self { backend: Backend::Etcd, seconds: 8.0, only: String::new(), listing: None, json };
        // `cargo bench` passes `--bench`.
        while let Some(name) = arguments.find(|argument| argument != "--bench") {
            let value = arguments.next().ok_or(HELP)?;
            parsed.set(&name, value).map_err(|problem| format!("{name}: {problem}\n\n{HELP}"))?;
        }
        Ok(parsed)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        match name {
            "--backend" => self.backend = Backend::parse(&value).ok_or("must be etcd or embedded")?,
            "--seconds" => self.seconds = value.parse().map_err(|error: ParseFloatError| error.to_string())?,
            "--only" => self.only = value,
            "--listing" => self.listing = Some(value.parse().map_err(|error: ParseIntError| error.to_string())?),
            "--json" => self.json = value.into(),
            _ => return Err("unknown option".to_owned()),
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => run(arguments).await,
        Err(usage) => Err(usage),
    };
    result.map_or_else(
        |message| {
            eprintln!("{message}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

async fn run(arguments: Arguments) -> Result<(), String> {
    if let Some(challenges) = arguments.listing {
        workloads::listing(arguments.backend, challenges).await;
        return Ok(());
    }
    let time = Duration::from_secs_f64(arguments.seconds);
    let rows = workloads::all(arguments.backend, time, &arguments.only).await;
    Row::print(&rows);
    write(&rows, &arguments.json).map_err(|error| format!("cannot write {}: {error}", arguments.json.display()))
}

fn write(rows: &[Row], path: &Path) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(path, serde_json::to_vec_pretty(rows)?)
}
