//! Secrets that go into a run come out of it nowhere but where they belong.

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};

use gauntlet_stack::{Registry, RegistryOptions, Tool, Tools};
use gauntlet_testing::{processes, webhook};

use crate::harness::{Backend, Manager, World, address, binary, eventually, fetch, rest_with};

const ETCD_PASSWORD: &str = "planted-etcd-password-6e1d";
const REGISTRY_PASSWORD: &str = RegistryOptions::PASSWORD;
const FLAG_KEY: &str = "71a07ed5ec2e700000000000000000000000000000000000000000005ec2e771";
const FLAG: &str = "FLAG{planted-flag-2b1c}";
const BEARER: &str = "planted-bearer-token-90ab";
const OTLP_HEADER: &str = "planted-otlp-header-44f0";
const VARIABLE: &str = "planted-variable-d3c2";
/// The secrets that are known before the run.
const SECRETS: [&str; 7] = [ETCD_PASSWORD, REGISTRY_PASSWORD, FLAG_KEY, FLAG, BEARER, OTLP_HEADER, VARIABLE];

/// What a run put out, and the secrets that were found in it.
struct Outputs {
    secrets: Vec<String>,
    searched: BTreeSet<&'static str>,
    leaks: Vec<String>,
}

impl Outputs {
    /// Searches bytes from `place` of the output `kind` for all secrets but those that may be there.
    fn search(&mut self, kind: &'static str, place: &str, bytes: &[u8], may_have: &[&str]) {
        self.searched.insert(kind);
        for secret in self.secrets.iter().filter(|secret| !may_have.contains(&secret.as_str())) {
            if bytes.windows(secret.len()).any(|window| window == secret.as_bytes()) {
                self.leaks.push(format!("{secret} in the {kind} of {place}"));
            }
        }
    }
}

#[test]
fn planted_secrets_are_in_no_output() {
    let mut world = World::bare(Backend::Etcd);
    enable_authentication(&world);
    world.registry = Some(Registry::start(world.path("registry"), &RegistryOptions::with_user()).unwrap());
    let key_file = world.path("key");
    fs::write(&key_file, FLAG_KEY).unwrap();
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
    let scenario = world.path("scenarios/web/scenario.yaml");
    let text = fs::read_to_string(&scenario).unwrap();
    let line = text.lines().find(|line| line.trim_start().starts_with("main: \"FLAG")).unwrap();
    fs::write(&scenario, text.replace(line, &format!("  main: \"{FLAG}\""))).unwrap();
    let collector = Collector::start();
    let mut environment = environment(&world, &collector);
    let token = create_token(&world);
    environment.push(("GAUNTLET_TOKEN", token.clone()));
    let (_, token_secret) = token.rsplit_once('_').unwrap();
    let secrets = SECRETS.into_iter().chain([token_secret]).map(str::to_owned).collect();
    let mut outputs = Outputs { secrets, searched: BTreeSet::new(), leaks: Vec::new() };

    let reference = format!("{}/ctf/web:v1", world.registry.as_ref().unwrap().address());
    let scenario = scenario.parent().unwrap().display().to_string();
    let cli = |outputs: &mut Outputs, arguments: &[&str], may_have: &[&str]| {
        let mut gauntlet = Command::new(binary("gauntlet"));
        let output = gauntlet.args(arguments).envs(environment.iter().cloned()).output().unwrap();
        for bytes in [&output.stdout, &output.stderr] {
            outputs.search("output", &arguments.join(" "), bytes, may_have);
        }
        output.status.success()
    };
    assert!(cli(&mut outputs, &["scenario", "validate", &scenario], &[]));
    assert!(cli(&mut outputs, &["scenario", "push", "--insecure", &scenario, &reference], &[]));
    let mut manager = world.manager_with("m1", &environment);
    let url = manager.url.clone();
    let gauntlet = |outputs: &mut Outputs, arguments: &[&str], may_have: &[&str]| {
        cli(outputs, &[arguments, &["--url", &url]].concat(), may_have)
    };
    assert!(gauntlet(&mut outputs, &["challenge", "create", "web", "--scenario", &reference], &[]));
    assert!(!gauntlet(&mut outputs, &["challenge", "create", "web", "--scenario", &reference], &[]), "it exists");
    let unknown = format!("{}/ctf/unknown:v1", world.registry.as_ref().unwrap().address());
    assert!(!gauntlet(&mut outputs, &["challenge", "create", "other", "--scenario", &unknown], &[]));
    // The caller that creates an instance gets its flags.
    assert!(gauntlet(&mut outputs, &["instance", "create", "web", "alice"], &[FLAG]));
    assert!(gauntlet(&mut outputs, &["instance", "list"], &[FLAG]));
    let credentials = [("authorization", format!("Bearer {token}"))];
    let info = rest_with(&url, "GET", "/api/v1/instance/web/alice", None, &credentials).unwrap().ok();
    let page = format!("{}/note?for=cook", address(info["connectionInfo"].as_str().unwrap()));
    let page = eventually("the page", || fetch(&page));
    assert!(page.contains(FLAG), "the flag is planted: {page}");

    for bearer in [&token, BEARER] {
        search_errors(&manager, bearer, &mut outputs);
    }
    search_processes(&world, &mut outputs);
    exit_and_restart(&world);
    search_files(&world.path("data"), &world.path("data"), &mut outputs);
    search_pages(&manager, &mut outputs);
    let janitor = Command::new(binary("gauntlet-janitor")).env("URL", &url).envs(environment.iter().cloned()).output();
    let janitor = janitor.unwrap();
    assert!(janitor.status.success());
    outputs.search("output", "the janitor", &[janitor.stdout, janitor.stderr].concat(), &[]);
    assert!(gauntlet(&mut outputs, &["instance", "delete", "web", "alice"], &[]));
    assert!(gauntlet(&mut outputs, &["challenge", "delete", "web"], &[]));
    manager.process.stop().unwrap();

    let log = fs::read(world.path("m1.log")).unwrap();
    assert!(log.len() > 1000, "the log has the run: {}", String::from_utf8_lossy(&log));
    outputs.search("log", "the manager", &log, &[]);
    for (path, body) in collector.received() {
        outputs.search("telemetry", &path, &body, &[]);
    }
    let searched: Vec<_> = outputs.searched.into_iter().collect();
    let all = ["cmdline", "environ", "errors", "files", "log", "output", "pages", "telemetry"];
    assert_eq!(searched, all, "each kind of output was searched");
    assert!(outputs.leaks.is_empty(), "secrets leaked:\n{}", outputs.leaks.join("\n"));
}

