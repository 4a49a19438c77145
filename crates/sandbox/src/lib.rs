//! Runs a program in namespaces of its own, with a minimal root, without capabilities, and with limits.

pub mod forward;
