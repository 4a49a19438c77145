//! `gauntlet dev`: what a new user sees, and what is left after it exits.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use gauntlet_stack::{ports::Reserved, process::spawn_bound};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{Backend, SOON, World, address, binary, eventually, fetch, rest};
use gauntlet_testing::processes;

struct Dev {
    child: Child,
    url: String,
    debug: String,
    output: PathBuf,
}

fn dev(data: &Path, output: PathBuf, ports: &[Reserved; 2]) -> Dev {
    dev_with(data, output, ports, &[])
}

fn dev_with(data: &Path, output: PathBuf, ports: &[Reserved; 2], environment: &[(&str, &str)]) -> Dev {
    let [api, debug] = ports.each_ref().map(Reserved::number);
    let said = File::create(&output).unwrap();
    let mut command = Command::new(binary("gauntlet"));
    command
        .arg("dev")
        .arg("--data")
        .arg(data)
        .args(["--port", &api.to_string(), "--debug-port", &debug.to_string()])
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stderr(said.try_clone().unwrap())
        .stdout(said);
    let child = spawn_bound(command).unwrap();
    Dev { child, url: format!("http://127.0.0.1:{api}"), debug: format!("http://127.0.0.1:{debug}"), output }
}

impl Dev {
    fn state(&self) -> Result<Value, String> {
        Ok(serde_json::from_str(&fetch(&format!("{}/debug/state.json", self.debug))?).unwrap())
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap()
    }

    /// Stops it as Ctrl-C does, and waits until it has exited.
    fn interrupt(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        self.wait()
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None if Instant::now() > deadline => panic!("still running:\n{}", self.said()),
                None => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns how often an operation ended, and how often it failed.
fn count(state: &Value, name: &str) -> (u64, u64) {
    let rows = state["operations"].as_array().unwrap().iter().filter(|row| row["name"] == name);
    rows.fold((0, 0), |(count, errors), row| {
        (count + row["count"].as_u64().unwrap(), errors + row["errors"].as_u64().unwrap())
    })
}

#[test]
fn shows_the_whole_lifecycle_and_leaves_only_data() {
    let world = World::bare(Backend::Embedded);
    let (data, ports) = (world.path("dev"), [Reserved::any().unwrap(), Reserved::any().unwrap()]);
    let mut first = dev(&data, world.path("first.log"), &ports);

    // An instance of another source, created as the intro describes.
    let mine = eventually("an instance is created by hand", || {
        if let Some(status) = first.child.try_wait().unwrap() {
            panic!("it exited ({status}):\n{}", first.said());
        }
        let body = json!({ "challengeId": "web", "sourceId": "me" });
        let answer = rest(&first.url, "POST", "/api/v1/instance", Some(body.to_string().as_bytes()))?;
        if answer.status == 200 { Ok(answer.json()) } else { Err(answer.text) }
    });
    let page = address(mine["connectionInfo"].as_str().unwrap()).to_owned();
    fetch(&page).unwrap();
    let said = eventually("the intro is printed", || {
        let said = first.said();
        if said.contains("Try it:") { Ok(said) } else { Err(said) }
    });
    for part in [first.url.as_str(), &format!("{}/", first.debug), "curl -s", "grpcurl", "flaky, vault, web"] {
        assert!(said.contains(part), "{part}:\n{said}");
    }
    assert!(fetch(&first.debug).unwrap().contains("<html"));

    // A second process cannot use the same data or port.
    let elsewhere = [Reserved::any().unwrap(), Reserved::any().unwrap()];
    let mut same_data = dev(&data, world.path("same-data.log"), &elsewhere);
    assert_eq!(same_data.wait().code(), Some(1));
    assert!(same_data.said().contains("another gauntlet dev (process "), "{}", same_data.said());
    let mut same_port = dev(&world.path("other"), world.path("same-port.log"), &ports);
    assert_eq!(same_port.wait().code(), Some(1));
    assert!(same_port.said().contains("--port"), "{}", same_port.said());

    eventually("calls are served, instances expire and are swept", || {
        let state = first.state()?;
        let (created, _) = count(&state, "api.v1.instance.InstanceManager/CreateInstance");
        let (swept, _) = count(&state, "janitor.expire");
        let seen = created > 0 && swept > 0 && count(&state, "lock.acquire").0 > 0;
        if seen { Ok(()) } else { Err(format!("{created} created, {swept} swept")) }
    });
    let state = first.state().unwrap();
    assert!(
        state["gauges"].as_array().unwrap().iter().any(|gauge| gauge["name"] == "challenges" && gauge["value"] == 3)
    );
    assert!(state["exporters"].as_array().unwrap().is_empty(), "nothing is exported without an endpoint: {state}");

    assert!(!processes::below(&data).is_empty(), "its instances are running");
    assert_eq!(first.interrupt().code(), Some(0), "{}", first.said());
    assert_eq!(processes::below(&data), Vec::<i32>::new(), "{}", first.said());
    assert!(fetch(&page).is_err());

    let mut second = dev(&data, world.path("second.log"), &ports);
    let path = "/api/v1/instance/web/me";
    let again = eventually("the instance of the first run is running again", || {
        let answer = rest(&second.url, "GET", path, None)?;
        fetch(&page)?;
        if answer.status == 200 { Ok(answer.json()) } else { Err(answer.text) }
    });
    assert_eq!(again, mine);
    let challenges = rest(&second.url, "GET", "/api/v1/challenge", None).unwrap().lines();
    assert_eq!(challenges.len(), 3);
    // Interrupted twice; by the second signal it may have exited already.
    kill_process(Pid::from_child(&second.child), Signal::INT).unwrap();
    eventually("it is stopping", || match second.said() {
        said if said.contains("press Ctrl-C again") => Ok(()),
        said => Err(said),
    });
    assert!(matches!(second.interrupt().code(), Some(0 | 130)), "{}", second.said());
    // The supervisors stop the instances after gauntlet has exited.
    eventually("no process is left", || match processes::below(&data) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}\n{}", second.said())),
    });
}

