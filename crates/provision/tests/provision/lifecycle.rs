//! Starting, updating, stopping and restarting instances.

use std::{path::Path, time::Duration};

use gauntlet_domain::{Identity, Provisioner as _};
use gauntlet_provision::process::Process;
use gauntlet_testing::{eventually, eventually_blocking, processes::is_running};
use rustix::process::Signal;

use crate::support::{Fixture, LaunchExt as _, launch, remove, send_signal, state};

#[tokio::test]
async fn instance_outlives_its_manager_and_is_found_by_the_next() {
    let fixture = Fixture::new();
    let (one, plan) = (fixture.manager(), fixture.greeter());
    let outputs = one.launch(&launch(1, 1, &plan)).await.unwrap();
    let pids = fixture.pids(&fixture.instance_dir()).unwrap();
    drop(one);
    let two = fixture.manager();
    assert_eq!(two.list().await.unwrap().len(), 1);
    assert_eq!(two.launch(&launch(1, 2, &plan)).await.unwrap(), outputs);
    assert_eq!(fixture.pids(&fixture.instance_dir()).unwrap(), pids, "must be neither restarted nor duplicated");
    remove(&two, 1).await;
    eventually_blocking("program and supervisor have exited", || !is_running(pids.0) && !is_running(pids.1));
}

#[tokio::test]
async fn supervisors_and_programs_leave_no_zombie() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let (supervisor, child) = fixture.pids(&fixture.instance_dir()).unwrap();
    remove(&manager, 1).await;
    eventually_blocking("both are reaped", || {
        [supervisor, child].iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
}

#[tokio::test]
async fn instance_that_a_cancelled_launch_left_starting_is_started_again_if_it_exits() {
    let fixture = Fixture::on_host();
    let manager = fixture.manager();
    let script =
        "[ -e started ] && exec $GREETER; echo yes > started; while [ ! -e exit ]; do sleep 0.01; done; exit 1";
    let launch = launch(1, 1, &fixture.script(script));
    let started = || fixture.instance_dirs().first().is_some_and(|dir| !fixture.file(dir, "started").is_empty());
    tokio::select! {
        launched = manager.launch(&launch) => panic!("the program does not listen yet: {launched:?}"),
        () = eventually("the program runs", async || started()) => {}
    }
    let mut repeated = manager.launch(&launch);
    for _ in 0..1000 {
        // Until it waits for the running program.
        assert!(futures::poll!(&mut repeated).is_pending());
        tokio::task::yield_now().await;
    }
    std::fs::write(fixture.instance_dir().join("work/exit"), "").unwrap();
    repeated.await.unwrap();
}

#[tokio::test]
async fn down_ends_every_descendant() {
    for fixture in Fixture::on_host_with_and_without_cgroups() {
        check_down_ends_every_descendant(fixture).await;
    }
}

async fn check_down_ends_every_descendant(fixture: Fixture) {
    let manager = fixture.manager();
    fixture.program("linger", "trap '' TERM; echo $$ > $1; while :; do sleep 1; done");
    // One in the program's process group, one in its own session, one reparented with a cleared environment; all ignore SIGTERM.
    let script = "$SCENARIO_DIR/linger a &
        setsid $SCENARIO_DIR/linger b &
        setsid env -i PATH=$PATH sh -c \"$SCENARIO_DIR/linger c & exit\" &
        exec $GREETER";
    manager.launch(&launch(1, 1, &fixture.script(script))).await.unwrap();
    let dir = fixture.instance_dir();
    let (supervisor, child) = fixture.pids(&dir).unwrap();
    let names = ["a", "b", "c"];
    eventually_blocking("all have written their pids", || {
        names.iter().all(|name| !fixture.file(&dir, name).is_empty())
    });
    let pids = names.map(|name| fixture.file(&dir, name).parse().unwrap());
    assert!(pids.iter().all(|pid| is_running(*pid)));
    remove(&manager, 1).await;
    eventually_blocking("program and supervisor have exited", || {
        [supervisor, child].iter().chain(&pids).all(|pid| !is_running(*pid))
    });
}

#[tokio::test]
async fn program_that_exits_within_its_grace_period_is_not_killed() {
    let mut fixture = Fixture::on_host();
    // Longer than the timeouts that the manager adds to it: it must not give up earlier.
    fixture.config.grace = Duration::from_secs(60);
    let manager = fixture.manager();
    let script = "trap 'sleep 0.2; echo done > saved; exit 7' TERM; $GREETER & while :; do wait; done";
    manager.launch(&launch(1, 1, &fixture.script(script))).await.unwrap();
    assert_eq!(manager.halt().await.unwrap(), 1);
    let dir = fixture.instance_dir();
    assert_eq!(fixture.file(&dir, "saved"), "done");
    let state = state(&dir).unwrap();
    assert!(state["end"].to_string().contains("ended with exit status 7"), "{state}");
}

#[tokio::test]
async fn hanging_supervisor_is_killed() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let (supervisor, child) = fixture.pids(&fixture.instance_dir()).unwrap();
    send_signal(supervisor, Signal::STOP);
    remove(&manager, 1).await;
    eventually_blocking("program and supervisor have exited", || !is_running(supervisor) && !is_running(child));
}

