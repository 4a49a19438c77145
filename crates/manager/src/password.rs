//! Passwords from a flag, a variable or a file.

use std::{io::Read as _, path::Path};

use anyhow::{Context as _, Result, bail};
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};

/// The most that is read from a password file, in bytes: more is a mistake.
const MAX_BYTES: u64 = 64 << 10;

/// Returns the password that belongs to `--{flags}-username`: of `--{flags}-password`, or in the file of `--{flags}-password-file`. Empty values
/// count as unset.
///
/// # Errors
/// Both are set, or neither, or the file can't be read. The text names the flags.
pub(crate) fn password(flags: &str, given: Option<&SecretString>, file: Option<&Path>) -> Result<SecretString> {
    let variable = flags.to_ascii_uppercase();
    let given = given.filter(|password| !password.expose_secret().is_empty());
    match (given, file.filter(|file| !file.as_os_str().is_empty())) {
        (Some(_), Some(_)) => bail!(
            "--{flags}-password ({variable}_PASSWORD) and --{flags}-password-file ({variable}_PASSWORD_FILE) are both set; keep one of them"
        ),
        (Some(password), None) => Ok(password.clone()),
        (None, Some(file)) => read(file).with_context(|| {
            format!("cannot read --{flags}-password-file ({variable}_PASSWORD_FILE) {}", file.display())
        }),
        (None, None) => bail!(
            "--{flags}-username ({variable}_USERNAME) needs a password; pass --{flags}-password-file FILE, or set {variable}_PASSWORD"
        ),
    }
}

/// Reads a secret from a file, without the line break at its end.
fn read(file: &Path) -> Result<SecretString> {
    let mut text = Zeroizing::new(String::new());
    std::fs::File::open(file)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => bail!("it is empty"),
        secret if secret.len() as u64 > MAX_BYTES => bail!("it holds more than {MAX_BYTES} bytes"),
        secret => Ok(secret.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn password_is_read_from_its_file_up_to_the_line_break() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "sword fish\r\n").unwrap();
        assert_eq!(password("etcd", Some(&"".into()), Some(&file)).unwrap().expose_secret(), "sword fish");
        assert_eq!(password("etcd", Some(&"given".into()), Some(Path::new(""))).unwrap().expose_secret(), "given");
    }

    #[test]
    fn missing_doubled_and_unreadable_passwords_are_refused_with_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let (empty, huge, binary) =
            (write("empty", "\n"), write("huge", &"x".repeat(65537)), dir.path().join("binary"));
        std::fs::write(&binary, [0xff]).unwrap();
        let given = SecretString::from("swordfish");
        for (given, file, part) in [
            (None, None, "--etcd-username (ETCD_USERNAME) needs a password; pass --etcd-password-file FILE"),
            (Some(&given), Some(&empty), "are both set; keep one of them"),
            (None, Some(&empty), "it is empty"),
            (None, Some(&huge), "more than 65536 bytes"),
            (None, Some(&binary), "(ETCD_PASSWORD_FILE)"),
            (None, Some(&dir.path().join("none")), "cannot read --etcd-password-file"),
        ] {
            let text = format!("{:#}", password("etcd", given, file.map(|file| file.as_path())).unwrap_err());
            assert!(text.contains(part) && !text.contains("swordfish"), "{text}");
        }
    }
}