/// The situation while `cargo xtask dev` builds the collector.
#[test]
fn export_waits_for_the_collector() {
    let world = World::bare(Backend::Embedded);
    let (ports, collector) = ([Reserved::any().unwrap(), Reserved::any().unwrap()], Reserved::any().unwrap());
    let (ready, endpoint) = (world.path("collector-ready"), format!("http://127.0.0.1:{}", collector.number()));
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("GAUNTLET_DEV_EXPORT_AFTER", ready.to_str().unwrap()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "200"),
        ("OTEL_BSP_SCHEDULE_DELAY", "200"),
    ];
    let mut dev = dev_with(&world.path("dev"), world.path("dev.log"), &ports, &environment);
    let state = eventually("players are served and several metric exports were due", || {
        let state = dev.state()?;
        let (created, _) = count(&state, "api.v1.instance.InstanceManager/CreateInstance");
        let served = created > 0 && state["uptime"].as_u64().unwrap() >= 2;
        if served { Ok(state) } else { Err(state.to_string()) }
    });
    let exporters = state["exporters"].as_array().unwrap();
    assert_eq!(exporters.len(), 3, "{state}");
    for exporter in exporters {
        assert_eq!((&exporter["held"], &exporter["error"]), (&json!(true), &Value::Null), "{exporter}");
        for lost in ["queued", "processed", "dropped", "failed"] {
            assert_eq!(exporter[lost], 0, "{exporter}");
        }
    }
    assert!(!dev.said().contains("telemetry is not exported"), "{}", dev.said());

    // From now on the collector is expected to be there.
    std::fs::write(&ready, "").unwrap();
    eventually("an export is attempted", || {
        let state = dev.state()?;
        let tried = state["exporters"].as_array().unwrap().iter().any(|exporter| exporter["error"] != Value::Null);
        if tried { Ok(()) } else { Err(state["exporters"].to_string()) }
    });
    assert_eq!(dev.interrupt().code(), Some(0), "{}", dev.said());
}
