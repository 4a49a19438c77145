//! The observability stack: collector, Jaeger, Prometheus and Alertmanager, on the files that users deploy.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::render::render;
use crate::{
    Doing as _, Error, Port, Ports, Process, Progress, Ready, Result, Spec, Tool, Tools, create_dir, http, pages,
    workspace_root,
};

/// How fast things are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// The intervals of the deployed files: 10 s.
    Deployed,
    /// A second or two, for tests. Expressions and thresholds stay as they are.
    Fast,
}

/// How a stack is to run.
#[derive(Debug)]
pub struct Options {
    /// Where each component keeps its data and log.
    pub data: PathBuf,
    /// On which ports.
    pub ports: Ports,
    /// How fast things are noticed.
    pub pace: Pace,
    /// `http://host:port` to which Alertmanager posts, at `/page`, `/ticket` and `/info`; that of the deployed file when `None`.
    pub webhook: Option<String>,
    /// The checkout whose files are run.
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
    /// When no free ports can be reserved.
    pub fn for_tests(data: impl Into<PathBuf>) -> Result<Options> {
        Ok(Options { ports: Ports::free()?, pace: Pace::Fast, ..Options::deployed(data) })
    }
}

/// The running stack. Dropping it ends every component.
#[derive(Debug)]
pub struct Stack {
    /// Receives OTLP. The first to end, so that nothing is scraped or sent on from a half-ended stack.
    pub collector: Collector,
    /// Keeps traces.
    pub jaeger: Jaeger,
    /// Keeps metrics, evaluates rules.
    pub prometheus: Prometheus,
    /// Delivers alerts.
    pub alertmanager: Alertmanager,
    ports: Ports,
    pace: Pace,
}

impl Stack {
    /// Starts all four side by side, waits until each is ready, and reports each with its address.
    ///
    /// # Errors
    /// [`Error::PortTaken`], [`Error::Missing`] (see [`Tools::ensure`]), [`Error::Drift`], or what a component that does not become ready says. What
    /// was already started is ended then.
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

    /// The `OTEL_*` variables with which a Gauntlet process reports to this stack, at its pace.
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

    /// The number of one of its ports.
    pub fn port(&self, port: Port) -> u16 {
        self.ports.get(port)
    }

    /// The components, for who treats them alike.
    pub fn processes(&mut self) -> [(&'static str, &mut Process); 4] {
        [
            ("collector", &mut self.collector.process),
            ("jaeger", &mut self.jaeger.process),
            ("prometheus", &mut self.prometheus.process),
            ("alertmanager", &mut self.alertmanager.process),
        ]
    }
}

/// The address at which a component says that it is ready, for who did not start it.
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
        // Three times the interval of Stack::telemetry_env, and more where the machine may be busy.
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

    /// `http://127.0.0.1:PORT` of its page and API.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// GET of a path of its API, such as `/api/traces/ID`, `/api/services` or `/api/metrics/calls?service=...`.
    ///
    /// # Errors
    /// [`Error::Http`]
    pub fn get(&self, path_and_query: &str) -> Result<Value> {
        http::get_json(&format!("{}{path_and_query}", self.url))
    }
}

/// Prometheus on `deploy/prometheus/`, with host names and intervals of this run in place of the written ones.
#[derive(Debug)]
pub struct Prometheus {
    /// Its process.
    pub process: Process,
    url: String,
}

impl Prometheus {
    fn spawn(options: &Options, tools: &Tools) -> Result<Prometheus> {
        let ports = &options.ports;
        let (from, home) = (options.source.join("deploy/prometheus"), options.data.join("prometheus"));
        create_dir(&home)?;
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
        render(&from.join("prometheus.yml"), &home.join("prometheus.yml"), &config)?;
        copy_dir(&from.join("rules"), &home.join("rules"), &rules)?;
        let spec = component(options, tools, Tool::Prometheus, "prometheus")?
            .arg(flag("--config.file=", &home.join("prometheus.yml")))
            .arg(flag("--storage.tsdb.path=", &home.join("data")))
            .arg("--storage.tsdb.retention.time=7d")
            .arg("--enable-feature=exemplar-storage")
            .arg(format!("--web.listen-address={}", ports.address(Port::Prometheus)));
        // What it sends before it has discovered Alertmanager is lost until it is sent again.
        let spec = if options.pace == Pace::Fast { spec.arg("--rules.alert.resend-delay=5s") } else { spec };
        Ok(Prometheus { process: Process::spawn(spec)?, url: ports.url(Port::Prometheus) })
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The samples of an instant query: labels (an object) and value of each series, as of now.
    ///
    /// # Errors
    /// [`Error::Http`], also for an expression that Prometheus refuses or that yields no vector.
    pub fn query(&self, expression: &str) -> Result<Vec<(Value, f64)>> {
        let url = format!("{}/api/v1/query?query={}", self.url, http::encode(expression));
        let answer = http::get_json(&url)?;
        let odd = || Error::Http { url: url.clone(), reason: format!("not a vector: {answer}") };
        let sample = |entry: &Value| {
            let value = entry.pointer("/value/1")?.as_str()?.parse().ok()?;
            Some((entry.get("metric")?.clone(), value))
        };
        let entries = answer.pointer("/data/result").and_then(Value::as_array).ok_or_else(odd)?;
        entries.iter().map(|entry| sample(entry).ok_or_else(odd)).collect()
    }
}

/// Alertmanager on `alertmanager/`, with the webhook and intervals of this run in place of the written ones.
#[derive(Debug)]
pub struct Alertmanager {
    /// Its process.
    pub process: Process,
    url: String,
}

impl Alertmanager {
    fn spawn(options: &Options, tools: &Tools) -> Result<Alertmanager> {
        let (from, home) = (options.source.join("alertmanager"), options.data.join("alertmanager"));
        create_dir(&home)?;
        let mut config = Vec::new();
        if let Some(webhook) = &options.webhook {
            config.push(("http://127.0.0.1:9095", webhook.clone()));
        }
        if options.pace == Pace::Fast {
            config.push(("group_wait: 10s", "group_wait: 0s".into()));
            config.push(("group_wait: 5s", "group_wait: 0s".into()));
            config.push(("group_interval: 1m", "group_interval: 1s".into()));
        }
        render(&from.join("alertmanager.yml"), &home.join("alertmanager.yml"), &config)?;
        copy_dir(&from.join("templates"), &home.join("templates"), &[])?;
        let address = options.ports.address(Port::Alertmanager);
        let spec = component(options, tools, Tool::Alertmanager, "alertmanager")?
            .arg(flag("--config.file=", &home.join("alertmanager.yml")))
            .arg(flag("--storage.path=", &home.join("data")))
            .arg(format!("--web.listen-address={address}"))
            .arg("--cluster.listen-address=");
        Ok(Alertmanager { process: Process::spawn(spec)?, url: format!("http://{address}") })
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The alerts it holds, as its API v2 lists them.
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

/// Copies the files of a directory, replacing in each what is there to replace. What the target held before is gone.
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
