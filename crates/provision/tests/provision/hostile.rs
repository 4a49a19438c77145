//! A player who owns an instance: what they try is denied, and other instances keep answering meanwhile.

use std::{
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use gauntlet_domain::Limits;
use gauntlet_provision::process::Level;
use gauntlet_testing::eventually_blocking;

use crate::support::{Fixture, LaunchExt as _, Script, greeting_at, launch, remove};

/// What ordinary instances say.
const HONEST: u64 = 10;

/// Whether a process with this argument runs.
fn runs(mark: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut arguments = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    arguments.any(|line| line.split(|byte| *byte == 0).any(|word| word == mark.as_bytes()))
}

/// Levels with namespaces that work here. Fails if one is missing without an explanation.
fn levels(fixture: &Fixture) -> Vec<Level> {
    let isolation = fixture.manager().isolation().clone();
    if !isolation.level.has_namespaces() {
        let why = isolation.to_string();
        assert!(why.contains("no stronger level works: "), "{why}");
        println!("not tried: {why}");
    }
    [Level::Uid, Level::Userns].into_iter().filter(|level| *level <= isolation.level).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attacks_from_an_instance_are_denied_and_others_keep_answering() {
    for level in levels(&Fixture::new()) {
        check_attacks(level).await;
    }
}

async fn check_attacks(level: Level) {
    let mut fixture = Fixture::new();
    fixture.config.isolation = Some(level);
    fixture.program("tool", "exit 0");
    std::fs::write(fixture.dir.path().join("flag.key"), "secret").unwrap();
    let manager = fixture.manager();
    let mut honest = Vec::new();
    for identity in 1..=HONEST {
        honest.push(manager.launch(&launch(identity, 1, &fixture.greeter())).await.unwrap().connection_info);
    }
    // What the attacks aim at: it exists, and this test reaches all of it.
    let api = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = api.local_addr().unwrap().port();
    let mark = format!("mark-{}-{port}-{level}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&mark).unwrap();
    let _abstract = UnixListener::bind_addr(&abstract_address).unwrap();
    let instance = fixture.instance_dirs()[0].clone();
    let data = &fixture.config.dir;
    let lock = data.join("run").join(instance.file_name().unwrap());
    let mut targets = vec![
        instance.join("instance.json"),
        instance.join("state.json"),
        instance.clone(),
        lock,
        fixture.dir.path().join("flag.key"),
    ];
    targets.extend(["ports", "instances", "uids", "store.json"].map(|name| data.join(name)));
    std::fs::write(data.join("store.json"), "{}").unwrap();
    assert!(targets.iter().all(|target| target.exists()), "{targets:?}");
    let mut addresses = vec![format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
    addresses.extend(honest.iter().cloned());

    let mut script: Script = fixture.greeter();
    script.command = vec!["hostile".to_owned()];
    let list = |items: Vec<String>| items.join(",");
    script.env.extend([
        ("TARGETS".to_owned(), list(targets.iter().map(|target| target.display().to_string()).collect())),
        ("PORTS".to_owned(), list(addresses)),
        ("MANAGER".to_owned(), std::process::id().to_string()),
        ("ABSTRACT".to_owned(), mark.clone()),
        ("MARK".to_owned(), mark.clone()),
    ]);
    script.limits = Limits { processes: Some(40), disk: Some(16 << 20), open_files: Some(256), ..Limits::default() };
    let hostile = manager.launch(&launch(0, 1, &script)).await.unwrap().connection_info;

    let (done, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let report = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for address in &honest {
                    assert_eq!(greeting_at(address).as_deref(), Some("hello"), "an honest instance");
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let report = greeting_at(&hostile).unwrap();
        done.store(true, Ordering::Relaxed);
        others.join().unwrap();
        report
    });
    println!("{level}, {} answers of others:\n{report}", answers.load(Ordering::Relaxed));
    let succeeded: Vec<_> = report.lines().filter(|line| line.contains("SUCCEEDED")).collect();
    assert!(succeeded.is_empty(), "{level}: {succeeded:#?}");
    assert!(report.contains("open files without end denied") && report.lines().count() > 80, "{report}");
    assert!(answers.load(Ordering::Relaxed) > 0);
    assert!(targets.iter().all(|target| std::fs::metadata(target).is_ok()), "the files are still there");

    assert!(runs(&mark), "what it left runs in a session of its own");
    remove(&manager, 0).await;
    eventually_blocking("everything has ended with the instance", || !runs(&mark));
    for address in &honest {
        assert_eq!(greeting_at(address).as_deref(), Some("hello"), "an honest instance, afterwards");
    }
}

#[tokio::test]
async fn files_of_an_instance_are_gone_after_a_restart() {
    let fixture = Fixture::new();
    if levels(&fixture).is_empty() {
        return;
    }
    let manager = fixture.manager();
    let plan = fixture.script("ls -A > /tmp/before; touch left; mv /tmp/before before; exec $GREETER");
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    manager.halt().await.unwrap();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    assert_eq!(fixture.file(&dir, "before"), "");
    assert!(crate::support::work(&dir).join("left").exists() && !dir.join("work/left").exists());
}

#[tokio::test]
async fn scenario_gets_no_less_isolation_than_the_operator_allows() {
    let mut fixture = Fixture::new();
    let mut plan = fixture.greeter();
    plan.isolation = Some(gauntlet_domain::Isolation::None);
    let isolation = fixture.manager().isolation().level;
    if isolation > Level::None {
        let text = crate::support::provision_error(fixture.manager().launch(&launch(1, 1, &plan)).await.unwrap_err());
        assert!(text.contains("--require-isolation none would allow it"), "{text}");
    }
    fixture.config.require_isolation = Some(Level::None);
    fixture.manager().launch(&launch(2, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dirs().into_iter().find(|dir| dir.join("instance.json").exists()).unwrap();
    let state = crate::support::state(&dir).unwrap();
    assert_eq!(state["isolation"], "none");
}

#[tokio::test]
async fn manager_does_not_start_below_the_required_isolation() {
    let mut fixture = Fixture::new();
    fixture.config.isolation = Some(Level::Landlock);
    fixture.config.require_isolation = Some(Level::Uid);
    let error = gauntlet_provision::process::Process::new(fixture.config.clone()).unwrap_err();
    let text = crate::support::provision_error(error);
    assert!(
        text.contains("isolation uid is required") && text.contains("the operator allows at most landlock"),
        "{text}"
    );
}
