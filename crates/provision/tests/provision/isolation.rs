//! An instance's environment, limits, files and output.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::{Limits, Probe};
use gauntlet_testing::eventually_blocking;

use crate::support::{Fixture, LaunchExt as _, launch, remove};

#[tokio::test]
async fn program_is_found_in_a_relative_path() {
    let mut fixture = Fixture::new();
    let programs = fixture.dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    std::fs::rename(fixture.program("program", "exec $GREETER"), programs.join("program")).unwrap();
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    fixture.config.path.insert(0, up.join(programs.strip_prefix("/").unwrap()));
    let mut script = fixture.greeter();
    script.command = vec!["program".to_owned()];
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &script)).await.unwrap();
    remove(&manager, 1).await;
}

#[tokio::test]
async fn instance_has_its_own_environment_directory_and_limits() {
    // Without control groups, memory is limited for each process.
    for mut fixture in [Fixture::new(), Fixture::on_host()] {
        fixture.config.cgroups = false;
        check_environment_directory_and_limits(fixture).await;
    }
}

async fn check_environment_directory_and_limits(fixture: Fixture) {
    let mut plan = fixture.script(
        "env > env; pwd > pwd; ulimit -v > memory; ulimit -n > files; ulimit -t > cpu; ulimit -c > core; ulimit -f > disk; umask > umask
         grep NoNewPrivs /proc/self/status > privileges; ls -l /proc/self/fd > open; exec $GREETER",
    );
    plan.limits = Limits {
        memory: Some(512 << 20),
        disk: Some(8 << 20),
        cpu_seconds: Some(50),
        open_files: Some(64),
        ..Limits::default()
    };
    // A file without `CLOEXEC`, as a careless parent process may leave open.
    let leaked = std::fs::File::create(fixture.dir.path().join("leaked")).unwrap();
    let _leaked = rustix::io::dup(&leaked).unwrap();
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    let wrote = |name| fixture.file(&dir, name);
    let env = wrote("env");
    let env: BTreeMap<_, _> = env.lines().filter_map(|line| line.split_once('=')).collect();
    let known = [
        "GREETER",
        "GREETING",
        "HOME",
        "LISTEN",
        "OLDPWD",
        "PATH",
        "PORT",
        "PWD",
        "SCENARIO_DIR",
        "SHLVL",
        "TMPDIR",
        "_",
    ];
    let isolated = manager.isolation().level.has_namespaces();
    // Without a PID namespace, a variable marks the instance's processes.
    let is_known = |name: &str| known.contains(&name) || !isolated && name == "GAUNTLET_INSTANCE";
    assert!(env.keys().all(|name| is_known(name)), "{env:?}");
    let (on_host, files) = (dir.join("work").display().to_string(), fixture.dir.path().join("files"));
    let (work, temporary, files) = match isolated {
        true => ("/work", "/tmp", Path::new("/scenario")),
        false => (on_host.as_str(), on_host.as_str(), files.as_path()),
    };
    assert_eq!((env["HOME"], env["TMPDIR"], wrote("pwd")), (work, temporary, work.to_owned()));
    assert_eq!(Path::new(env["SCENARIO_DIR"]), files);
    assert_eq!((wrote("memory"), wrote("files")), ((512 << 10).to_string(), "64".to_owned()));
    assert_eq!(wrote("disk"), ((8 << 20) / 512).to_string());
    assert_eq!((wrote("cpu"), wrote("core"), wrote("umask")), ("50".to_owned(), "0".to_owned(), "0077".to_owned()));
    assert!(wrote("privileges").ends_with('1'));
    let open = wrote("open");
    assert!(!open.contains("run/") && !open.contains("leaked"), "{open}");
}

#[tokio::test]
async fn only_the_owner_can_read_the_files() {
    let fixture = Fixture::new();
    fixture.manager().launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let dir = fixture.instance_dir();
    assert_eq!(mode(&dir), 0o700);
    for file in ["instance.json", "label.json", "state.json", "output.log"] {
        // The supervisor may write its files only after the program answers.
        eventually_blocking("the file exists", || dir.join(file).exists());
        assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
    }
}

#[tokio::test]
async fn output_stays_within_its_limit() {
    let fixture = Fixture::new();
    let mut plan =
        fixture.script("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; echo last; exec $GREETER");
    plan.limits.output = Some(4096);
    plan.probe = Probe::Output { contains: "listening".to_owned() };
    fixture.manager().launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    let read = |name| std::fs::read_to_string(dir.join(name)).unwrap();
    let kept = read("output.old.log") + &read("output.log");
    assert!(kept.len() <= 4096 && kept.ends_with("line 4999\nlast\nlistening\n"), "{kept}");
}
