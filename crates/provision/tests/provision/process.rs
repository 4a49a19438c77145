//! What the process backend promises beyond the contract.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use gauntlet_domain::{Error, Identity, Limits, PortSpec, Probe, Protocol, Provisioner};
use gauntlet_provision::process::Process;
use rustix::process::Signal;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{self, Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

use crate::support::{LaunchExt as _, Rig, challenge, kill, launch, runs, said, until};

async fn down(manager: &Process, identity: u64) {
    manager.down(&challenge("a challenge"), &Identity::from_bits(identity), u64::MAX).await.unwrap();
}

fn detail(error: Error) -> String {
    match error {
        Error::Provision { step, detail } => format!("{step}: {detail}"),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn an_instance_outlives_its_manager_and_is_found_again() {
    let rig = Rig::new();
    let (one, plan) = (rig.manager(), rig.greeter());
    let outputs = one.launch(&launch(1, 1, &plan)).await.unwrap();
    let pids = rig.pids(&rig.home()).unwrap();
    drop(one);
    let two = rig.manager();
    assert_eq!(two.list().await.unwrap().len(), 1);
    assert_eq!(two.launch(&launch(1, 2, &plan)).await.unwrap(), outputs);
    assert_eq!(rig.pids(&rig.home()).unwrap(), pids, "neither ended nor doubled");
    down(&two, 1).await;
    until("it has ended, and its supervisor", || !runs(pids.0) && !runs(pids.1));
}

#[tokio::test]
async fn a_program_is_found_by_a_relative_path() {
    let mut rig = Rig::new();
    let programs = rig.dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    std::fs::rename(rig.program("program", "exec $GREETER"), programs.join("program")).unwrap();
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    rig.config.path.insert(0, up.join(programs.strip_prefix("/").unwrap()));
    let mut script = rig.greeter();
    script.command = vec!["program".to_owned()];
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &script)).await.unwrap();
    down(&manager, 1).await;
}

#[tokio::test]
async fn supervisors_and_programs_leave_no_zombie() {
    let rig = Rig::new();
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let (shim, child) = rig.pids(&rig.home()).unwrap();
    down(&manager, 1).await;
    until("both are reaped", || [shim, child].iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
}

#[tokio::test]
async fn every_descendant_ends_with_it() {
    for rig in Rig::each() {
        ends_every_descendant(rig).await;
    }
}

async fn ends_every_descendant(rig: Rig) {
    let manager = rig.manager();
    rig.program("linger", "trap '' TERM; echo $$ > $1; while :; do sleep 1; done");
    // One in its group, one that left group and session, one that is nobody's child and hides its origin; all deaf to SIGTERM.
    let script = "$SCENARIO_DIR/linger a &
        setsid $SCENARIO_DIR/linger b &
        setsid env -i PATH=$PATH sh -c \"$SCENARIO_DIR/linger c & exit\" &
        exec $GREETER";
    manager.launch(&launch(1, 1, &rig.script(script))).await.unwrap();
    let home = rig.home();
    let (shim, child) = rig.pids(&home).unwrap();
    let names = ["a", "b", "c"];
    until("all have said who they are", || names.iter().all(|name| !rig.wrote(&home, name).is_empty()));
    let pids = names.map(|name| rig.wrote(&home, name).parse().unwrap());
    assert!(pids.iter().all(|pid| runs(*pid)));
    down(&manager, 1).await;
    until("it has ended, and its supervisor", || [shim, child].iter().chain(&pids).all(|pid| !runs(*pid)));
}

#[tokio::test]
async fn what_a_killed_supervisor_leaves_is_ended() {
    for rig in Rig::each() {
        ends_what_a_killed_supervisor_left(rig).await;
    }
}

async fn ends_what_a_killed_supervisor_left(rig: Rig) {
    let manager = rig.manager();
    rig.program("linger", "echo $$ > $1; while :; do sleep 1; done");
    let script = "setsid $SCENARIO_DIR/linger far & env -i PATH=$PATH $SCENARIO_DIR/linger near & exec $GREETER";
    let plan = rig.script(script);
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    let (shim, child) = rig.pids(&home).unwrap();
    until("both have said who they are", || ["far", "near"].iter().all(|name| !rig.wrote(&home, name).is_empty()));
    let left = ["far", "near"].map(|name| rig.wrote(&home, name).parse().unwrap());
    kill(shim, Signal::KILL);
    until("the program went with its supervisor", || !runs(child));
    assert!(left.iter().all(|pid| runs(*pid)));
    // Brought up again, in the same place.
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    until("it has ended, and its supervisor", || left.iter().all(|pid| !runs(*pid)));

    let (shim, _) = rig.pids(&home).unwrap();
    let again = ["far", "near"].map(|name| {
        until("it has said who it is", || rig.wrote(&home, name).parse().is_ok_and(|pid: i32| !left.contains(&pid)));
        rig.wrote(&home, name).parse().unwrap()
    });
    // Another directory's instance of the same name is none of its business.
    let other = Rig::new();
    let elsewhere = other.manager().launch(&launch(1, 1, &other.greeter())).await.unwrap();
    kill(shim, Signal::KILL);
    down(&manager, 1).await;
    assert_eq!(said(&elsewhere.connection_info).as_deref(), Some("hello"));
    until("it has ended, and its supervisor", || again.iter().all(|pid| !runs(*pid)));
}

/// The processes that run that program.
fn running(program: &Path) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_supervisor_waits_for_the_next_instance_and_ends_with_its_manager() {
    let mut rig = Rig::new();
    let own = rig.dir.path().canonicalize().unwrap().join("supervisor");
    std::fs::copy(rig.config.shim.as_ref().unwrap(), &own).unwrap();
    rig.config.shim = Some(own.clone());
    let manager = rig.manager();
    assert!(running(&own).is_empty(), "none before the first instance");
    manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let (first, _) = rig.pids(&rig.home()).unwrap();
    // A supervisor, and what becomes the program.
    let waiting = || running(&own).into_iter().filter(|pid| *pid != first).collect::<Vec<_>>();
    until("a pair waits", || waiting().len() == 2);
    let pair = waiting();
    manager.launch(&launch(2, 1, &rig.greeter())).await.unwrap();
    let (second, program) = rig.pids(&rig.homes()[1]).unwrap();
    assert!(pair.contains(&second) && pair.contains(&program), "{pair:?} became {second} and {program}");
    until("another pair waits", || waiting().len() == 3);
    // One that was killed is not waited for.
    for pid in waiting().into_iter().filter(|pid| *pid != second) {
        kill(pid, Signal::KILL);
    }
    manager.launch(&launch(3, 1, &rig.greeter())).await.unwrap();
    drop(manager);
    until("the waiting pair has ended", || running(&own).len() == 3);
    let manager = rig.manager();
    for identity in 1..=3 {
        down(&manager, identity).await;
    }
    until("none is left", || running(&own).is_empty());
}

#[tokio::test]
async fn a_supervisor_that_hangs_is_killed() {
    let rig = Rig::new();
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let (shim, child) = rig.pids(&rig.home()).unwrap();
    kill(shim, Signal::STOP);
    down(&manager, 1).await;
    until("it has ended, and its supervisor", || !runs(shim) && !runs(child));
}

#[tokio::test]
async fn what_ended_by_itself_is_brought_up_again_in_its_place() {
    let rig = Rig::new();
    let manager = rig.manager();
    let plan = rig.script("echo again >> runs; exec $GREETER");
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let (shim, child) = rig.pids(&rig.home()).unwrap();
    kill(child, Signal::KILL);
    until("the supervisor has gone", || !runs(shim));
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    assert_eq!(rig.wrote(&rig.home(), "runs"), "again\nagain", "what it wrote is still there");
}

#[tokio::test]
async fn a_program_that_has_ended_is_not_answered_as_ready() {
    let rig = Rig::new();
    let manager = rig.manager();
    let plan = rig.greeter();
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let (shim, child) = rig.pids(&rig.home()).unwrap();
    // Its supervisor is there and has not noticed.
    kill(shim, Signal::STOP);
    kill(child, Signal::KILL);
    until("the program has ended", || !runs(child));
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    assert_eq!(said(&outputs.connection_info).as_deref(), Some("hello"));
}

#[tokio::test]
async fn a_program_that_used_up_its_cpu_time_is_said_to_have() {
    let rig = Rig::new();
    let mut plan = rig.script("while :; do :; done");
    plan.limits.cpu_seconds = Some(1);
    let text = detail(rig.manager().launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert!(text.contains("the program used up its CPU time"), "{text}");
}

#[tokio::test]
async fn an_update_that_changes_nothing_restarts_nothing() {
    let rig = Rig::new();
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let pids = rig.pids(&rig.home());
    manager.relaunch(&launch(1, 2, &rig.greeter())).await.unwrap();
    assert_eq!(rig.pids(&rig.home()), pids);
    manager.relaunch(&launch(1, 3, &rig.greeter().greeting("other"))).await.unwrap();
    assert_ne!(rig.pids(&rig.home()), pids);
}

#[tokio::test]
async fn an_update_gives_and_takes_ports() {
    let rig = Rig::new();
    let manager = rig.manager();
    let named = |names: &[&str]| {
        let mut plan = rig.greeter();
        plan.ports = names.iter().map(|name| PortSpec { name: (*name).to_owned(), protocol: Protocol::Tcp }).collect();
        // Another number of ports is another plan to run.
        plan.greeting = names.join(",");
        plan
    };
    let first = manager.launch(&launch(1, 1, &named(&["main"]))).await.unwrap();
    let two = manager.relaunch(&launch(1, 1, &named(&["extra", "main"]))).await.unwrap();
    assert_eq!(first.connection_info, two.connection_info);
    assert_eq!(rig.ports().len(), 2);
    manager.relaunch(&launch(1, 1, &named(&["main"]))).await.unwrap();
    assert_eq!(rig.ports().len(), 1);
    // A port that was reserved for an update that never came is given back too.
    launch(1, 1, &named(&["extra", "main"])).reserve(&manager).await.unwrap();
    assert_eq!(rig.ports().len(), 2);
    assert_eq!(said(&first.connection_info).as_deref(), Some("main"), "a reservation disturbs nothing");
    down(&manager, 1).await;
    assert_eq!(rig.ports().len(), 0);
}

#[tokio::test]
async fn reservation_holds_its_ports_until_it_is_dropped_and_keeps_them_until_down() {
    let rig = Rig::new();
    let launch = launch(1, 1, &rig.greeter());
    let placement = launch.reserve(&rig.manager()).await.unwrap();
    let address = (rig.config.bind, placement.ports["main"]);
    assert!(std::net::TcpListener::bind(address).is_err(), "held");
    let again = launch.reserve(&rig.manager()).await.unwrap();
    assert_ne!(again.ports, placement.ports, "the first manager holds the port, as a paused one would");
    drop((placement, again));
    std::net::TcpListener::bind(address).unwrap();
    // As after a crash: the reservation is found by what is recorded.
    assert_eq!(rig.ports().len(), 1);
    down(&rig.manager(), 1).await;
    assert_eq!(rig.ports(), [0; 0]);
}

#[tokio::test]
async fn reservation_that_was_given_up_is_not_launched_on() {
    let rig = Rig::new();
    let manager = rig.manager();
    let launch = launch(1, 1, &rig.greeter());
    let request = launch.request(launch.reserve(&manager).await.unwrap());
    down(&manager, 1).await;
    let request = gauntlet_domain::LaunchRequest { generation: u64::MAX, ..request };
    let error = manager.up(&request).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { port, .. } if port == request.placement.ports["main"]), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_that_share_a_directory_share_its_ports() {
    let rig = Rig::new();
    let (managers, plan) = ([rig.manager(), rig.manager()], rig.greeter());
    let launches: Vec<_> = (0..20).map(|identity| launch(identity, 1, &plan)).collect();
    let up = launches.iter().enumerate().map(|(at, launch)| managers[at % 2].launch(launch));
    let outputs = futures::future::try_join_all(up).await.unwrap();
    let places: BTreeSet<_> = outputs.iter().map(|outputs| &outputs.connection_info).collect();
    assert_eq!(places.len(), 20);
    assert_eq!(managers[0].list().await.unwrap().len(), 20);
    let down = launches.iter().map(|launch| managers[0].down(&launch.challenge, &launch.identity, 1));
    futures::future::try_join_all(down).await.unwrap();
    assert!(places.iter().all(|place| said(place).is_none()));
    assert_eq!(rig.ports(), [0; 0]);
}

#[tokio::test]
async fn a_port_that_is_in_use_is_not_given_out() {
    let mut rig = Rig::new();
    let first = *rig.config.ports.start();
    rig.config.ports = first..=first + 1;
    let taken = std::net::TcpListener::bind((rig.config.bind, first)).unwrap();
    let manager = rig.manager();
    let outputs = manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    assert_eq!(outputs.connection_info, format!("127.0.0.1:{}", first + 1));
    let error = manager.launch(&launch(2, 1, &rig.greeter())).await.unwrap_err();
    assert!(detail(error).contains("no free port"));
    // What an instance left behind without giving it back is given out again.
    drop(taken);
    std::os::unix::fs::symlink("../instances/none", rig.config.dir.join(format!("ports/{first}"))).unwrap();
    manager.launch(&launch(2, 1, &rig.greeter())).await.unwrap();
}

#[tokio::test]
async fn what_left_its_environment_and_group_ends_after_a_killed_supervisor_too() {
    // Nothing but a control group finds it.
    let rig = Rig::new();
    let manager = rig.manager();
    rig.program("linger", "echo $$ > $1; while :; do sleep 1; done");
    let script = "setsid env -i PATH=$PATH sh -c \"$SCENARIO_DIR/linger hidden & exit\" & exec $GREETER";
    let plan = rig.script(script);
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    until("it has said who it is", || !rig.wrote(&home, "hidden").is_empty());
    let hidden = rig.wrote(&home, "hidden").parse().unwrap();
    let Some(group) = rig.cgroup(&home) else {
        println!("no control groups here: not tried");
        return;
    };
    let (shim, child) = rig.pids(&home).unwrap();
    kill(shim, Signal::KILL);
    until("the program went with its supervisor", || !runs(child));
    assert!(runs(hidden) && group.exists());
    // At the start of a manager, before anything is launched.
    rig.manager().claim("store").await.unwrap();
    until("it has ended", || !runs(hidden));
    assert!(!group.exists());
}

#[tokio::test]
async fn control_groups_are_used_where_they_can_be_and_none_is_left() {
    let rig = Rig::new();
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let Some(group) = rig.cgroup(&rig.home()) else {
        let base = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        println!("no control groups here: {base}");
        return;
    };
    let (shim, child) = rig.pids(&rig.home()).unwrap();
    let processes = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let processes: Vec<i32> = processes.lines().map(|pid| pid.parse().unwrap()).collect();
    assert!(processes.contains(&child) && !processes.contains(&shim), "{processes:?}");
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 2).await.unwrap();
    assert!(!group.exists());
    // One of that name that is there already, with something in it, goes first.
    std::fs::create_dir(&group).unwrap();
    let mut stray =
        std::process::Command::new("sleep").arg("1000").stdout(std::process::Stdio::null()).spawn().unwrap();
    std::fs::write(group.join("cgroup.procs"), stray.id().to_string()).unwrap();
    manager.launch(&launch(1, 2, &rig.greeter())).await.unwrap();
    assert_eq!(rig.cgroup(&rig.home()), Some(group.clone()));
    assert!(!stray.wait().unwrap().success());
    assert_eq!(said(&format!("127.0.0.1:{}", rig.ports()[0])).as_deref(), Some("hello"));
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 2).await.unwrap();
    assert!(!group.exists());
}

#[tokio::test]
async fn a_port_that_another_takes_while_the_program_starts_is_replaced() {
    let rig = Rig::new();
    let manager = rig.manager();
    // The first time, it begins when another has its port.
    let script = "echo $PORT >> ports; while [ ! -e taken ]; do sleep 0.01; done; exec $GREETER";
    let plan = rig.script(script);
    let launch = launch(1, 1, &plan);
    let taker = async {
        loop {
            let port =
                rig.homes().first().and_then(|home| rig.wrote(home, "ports").lines().next()?.parse::<u16>().ok());
            // Bound, and not listening: an answer would be mistaken for the program's.
            if let Some(port) = port {
                let socket =
                    rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
                let socket = socket.unwrap();
                // Connections of an earlier test may still be closing.
                rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
                rustix::net::bind(&socket, &std::net::SocketAddr::new(rig.config.bind, port)).unwrap();
                rustix::net::sockopt::set_socket_reuseaddr(&socket, false).unwrap();
                std::fs::write(rig.home().join("work/taken"), "").unwrap();
                return (port, socket);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (outputs, (taken, _socket)) = futures::join!(manager.launch(&launch), taker);
    let outputs = outputs.unwrap();
    assert_ne!(outputs.connection_info, format!("127.0.0.1:{taken}"));
    assert_eq!(said(&outputs.connection_info).as_deref(), Some("hello"));
    assert_eq!(rig.ports().len(), 1, "the other is given back");
}

#[tokio::test]
async fn a_port_is_held_until_the_program_begins() {
    let rig = Rig::new();
    // What becomes the program says, as the last thing before, what it has open.
    rig.manager().launch(&launch(1, 1, &rig.script("ls -l /proc/self/fd > open; exec $GREETER"))).await.unwrap();
    let open = rig.wrote(&rig.home(), "open");
    assert!(!open.contains("socket"), "the program has none of the sockets that hold ports: {open}");
    assert!(open.contains("/dev/null"), "{open}");
}

#[tokio::test]
async fn errors_of_the_supervisor_are_logged_and_answered() {
    let rig = Rig::new();
    let manager = rig.manager();
    let plan = rig.greeter();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    let (shim, child) = rig.pids(&home).unwrap();
    kill(child, Signal::KILL);
    until("the supervisor has gone", || !runs(shim));
    std::fs::create_dir(home.join("state.json.new")).unwrap();
    let text = detail(manager.launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert!(text.contains("exit status: 126") && text.contains("Is a directory"), "{text}");
    let log = std::fs::read_to_string(home.join("supervisor.log")).unwrap();
    assert!(log.contains("failed: Is a directory"), "{log}");
    // It is there to be read when the instance runs again, and does not grow without bound.
    std::fs::write(home.join("supervisor.log"), "x".repeat(20 << 10)).unwrap();
    manager.launch(&launch(1, 1, &plan)).await.unwrap_err();
    std::fs::remove_dir(home.join("state.json.new")).unwrap();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let log = std::fs::read_to_string(home.join("supervisor.log")).unwrap();
    assert!(log.contains("failed: Is a directory") && log.len() < 200, "{log}");
}

#[tokio::test]
async fn an_end_is_noticed_when_it_happens() {
    for rig in Rig::each() {
        let manager = rig.manager();
        let plan = rig.greeter();
        let mut ends = manager.ends().unwrap();
        // Those that are taken down are not told of.
        manager.launch(&launch(1, 1, &plan)).await.unwrap();
        down(&manager, 1).await;
        manager.launch(&launch(2, 7, &plan)).await.unwrap();
        let home = rig.homes().into_iter().find(|home| home.join("state.json").exists()).unwrap();
        let (_, child) = rig.pids(&home).unwrap();
        kill(child, Signal::KILL);
        let found = tokio::time::timeout(Duration::from_secs(20), ends.next()).await.expect("noticed").unwrap();
        assert_eq!((found.identity.clone(), found.generation, found.alive), (Identity::from_bits(2), 7, false));
        assert_eq!(manager.list().await.unwrap(), [found]);
        // Nor is one whose supervisor was killed missed.
        manager.launch(&launch(2, 8, &plan)).await.unwrap();
        kill(rig.pids(&home).unwrap().0, Signal::KILL);
        let found = tokio::time::timeout(Duration::from_secs(20), ends.next()).await.expect("noticed").unwrap();
        assert_eq!(found.generation, 8);
        down(&manager, 2).await;
    }
}

#[tokio::test]
async fn one_that_ends_again_and_again_rests_before_it_is_told_of() {
    let mut rig = Rig::new();
    rig.config.restart.first = Duration::from_secs(3600);
    rig.config.restart.most = Duration::from_secs(3600);
    let manager = rig.manager();
    let plan = rig.greeter();
    let mut ends = manager.ends().unwrap();
    let end = |generation| {
        let (manager, rig, launch) = (&manager, &rig, launch(1, generation, &plan));
        async move {
            manager.launch(&launch).await.unwrap();
            let (shim, child) = rig.pids(&rig.homes()[0]).unwrap();
            kill(child, Signal::KILL);
            until("the supervisor has gone", || !runs(shim));
        }
    };
    end(1).await;
    assert!(!manager.list().await.unwrap()[0].alive, "the first time it is due at once");
    assert_eq!(ends.next().await.unwrap().generation, 1);
    end(2).await;
    assert!(manager.list().await.unwrap()[0].alive, "the second time it is left alone for a while");
    // Another one that ends is told of meanwhile.
    let other = launch(2, 3, &plan);
    manager.launch(&other).await.unwrap();
    let home = rig.homes().into_iter().find(|home| home.display().to_string().ends_with("2")).unwrap();
    kill(rig.pids(&home).unwrap().1, Signal::KILL);
    assert_eq!(ends.next().await.unwrap().generation, 3);
    // A launch does not wait.
    end(4).await;
    // One that ran well begins again.
    let mut config = rig.config.clone();
    config.restart.well = Duration::ZERO;
    assert!(!Process::new(config).unwrap().list().await.unwrap().iter().any(|found| found.alive));
}

#[tokio::test]
async fn it_is_alone_with_its_environment_directory_and_limits() {
    let rig = Rig::new();
    let mut plan = rig.script(
        "env > env; pwd > pwd; ulimit -v > memory; ulimit -n > files; ulimit -t > cpu; ulimit -c > core; umask > umask
         grep NoNewPrivs /proc/self/status > privileges; ls -l /proc/self/fd > open; exec $GREETER",
    );
    plan.limits = Limits { memory: Some(512 << 20), cpu_seconds: Some(50), open_files: Some(64), output: None };
    // Not closed on exec, as careless parents leave them.
    let leaked = std::fs::File::create(rig.dir.path().join("leaked")).unwrap();
    let _leaked = rustix::io::dup(&leaked).unwrap();
    let manager = rig.manager();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    let wrote = |name| rig.wrote(&home, name);
    let env = wrote("env");
    let env: BTreeMap<_, _> = env.lines().filter_map(|line| line.split_once('=')).collect();
    let known = [
        "GAUNTLET_INSTANCE",
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
    assert!(env.keys().all(|name| known.contains(name)), "{env:?}");
    let work = home.join("work").display().to_string();
    assert_eq!((env["HOME"], env["TMPDIR"], wrote("pwd")), (work.as_str(), work.as_str(), work.clone()));
    assert_eq!(Path::new(env["SCENARIO_DIR"]), rig.dir.path().join("files"));
    assert_eq!((wrote("memory"), wrote("files")), ((512 << 10).to_string(), "64".to_owned()));
    assert_eq!((wrote("cpu"), wrote("core"), wrote("umask")), ("50".to_owned(), "0".to_owned(), "0077".to_owned()));
    assert!(wrote("privileges").ends_with('1'));
    let open = wrote("open");
    assert!(!open.contains("run.lock") && !open.contains("leaked"), "{open}");
}

#[tokio::test]
async fn nobody_else_may_read_what_is_kept() {
    let rig = Rig::new();
    rig.manager().launch(&launch(1, 1, &rig.greeter())).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let home = rig.home();
    assert_eq!(mode(&home), 0o700);
    for file in ["instance.json", "label.json", "state.json", "output.log"] {
        // The supervisor may write its own after the program answers.
        until("the file is there", || home.join(file).exists());
        assert_eq!(mode(&home.join(file)), 0o600, "{file}");
    }
}

#[tokio::test]
async fn output_is_kept_within_its_limit() {
    let rig = Rig::new();
    let mut plan =
        rig.script("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; echo last; exec $GREETER");
    plan.limits.output = Some(4096);
    plan.probe = Probe::Output { contains: "listening".to_owned() };
    rig.manager().launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    let read = |name| std::fs::read_to_string(home.join(name)).unwrap();
    let kept = read("output.old.log") + &read("output.log");
    assert!(kept.len() <= 4096 && kept.ends_with("line 4999\nlast\nlistening\n"), "{kept}");
}

#[tokio::test]
async fn each_probe_waits_for_its_answer() {
    let rig = Rig::new();
    let manager = rig.manager();
    let http = |path: &str, status| Probe::Http { port: "main".to_owned(), path: path.to_owned(), status };
    let mut plan = rig.greeter().probe(http("/", 200));
    plan.env.insert("HTTP".to_owned(), "1".to_owned());
    manager.launch(&launch(1, 1, &plan.clone())).await.unwrap();
    plan = plan.probe(Probe::Output { contains: "istenin".to_owned() });
    manager.launch(&launch(2, 1, &plan.clone())).await.unwrap();
    // However long the program takes to answer what is not asked for.
    let mut text = String::new();
    for (generation, timeout) in (1..).zip([100, 1000, 10_000, 30_000]).map(|(at, ms)| (at, Duration::from_millis(ms)))
    {
        plan.timeout = timeout;
        let plan = plan.clone().probe(http("/", 204));
        text = detail(manager.launch(&launch(3, generation, &plan)).await.unwrap_err());
        assert!(text.contains(&format!("{timeout:?}")), "{text}");
        if text.contains("status 200") {
            break;
        }
    }
    for part in ["ready: GET / with status 204 on port \"main\" (127.0.0.1:", "status 200", "listening"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let error = manager.launch(&launch(4, 1, &plan.clone().probe(http("/ HTTP/1.1\r\nX: y", 200)))).await.unwrap_err();
    assert!(detail(error).contains("control character"));
    let error = manager.launch(&launch(5, 1, &plan.probe(Probe::Tcp { port: "nay".to_owned() }))).await.unwrap_err();
    assert!(detail(error).contains("not a port of this instance"));
}

#[tokio::test]
async fn what_is_not_ready_in_time_does_not_stay() {
    let rig = Rig::new();
    let manager = rig.manager();
    let mut plan = rig.script("echo $$ > pid; exec sleep 1000");
    // However long it takes to begin.
    for (generation, timeout) in (1..).zip([200, 2000, 30_000]) {
        plan.timeout = Duration::from_millis(timeout);
        let text = detail(manager.launch(&launch(1, generation, &plan.clone())).await.unwrap_err());
        assert!(text.contains("a TCP connection to port \"main\"") && text.contains("it wrote nothing"), "{text}");
        if !rig.wrote(&rig.home(), "pid").is_empty() {
            break;
        }
    }
    assert!(!runs(rig.wrote(&rig.home(), "pid").parse().unwrap()));
}

#[tokio::test]
async fn errors_say_what_happened() {
    let rig = Rig::new();
    let manager = rig.manager();
    // Long before the timeout.
    let plan = rig.script("echo one; echo \"bad: $GREETING FLAG{$GREETING}\" >&2; exit 3").greeting("secret");
    let text = detail(manager.launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert_eq!(text, "ready: the program ended with exit status 3; its last output:\none\nbad: secret [flag]");

    let plan = rig.script("kill -SEGV $$");
    let text = detail(manager.launch(&launch(1, 2, &plan)).await.unwrap_err());
    assert!(text.contains("was ended by signal 11"), "{text}");

    let mut plan = rig.greeter();
    plan.command = vec!["no-such-program".to_owned()];
    let text = detail(manager.launch(&launch(2, 1, &plan.clone())).await.unwrap_err());
    assert!(text.contains("\"no-such-program\" not found"), "{text}");

    std::fs::write(rig.program("broken", ""), "#!/no/such/interpreter\n").unwrap();
    plan.command = vec!["broken".to_owned()];
    let text = detail(manager.launch(&launch(3, 1, &plan.clone())).await.unwrap_err());
    assert!(text.contains("exit status 126") && text.contains("files/broken: No such file"), "{text}");

    plan.command = Vec::new();
    assert!(detail(manager.launch(&launch(4, 1, &plan)).await.unwrap_err()).contains("command is empty"));
}

#[tokio::test]
async fn a_supervisor_that_is_none_is_noticed() {
    let mut rig = Rig::new();
    rig.config.shim = Some("/bin/false".into());
    let text = detail(rig.manager().launch(&launch(1, 1, &rig.greeter())).await.unwrap_err());
    assert!(text.contains("its supervisor /bin/false ended with exit status: 1"), "{text}");
    rig.config.shim = Some("/no/such/file".into());
    assert!(detail(Process::new(rig.config.clone()).unwrap_err()).contains("/no/such/file is not there"));
}

#[tokio::test]
async fn records_that_cannot_be_read_are_written_anew() {
    let rig = Rig::new();
    let manager = rig.manager();
    let plan = rig.greeter();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let home = rig.home();
    let (shim, child) = rig.pids(&home).unwrap();
    kill(child, Signal::KILL);
    until("the supervisor has gone", || !runs(shim));
    for name in ["label.json", "instance.json", "state.json"] {
        std::fs::write(home.join(name), "{").unwrap();
    }
    assert_eq!(manager.list().await.unwrap(), []);
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    assert_eq!(manager.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trivial_instance_is_ready_at_once() {
    let rig = Rig::new();
    let manager = rig.manager();
    let plan = rig.greeter();
    let mut took = Vec::new();
    for identity in 0..20 {
        let began = std::time::Instant::now();
        manager.launch(&launch(identity, 1, &plan)).await.unwrap();
        took.push(began.elapsed());
        if identity == 0 {
            let (shim, _) = rig.pids(&rig.home()).unwrap();
            let status = std::fs::read_to_string(format!("/proc/{shim}/status")).unwrap();
            let memory: Vec<_> =
                status.lines().filter(|line| line.starts_with("Rss") || line.starts_with("VmRSS")).collect();
            println!("supervisor: {}", memory.join(", "));
        }
        down(&manager, identity).await;
    }
    took.sort();
    println!("ready after: median {:?}, slowest {:?}", took[10], took[19]);
}

#[tokio::test]
async fn each_step_is_a_span_and_none_tells_a_secret() {
    let rig = Rig::new();
    let seen = Seen::default();
    // Tests run beside this one on threads without a subscriber: the first to come to a span would settle for all that nobody is interested.
    tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap();
    let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(seen.clone()));
    let manager = rig.manager();
    let plan = |greeting: &str| rig.greeter().greeting(greeting);
    manager.launch(&launch(1, 1, &plan("secret-one"))).await.unwrap();
    manager.relaunch(&launch(1, 1, &plan("secret-two"))).await.unwrap();
    manager.launch(&launch(2, 1, &rig.script("echo FLAG{$GREETING}; exit 1"))).await.unwrap_err();
    down(&manager, 1).await;
    drop(Rig::without_cgroups().manager());
    drop(guard);
    let seen = std::mem::take(&mut *seen.0.lock().unwrap());
    let names: Vec<_> = seen.iter().filter_map(|line| line.strip_prefix("span ")).collect();
    let (up, update) = (["allocate", "start", "ready"], ["allocate", "stop", "start", "ready"]);
    let failed = ["allocate", "start", "ready", "stop"];
    let steps: Vec<_> = [&up[..], &update[..], &failed[..], &["stop", "remove"]].concat();
    assert_eq!(names, steps.iter().map(|step| format!("provision.{step}")).collect::<Vec<_>>());
    let all = seen.join("\n");
    assert!(all.contains("instance.identity=\"0000000000000001\"") && all.contains("provisioner=\"process\""), "{all}");
    assert_eq!(all.matches("otel.status_code=\"ERROR\"").count(), 1, "{all}");
    assert!(all.contains("error.type="), "{all}");
    let why = "why=\"switched off\"";
    assert!(all.contains(why) && all.contains("instances have no control groups"), "it is said once why: {all}");
    assert!(!all.contains("secret-") && !all.contains("FLAG{"), "{all}");
}

/// Everything that spans and events say.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{field}={value:?}"));
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.0.lock().unwrap().push(format!("span {}", attributes.metadata().name()));
        attributes.record(&mut self.clone());
    }

    fn on_record(&self, _: &Id, values: &span::Record<'_>, _: Context<'_, S>) {
        values.record(&mut self.clone());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        event.record(&mut self.clone());
    }
}
