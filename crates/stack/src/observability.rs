//! Runs the observability stack (collector, Jaeger, Prometheus, Alertmanager) on the configuration files that users deploy.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::render::render;
use crate::{
    Doing as _, Error, Port, Ports, Process, Progress, Ready, Result, Spec, Tool, Tools, create_dir, http, pages,
    workspace_root,
};

/// The intervals of scraping, evaluation and export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Those of the deployed files: 10 s.
    Deployed,
    /// One or two seconds, for tests. Expressions and thresholds don't change.
    Fast,
}

/// How to run a stack.
#[derive(Debug)]
pub struct Options {
    /// The directory for the data and logs of the components.
    pub data: PathBuf,
    /// The ports to listen on.
    pub ports: Ports,
    /// The intervals to use.
    pub pace: Pace,
    /// `http://host:port` to which Alertmanager posts, at `/page`, `/ticket` and `/info`; `None` is the address in the deployed file.
    pub webhook: Option<String>,
    /// The checkout with the configuration files.
    pub source: PathBuf,
}

impl Options {
    /// The documented ports and intervals.
    pub fn deployed(data: impl Into<PathBuf>) -> Options {
        let (ports, pace) = (Ports::documented(), Pace::Deployed);
        Options { data: data.into(), ports, pace, webhook: None, source: workspace_root() }
    }

    /// Free ports and short intervals.
    ///
    /// # Errors
    /// If no free ports can be reserved.
    pub fn for_tests(data: impl Into<PathBuf>) -> Result<Options> {
        Ok(Options { ports: Ports::free()?, pace: Pace::Fast, ..Options::deployed(data) })
    }
}

/// The running stack. Dropping it stops every component.
#[derive(Debug)]
pub struct Stack {
    /// Receives OTLP. It stops first, so that it doesn't export to components that have stopped.
    pub collector: Collector,
    /// Stores traces.
    pub jaeger: Jaeger,
    /// Stores metrics and evaluates rules.
    pub prometheus: Prometheus,
    /// Delivers alerts.
    pub alertmanager: Alertmanager,
    ports: Ports,
    pace: Pace,
}

impl Stack {
    /// Starts the four components in parallel, waits until each is ready, and reports their addresses.
    ///
    /// # Errors
    /// [`Error::PortTaken`], [`Error::Missing`] (see [`Tools::ensure`]), [`Error::Drift`], or [`Error::NotReady`]. The components that were
    /// already started are stopped.
    pub fn start(options: Options, progress: &mut dyn Progress) -> Result<Stack> {
        let tools = Tools::from_env();
        options.ports.check_free()?;
        let mut stack = Stack {
            alertmanager: Alertmanager::spawn(&options, &tools)?,
            prometheus: Prometheus::spawn(&options, &tools)?,
            jaeger: Jaeger::spawn(&options, &tools)?,
            collector: Collector::spawn(&options, &tools)?,
            ports: options.ports,
            pace: options.pace,
        };
        let (grpc, http) = (stack.collector.otlp_grpc(), stack.collector.otlp_http());
        stack.collector.process.wait_ready()?;
        progress.report(&format!("collector ready: OTLP/gRPC at {grpc}, OTLP/HTTP at {http}"));
        for process in [&mut stack.alertmanager.process, &mut stack.prometheus.process, &mut stack.jaeger.process] {
            process.wait_ready()?;
        }
        for (name, line) in pages::lines(&stack.ports) {
            progress.report(&format!("{name} ready: {line}"));
        }
        Ok(stack)
    }

    /// The `OTEL_*` variables that make a Gauntlet process export to this stack, with intervals that match its pace.
    pub fn telemetry_env(&self) -> Vec<(&'static str, String)> {
        let (metrics, spans) = match self.pace {
            Pace::Deployed => ("10000", "1000"),
            Pace::Fast => ("1000", "200"),
        };
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.collector.otlp_grpc()),
            ("OTEL_METRIC_EXPORT_INTERVAL", metrics.to_owned()),
            ("OTEL_BSP_SCHEDULE_DELAY", spans.to_owned()),
            ("OTEL_BLRP_SCHEDULE_DELAY", spans.to_owned()),
        ]
    }

    /// The number of the port.
    pub fn port(&self, port: Port) -> u16 {
        self.ports.get(port)
    }

    /// All components, by name.
    pub fn processes(&mut self) -> [(&'static str, &mut Process); 4] {
        [
            ("collector", &mut self.collector.process),
            ("jaeger", &mut self.jaeger.process),
            ("prometheus", &mut self.prometheus.process),
            ("alertmanager", &mut self.alertmanager.process),
        ]
    }
}

