//! The supervisor's own log, in the instance's directory.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::SystemTime,
};

use crate::process::record::{LOG, log_prefix};

/// The log is truncated when it is larger than this.
const MAX_LOG_BYTES: u64 = 16 << 10;

/// Appends a line with the time and the supervisor's process id.
pub(super) fn append_log(dir: &Path, text: &str) {
    let append = || -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join(LOG))?;
        if file.metadata()?.len() > MAX_LOG_BYTES {
            file.set_len(0)?;
        }
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        writeln!(file, "{}.{:03} {}{text}", at.as_secs(), at.subsec_millis(), log_prefix(std::process::id()))
    };
    // A failure can't be reported anywhere else.
    let _ = append();
}
