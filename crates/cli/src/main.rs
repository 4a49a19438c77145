//! `gauntlet`: everything in one command.

fn main() {}
