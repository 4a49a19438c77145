//! The tables of span and metric names.
//!
//! Every span and every metric of Gauntlet is a row here, and instruments are only built from rows. Names are an interface: dashboards, alert
//! rules and `docs/telemetry.md` depend on them, and a test fails when that document and these tables disagree. Where OpenTelemetry's semantic
//! conventions (1.44) define a name, that name is used.

/// The kind of instrument behind a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// A sum that only grows.
    Counter,
    /// A sum that grows and shrinks.
    UpDownCounter,
    /// A distribution over [`Metric::buckets`].
    Histogram,
    /// A value read at collection.
    Gauge,
}

impl MetricKind {
    /// The kind as `docs/telemetry.md` prints it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::UpDownCounter => "up-down counter",
            Self::Histogram => "histogram",
            Self::Gauge => "gauge",
        }
    }
}

/// A row of the table of metrics.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// The OpenTelemetry name.
    pub name: &'static str,
    /// The kind of instrument.
    pub kind: MetricKind,
    /// The unit in UCUM: `s`, `By`, `{instance}`.
    pub unit: &'static str,
    /// The description, sent with the metric.
    pub description: &'static str,
    /// The attributes that a value may have.
    pub attributes: &'static [&'static str],
    /// The upper bounds of a histogram's buckets, in [`Metric::unit`]. Empty for other kinds.
    pub buckets: &'static [f64],
}

impl Metric {
    const fn new(
        name: &'static str,
        kind: MetricKind,
        unit: &'static str,
        attributes: &'static [&'static str],
        description: &'static str,
    ) -> Self {
        Self { name, kind, unit, description, attributes, buckets: &[] }
    }

    const fn seconds(
        name: &'static str,
        buckets: &'static [f64],
        attributes: &'static [&'static str],
        description: &'static str,
    ) -> Self {
        Self { name, kind: MetricKind::Histogram, unit: "s", description, attributes, buckets }
    }

    /// The name in Prometheus, as the OpenTelemetry collector and the Prometheus exporter translate it. A histogram's series add `_bucket`,
    /// `_sum` and `_count`.
    pub fn prometheus_name(&self) -> String {
        let mut name = self.name.replace('.', "_");
        let unit = match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            _ => "",
        };
        if !name.ends_with(unit) {
            name.push_str(unit);
        }
        if self.kind == MetricKind::Counter {
            name.push_str("_total");
        }
        name
    }
}

/// The kind of a span, as defined by OpenTelemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Serves a call from another process.
    Server,
    /// Calls another process and waits for its response.
    Client,
    /// Work inside the process.
    Internal,
}

impl SpanKind {
    /// The value of the span field `otel.kind`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
            Self::Internal => "internal",
        }
    }
}

/// A row of the table of spans.
///
/// Code creates spans from the row's constant, so that each name is written once:
///
/// ```
/// use gauntlet_telemetry::names;
/// let span = tracing::info_span!(names::LOCK_ACQUIRE.name, lock.kind = "challenge");
/// ```
#[derive(Debug, PartialEq)]
pub struct Span {
    /// The name, or its pattern if it contains `{}`. Of low cardinality.
    pub name: &'static str,
    /// The kind of span.
    pub kind: SpanKind,
    /// What one span represents.
    pub description: &'static str,
    /// The notable attributes.
    pub attributes: &'static [&'static str],
}

macro_rules! spans {
    ($($id:ident = $name:literal, $kind:ident, $attributes:expr, $description:literal;)*) => {
        $(
            #[doc = $description]
            pub const $id: Span = Span { name: $name, kind: SpanKind::$kind, description: $description, attributes: $attributes };
        )*
        /// Every span, in the order of the documentation.
        pub static SPANS: &[Span] = &[$($id),*];
    };
}

