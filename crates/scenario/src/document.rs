//! Parses `scenario.yaml`: its fields, their limits and defaults.

use std::time::Duration;

use gauntlet_domain::{Isolation, Limits, PortSpec, Probe, Protocol, Readiness};

use crate::{
    limits,
    quantity::{self, SECOND, TIMES},
    template::{Scope, Template},
    yaml::{self, Node, Problem, Problems, join},
};

/// A valid document.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) ports: Vec<PortSpec>,
    pub(crate) command: Vec<Template>,
    pub(crate) env: Vec<(String, Template)>,
    pub(crate) limits: Limits,
    pub(crate) isolation: Option<Isolation>,
    pub(crate) readiness: Readiness,
    pub(crate) flags: Vec<(String, Template)>,
    pub(crate) connection_info: Template,
}

const MAX_COMMAND: usize = 256;
const MAX_ENV: usize = 256;
const MAX_PORTS: usize = 16;
const MAX_FLAGS: usize = 64;

impl Document {
    /// Parses and checks a document. Reports every problem, sorted by line.
    pub(crate) fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let root = yaml::parse(text).map_err(|problem| vec![problem])?;
        let mut problems = Problems::default();
        let document = read(root, &mut problems);
        let mut problems = problems.0;
        match document {
            Some(document) if problems.is_empty() => Ok(document),
            _ => {
                problems.sort_by_key(|problem| problem.line);
                Err(problems)
            }
        }
    }
}

/// Returns `None` only if a problem was reported.
fn read(root: Node, problems: &mut Problems) -> Option<Document> {
    let line = root.line;
    let known = ["version", "provisioner", "process", "ports", "ready", "flags", "connection_info"];
    let [version, provisioner, process, ports, ready, flags, connection_info] = problems.fields(root, "", known)?;

    if let Some(version) = required(version, line, "version", "version: 1", problems) {
        problems.integer(version, "version", 1, 1);
    }
    if let Some(provisioner) = required(provisioner, line, "provisioner", "provisioner: process", problems)
        && let Some((line, name)) = problems.text(provisioner, "provisioner")
        && name != "process"
    {
        problems.at(line, "provisioner", format!("unknown provisioner {name:?}; this release has process"));
    }

    let ports = read_ports(ports, problems);
    let port_names: Vec<String> = ports.iter().map(|port| port.name.clone()).collect();
    let flags = read_flags(flags, problems);
    let flag_names: Vec<String> = flags.iter().map(|(name, _)| name.clone()).collect();
    let scope = Scope::Placed { flags: &flag_names, ports: &port_names };

    let process = required(process, line, "process", "process: { command: [\"program\"] }", problems)
        .and_then(|process| read_process(process, &scope, problems));
    let example = "ready: { tcp: { port: NAME } }";
    let readiness =
        required(ready, line, "ready", example, problems).and_then(|ready| read_readiness(ready, &ports, problems));
    let example = "connection_info: \"http://{{ host }}:{{ ports.NAME }}\"";
    let connection_info = required(connection_info, line, "connection_info", example, problems)
        .and_then(|node| template(node, "connection_info", &scope, problems));

    let Process { command, env, limits, isolation } = process?;
    Some(Document {
        ports,
        command,
        env,
        limits,
        isolation,
        readiness: readiness?,
        flags,
        connection_info: connection_info?,
    })
}

fn required(node: Option<Node>, line: u64, field: &str, example: &str, problems: &mut Problems) -> Option<Node> {
    if node.is_none() {
        problems.at(line, field, format!("is missing; for example: {example}"));
    }
    node
}

fn template(node: Node, field: &str, scope: &Scope, problems: &mut Problems) -> Option<Template> {
    let (line, source) = problems.text(node, field)?;
    Some(Template::check(line, field, source, scope, problems))
}

fn read_ports(node: Option<Node>, problems: &mut Problems) -> Vec<PortSpec> {
    let Some(node) = node else { return Vec::new() };
    let line = node.line;
    let entries = problems.map(node, "ports").unwrap_or_default();
    at_most(entries.len(), MAX_PORTS, line, "ports", problems);
    let mut ports = Vec::new();
    for (line, name, node) in entries {
        let field = join("ports", &name);
        identifier(line, &field, &name, problems);
        let protocol = match problems.text(node, &field) {
            Some((_, text)) if text == "udp" => Protocol::Udp,
            Some((line, text)) => {
                if text != "tcp" {
                    problems.at(line, &field, format!("must be tcp or udp, not {text:?}; its number is chosen for it"));
                }
                Protocol::Tcp
            }
            None => Protocol::Tcp,
        };
        ports.push(PortSpec { name, protocol });
    }
    ports
}

