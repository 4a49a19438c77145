//! Real sandboxes, at every level that this machine allows. Where a level is missing, its test checks that the probe tells why.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use gauntlet_sandbox::{Bind, HostPaths, Level, Probe, ResourceLimits, Root, Spec, View, probe};

/// A user that nobody has.
const UID: u32 = 1_900_000_123;

fn supervisor() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples/supervisor")
}

fn probed() -> Probe {
    probe_up_to(Level::Uid)
}

fn probe_up_to(ceiling: Level) -> Probe {
    probe(&supervisor(), Path::new("/"), UID, ceiling, Command::spawn)
}

/// The levels that work here. Fails if one is missing without an explanation.
fn levels(wanted: &[Level]) -> Vec<Level> {
    let probe = probed();
    let (usable, missing): (Vec<_>, Vec<_>) = wanted.iter().copied().partition(|level| *level <= probe.best);
    for level in missing {
        let refusal = probe.refusal(level).expect("a missing level is explained");
        assert!(!refusal.step.is_empty() && !refusal.error.is_empty(), "{refusal:?}");
        println!("level {level} doesn't work here: {refusal}");
    }
    usable
}

fn spec(level: Level, script: &str) -> Spec {
    let root = Root {
        system: "/".into(),
        binds: Vec::new(),
        size: Some(4 << 20),
        inodes: Some(100),
        hostname: "instance".to_owned(),
    };
    let view = if level.has_namespaces() {
        View::Root(root)
    } else {
        View::Host(HostPaths {
            read: ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/proc"].map(PathBuf::from).to_vec(),
            ..HostPaths::default()
        })
    };
    Spec {
        program: Some("/bin/sh".into()),
        args: ["-c", script].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
        directory: if level.has_namespaces() { "/work" } else { "/" }.into(),
        limits: ResourceLimits::default(),
        view,
        uid: UID,
    }
}

fn root(spec: &mut Spec) -> &mut Root {
    match &mut spec.view {
        View::Root(root) => root,
        View::Host(_) => panic!("no root"),
    }
}

fn run(level: Level, spec: &Spec) -> String {
    run_with(level, spec, serde_json::json!({}))
}

/// Returns everything that the program and the supervisor print.
fn run_with(level: Level, spec: &Spec, mut input: serde_json::Value) -> String {
    input["level"] = serde_json::to_value(level).unwrap();
    input["spec"] = serde_json::to_value(spec).unwrap();
    let mut child = Command::new(supervisor())
        .env("SECRET", "of the supervisor")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("{level}: {text}");
    text
}

#[test]
fn probe_finds_a_level_and_explains_the_others() {
    let probe = probed();
    assert_eq!(probe.refused.len(), Level::ALL.iter().filter(|level| **level > probe.best).count());
    assert_eq!(probe.explanation().is_empty(), probe.best == Level::Uid);
    levels(&Level::ALL);
    let ceiling = probe_up_to(Level::None);
    assert_eq!((ceiling.best, ceiling.refused), (Level::None, Vec::new()), "stronger levels are not tried");
}

#[test]
fn program_runs_and_its_exit_is_reported() {
    for level in levels(&Level::ALL) {
        let text = run(level, &spec(level, "echo hello; exit 3"));
        assert!(text.contains("hello\n"), "{text}");
        assert!(text.contains(if level.has_namespaces() { "ended with exit status 3" } else { "ended with Some(3)" }));
    }
    for level in levels(&[Level::Uid, Level::Userns]) {
        assert!(run(level, &spec(level, "kill -SEGV $$")).contains("ended with signal 11"));
    }
}

#[test]
fn missing_program_fails_with_step_and_error() {
    for level in levels(&Level::ALL) {
        let mut spec = spec(level, "");
        spec.program = Some("/usr/bin/no-such-program".into());
        let text = run(level, &spec);
        assert!(text.contains("failed execute /usr/bin/no-such-program: No such file or directory"), "{text}");
    }
}

#[test]
fn program_has_no_privileges_and_one_user() {
    for level in levels(&[Level::Uid, Level::Userns]) {
        let script = "id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/uid_map; hostname; env";
        let text = run(level, &spec(level, script));
        assert!(text.starts_with("1000\n1000\n1000"), "{text}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(text.contains(&format!("{set}:\t0000000000000000")), "{text}");
        }
        assert!(
            text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2") && text.contains("\ninstance\n"),
            "{text}"
        );
        assert!(!text.contains("SECRET"), "{text}");
        if level == Level::Uid {
            assert!(text.contains(&format!("1000 {UID}")), "{text}");
        }
    }
}

