//! `gauntlet token` of the real binary.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use gauntlet_access::{Scope, Token, TokenFile};
use jiff::{SignedDuration, Timestamp};

/// Runs `gauntlet token` on the file. Returns the exit code, standard output and standard error.
fn run(file: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gauntlet"));
    let output = command.env_clear().env("TOKENS", file).arg("token").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn create(file: &Path, arguments: &[&str]) -> Token {
    let (code, out, err) = run(file, &[&["create"], arguments].concat());
    assert_eq!(code, 0, "{err}");
    out.trim().parse().unwrap()
}

fn parse(file: &Path) -> TokenFile {
    TokenFile::parse(&fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn created_token_is_accepted_until_it_is_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.jsonl");
    let bound =
        ["--name", "author", "--scope", "admin", "--challenge", "web", "--challenge", "pwn", "--expires-in", "30d"];
    let (janitor, author) = (create(&file, &["--name", "janitor", "--scope", "operate"]), create(&file, &bound));

    let (tokens, now) = (parse(&file), Timestamp::now());
    assert_eq!(tokens.authenticate(&janitor, now).unwrap().scope, Scope::Operate);
    let principal = tokens.authenticate(&author, now + SignedDuration::from_hours(29 * 24)).unwrap();
    assert!(principal.challenges.contain("pwn") && !principal.challenges.contain("other"));
    assert!(tokens.authenticate(&author, now + SignedDuration::from_hours(31 * 24)).is_err());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    let (_, listed, _) = run(&file, &["list"]);
    for part in [&janitor.id().to_string(), &author.id().to_string(), "janitor", "operate", "all", "pwn, web", "never"]
    {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let (_, json, _) = run(&file, &["list", "--output", "json"]);
    assert!(json.lines().count() == 2 && !json.contains("sha256") && json.contains(r#""challenges":["pwn","web"]"#));

    assert_eq!(run(&file, &["revoke", &janitor.id().to_string()]).0, 0);
    assert!(parse(&file).authenticate(&janitor, now).is_err() && parse(&file).authenticate(&author, now).is_ok());
}

#[test]
fn secret_is_shown_once_and_stored_nowhere() {
    use secrecy::ExposeSecret as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.jsonl");
    let token = create(&file, &["--name", "a", "--scope", "read"]).reveal();
    let secret = token.expose_secret().rsplit('_').next().unwrap().to_owned();
    let (_, listed, _) = run(&file, &["list", "-o", "json"]);
    assert!(!listed.contains(&secret) && !fs::read_to_string(&file).unwrap().contains(&secret));
}

#[test]
fn errors_name_what_is_wrong_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.jsonl");
    let token = create(&file, &["--name", "a", "--scope", "read"]);
    let before = fs::read_to_string(&file).unwrap();
    for (arguments, code, part) in [
        (&["revoke", "000000000000"][..], 1, "has no token 000000000000"),
        (&["revoke", &token.id().to_string(), "000000000000"], 1, "Nothing was revoked"),
        (&["revoke", "abc"], 64, "12 hexadecimal characters"),
        (&["create", "--name", "a", "--scope", "root"], 64, "use read, operate or admin"),
        (&["create", "--name", "", "--scope", "read"], 64, "a name has 1 to 256 bytes"),
        (&["create", "--name", "a", "--scope", "read", "--expires-in", "soon"], 64, "30d or 12h"),
        (&["create", "--name", "a", "--scope", "read", "--tokens", ""], 64, "pass --tokens FILE or set TOKENS"),
        (&["list", "--tokens", "/nonexistent/tokens"], 1, "cannot read the token file /nonexistent/tokens"),
    ] {
        let (exited, out, err) = run(&file, arguments);
        assert!(exited == code && out.is_empty() && err.contains(part), "{arguments:?}: {exited} {err}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), before);

    fs::write(&file, format!("{before}not a record\n")).unwrap();
    let (code, _, err) = run(&file, &["create", "--name", "b", "--scope", "read"]);
    assert!(code == 1 && err.contains("tokens.jsonl, line 2: "), "{err}");
    // Revoking must not depend on a repair of the file.
    assert_eq!(run(&file, &["revoke", &token.id().to_string()]).0, 0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "not a record\n");
}