const ETCD: &[&str] = &["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
const PROVISION: &[&str] =
    &["provisioner", "challenge.id", "instance.identity", "scenario.digest", "lock.token", "outcome", "error.type"];
const PROVISION_STEP: &[&str] = &["provisioner", "instance.identity", "error.type"];

spans! {
    RPC_SERVER = "{package.Service}/{Method}", Server,
        &["rpc.system.name", "rpc.method", "rpc.method_original", "rpc.response.status_code", "error.type", "gauntlet.error.code", "challenge.id", "enduser.id", "gauntlet.access.kind", "gauntlet.access.token_id", "client.address"],
        "A gRPC call served, directly or over gRPC-web.";
    HTTP_SERVER = "{METHOD} {route}", Server,
        &["http.request.method", "http.route", "http.response.status_code", "url.path", "url.scheme", "error.type", "gauntlet.error.code", "challenge.id", "enduser.id", "gauntlet.access.kind", "gauntlet.access.token_id", "client.address"],
        "A REST call served.";
    RPC_CLIENT = "{package.Service}/{Method}", Client,
        &["rpc.system.name", "rpc.method", "rpc.response.status_code", "server.address", "server.port", "error.type"],
        "A gRPC call made by the janitor or the CLI.";
    LOCK_ACQUIRE = "lock.acquire", Internal,
        &["lock.kind", "lock.backend", "lock.contended", "lock.queue_depth", "lock.token", "challenge.id", "outcome", "error.type"],
        "An attempt to acquire a lock, whether it succeeds or not.";
    LOCK_HOLD = "lock.hold", Internal, &["lock.kind", "lock.backend", "lock.token", "error.type"],
        "A lock held, from acquisition to release.";
    ETCD_TXN = "etcd.txn", Client, ETCD, "An etcd transaction.";
    ETCD_RANGE = "etcd.range", Client, ETCD, "An etcd range read.";
    ETCD_PUT = "etcd.put", Client, ETCD, "An etcd put outside a transaction.";
    ETCD_DELETE = "etcd.delete", Client, ETCD, "An etcd delete outside a transaction.";
    ETCD_LEASE = "etcd.lease", Client, ETCD, "A lease granted, kept alive or revoked.";
    ETCD_WATCH = "etcd.watch", Client, ETCD, "A watch request, until etcd confirms it.";
    PROVISION_PREPARE = "provision.prepare", Internal, &["instance.identity", "scenario.digest", "outcome", "error.type"],
        "A scenario fetched and rendered for an instance.";
    PROVISION_UP = "provision.up", Internal, PROVISION, "An instance started, with a child span for each step.";
    PROVISION_UPDATE = "provision.update", Internal, PROVISION, "An instance updated, with a child span for each step.";
    PROVISION_DOWN = "provision.down", Internal,
        &["provisioner", "challenge.id", "instance.identity", "lock.token", "outcome", "error.type"],
        "An instance stopped and removed, with a child span for each step.";
    PROVISION_ALLOCATE = "provision.allocate", Internal, PROVISION_STEP, "Step: ports and directory are allocated.";
    PROVISION_START = "provision.start", Internal, &["provisioner", "instance.identity", "instance.isolation", "error.type"],
        "Step: the supervisor and the program are started.";
    PROVISION_READY = "provision.ready", Internal, PROVISION_STEP, "Step: the readiness probe is polled until it succeeds.";
    PROVISION_STOP = "provision.stop", Internal,
        &["provisioner", "instance.identity", "instance.end", "instance.exceeded", "error.type"], "Step: the program and all its processes are stopped.";
    PROVISION_REMOVE = "provision.remove", Internal, PROVISION_STEP, "Step: the ports are released and the directory is removed.";
    SCENARIO_PULL = "scenario.pull", Client, &["oci.reference", "scenario.digest", "cache.hit", "error.type"],
        "A scenario fetched from the registry or the cache.";
    SCENARIO_VALIDATE = "scenario.validate", Internal, &["scenario.digest", "error.type"], "A scenario validated.";
    SCENARIO_EVICT = "scenario.evict", Internal, &["evicted.scenarios", "evicted.bytes", "error.type"],
        "An eviction from the scenario cache, which exceeded `--scenario-keep`. A root span.";
    POOL_REFILL = "pool.refill", Internal, &["challenge.id", "error.type"],
        "A pool refilled to its minimum. A root span, linked to its cause.";
    RECONCILE = "reconcile", Internal,
        &["reconcile.recovered", "reconcile.resumed", "reconcile.revived", "reconcile.orphans", "reconcile.failures", "error.type"],
        "A pass over unfinished work. A root span; its lock spans link to the traces in which the work began.";
    JANITOR_SWEEP = "janitor.sweep", Internal,
        &["janitor.scanned", "janitor.expired", "janitor.deleted", "janitor.failed", "outcome", "error.type"],
        "A sweep of the janitor. A root span.";
    JANITOR_EXPIRE = "janitor.expire", Internal, &["challenge.id", "source.id", "outcome", "error.type"],
        "An expired instance deleted, a child of its sweep.";
}

/// Bounds for calls, as the semantic conventions recommend them.
const CALL_SECONDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Bounds for etcd calls, as the semantic conventions recommend them for databases.
const ETCD_SECONDS: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];
/// Bounds for locks. An uncontended lock takes about half a millisecond.
const LOCK_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Bounds for provisioning, which takes milliseconds to minutes.
const PROVISION_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0];
/// Bounds for the delay of expiry. The janitor's interval is seconds to minutes.
const LAG_SECONDS: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

