//! What the binaries share before they run: parsing the values of flags ([`duration`], [`size`]), exit codes, shutdown signals, and
//! the protection of memory.

mod exit;
mod memory;
mod signals;
mod values;

pub use exit::{EX_UNAVAILABLE, EX_USAGE, print_parse_error};
pub use memory::protect_memory;
pub use signals::{ShutdownSignals, exit_on_second_signal};
pub use values::{duration, size};