#[tokio::test]
async fn instance_that_ended_is_launched_again_in_its_directory() {
    let fixture = Fixture::on_host();
    let manager = fixture.manager();
    let plan = fixture.script("echo again >> runs; exec $GREETER");
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let (supervisor, child) = fixture.pids(&fixture.instance_dir()).unwrap();
    send_signal(child, Signal::KILL);
    eventually_blocking("the supervisor has exited", || !is_running(supervisor));
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    assert_eq!(fixture.file(&fixture.instance_dir(), "runs"), "again\nagain", "the first run's file must be kept");
}

#[tokio::test]
async fn update_without_changes_restarts_nothing() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let pids = fixture.pids(&fixture.instance_dir());
    manager.relaunch(&launch(1, 2, &fixture.greeter())).await.unwrap();
    assert_eq!(fixture.pids(&fixture.instance_dir()), pids);
    manager.relaunch(&launch(1, 3, &fixture.greeter().greeting("other"))).await.unwrap();
    assert_ne!(fixture.pids(&fixture.instance_dir()), pids);
}

#[tokio::test]
async fn end_of_an_instance_is_reported_at_once() {
    for fixture in Fixture::with_and_without_cgroups() {
        let manager = fixture.manager();
        let plan = fixture.greeter();
        let mut ends = manager.ends().unwrap();
        // An instance that is removed on request is not reported.
        manager.launch(&launch(1, 1, &plan)).await.unwrap();
        remove(&manager, 1).await;
        manager.launch(&launch(2, 7, &plan)).await.unwrap();
        let dir = fixture.instance_dirs().into_iter().find(|dir| dir.join("state.json").exists()).unwrap();
        let (_, child) = fixture.pids(&dir).unwrap();
        send_signal(child, Signal::KILL);
        let found =
            tokio::time::timeout(Duration::from_secs(20), ends.next()).await.expect("no exit reported").unwrap();
        assert_eq!((found.identity.clone(), found.generation, found.alive), (Identity::from_bits(2), 7, false));
        assert_eq!(manager.list().await.unwrap(), [found]);
        // An instance whose supervisor was killed is reported too.
        manager.launch(&launch(2, 8, &plan)).await.unwrap();
        send_signal(fixture.pids(&dir).unwrap().0, Signal::KILL);
        let found =
            tokio::time::timeout(Duration::from_secs(20), ends.next()).await.expect("no exit reported").unwrap();
        assert_eq!(found.generation, 8);
        remove(&manager, 2).await;
    }
}

#[tokio::test]
async fn repeated_ends_are_reported_after_a_delay() {
    let mut fixture = Fixture::new();
    fixture.config.restart.first_delay = Duration::from_secs(3600);
    fixture.config.restart.max_delay = Duration::from_secs(3600);
    let manager = fixture.manager();
    let plan = fixture.greeter();
    let mut ends = manager.ends().unwrap();
    let end = |generation| {
        let (manager, fixture, launch) = (&manager, &fixture, launch(1, generation, &plan));
        async move {
            manager.launch(&launch).await.unwrap();
            let (supervisor, child) = fixture.pids(&fixture.instance_dirs()[0]).unwrap();
            send_signal(child, Signal::KILL);
            eventually_blocking("the supervisor has exited", || !is_running(supervisor));
        }
    };
    end(1).await;
    assert!(!manager.list().await.unwrap()[0].alive, "the first exit must be reported at once");
    assert_eq!(ends.next().await.unwrap().generation, 1);
    end(2).await;
    assert!(manager.list().await.unwrap()[0].alive, "the second exit must be reported only after the delay");
    // The exit of another instance is reported meanwhile.
    let other = launch(2, 3, &plan);
    manager.launch(&other).await.unwrap();
    let dir = fixture.instance_dirs().into_iter().find(|dir| dir.display().to_string().ends_with("2")).unwrap();
    send_signal(fixture.pids(&dir).unwrap().1, Signal::KILL);
    assert_eq!(ends.next().await.unwrap().generation, 3);
    // A launch ignores the delay.
    end(4).await;
    // The delay is reset once an instance has run for `reset_after`.
    let mut config = fixture.config.clone();
    config.restart.reset_after = Duration::ZERO;
    assert!(!Process::new(config).unwrap().list().await.unwrap().iter().any(|found| found.alive));
}

#[tokio::test]
async fn unreadable_records_are_replaced() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let plan = fixture.greeter();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    let (supervisor, child) = fixture.pids(&dir).unwrap();
    send_signal(child, Signal::KILL);
    eventually_blocking("the supervisor has exited", || !is_running(supervisor));
    for name in ["label.json", "instance.json", "state.json"] {
        std::fs::write(dir.join(name), "{").unwrap();
    }
    assert_eq!(manager.list().await.unwrap(), []);
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    assert_eq!(manager.list().await.unwrap().len(), 1);
}
