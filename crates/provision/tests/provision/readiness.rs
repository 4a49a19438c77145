//! Readiness probes, and the errors of instances that do not become ready.

use std::time::Duration;

use gauntlet_domain::Probe;
use gauntlet_testing::{eventually_blocking, processes::is_running};
use rustix::process::Signal;

use crate::support::{Fixture, LaunchExt as _, greeting_at, launch, provision_error, remove, send_signal};

#[tokio::test]
async fn ended_program_is_not_reported_as_ready() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let plan = fixture.greeter();
    let outputs = manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let (supervisor, child) = fixture.pids(&fixture.instance_dir()).unwrap();
    // The supervisor is stopped, so it cannot notice the exit.
    send_signal(supervisor, Signal::STOP);
    send_signal(child, Signal::KILL);
    eventually_blocking("the program has exited", || !is_running(child));
    assert_eq!(manager.launch(&launch(1, 1, &plan)).await.unwrap(), outputs);
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("hello"));
}

#[tokio::test]
async fn error_says_that_a_program_used_up_its_cpu_time() {
    let fixture = Fixture::new();
    let mut plan = fixture.script("while :; do :; done");
    plan.limits.cpu_seconds = Some(1);
    let text = provision_error(fixture.manager().launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert!(text.contains("the program used up its CPU time"), "{text}");
}

#[tokio::test]
async fn each_kind_of_probe_waits_until_it_succeeds() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let http = |path: &str, status| Probe::Http { port: "main".to_owned(), path: path.to_owned(), status };
    let mut plan = fixture.greeter().probe(http("/", 200));
    plan.env.insert("HTTP".to_owned(), "1".to_owned());
    manager.launch(&launch(1, 1, &plan.clone())).await.unwrap();
    plan = plan.probe(Probe::Output { contains: "istenin".to_owned() });
    manager.launch(&launch(2, 1, &plan.clone())).await.unwrap();
    // Retries with longer timeouts until the program has answered with the wrong status, however slow the machine is.
    let mut text = String::new();
    for (generation, timeout) in (1..).zip([100, 1000, 10_000, 30_000]).map(|(at, ms)| (at, Duration::from_millis(ms)))
    {
        plan.timeout = timeout;
        let plan = plan.clone().probe(http("/", 204));
        text = provision_error(manager.launch(&launch(3, generation, &plan)).await.unwrap_err());
        assert!(text.contains(&format!("{timeout:?}")), "{text}");
        if text.contains("status 200") {
            break;
        }
    }
    for part in ["ready: GET / with status 204 on port \"main\" (127.0.0.1:", "status 200", "listening"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let error = manager.launch(&launch(4, 1, &plan.clone().probe(http("/ HTTP/1.1\r\nX: y", 200)))).await.unwrap_err();
    assert!(provision_error(error).contains("control character"));
    let error = manager.launch(&launch(5, 1, &plan.probe(Probe::Tcp { port: "nay".to_owned() }))).await.unwrap_err();
    assert!(provision_error(error).contains("not a port of this instance"));
}

#[tokio::test]
async fn instance_that_is_not_ready_in_time_is_stopped() {
    let fixture = Fixture::on_host();
    let manager = fixture.manager();
    let mut plan = fixture.script("echo $$ > pid; exec sleep 1000");
    // Retries with longer timeouts until the program has started, however slow the machine is.
    for (generation, timeout) in (1..).zip([200, 2000, 30_000]) {
        plan.timeout = Duration::from_millis(timeout);
        let text = provision_error(manager.launch(&launch(1, generation, &plan.clone())).await.unwrap_err());
        assert!(text.contains("a TCP connection to port \"main\"") && text.contains("it wrote no output"), "{text}");
        if !fixture.file(&fixture.instance_dir(), "pid").is_empty() {
            break;
        }
    }
    assert!(!is_running(fixture.file(&fixture.instance_dir(), "pid").parse().unwrap()));
}

#[tokio::test]
async fn errors_describe_the_failure() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    // A launch fails as soon as the program exits, long before the timeout.
    let plan = fixture.script("echo one; echo \"bad: $GREETING FLAG{$GREETING}\" >&2; exit 3").greeting("secret");
    let text = provision_error(manager.launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert_eq!(text, "ready: the program ended with exit status 3; its last output:\none\nbad: secret [flag]");

    let plan = fixture.script("kill -SEGV $$");
    let text = provision_error(manager.launch(&launch(1, 2, &plan)).await.unwrap_err());
    assert!(text.contains("was ended by signal 11"), "{text}");

    let mut plan = fixture.greeter();
    plan.command = vec!["no-such-program".to_owned()];
    let text = provision_error(manager.launch(&launch(2, 1, &plan.clone())).await.unwrap_err());
    assert!(text.contains("\"no-such-program\" not found"), "{text}");

    std::fs::write(fixture.program("broken", ""), "#!/no/such/interpreter\n").unwrap();
    plan.command = vec!["broken".to_owned()];
    let text = provision_error(manager.launch(&launch(3, 1, &plan.clone())).await.unwrap_err());
    assert!(text.contains("could not be started: execute /") && text.contains("/broken: No such file"), "{text}");

    plan.command = Vec::new();
    assert!(provision_error(manager.launch(&launch(4, 1, &plan)).await.unwrap_err()).contains("command is empty"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn start_times_of_a_small_program() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let plan = fixture.greeter();
    let mut took = Vec::new();
    for identity in 0..20 {
        let began = std::time::Instant::now();
        manager.launch(&launch(identity, 1, &plan)).await.unwrap();
        took.push(began.elapsed());
        if identity == 0 {
            let (supervisor, _) = fixture.pids(&fixture.instance_dir()).unwrap();
            let status = std::fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
            let memory: Vec<_> =
                status.lines().filter(|line| line.starts_with("Rss") || line.starts_with("VmRSS")).collect();
            println!("supervisor: {}", memory.join(", "));
        }
        remove(&manager, identity).await;
    }
    took.sort();
    println!("ready after: median {:?}, slowest {:?}", took[10], took[19]);
}
