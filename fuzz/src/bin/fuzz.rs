//! libFuzzer on one target, named by `GAUNTLET_FUZZ_TARGET`. Its arguments are libFuzzer's.
#![no_main]
#![allow(clippy::expect_used, reason = "the fuzzer cannot run without a target")]

use std::sync::LazyLock;

use gauntlet_fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("GAUNTLET_FUZZ_TARGET").expect("GAUNTLET_FUZZ_TARGET names the target");
    let found = TARGETS.into_iter().find(|(target, _)| *target == name);
    found.expect("GAUNTLET_FUZZ_TARGET is the name of a target").1
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
