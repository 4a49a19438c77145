//! One page, one port, one flag.

fn main() {}
