//! Bringing instances up and down: the backends of [`gauntlet_domain::Provisioner`].
//!
//! [`process`] runs each instance as a group of processes on this machine.

pub mod process;