#[test]
fn program_sees_a_root_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("given"), "content").unwrap();
    for level in levels(&[Level::Uid, Level::Userns]) {
        let script = "ls -A /; cat /scenario/given; ls /proc | grep -c '^[0-9]'; ls /proc/self/fd; pwd
            for path in /usr/x /etc/x /x /scenario/x /proc/sys/kernel/hostname /dev/x; do (echo > $path) 2>/dev/null && echo WROTE $path; done
            for path in /work /tmp /dev/shm; do echo > $path/x && echo may write $path; done
            cat /proc/sysrq-trigger /proc/kcore /proc/1/environ /proc/1/mem 2>/dev/null; ls /proc/1/fd /proc/1/root 2>/dev/null";
        let mut spec = spec(level, script);
        root(&mut spec).binds.push(Bind { source: dir.path().to_owned(), target: "/scenario".into() });
        let text = run(level, &spec);
        let names: Vec<_> = text.lines().take_while(|line| !line.contains("content")).collect();
        for name in names {
            assert!(
                [
                    "bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "scenario", "tmp", "usr",
                    "work"
                ]
                .contains(&name),
                "{name}"
            );
        }
        assert!(text.contains("content") && text.contains("\n/work\n") && !text.contains("WROTE"), "{text}");
        for path in ["/work", "/tmp", "/dev/shm"] {
            assert!(text.contains(&format!("may write {path}\n")), "{text}");
        }
    }
}

#[test]
fn writable_directories_are_bounded() {
    for level in levels(&[Level::Uid, Level::Userns]) {
        let script = "head -c 3000000 /dev/zero > /work/a && echo fits; head -c 3000000 /dev/zero > /tmp/b || echo full
            rm /work/a /tmp/b; i=0; while mkdir d 2>/dev/null && cd d; do i=$((i+1)); done; echo depth $i";
        let text = run(level, &spec(level, script));
        assert!(text.contains("fits\n") && text.contains("full\n"), "{text}");
        let depth: usize = text.split_once("depth ").unwrap().1.lines().next().unwrap().parse().unwrap();
        assert!(depth < 100, "{text}");
    }
}

#[test]
fn every_process_ends_with_the_program() {
    for level in levels(&[Level::Uid, Level::Userns]) {
        // The lock is held by a process that ignores SIGTERM, in a session of its own, and whose parent has exited.
        let script = "(setsid sh -c 'trap \"\" TERM; echo left; while :; do sleep 1; done' &) ; sleep 0.1; echo done";
        let text = run(level, &spec(level, script));
        // The output ends only when every process has closed it.
        assert!(text.contains("left\n") && text.contains("ended with exit status 0"), "{text}");
    }
}

#[test]
fn sigterm_reaches_the_program() {
    for level in levels(&[Level::Uid, Level::Userns]) {
        let script = "trap 'echo terminated; exit 7' TERM; echo started; while :; do sleep 0.01; done";
        let text = run_with(level, &spec(level, script), serde_json::json!({ "terminate_after": 8 }));
        assert!(text.contains("terminated\n") && text.contains("ended with exit status 7"), "{text}");
    }
}

#[test]
fn connections_are_forwarded_and_the_network_is_its_own() {
    for level in levels(&[Level::Uid, Level::Userns]) {
        let host = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = host.local_addr().unwrap().port();
        // Released here, bound again by the supervisor.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut spec = spec(
            level,
            &format!(
                "cat /proc/net/dev; (echo > /dev/tcp/127.0.0.1/{other}) 2>&1; exec /programs/supervisor greet {port}"
            ),
        );
        spec.program = Some("/usr/bin/bash".into());
        root(&mut spec)
            .binds
            .push(Bind { source: supervisor().parent().unwrap().to_owned(), target: "/programs".into() });
        let client = std::thread::spawn(move || {
            let mut stream = loop {
                match TcpStream::connect(("127.0.0.1", port)) {
                    Ok(stream) => break stream,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            };
            stream.write_all(b"half a connection").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        let text = run_with(level, &spec, serde_json::json!({ "ports": [port] }));
        assert!(text.contains("listening") && text.contains("Connection refused"), "{text}");
        assert!(text.contains("lo:") && !text.contains("eth0"), "{text}");
        assert_eq!(client.join().unwrap(), "half a connection was received");
    }
}

#[test]
fn limits_apply() {
    for level in levels(&Level::ALL) {
        let mut spec = spec(level, "ulimit -n; ulimit -t; ulimit -v; ulimit -f; ulimit -c");
        spec.limits = ResourceLimits {
            open_files: Some(64),
            cpu_seconds: Some(50),
            address_space: Some(512 << 20),
            file_size: Some(1 << 20),
            processes: Some(50),
        };
        let text = run(level, &spec);
        assert!(text.starts_with(&format!("64\n50\n{}\n2048\n0\n", 512 << 10)), "{text}");
    }
}

#[test]
fn environment_and_arguments_are_not_printed() {
    let mut spec = spec(Level::None, "FLAG{one}");
    spec.env.insert("FLAG".to_owned(), "FLAG{two}".to_owned());
    assert!(!format!("{spec:?}").contains("FLAG{"));
}
