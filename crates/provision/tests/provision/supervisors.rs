//! Supervisors that wait, fail or are killed, and control groups.

use std::path::Path;

use gauntlet_domain::{Identity, Provisioner as _};
use gauntlet_provision::process::Process;
use gauntlet_testing::{eventually_blocking, processes::is_running};
use rustix::process::Signal;

use crate::support::{Fixture, LaunchExt as _, challenge, greeting_at, launch, provision_error, remove, send_signal};

#[tokio::test]
async fn processes_of_a_killed_supervisor_are_killed() {
    for fixture in Fixture::on_host_with_and_without_cgroups() {
        check_processes_of_a_killed_supervisor_are_killed(fixture).await;
    }
}

async fn check_processes_of_a_killed_supervisor_are_killed(fixture: Fixture) {
    let manager = fixture.manager();
    fixture.program("linger", "echo $$ > $1; while :; do sleep 1; done");
    let script = "setsid $SCENARIO_DIR/linger far & env -i PATH=$PATH $SCENARIO_DIR/linger near & exec $GREETER";
    let plan = fixture.script(script);
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    let (supervisor, child) = fixture.pids(&dir).unwrap();
    eventually_blocking("both have written their process ids", || {
        ["far", "near"].iter().all(|name| !fixture.file(&dir, name).is_empty())
    });
    let left = ["far", "near"].map(|name| fixture.file(&dir, name).parse().unwrap());
    send_signal(supervisor, Signal::KILL);
    eventually_blocking("the program has exited with its supervisor", || !is_running(child));
    assert!(left.iter().all(|pid| is_running(*pid)));
    // Launched again, at the same address.
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    eventually_blocking("program and supervisor have exited", || left.iter().all(|pid| !is_running(*pid)));

    let (supervisor, _) = fixture.pids(&dir).unwrap();
    let again = ["far", "near"].map(|name| {
        eventually_blocking("the script has written its process id", || {
            fixture.file(&dir, name).parse().is_ok_and(|pid: i32| !left.contains(&pid))
        });
        fixture.file(&dir, name).parse().unwrap()
    });
    // An instance of the same name in another data directory must not be affected.
    let other = Fixture::new();
    let elsewhere = other.manager().launch(&launch(1, 1, &other.greeter())).await.unwrap();
    send_signal(supervisor, Signal::KILL);
    remove(&manager, 1).await;
    assert_eq!(greeting_at(&elsewhere.connection_info).as_deref(), Some("hello"));
    eventually_blocking("program and supervisor have exited", || again.iter().all(|pid| !is_running(*pid)));
}

/// Returns the ids of the processes that run `program`.
fn running(program: &Path) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_supervisor_waits_for_the_next_instance_and_ends_with_its_manager() {
    let mut fixture = Fixture::on_host();
    let own = fixture.dir.path().canonicalize().unwrap().join("supervisor");
    std::fs::copy(fixture.config.supervisor.as_ref().unwrap(), &own).unwrap();
    fixture.config.supervisor = Some(own.clone());
    let manager = fixture.manager();
    assert!(running(&own).is_empty(), "a supervisor runs before the first instance");
    manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let (first, _) = fixture.pids(&fixture.instance_dir()).unwrap();
    // A pair is a supervisor and the process that becomes the program.
    let waiting = || running(&own).into_iter().filter(|pid| *pid != first).collect::<Vec<_>>();
    eventually_blocking("a pair waits", || waiting().len() == 2);
    let pair = waiting();
    manager.launch(&launch(2, 1, &fixture.greeter())).await.unwrap();
    let (second, program) = fixture.pids(&fixture.instance_dirs()[1]).unwrap();
    assert!(pair.contains(&second) && pair.contains(&program), "{pair:?} waited, but {second} and {program} run");
    eventually_blocking("another pair waits", || waiting().len() == 3);
    // A waiting pair that was killed is not used.
    let killed: Vec<_> = waiting().into_iter().filter(|pid| *pid != second).collect();
    killed.iter().for_each(|pid| send_signal(*pid, Signal::KILL));
    eventually_blocking("the killed pair has exited", || killed.iter().all(|pid| !is_running(*pid)));
    manager.launch(&launch(3, 1, &fixture.greeter())).await.unwrap();
    drop(manager);
    eventually_blocking("the waiting pair has ended", || running(&own).len() == 3);
    let manager = fixture.manager();
    for identity in 1..=3 {
        remove(&manager, identity).await;
    }
    eventually_blocking("no supervisor is left", || running(&own).is_empty());
}