/// The environment of the manager and of every command.
fn environment(world: &World, collector: &Collector) -> Vec<(&'static str, String)> {
    vec![
        ("ETCD_USERNAME", "root".to_owned()),
        ("ETCD_PASSWORD", ETCD_PASSWORD.to_owned()),
        ("OCI_USERNAME", RegistryOptions::USER.to_owned()),
        ("OCI_REGISTRY", world.registry.as_ref().unwrap().address()),
        ("OCI_PASSWORD", REGISTRY_PASSWORD.to_owned()),
        ("TOKENS", world.path("tokens").display().to_string()),
        ("FLAG_KEY_FILE", world.path("key").display().to_string()),
        ("SOME_OTHER_SECRET", VARIABLE.to_owned()),
        ("LOG_LEVEL", "debug".to_owned()),
        ("OTEL_TRACES_EXPORTER", "otlp".to_owned()),
        ("OTEL_METRICS_EXPORTER", "otlp".to_owned()),
        ("OTEL_LOGS_EXPORTER", "otlp".to_owned()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".to_owned()),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "none".to_owned()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.clone()),
        ("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization=Bearer%20{OTLP_HEADER}")),
        ("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()),
        ("OTEL_BLRP_SCHEDULE_DELAY", "200".to_owned()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "500".to_owned()),
    ]
}

/// Creates a token in the manager's file, and returns it.
fn create_token(world: &World) -> String {
    let mut create = Command::new(binary("gauntlet"));
    create.args(["token", "create", "--name", "operator", "--scope", "admin", "--tokens"]).arg(world.path("tokens"));
    let output = create.env("OTEL_SDK_DISABLED", "true").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Adds a user to etcd, without which it then refuses every call.
fn enable_authentication(world: &World) {
    let etcdctl = Tools::from_env().require(Tool::Etcdctl).unwrap();
    let user = format!("root:{ETCD_PASSWORD}");
    for arguments in [&["user", "add", &user] as &[&str], &["user", "grant-role", "root", "root"], &["auth", "enable"]]
    {
        let endpoints = format!("--endpoints={}", world.etcd.as_ref().unwrap().url());
        let output = Command::new(&etcdctl).arg(endpoints).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Calls that fail, whether or not the manager knows the token.
fn search_errors(manager: &Manager, bearer: &str, outputs: &mut Outputs) {
    for (method, path, body) in [
        ("GET", "/api/v1/challenge/unknown", ""),
        ("GET", "/nowhere", ""),
        ("PUT", "/api/v1/challenge", ""),
        ("POST", "/api/v1/challenge", "{"),
        ("POST", "/api/v1/challenge", r#"{"id":"x","scenario":"file://../../etc"}"#),
        ("POST", "/api/v1/instance", r#"{"challengeId":"web","sourceId":"alice"}"#),
        ("DELETE", "/api/v1/instance/web/nobody", ""),
    ] {
        let headers = [("authorization", format!("Bearer {bearer}")), ("cookie", format!("session={bearer}"))];
        let answer = rest_with(&manager.url, method, path, Some(body.as_bytes()), &headers).unwrap();
        assert!(answer.status >= 400, "{method} {path}: {}", answer.text);
        outputs.search("errors", &format!("{method} {path}"), answer.text.as_bytes(), &[]);
    }
}

/// What any user of the machine may see of the processes of instances and their supervisors. An instance knows its own flag.
fn search_processes(world: &World, outputs: &mut Outputs) {
    let found = processes::of_instances(&world.path("data/process/instances"));
    assert!(found.iter().any(|process| process.supervisor) && found.iter().any(|process| !process.supervisor));
    for process in found {
        let may_have: &[&str] = if process.supervisor { &[] } else { &[FLAG] };
        let (kind, pid) = (if process.supervisor { "a supervisor" } else { "an instance" }, process.pid);
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        outputs.search("environ", kind, &read("environ"), may_have);
        outputs.search("cmdline", kind, &read("cmdline"), &[]);
    }
    // The manager's arguments, and those of a supervisor that waits for its instance.
    for pid in processes::below(&world.path("data")) {
        outputs.search("cmdline", "a process", &fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default(), &[]);
    }
}

/// Kills the program of the instance, so that the manager restarts it.
fn exit_and_restart(world: &World) {
    let dir = world.path("data/process/instances");
    let program = || processes::of_instances(&dir).into_iter().find(|process| !process.supervisor).map(|it| it.pid);
    let first = program().unwrap();
    processes::kill(first);
    eventually("the instance runs again", || program().filter(|pid| *pid != first).ok_or("it does not".to_owned()));
}

/// Searches the files below `dir` that every user of the machine may read.
fn search_files(root: &Path, dir: &Path, outputs: &mut Outputs) {
    let mode = |path: &Path| fs::symlink_metadata(path).map_or(0, |metadata| metadata.permissions().mode());
    if dir == root {
        outputs.search("files", "the data directory", &[], &[]);
    }
    if mode(dir) & 0o001 == 0 {
        return;
    }
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            search_files(root, &path, outputs);
        } else if entry.file_type().unwrap().is_file() && mode(&path) & 0o004 != 0 {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            outputs.search("files", &name, &fs::read(&path).unwrap_or_default(), &[]);
        }
    }
}

fn search_pages(manager: &Manager, outputs: &mut Outputs) {
    for path in ["/", "/debug/state.json"] {
        let page = eventually("a debug page", || fetch(&format!("{}{path}", manager.debug)));
        assert!(!page.is_empty());
        outputs.search("pages", path, page.as_bytes(), &[]);
    }
}

/// The path and the body of an export.
type Export = (String, Vec<u8>);

/// Receives OTLP over HTTP and keeps the bodies. The headers are the exporter's credentials.
struct Collector {
    url: String,
    received: Arc<Mutex<Vec<Export>>>,
}

impl Collector {
    /// Starts listening. It answers until the test's process ends.
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let received = Arc::<Mutex<Vec<_>>>::default();
        let keep = Arc::clone(&received);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Some(export) = webhook::receive(stream, "application/x-protobuf") {
                    keep.lock().unwrap().push(export);
                }
            }
        });
        Self { url, received }
    }

    /// What was exported: spans, metrics and logs.
    fn received(&self) -> Vec<Export> {
        let received = self.received.lock().unwrap().clone();
        for signal in ["/v1/traces", "/v1/metrics", "/v1/logs"] {
            assert!(received.iter().any(|(path, _)| path == signal), "nothing was exported to {signal}");
        }
        received
    }
}
