//! What the binaries share before they run: parsing the values of flags ([`duration`], [`size`]), exit codes, and shutdown signals.

mod exit;
mod signals;
mod values;

pub use exit::{EX_UNAVAILABLE, EX_USAGE, print_parse_error};
pub use signals::{ShutdownSignals, exit_on_second_signal};
pub use values::{duration, size};
