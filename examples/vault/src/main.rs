//! Two ports, two flags.

fn main() {}