#[tokio::test]
async fn control_group_finds_processes_without_the_environment() {
    // With a cleared environment and its own session, the process is found only by its control group.
    let fixture = Fixture::on_host();
    let manager = fixture.manager();
    fixture.program("linger", "echo $$ > $1; while :; do sleep 1; done");
    let script = "setsid env -i PATH=$PATH sh -c \"$SCENARIO_DIR/linger hidden & exit\" & exec $GREETER";
    let plan = fixture.script(script);
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    eventually_blocking("the script has written its process id", || !fixture.file(&dir, "hidden").is_empty());
    let hidden = fixture.file(&dir, "hidden").parse().unwrap();
    let Some(group) = fixture.cgroup(&dir) else {
        println!("no control groups here: not tried");
        return;
    };
    let (supervisor, child) = fixture.pids(&dir).unwrap();
    send_signal(supervisor, Signal::KILL);
    eventually_blocking("the program has exited with its supervisor", || !is_running(child));
    assert!(is_running(hidden) && group.exists());
    // The next manager kills the process when it starts, before it launches anything.
    fixture.manager().claim("store").await.unwrap();
    eventually_blocking("the process has exited", || !is_running(hidden));
    assert!(!group.exists());
}

#[tokio::test]
async fn control_group_is_created_and_removed_with_its_instance() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    let Some(group) = fixture.cgroup(&fixture.instance_dir()) else {
        let base = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        println!("no control groups here: {base}");
        return;
    };
    let (supervisor, child) = fixture.pids(&fixture.instance_dir()).unwrap();
    let processes = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let processes: Vec<i32> = processes.lines().map(|pid| pid.parse().unwrap()).collect();
    assert!(processes.contains(&child) && !processes.contains(&supervisor), "{processes:?}");
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 2).await.unwrap();
    assert!(!group.exists());
}

#[tokio::test]
async fn supervisor_errors_are_logged_and_returned() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let plan = fixture.greeter();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let dir = fixture.instance_dir();
    let (supervisor, child) = fixture.pids(&dir).unwrap();
    send_signal(child, Signal::KILL);
    eventually_blocking("the supervisor has exited", || !is_running(supervisor));
    std::fs::create_dir(dir.join("state.json.new")).unwrap();
    let text = provision_error(manager.launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert!(text.contains("exit status: 126") && text.contains("Is a directory"), "{text}");
    let log = std::fs::read_to_string(dir.join("supervisor.log")).unwrap();
    assert!(log.contains("failed: Is a directory"), "{log}");
    // The log is kept when the instance runs again, and its size is bounded.
    std::fs::write(dir.join("supervisor.log"), "x".repeat(20 << 10)).unwrap();
    manager.launch(&launch(1, 1, &plan)).await.unwrap_err();
    std::fs::remove_dir(dir.join("state.json.new")).unwrap();
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let log = std::fs::read_to_string(dir.join("supervisor.log")).unwrap();
    assert!(log.contains("failed: Is a directory") && log.len() < 200, "{log}");
}

#[tokio::test]
async fn invalid_supervisor_program_is_reported() {
    let mut fixture = Fixture::new();
    fixture.config.supervisor = Some("/bin/false".into());
    let text = provision_error(fixture.manager().launch(&launch(1, 1, &fixture.greeter())).await.unwrap_err());
    assert!(text.contains("its supervisor /bin/false ended with exit status: 1"), "{text}");
    fixture.config.supervisor = Some("/no/such/file".into());
    assert!(
        provision_error(Process::new(fixture.config.clone()).unwrap_err()).contains("/no/such/file does not exist")
    );
}