fn read_flags(node: Option<Node>, problems: &mut Problems) -> Vec<(String, Template)> {
    let Some(node) = node else { return Vec::new() };
    let line = node.line;
    let entries = problems.map(node, "flags").unwrap_or_default();
    at_most(entries.len(), MAX_FLAGS, line, "flags", problems);
    let mut flags = Vec::new();
    for (line, name, node) in entries {
        let field = join("flags", &name);
        identifier(line, &field, &name, problems);
        flags.extend(template(node, &field, &Scope::Flag, problems).map(|template| (name, template)));
    }
    flags
}

struct Process {
    command: Vec<Template>,
    env: Vec<(String, Template)>,
    limits: Limits,
    isolation: Option<Isolation>,
}

fn read_process(node: Node, scope: &Scope, problems: &mut Problems) -> Option<Process> {
    let line = node.line;
    let [command, env, limits, isolation] =
        problems.fields(node, "process", ["command", "env", "limits", "isolation"])?;

    let mut words = Vec::new();
    let field = "process.command";
    if let Some(command) = required(command, line, field, "command: [\"program\", \"--flag\"]", problems)
        && let Some((line, nodes)) = problems.list(command, field)
    {
        if nodes.is_empty() {
            problems.at(line, field, "must name a program, for example [\"program\"]");
        }
        at_most(nodes.len(), MAX_COMMAND, line, field, problems);
        for (at, node) in nodes.into_iter().enumerate() {
            words.extend(template(node, &format!("{field}[{at}]"), scope, problems));
        }
    }

    let mut variables = Vec::new();
    if let Some(env) = env {
        let line = env.line;
        let entries = problems.map(env, "process.env").unwrap_or_default();
        at_most(entries.len(), MAX_ENV, line, "process.env", problems);
        for (line, name, node) in entries {
            let field = join("process.env", &name);
            if name.is_empty() || name.contains(['=', '\0']) {
                problems.at(line, &field, "an environment name is not empty and contains neither = nor NUL");
            }
            variables.extend(template(node, &field, scope, problems).map(|template| (name, template)));
        }
    }

    let limits = limits.and_then(|limits| limits::read(limits, "process.limits", problems)).unwrap_or_default();
    let isolation = isolation.and_then(|isolation| read_isolation(isolation, problems));
    Some(Process { command: words, env: variables, limits, isolation })
}

fn read_isolation(node: Node, problems: &mut Problems) -> Option<Isolation> {
    let field = "process.isolation";
    let (line, text) = problems.text(node, field)?;
    match text.as_str() {
        "uid" => Some(Isolation::Uid),
        "userns" => Some(Isolation::Userns),
        "landlock" => Some(Isolation::Landlock),
        "none" => Some(Isolation::None),
        _ => {
            problems.at(line, field, format!("must be uid, userns, landlock or none, not {text:?}"));
            None
        }
    }
}

