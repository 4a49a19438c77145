//! The guarantees hold while managers, etcd members and the network between them fail.
//!
//! `cargo xtask faults --minutes N` runs [`storm`] for longer than CI does.

mod census;
mod cluster;
mod embedded;
mod etcd;
mod histories;
mod load;
mod network;
mod scenario;
mod storm;