macro_rules! metrics {
    ($($id:ident = $constructor:ident($($argument:expr),*; $description:literal);)*) => {
        $(
            #[doc = $description]
            pub static $id: Metric = Metric::$constructor($($argument),*, $description);
        )*
        /// Every metric, in the order of the documentation.
        pub static METRICS: &[&Metric] = &[$(&$id),*];
    };
}

use MetricKind::{Counter, Gauge, UpDownCounter};

const RPC: &[&str] = &["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"];
const SDK: &[&str] = &["otel.component.type"];
const SDK_RESULT: &[&str] = &["otel.component.type", "error.type"];

metrics! {
    CHALLENGES = new("challenges", Gauge, "{challenge}", &[]; "Challenges in the store, read at collection.");
    INSTANCES = new("instances", Gauge, "{instance}", &["challenge", "state", "pool"];
        "Instances in the store, read at collection.");
    INSTANCES_OVERDUE = new("gauntlet.instances.overdue", Gauge, "{instance}", &[];
        "Instances that have expired and are still in the store, read at collection.");
    RPC_SERVER_CALL_DURATION = seconds("rpc.server.call.duration", CALL_SECONDS, RPC;
        "Duration of a gRPC call served, from its headers to its trailers.");
    RPC_CLIENT_CALL_DURATION = seconds("rpc.client.call.duration", CALL_SECONDS,
        &["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type", "server.address", "server.port"];
        "Duration of a gRPC call made, from its headers to its trailers.");
    HTTP_SERVER_REQUEST_DURATION = seconds("http.server.request.duration", CALL_SECONDS,
        &["http.request.method", "http.route", "http.response.status_code", "url.scheme", "error.type"];
        "Duration of a REST call served, to the end of its body.");
    DB_CLIENT_OPERATION_DURATION = seconds("db.client.operation.duration", ETCD_SECONDS, ETCD;
        "Duration of a call to etcd.");
    LOCK_ATTEMPTS = new("gauntlet.lock.attempts", Counter, "{attempt}", &["lock.kind", "outcome"];
        "Attempts to acquire a lock, by outcome.");
    LOCK_WAIT_DURATION = seconds("gauntlet.lock.wait.duration", LOCK_SECONDS, &["lock.kind", "outcome"];
        "Duration of an attempt to acquire a lock, whether it was acquired or not.");
    LOCK_HOLD_DURATION = seconds("gauntlet.lock.hold.duration", LOCK_SECONDS, &["lock.kind"];
        "Duration for which a lock was held.");
    LOCK_WAITERS = new("gauntlet.lock.waiters", UpDownCounter, "{waiter}", &["lock.kind"];
        "Tasks of this process that are waiting for a lock.");
    LOCK_LOST = new("gauntlet.lock.lost", Counter, "{lock}", &["lock.kind"];
        "Locks whose lease expired, or may have expired, while they were held.");
    PROVISION_DURATION = seconds("gauntlet.provision.duration", PROVISION_SECONDS, &["provisioner", "step", "outcome"];
        "Duration of a provisioning step.");
    PROVISION_ACTIVE = new("gauntlet.provision.active", UpDownCounter, "{step}", &["provisioner", "step"];
        "Provisioning steps in progress in this process.");
    POOL_CLAIMS = new("gauntlet.pool.claims", Counter, "{claim}", &["challenge", "result"];
        "Instances requested from a pool: hit if one was ready, miss if one had to be created.");
    SCENARIO_DAMAGED = new("gauntlet.scenario.damaged", Counter, "{scenario}", &[];
        "Cached scenarios that were not as they had been unpacked, and were fetched again.");
    INSTANCE_OPERATIONS = new("gauntlet.instance.operations", Counter, "{operation}", &["challenge", "operation", "outcome"];
        "Attempts to create, renew, update or delete an instance, each counted once. The outcome is ok, refused or failed.");
    INSTANCE_EXCEEDED = new("gauntlet.instance.exceeded", Counter, "{end}", &["challenge", "limit"];
        "Ends of instances that had reached a limit: memory, processes, cpu_quota, cpu or disk.");
    JANITOR_LAG = seconds("gauntlet.janitor.lag", LAG_SECONDS, &["outcome"];
        "Time from an instance's expiry to the janitor's attempt to delete it.");
    SERVER_REFUSED = new("gauntlet.server.refused", Counter, "{refusal}", &["server", "reason"];
        "Connections and calls refused or closed by a server: over the limit of connections or of calls, in all or of one address (connections, calls, peer_connections, peer_calls), over the limit of changes (changes), headers, body or message too long (headers, body, message), body not sent in time (body_timeout), streams reset or calls cancelled too often (rapid_reset), request headers not sent in time (header_timeout), response not read in time (stalled_reader), connection not accepted by the system (accept_failed), sent by a web page of another origin (cross_origin), sent to a host name that the listener does not have (host), with credentials in plaintext (plaintext_credentials), TLS handshake failed or not finished in time (handshake_failed, handshake_timeout).");
    ACCESS_DENIED = new("gauntlet.access.denied", Counter, "{call}", &["reason"];
        "Calls denied, by code: no credentials, or credentials that are invalid or expired (CREDENTIALS_REQUIRED, CREDENTIALS_INVALID, CREDENTIALS_EXPIRED), a scope that is too low (SCOPE_INSUFFICIENT), or too many calls (CALL_RATE_EXCEEDED, SOURCE_RATE_EXCEEDED).");
    JANITOR_EXPIRED = new("gauntlet.janitor.expired", Counter, "{instance}", &["outcome"];
        "Expired instances that the janitor tried to delete, by outcome.");
    RECONCILE_RECOVERED = new("gauntlet.reconcile.recovered", Counter, "{instance}", &["phase", "action"];
        "Instances with unfinished work that were adopted or taken down, and exited instances that were restarted.");
    GAUGE_FAILURES = new("gauntlet.gauge.failures", Counter, "{read}", &["error.type"];
        "Reads for a gauge that failed or timed out. The gauge has no value for that collection.");
    PROCESS_CPU_TIME = new("process.cpu.time", Counter, "s", &["cpu.mode"]; "CPU time used by the process.");
    PROCESS_MEMORY_USAGE = new("process.memory.usage", UpDownCounter, "By", &[]; "Physical memory used by the process.");
    PROCESS_THREAD_COUNT = new("process.thread.count", UpDownCounter, "{thread}", &[]; "Threads of the process.");
    PROCESS_FILE_DESCRIPTORS = new("process.unix.file_descriptor.count", UpDownCounter, "{file_descriptor}", &[];
        "File descriptors that the process has open.");
    PROCESS_UPTIME = new("process.uptime", Gauge, "s", &[]; "Time since the process started.");
    TOKIO_WORKERS = new("tokio.workers", UpDownCounter, "{thread}", &[]; "Worker threads of the runtime.");
    TOKIO_TASKS_ALIVE = new("tokio.tasks.alive", UpDownCounter, "{task}", &[]; "Tasks of the runtime that have not finished.");
    TOKIO_QUEUE_DEPTH = new("tokio.global_queue.depth", UpDownCounter, "{task}", &[];
        "Tasks waiting in the runtime's global queue.");
    SDK_SPAN_PROCESSED = new("otel.sdk.processor.span.processed", Counter, "{span}", SDK_RESULT;
        "Spans handed to an exporter, or dropped because the queue was full (error.type=queue_full).");
    SDK_SPAN_QUEUE_SIZE = new("otel.sdk.processor.span.queue.size", UpDownCounter, "{span}", SDK;
        "Spans waiting to be exported.");
    SDK_SPAN_QUEUE_CAPACITY = new("otel.sdk.processor.span.queue.capacity", UpDownCounter, "{span}", SDK;
        "Spans that the queue can hold.");
    SDK_SPAN_EXPORTED = new("otel.sdk.exporter.span.exported", Counter, "{span}", SDK_RESULT;
        "Spans exported. With error.type, spans lost because their export failed.");
    SDK_LOG_PROCESSED = new("otel.sdk.processor.log.processed", Counter, "{log_record}", SDK_RESULT;
        "Log records handed to an exporter, or dropped because the queue was full (error.type=queue_full).");
    SDK_LOG_QUEUE_SIZE = new("otel.sdk.processor.log.queue.size", UpDownCounter, "{log_record}", SDK;
        "Log records waiting to be exported.");
    SDK_LOG_QUEUE_CAPACITY = new("otel.sdk.processor.log.queue.capacity", UpDownCounter, "{log_record}", SDK;
        "Log records that the queue can hold.");
    SDK_LOG_EXPORTED = new("otel.sdk.exporter.log.exported", Counter, "{log_record}", SDK_RESULT;
        "Log records exported. With error.type, log records lost because their export failed.");
    SDK_METRIC_EXPORTED = new("otel.sdk.exporter.metric_data_point.exported", Counter, "{data_point}", SDK_RESULT;
        "Metric data points exported. With error.type, data points whose export failed.");
}
