//! Set-up, tests and the observability stack.

fn main() {}
