//! Every input that was kept, and small changes of each. `cargo xtask fuzz` searches further.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::{fs, panic, path::PathBuf};

use gauntlet_fuzz::{TARGETS, corpus};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// Changed inputs of each target. A few seconds in all.
const CHANGED: usize = 1000;

/// The kept inputs of a target, by name of their file.
fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = corpus(target);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut inputs: Vec<_> =
        entries.map(|entry| entry.unwrap().path()).map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    inputs.sort();
    assert!(inputs.len() >= 3, "{} has {} inputs", dir.display(), inputs.len());
    inputs
}

#[test]
fn kept_inputs_hold() {
    for (target, run) in TARGETS {
        for (path, input) in inputs(target) {
            panic::catch_unwind(|| run(&input)).unwrap_or_else(|_| panic!("{target}: {}", path.display()));
        }
    }
}

#[test]
fn changed_inputs_hold() {
    for (target, run) in TARGETS {
        let inputs = inputs(target);
        // The same in every run; another seed is another search.
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..CHANGED {
            let mut input = inputs[random.random_range(0..inputs.len())].1.clone();
            for _ in 0..random.random_range(1..4) {
                change(&mut input, &inputs[random.random_range(0..inputs.len())].1, &mut random);
            }
            panic::catch_unwind(|| run(&input))
                .unwrap_or_else(|_| panic!("{target}: keep this in its corpus: {:?}", String::from_utf8_lossy(&input)));
        }
    }
}

/// Makes one small change: a bit, a removed or repeated part, or a part of another input.
fn change(input: &mut Vec<u8>, other: &[u8], random: &mut StdRng) {
    let at = random.random_range(0..=input.len());
    let end = random.random_range(at..=input.len().min(at + 16));
    match random.random_range(0..4) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << random.random_range(0..8);
            }
        }
        1 => drop(input.drain(at..end)),
        2 => {
            let part = input[at..end].repeat(random.random_range(1..8));
            input.splice(at..at, part);
        }
        _ => {
            let from = random.random_range(0..=other.len());
            let to = random.random_range(from..=other.len().min(from + 16));
            input.splice(at..end, other[from..to].iter().copied());
        }
    }
}