fn read_readiness(node: Node, ports: &[PortSpec], problems: &mut Problems) -> Option<Readiness> {
    let line = node.line;
    let [tcp, http, output, interval, timeout] =
        problems.fields(node, "ready", ["tcp", "http", "output", "interval", "timeout"])?;
    let mut time = |node: Option<Node>, field, max, default| {
        node.and_then(|node| quantity::read(node, field, &TIMES, "10ms", max, problems)).unwrap_or(default)
    };
    let interval = time(interval, "ready.interval", "1m", 100);
    let timeout = time(timeout, "ready.timeout", "10m", 30 * SECOND);
    let probe = match (tcp, http, output) {
        (Some(node), None, None) => {
            let [port] = problems.fields(node, "ready.tcp", ["port"])?;
            Probe::Tcp { port: read_port(port, line, "ready.tcp.port", ports, problems)? }
        }
        (None, Some(node), None) => {
            let line = node.line;
            let [port, path, status] = problems.fields(node, "ready.http", ["port", "path", "status"])?;
            let port = read_port(port, line, "ready.http.port", ports, problems);
            let path = match path {
                Some(node) => read_path(node, problems),
                None => Some("/".to_owned()),
            };
            let status = match status {
                Some(node) => problems.integer(node, "ready.http.status", 100, 599),
                None => Some(200),
            };
            Probe::Http { port: port?, path: path?, status: u16::try_from(status?).ok()? }
        }
        (None, None, Some(node)) => {
            let line = node.line;
            let [contains] = problems.fields(node, "ready.output", ["contains"])?;
            let field = "ready.output.contains";
            let contains = required(contains, line, field, "contains: \"listening\"", problems)?;
            let (line, contains) = problems.text(contains, field)?;
            if contains.is_empty() || contains.contains('\n') || contains.len() > 1024 {
                problems.at(line, field, "must be a part of one line, of 1 to 1024 bytes");
            }
            Probe::Output { contains }
        }
        _ => {
            problems.at(line, "ready", "must have exactly one of tcp, http, output");
            return None;
        }
    };
    Some(Readiness { probe, interval: Duration::from_millis(interval), timeout: Duration::from_millis(timeout) })
}

fn read_port(
    node: Option<Node>,
    line: u64,
    field: &str,
    ports: &[PortSpec],
    problems: &mut Problems,
) -> Option<String> {
    let node = required(node, line, field, "port: NAME, one of those in ports", problems)?;
    let (line, name) = problems.text(node, field)?;
    match ports.iter().find(|port| port.name == name) {
        Some(port) if port.protocol == Protocol::Udp => {
            problems.at(line, field, format!("port {name} is udp; probe a tcp port, or use ready.output"));
        }
        Some(_) => {}
        None => {
            let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
            let fix = match yaml::nearest(&name, &names) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("add it there: ports: {{ {name}: tcp }}"),
            };
            problems.at(line, field, format!("port {name:?} is not in ports; {fix}"));
        }
    }
    Some(name)
}

fn read_path(node: Node, problems: &mut Problems) -> Option<String> {
    let (line, path) = problems.text(node, "ready.http.path")?;
    let graphic = path.bytes().all(|b| b.is_ascii_graphic());
    if !path.starts_with('/') || !graphic || path.len() > 1024 {
        problems.at(line, "ready.http.path", "must start with / and hold no spaces; percent-encode what is not ASCII");
    }
    Some(path)
}

fn identifier(line: u64, field: &str, name: &str, problems: &mut Problems) {
    let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts || name.len() > 63 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        problems.at(line, field, "a name is a letter, then letters, digits and _, 63 at most");
    }
}

