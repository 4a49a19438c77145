//! Several managers, an etcd and a machine, all simulated in one thread on simulated time, with every fault there is: tests only.
//!
//! `cargo xtask chaos` runs any number of seeds and replays one; `docs/adr/005-simulation.md` says why it is done like this.
