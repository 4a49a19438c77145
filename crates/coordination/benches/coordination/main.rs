//! What coordination costs beside one raw transaction of the store below it. `cargo xtask bench coordination` runs it.
#![allow(clippy::expect_used, reason = "a bench")]

mod measure;
mod nothing;
mod store;
mod work;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use measure::Row;
use store::Backend;

const HELP: &str = "\
Measures coordination beside one raw transaction of its store (a compare, a put of 256 bytes, a get), in the same run, turn by turn

  --backend etcd|embedded   The store [default: etcd]
  --seconds N               How long each of the two is measured, for each row [default: 8]
  --only NAME               Only the rows whose name begins so
  --listing CHALLENGES      Lists so many challenges of ten instances each instead, and counts them
  --json FILE               Where the rows go [default: target/bench/coordination.json]
";

struct Arguments {
    backend: Backend,
    seconds: f64,
    only: String,
    listing: Option<usize>,
    json: PathBuf,
}

impl Arguments {
    fn read(mut from: impl Iterator<Item = String>) -> Result<Self, String> {
        let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let json = workspace.join("target/bench/coordination.json");
        let mut read = Self { backend: Backend::Etcd, seconds: 8.0, only: String::new(), listing: None, json };
        while let Some(name) = from.next() {
            // What `cargo bench` adds.
            if name == "--bench" {
                continue;
            }
            let value = from.next().ok_or_else(|| HELP.to_owned())?;
            let wrong = |problem: String| format!("{name} {value}: {problem}\n\n{HELP}");
            match name.as_str() {
                "--backend" => {
                    read.backend = match value.as_str() {
                        "etcd" => Backend::Etcd,
                        "embedded" => Backend::Embedded,
                        _ => return Err(wrong("it is neither etcd nor embedded".to_owned())),
                    }
                }
                "--seconds" => {
                    read.seconds = value.parse().map_err(|error: std::num::ParseFloatError| wrong(error.to_string()))?
                }
                "--only" => read.only = value,
                "--listing" => {
                    let count = value.parse().map_err(|error: std::num::ParseIntError| wrong(error.to_string()))?;
                    read.listing = Some(count);
                }
                "--json" => read.json = value.into(),
                _ => return Err(HELP.to_owned()),
            }
        }
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
    if let Some(challenges) = arguments.listing {
        work::listing(arguments.backend, challenges).await;
        return ExitCode::SUCCESS;
    }
    let rows = work::all(arguments.backend, Duration::from_secs_f64(arguments.seconds), &arguments.only).await;
    Row::print(&rows);
    match write(&rows, &arguments.json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", arguments.json.display());
            ExitCode::FAILURE
        }
    }
}

fn write(rows: &[Row], to: &Path) -> std::io::Result<()> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(to, serde_json::to_vec_pretty(rows)?)
}
