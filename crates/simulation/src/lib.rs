//! Several managers, etcd and a machine, simulated in one thread on simulated time, with fault injection. Tests only.
//!
//! `cargo xtask chaos` runs any number of seeds and replays one. `docs/adr/005-simulation.md` explains the design.