fn at_most(count: usize, max: usize, line: u64, field: &str, problems: &mut Problems) {
    if count > max {
        problems.at(line, field, format!("has {count} entries; at most {max}"));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    const WEB: &str = r#"
version: 1
provisioner: process
process:
  command: ["example-web", "--listen", "0.0.0.0:{{ ports.http }}", 8080]
  env: { FLAG: "{{ flags.main }}", MOTD: "{{ additional['motd'] | default('hello') }}" }
  limits: { memory: 256MiB, processes: 64, cpu_quota: 50%, disk: 1GiB, cpu: 60s, open_files: 256, output: 1MiB }
  isolation: userns
ports:
  http: tcp
ready:
  http: { port: http, path: /, status: 200 }
  timeout: 10s
flags:
  main: "FLAG{ {{ vary('hello web') }} }"
connection_info: "http://{{ host }}:{{ ports.http }}"
"#;

    fn wrong(text: &str) -> String {
        let problems = Document::parse(text).expect_err("it is wrong");
        problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn document_with_all_fields_is_parsed() {
        let document = Document::parse(WEB).unwrap();
        assert_eq!(document.command.len(), 4);
        assert_eq!(document.ports, [PortSpec { name: "http".into(), protocol: Protocol::Tcp }]);
        let limits = Limits {
            memory: Some(256 << 20),
            processes: Some(64),
            cpu_quota: Some(50),
            disk: Some(1 << 30),
            cpu_seconds: Some(60),
            open_files: Some(256),
            output: Some(1 << 20),
        };
        assert_eq!((document.limits, document.isolation), (limits, Some(Isolation::Userns)));
        let probe = Probe::Http { port: "http".into(), path: "/".into(), status: 200 };
        let (interval, timeout) = (Duration::from_millis(100), Duration::from_secs(10));
        assert_eq!(document.readiness, Readiness { probe, interval, timeout });
    }

    #[test]
    fn omitted_fields_get_defaults() {
        let least = "version: 1\nprovisioner: process\nprocess: {command: [a]}\nready: {output: {contains: up}}\nconnection_info: here\n";
        let document = Document::parse(least).unwrap();
        assert!(document.flags.is_empty() && document.ports.is_empty() && document.env.is_empty());
        assert_eq!(document.isolation, None);
        assert_eq!(document.readiness.timeout, Duration::from_secs(30));
    }

    #[test]
    fn problems_name_line_field_and_fix() {
        let mistakes = [
            ("command:", "comand:"),
            ("version: 1", "version: 2"),
            ("provisioner: process", "provisioner: kubernetes"),
            ("http: tcp", "http: 8080"),
            ("port: http,", "port: htpp,"),
            ("status: 200", "status: 1000"),
            ("timeout: 10s", "timeout: 10"),
            ("timeout: 10s", "timeout: 11m"),
            ("memory: 256MiB", "memory: 256MB"),
            ("cpu_quota: 50%", "cpu_quota: 0.5"),
            ("processes: 64", "processes: many"),
            ("path: /,", "path: index.html,"),
            ("ports.http }}\", 8080", "ports.htpt }}\", 8080"),
            ("{{ host }}", "{{ hots }}"),
            ("{{ host }}", "{{ host "),
            ("{{ host }}", "{{ host | rot13 }}"),
            ("{{ host }}", "{% if host %}x{% endif %}"),
            ("{{ host }}", "{{ vary('x') }}"),
            ("{{ host }}", "{{ ports['htpp'] }}"),
            ("{{ flags.main }}", "{{ flags.mian }}"),
            ("vary('hello web')", "vari('hello web')"),
            ("vary('hello web')", "host"),
            ("MOTD: \"{{ additional['motd'] | default('hello') }}\"", "MOTD: yes, DEBUG: true"),
            ("main:", "\"ma-in\":"),
            ("8080]", "8080"),
            ("ports:\n", "ports:\nports:\n"),
        ];
        let mut all = String::new();
        for (right, mistake) in mistakes {
            let text = WEB.replacen(right, mistake, 1);
            assert_ne!(text, WEB, "{right} is not in the document");
            all += &format!("{mistake:?}\n  {}\n", wrong(&text).replace('\n', "\n  "));
        }
        insta::assert_snapshot!(all);
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        insta::assert_snapshot!(wrong("provisioner: process\nprocess: {env: [], command: run}\nready: {}\n"));
        insta::assert_snapshot!(wrong(""));
        insta::assert_snapshot!(wrong("- a\n- b\n"));
        insta::assert_snapshot!(wrong("ports: {a: udp}\nready: {tcp: {port: a}, interval: 5ms}\nflags: {b: 1.5}\n"));
    }

    #[test]
    fn bombs_are_rejected_quickly() {
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let before = format!("*a{}", level - 1);
            laughs += &format!("a{level}: &a{level} [{}]\n", vec![before; 9].join(", "));
        }
        for bomb in [
            laughs,
            "[".repeat(30_000),
            "a: ".to_owned() + &"{b: ".repeat(10_000),
            "x".repeat(yaml::MAX_BYTES + 1),
            "- a\n".repeat(10_000),
            "a: &a [*a]".into(),
            "a: !!python/object x".into(),
            "a: 1\n---\nb: 2\n".into(),
            "<<: {version: 1}".into(),
        ] {
            let text = wrong(&bomb);
            assert!(text.len() < 2000, "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,200}") {
            let _ = Document::parse(&text);
        }

        #[test]
        fn damaged_documents_never_panic(at in 0usize..600, cut in 0usize..40, put in "[\\PC\n]{0,12}") {
            let from = (0..=at.min(WEB.len())).rev().find(|i| WEB.is_char_boundary(*i)).unwrap();
            let to = (from + cut).min(WEB.len());
            if WEB.is_char_boundary(to) {
                let _ = Document::parse(&format!("{}{put}{}", &WEB[..from], &WEB[to..]));
            }
        }
    }
}
