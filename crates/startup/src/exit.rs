/// The exit code for a wrong flag or variable: EX_USAGE of sysexits.h.
pub const EX_USAGE: u8 = 64;

/// The exit code when a server that the command needs does not answer: EX_UNAVAILABLE of sysexits.h.
pub const EX_UNAVAILABLE: u8 = 69;

/// Prints what clap returned instead of arguments, and returns the exit code: [`EX_USAGE`] for an error, which goes to standard error; 0 for
/// `--help` and `--version`, which go to standard output.
pub fn print_parse_error(error: &clap::Error) -> u8 {
    // If printing fails as well, only the exit code is left to report the error.
    let _ = error.print();
    if error.use_stderr() { EX_USAGE } else { 0 }
}
