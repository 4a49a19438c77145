//! Keeps an instance's output within a limit.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

const NEW: &str = "output.log";
const OLD: &str = "output.old.log";

/// How much of the end of the output an error contains.
const TAIL_BYTES: usize = 2048;
const TAIL_LINES: usize = 10;

/// Two files of half the limit each. When the newer is full, it replaces the older.
pub(super) struct Output {
    dir: PathBuf,
    file: File,
    written: u64,
    half: u64,
}

impl Output {
    /// Creates the output files. Removes the output of an earlier run.
    pub(super) fn create(dir: &Path, limit: u64) -> io::Result<Self> {
        super::record::remove(&dir.join(OLD))?;
        Ok(Self { dir: dir.to_owned(), file: create_file(dir)?, written: 0, half: (limit / 2).max(1) })
    }

    /// Writes `bytes`; of more than half the limit, only the end.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let room = usize::try_from(self.half).unwrap_or(usize::MAX);
        if let Some(surplus) = bytes.len().checked_sub(room) {
            bytes = bytes.get(surplus..).unwrap_or_default();
        }
        if self.written + bytes.len() as u64 > self.half {
            // If the rename fails, the output so far is lost, but new output must not be.
            let _ = std::fs::rename(self.dir.join(NEW), self.dir.join(OLD));
            self.file = create_file(&self.dir)?;
            self.written = 0;
        }
        // Counted before it is written, because a part may be written even if the disk is full.
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn create_file(dir: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join(NEW))
}

/// Removes the output files.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    super::record::remove(&dir.join(OLD))?;
    super::record::remove(&dir.join(NEW))
}

/// Reads all output that is kept.
pub(super) fn read_all(dir: &Path) -> Vec<u8> {
    let mut all = std::fs::read(dir.join(OLD)).unwrap_or_default();
    all.extend(std::fs::read(dir.join(NEW)).unwrap_or_default());
    all
}

/// Returns the last lines, for an error, with secrets and control characters replaced.
pub(super) fn tail(dir: &Path, secrets: &[String]) -> String {
    let longest = secrets.iter().map(String::len).max().unwrap_or(0);
    let window = TAIL_BYTES + longest;
    let (mut bytes, mut cut) = last_bytes(&dir.join(NEW), window).unwrap_or_default();
    if !cut {
        let (mut older, cut_older) = last_bytes(&dir.join(OLD), window.saturating_sub(bytes.len())).unwrap_or_default();
        older.extend(bytes);
        (bytes, cut) = (older, cut_older);
    }
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret.as_str(), "[flag]");
    }
    if cut {
        // The text may start with the rest of a secret, which wasn't recognised.
        text = text.char_indices().filter(|(at, _)| *at >= longest).map(|(_, c)| c).collect();
    }
    let text: String = text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n")
}

/// Returns the end of a file, at most `window` bytes, and whether there is more before it.
fn last_bytes(path: &Path, window: usize) -> io::Result<(Vec<u8>, bool)> {
    let mut file = File::open(path)?;
    let skipped = file.metadata()?.len().saturating_sub(window as u64);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(window as u64).read_to_end(&mut bytes)?;
    Ok((bytes, skipped > 0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tail_hides_flags_and_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create(dir.path(), 4096).unwrap();
        output.write(b"one\nFLAG{x}\x1b[31m red\n").unwrap();
        assert_eq!(tail(dir.path(), &["FLAG{x}".to_owned(), String::new()]), "one\n[flag] [31m red");
    }

    #[test]
    fn tail_hides_a_flag_that_is_cut_in_two() {
        let dir = tempfile::tempdir().unwrap();
        let flag = "FLAG{0123456789}".to_owned();
        for filler in TAIL_BYTES - 4..TAIL_BYTES + 20 {
            let mut output = Output::create(dir.path(), 1 << 20).unwrap();
            output.write(format!("before{flag}{}", ".".repeat(filler)).as_bytes()).unwrap();
            let tail = tail(dir.path(), std::slice::from_ref(&flag));
            assert!(!tail.contains("789}"), "{tail}");
        }
    }

    #[test]
    fn output_continues_after_a_failed_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create(dir.path(), 16).unwrap();
        output.write(b"one two").unwrap();
        // The older file can't be replaced, and the newer one can't be created.
        std::fs::create_dir_all(dir.path().join(OLD).join("x")).unwrap();
        std::fs::remove_file(dir.path().join(NEW)).unwrap();
        std::fs::create_dir(dir.path().join(NEW)).unwrap();
        assert!(output.write(b"lost").is_err());
        std::fs::remove_dir(dir.path().join(NEW)).unwrap();
        output.write(b"three").unwrap();
        output.write(b"fourth").unwrap();
        assert!(read_all(dir.path()).ends_with(b"fourth"));
        std::fs::remove_dir_all(dir.path().join(OLD)).unwrap();
        output.write(b"fifth").unwrap();
        assert_eq!(read_all(dir.path()), b"fourthfifth");
    }

    proptest! {
        #[test]
        fn output_stays_within_the_limit_and_keeps_the_end(limit in 2u64..200, chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..80), 1..30)) {
            let dir = tempfile::tempdir().unwrap();
            let mut output = Output::create(dir.path(), limit).unwrap();
            let mut all = Vec::new();
            for chunk in &chunks {
                output.write(chunk).unwrap();
                all.extend(chunk);
                let kept = read_all(dir.path());
                prop_assert!(kept.len() as u64 <= limit);
                prop_assert!(all.ends_with(&std::fs::read(dir.path().join(NEW)).unwrap()));
            }
        }
    }
}
