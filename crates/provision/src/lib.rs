//! The backends of [`gauntlet_domain::Provisioner`], which launch and remove instances.
//!
//! [`process`] runs each instance as a group of processes on this machine.

pub mod process;