/// The readiness checks of the components on these ports, for a process that did not start them.
pub fn readiness(ports: &Ports) -> [(&'static str, Ready); 4] {
    [
        ("collector", Ready::Http(ports.url(Port::CollectorHealth))),
        ("jaeger", Ready::Http(format!("{}/status", ports.url(Port::JaegerHealth)))),
        ("prometheus", Ready::Http(format!("{}/-/ready", ports.url(Port::Prometheus)))),
        ("alertmanager", Ready::Http(format!("{}/-/ready", ports.url(Port::Alertmanager)))),
    ]
}

/// The OpenTelemetry Collector on `otel-collector.yaml`.
#[derive(Debug)]
pub struct Collector {
    /// Its process.
    pub process: Process,
    grpc: String,
    http: String,
}

impl Collector {
    fn spawn(options: &Options, tools: &Tools) -> Result<Collector> {
        let ports = &options.ports;
        let mut spec = component(options, tools, Tool::Collector, "collector")?
            .arg("--config")
            .arg(options.source.join("otel-collector.yaml"))
            .env("COLLECTOR_TELEMETRY_PORT", ports.get(Port::CollectorTelemetry).to_string());
        for (name, port) in [
            ("COLLECTOR_OTLP_GRPC", Port::OtlpGrpc),
            ("COLLECTOR_OTLP_HTTP", Port::OtlpHttp),
            ("COLLECTOR_PROMETHEUS", Port::CollectorPrometheus),
            ("COLLECTOR_HEALTH", Port::CollectorHealth),
            ("COLLECTOR_ZPAGES", Port::CollectorZpages),
            ("COLLECTOR_JAEGER_OTLP", Port::JaegerOtlp),
        ] {
            spec = spec.env(name, ports.address(port));
        }
        // Three times the export interval of Stack::telemetry_env, and more for tests, where the machine may be busy.
        spec = match options.pace {
            Pace::Deployed => spec.env("COLLECTOR_METRIC_EXPIRATION", "30s"),
            Pace::Fast => spec.env("COLLECTOR_METRIC_EXPIRATION", "6s").env("COLLECTOR_SPAN_METRICS_FLUSH", "1s"),
        };
        Ok(Collector {
            process: Process::spawn(spec)?,
            grpc: ports.url(Port::OtlpGrpc),
            http: ports.url(Port::OtlpHttp),
        })
    }

    /// `http://127.0.0.1:PORT` for OTLP over gRPC.
    pub fn otlp_grpc(&self) -> String {
        self.grpc.clone()
    }

    /// `http://127.0.0.1:PORT` for OTLP over HTTP.
    pub fn otlp_http(&self) -> String {
        self.http.clone()
    }
}

/// Jaeger v2 on `jaeger/config.yaml`.
#[derive(Debug)]
pub struct Jaeger {
    /// Its process.
    pub process: Process,
    url: String,
}

impl Jaeger {
    fn spawn(options: &Options, tools: &Tools) -> Result<Jaeger> {
        let ports = &options.ports;
        let mut spec = component(options, tools, Tool::Jaeger, "jaeger")?
            .arg("--config")
            .arg(options.source.join("jaeger/config.yaml"))
            .env("JAEGER_PROMETHEUS_URL", ports.url(Port::Prometheus))
            .env("JAEGER_TELEMETRY_PORT", ports.get(Port::JaegerTelemetry).to_string());
        for (name, port) in [
            ("JAEGER_HEALTH", Port::JaegerHealth),
            ("JAEGER_QUERY_HTTP", Port::JaegerQuery),
            ("JAEGER_QUERY_GRPC", Port::JaegerGrpc),
            ("JAEGER_OTLP_GRPC", Port::JaegerOtlp),
        ] {
            spec = spec.env(name, ports.address(port));
        }
        Ok(Jaeger { process: Process::spawn(spec)?, url: ports.url(Port::JaegerQuery) })
    }

    /// `http://127.0.0.1:PORT` of its web page and API.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Gets a path of its API, such as `/api/traces/ID`, `/api/services` or `/api/metrics/calls?service=...`.
    ///
    /// # Errors
    /// [`Error::Http`]
    pub fn get(&self, path_and_query: &str) -> Result<Value> {
        http::get_json(&format!("{}{path_and_query}", self.url))
    }
}

/// Prometheus on a copy of `deploy/prometheus/`, with the host names and intervals of this run.
#[derive(Debug)]
pub struct Prometheus {
    /// Its process.
    pub process: Process,
    url: String,
}

impl Prometheus {
    fn spawn(options: &Options, tools: &Tools) -> Result<Prometheus> {
        let ports = &options.ports;
        let (from, dir) = (options.source.join("deploy/prometheus"), options.data.join("prometheus"));
        create_dir(&dir)?;
        let mut config = vec![
            ("collector:8889", ports.address(Port::CollectorPrometheus)),
            ("collector:8888", ports.address(Port::CollectorTelemetry)),
            ("jaeger:8887", ports.address(Port::JaegerTelemetry)),
            ("alertmanager:9093", ports.address(Port::Alertmanager)),
            ("prometheus:9090", ports.address(Port::Prometheus)),
        ];
        let mut rules = Vec::new();
        if options.pace == Pace::Fast {
            config.push(("scrape_interval: 10s", "scrape_interval: 2s".into()));
            config.push(("scrape_timeout: 5s", "scrape_timeout: 2s".into()));
            config.push(("evaluation_interval: 10s", "evaluation_interval: 1s".into()));
            rules.push(("for: 15s", "for: 0s".to_owned()));
        }
        render(&from.join("prometheus.yml"), &dir.join("prometheus.yml"), &config)?;
        copy_dir(&from.join("rules"), &dir.join("rules"), &rules)?;
        let spec = component(options, tools, Tool::Prometheus, "prometheus")?
            .arg(flag("--config.file=", &dir.join("prometheus.yml")))
            .arg(flag("--storage.tsdb.path=", &dir.join("data")))
            .arg("--storage.tsdb.retention.time=7d")
            .arg("--enable-feature=exemplar-storage")
            .arg(format!("--web.listen-address={}", ports.address(Port::Prometheus)));
        // An alert sent before Prometheus has discovered Alertmanager is lost until it is sent again.
        let spec = if options.pace == Pace::Fast { spec.arg("--rules.alert.resend-delay=5s") } else { spec };
        Ok(Prometheus { process: Process::spawn(spec)?, url: ports.url(Port::Prometheus) })
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Runs an instant query. Returns the labels (an object) and the current value of each series.
    ///
    /// # Errors
    /// [`Error::Http`], also if Prometheus rejects the expression or its result isn't a vector.
    pub fn query(&self, expression: &str) -> Result<Vec<(Value, f64)>> {
        let url = format!("{}/api/v1/query?query={}", self.url, http::encode(expression));
        let answer = http::get_json(&url)?;
        let not_a_vector = || Error::Http { url: url.clone(), reason: format!("not a vector: {answer}") };
        let sample = |entry: &Value| {
            let value = entry.pointer("/value/1")?.as_str()?.parse().ok()?;
            Some((entry.get("metric")?.clone(), value))
        };
        let entries = answer.pointer("/data/result").and_then(Value::as_array).ok_or_else(not_a_vector)?;
        entries.iter().map(|entry| sample(entry).ok_or_else(not_a_vector)).collect()
    }
}

/// Alertmanager on a copy of `alertmanager/`, with the webhook and intervals of this run.
#[derive(Debug)]
pub struct Alertmanager {
    /// Its process.
    pub process: Process,
    url: String,
}

impl Alertmanager {
    fn spawn(options: &Options, tools: &Tools) -> Result<Alertmanager> {
        let (from, dir) = (options.source.join("alertmanager"), options.data.join("alertmanager"));
        create_dir(&dir)?;
        let mut config = Vec::new();
        if let Some(webhook) = &options.webhook {
            config.push(("http://127.0.0.1:9095", webhook.clone()));
        }
        if options.pace == Pace::Fast {
            config.push(("group_wait: 10s", "group_wait: 0s".into()));
            config.push(("group_wait: 5s", "group_wait: 0s".into()));
            config.push(("group_interval: 1m", "group_interval: 1s".into()));
        }
        render(&from.join("alertmanager.yml"), &dir.join("alertmanager.yml"), &config)?;
        copy_dir(&from.join("templates"), &dir.join("templates"), &[])?;
        let address = options.ports.address(Port::Alertmanager);
        let spec = component(options, tools, Tool::Alertmanager, "alertmanager")?
            .arg(flag("--config.file=", &dir.join("alertmanager.yml")))
            .arg(flag("--storage.path=", &dir.join("data")))
            .arg(format!("--web.listen-address={address}"))
            .arg("--cluster.listen-address=");
        Ok(Alertmanager { process: Process::spawn(spec)?, url: format!("http://{address}") })
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The active alerts, as listed by its API v2.
    ///
    /// # Errors
    /// [`Error::Http`]
    pub fn alerts(&self) -> Result<Value> {
        http::get_json(&format!("{}/api/v2/alerts", self.url))
    }
}

fn component(options: &Options, tools: &Tools, tool: Tool, name: &'static str) -> Result<Spec> {
    create_dir(&options.data)?;
    let ready =
        readiness(&options.ports).into_iter().find(|(of, _)| *of == name).map_or(Ready::Spawned, |(_, ready)| ready);
    Ok(Spec::new(name, tools.require(tool)?, options.data.join(format!("{name}.log")), ready))
}

fn flag(name: &str, path: &Path) -> std::ffi::OsString {
    let mut flag = std::ffi::OsString::from(name);
    flag.push(path);
    flag
}

/// Copies the files of a directory with the replacements made in each. Removes the previous content of the target.
fn copy_dir(from: &Path, to: &Path, replacements: &[(&str, String)]) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to).doing(|| format!("remove {}", to.display()))?;
    }
    create_dir(to)?;
    for entry in std::fs::read_dir(from).doing(|| format!("list {}", from.display()))? {
        let entry = entry.doing(|| format!("list {}", from.display()))?;
        render(&entry.path(), &to.join(entry.file_name()), replacements)?;
    }
    Ok(())
}
