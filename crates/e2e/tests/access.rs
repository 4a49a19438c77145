//! Gauntlet's own clients show credentials to a manager that wants them.

use std::process::{Command, Output};

use crate::harness::{Backend, World, binary, eventually, local};

fn gauntlet(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("gauntlet"));
    command.args(arguments).env_remove("GAUNTLET_TOKEN").env("OTEL_SDK_DISABLED", "true");
    command
}

fn succeeded(output: Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn cli_and_janitor_work_with_a_token_until_it_is_revoked() {
    let world = World::bare(Backend::Embedded);
    let file = world.path("tokens.jsonl").display().to_string();
    let create = |name: &str, scope: &str| {
        let arguments = ["token", "create", "--tokens", &file, "--name", name, "--scope", scope];
        succeeded(gauntlet(&arguments).output().unwrap()).unwrap()
    };
    let (admin, janitor) = (create("author", "admin"), create("janitor", "operate"));
    let manager = world.manager_with("m1", &[("TOKENS", file.clone())]);
    let call = |token: Option<&str>, arguments: &[&str]| {
        let mut command = gauntlet(arguments);
        command.env("URL", &manager.url).envs(token.map(|token| ("GAUNTLET_TOKEN", token)));
        succeeded(command.output().unwrap())
    };
    let error = call(None, &["challenge", "list"]).unwrap_err();
    assert!(error.contains("CREDENTIALS_REQUIRED") && error.contains("GAUNTLET_TOKEN"), "{error}");
    let create_challenge = ["challenge", "create", "short", "--scenario", &local("web"), "--timeout", "1s"];
    let error = call(Some(&janitor), &create_challenge).unwrap_err();
    assert!(error.contains("SCOPE_INSUFFICIENT"), "{error}");
    call(Some(&admin), &create_challenge).unwrap();
    call(Some(&admin), &["instance", "create", "short", "a"]).unwrap();

    let token_file = world.path("janitor-token");
    std::fs::write(&token_file, &janitor).unwrap();
    let sweep = || {
        let mut command = Command::new(binary("gauntlet-janitor"));
        command.env("URL", &manager.url).env("GAUNTLET_TOKEN_FILE", &token_file).env("OTEL_SDK_DISABLED", "true");
        succeeded(command.output().unwrap())
    };
    eventually("the expired instance is deleted", || {
        sweep()?;
        match call(Some(&admin), &["instance", "get", "short", "a"]) {
            Err(error) if error.contains("INSTANCE_NOT_FOUND") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });

    let id = janitor.split('_').nth(1).unwrap();
    succeeded(gauntlet(&["token", "revoke", "--tokens", &file, id]).output().unwrap()).unwrap();
    eventually("the janitor is refused", || match sweep() {
        Err(error) if error.contains("CREDENTIALS_INVALID") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let log = std::fs::read_to_string(world.path("m1.log")).unwrap();
    let secret = |token: &str| token.rsplit('_').next().unwrap().to_owned();
    assert!(log.contains("gauntlet::audit") && log.contains("author"), "{log}");
    assert!(!log.contains(&secret(&admin)) && !log.contains(&secret(&janitor)), "{log}");
}
