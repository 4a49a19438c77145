//! An instance's output: kept, and bounded.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

const NEW: &str = "output.log";
const OLD: &str = "output.old.log";

/// How much of the end of the output goes into an error.
const TAIL_BYTES: usize = 2048;
const TAIL_LINES: usize = 10;

/// Output in two files of half the limit each: when the newer is full it takes the place of the older.
pub(super) struct Output {
    dir: PathBuf,
    file: File,
    written: u64,
    half: u64,
}

impl Output {
    /// Begins anew: what an earlier run said is gone.
    pub(super) fn begin(dir: &Path, limit: u64) -> io::Result<Self> {
        super::record::remove(&dir.join(OLD))?;
        Ok(Self { dir: dir.to_owned(), file: create(dir)?, written: 0, half: (limit / 2).max(1) })
    }

    /// Keeps as much of it as the limit allows, the end first.
    pub(super) fn keep(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let room = usize::try_from(self.half).unwrap_or(usize::MAX);
        if let Some(surplus) = bytes.len().checked_sub(room) {
            bytes = bytes.get(surplus..).unwrap_or_default();
        }
        if self.written + bytes.len() as u64 > self.half {
            // What cannot be kept as the older file goes; what matters is that the newer one begins.
            let _ = std::fs::rename(self.dir.join(NEW), self.dir.join(OLD));
            self.file = create(&self.dir)?;
            self.written = 0;
        }
        // Counted before it is written: a part of it may be, when the disk is full.
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn create(dir: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join(NEW))
}

/// Removes all of it.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    super::record::remove(&dir.join(OLD))?;
    super::record::remove(&dir.join(NEW))
}

/// Everything that is kept.
pub(super) fn kept(dir: &Path) -> Vec<u8> {
    let mut all = std::fs::read(dir.join(OLD)).unwrap_or_default();
    all.extend(std::fs::read(dir.join(NEW)).unwrap_or_default());
    all
}

/// The last lines, for an error: secrets and control characters replaced.
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
        // Where it was cut, a part of a secret may stand, which was not recognised.
        text = text.char_indices().filter(|(at, _)| *at >= longest).map(|(_, c)| c).collect();
    }
    let text: String = text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n")
}

/// The end of a file, and whether there is more before it.
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
    fn the_tail_hides_flags_and_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::begin(dir.path(), 4096).unwrap();
        output.keep(b"one\nFLAG{x}\x1b[31m red\n").unwrap();
        assert_eq!(tail(dir.path(), &["FLAG{x}".to_owned(), String::new()]), "one\n[flag] [31m red");
    }

    #[test]
    fn a_flag_cut_in_two_is_hidden_too() {
        let dir = tempfile::tempdir().unwrap();
        let flag = "FLAG{0123456789}".to_owned();
        for filler in TAIL_BYTES - 4..TAIL_BYTES + 20 {
            let mut output = Output::begin(dir.path(), 1 << 20).unwrap();
            output.keep(format!("before{flag}{}", ".".repeat(filler)).as_bytes()).unwrap();
            let tail = tail(dir.path(), std::slice::from_ref(&flag));
            assert!(!tail.contains("789}"), "{tail}");
        }
    }

    #[test]
    fn a_rotation_that_failed_does_not_end_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::begin(dir.path(), 16).unwrap();
        output.keep(b"one two").unwrap();
        // Neither can the older file be replaced, nor the newer one begin: both are tried again.
        std::fs::create_dir_all(dir.path().join(OLD).join("x")).unwrap();
        std::fs::remove_file(dir.path().join(NEW)).unwrap();
        std::fs::create_dir(dir.path().join(NEW)).unwrap();
        assert!(output.keep(b"lost").is_err());
        std::fs::remove_dir(dir.path().join(NEW)).unwrap();
        output.keep(b"three").unwrap();
        output.keep(b"fourth").unwrap();
        assert!(kept(dir.path()).ends_with(b"fourth"));
        std::fs::remove_dir_all(dir.path().join(OLD)).unwrap();
        output.keep(b"fifth").unwrap();
        assert_eq!(kept(dir.path()), b"fourthfifth");
    }

    proptest! {
        #[test]
        fn never_above_the_limit_and_the_end_is_kept(limit in 2u64..200, chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..80), 1..30)) {
            let dir = tempfile::tempdir().unwrap();
            let mut output = Output::begin(dir.path(), limit).unwrap();
            let mut all = Vec::new();
            for chunk in &chunks {
                output.keep(chunk).unwrap();
                all.extend(chunk);
                let kept = kept(dir.path());
                prop_assert!(kept.len() as u64 <= limit);
                prop_assert!(all.ends_with(&std::fs::read(dir.path().join(NEW)).unwrap()));
            }
        }
    }
}
