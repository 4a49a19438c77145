//! The table of names.
//!
//! Every span and metric that Gauntlet emits is one row here, and an instrument is only ever built from a row. Names are
//! an interface: dashboards, alert rules and `docs/telemetry.md` use them, and a test fails when the document and
//! this table disagree. Where OpenTelemetry's semantic conventions (1.44) have a name, it is used.

/// The kind of instrument behind a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only goes up.
    Counter,
    /// Goes up and down, changed by the code that acts.
    UpDownCounter,
    /// A distribution over [`Metric::buckets`].
    Histogram,
    /// A value read when it is collected.
    Gauge,
}

impl MetricKind {
    /// The kind in words, as the documentation prints it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::UpDownCounter => "up-down counter",
            Self::Histogram => "histogram",
            Self::Gauge => "gauge",
        }
    }
}

/// One row of the table of metrics.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// The OpenTelemetry name.
    pub name: &'static str,
    /// What instrument it is.
    pub kind: MetricKind,
    /// The unit in UCUM: `s`, `By`, `{instance}`.
    pub unit: &'static str,
    /// What is measured, in one sentence.
    pub description: &'static str,
    /// The attributes that it may carry.
    pub attributes: &'static [&'static str],
    /// The upper bounds of a histogram's buckets, in [`Metric::unit`]; empty for the other kinds.
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

    /// The name under which Prometheus knows the metric, as the OpenTelemetry collector and the exporter for
    /// Prometheus translate it. A histogram adds `_bucket`, `_sum` and `_count`.
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

/// The kind of a span, as OpenTelemetry defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Serves a call from outside.
    Server,
    /// Calls something outside and waits for the answer.
    Client,
    /// Work inside the process.
    Internal,
}

impl SpanKind {
    /// The kind as OpenTelemetry writes it, which is also what the field `otel.kind` takes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
            Self::Internal => "internal",
        }
    }
}

/// One row of the table of spans.
///
/// A span is made with the row's constant, so that a name is written once:
///
/// ```
/// use gauntlet_telemetry::names;
/// let span = tracing::info_span!(names::LOCK_ACQUIRE.name, lock.kind = "challenge");
/// ```
#[derive(Debug, PartialEq)]
pub struct Span {
    /// The name, or its pattern when it holds `{}`. Of low cardinality.
    pub name: &'static str,
    /// The kind of span.
    pub kind: SpanKind,
    /// When there is such a span.
    pub when: &'static str,
    /// The notable attributes.
    pub attributes: &'static [&'static str],
}

macro_rules! spans {
    ($($(#[$doc:meta])* $id:ident = $name:literal, $kind:ident, $when:literal, [$($attribute:literal),*];)*) => {
        $($(#[$doc])* pub const $id: Span = Span { name: $name, kind: SpanKind::$kind, when: $when, attributes: &[$($attribute),*] };)*
        /// Every span, in the order of the documentation.
        pub static SPANS: &[Span] = &[$($id),*];
    };
}

spans! {
    /// A call served over gRPC or gRPC-web.
    RPC_SERVER = "{package.Service}/{Method}", Server, "each gRPC call served",
        ["rpc.system.name", "rpc.method", "rpc.method_original", "rpc.response.status_code", "error.type", "gauntlet.error.code", "challenge.id"];
    /// A call served over REST.
    HTTP_SERVER = "{METHOD} {route}", Server, "each REST call served",
        ["http.request.method", "http.route", "http.response.status_code", "url.path", "url.scheme", "error.type", "gauntlet.error.code", "challenge.id"];
    /// A gRPC call made.
    RPC_CLIENT = "{package.Service}/{Method}", Client, "each gRPC call made by janitor, sidecar and CLI",
        ["rpc.system.name", "rpc.method", "rpc.response.status_code", "server.address", "server.port", "error.type"];
    /// Waiting for a lock.
    LOCK_ACQUIRE = "lock.acquire", Internal, "each lock asked for, until it is had or given up",
        ["lock.kind", "lock.backend", "lock.contended", "lock.queue_depth", "lock.token", "challenge.id", "outcome", "error.type"];
    /// Holding a lock.
    LOCK_HOLD = "lock.hold", Internal, "each lock had, until it is released",
        ["lock.kind", "lock.backend", "lock.token", "error.type"];
    /// An etcd transaction.
    ETCD_TXN = "etcd.txn", Client, "each etcd transaction", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// An etcd range read.
    ETCD_RANGE = "etcd.range", Client, "each etcd range read", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// An etcd put.
    ETCD_PUT = "etcd.put", Client, "each etcd put outside a transaction", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// An etcd delete.
    ETCD_DELETE = "etcd.delete", Client, "each etcd delete outside a transaction", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// A lease granted, kept alive or revoked.
    ETCD_LEASE = "etcd.lease", Client, "each lease granted, kept alive or revoked", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// A watch opened.
    ETCD_WATCH = "etcd.watch", Client, "each watch opened, until it is established", ["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"];
    /// A scenario made ready to be provisioned.
    PROVISION_PREPARE = "provision.prepare", Internal, "each scenario prepared for an instance",
        ["instance.identity", "scenario.digest", "outcome", "error.type"];
    /// An instance brought up.
    PROVISION_UP = "provision.up", Internal, "each instance brought up, with a child for each step",
        ["provisioner", "challenge.id", "instance.identity", "scenario.digest", "lock.token", "outcome", "error.type"];
    /// An instance updated in place.
    PROVISION_UPDATE = "provision.update", Internal, "each instance updated, with a child for each step",
        ["provisioner", "challenge.id", "instance.identity", "scenario.digest", "lock.token", "outcome", "error.type"];
    /// An instance taken down.
    PROVISION_DOWN = "provision.down", Internal, "each instance taken down, with a child for each step",
        ["provisioner", "challenge.id", "instance.identity", "lock.token", "outcome", "error.type"];
    /// Ports and directory given out.
    PROVISION_ALLOCATE = "provision.allocate", Internal, "a step: ports and directory given out", ["provisioner", "instance.identity", "error.type"];
    /// The supervisor and the program started.
    PROVISION_START = "provision.start", Internal, "a step: the program started", ["provisioner", "instance.identity", "error.type"];
    /// The wait for the probe.
    PROVISION_READY = "provision.ready", Internal, "a step: the wait until the probe answers", ["provisioner", "instance.identity", "error.type"];
    /// The program ended, whole.
    PROVISION_STOP = "provision.stop", Internal, "a step: the program ended, with all it started", ["provisioner", "instance.identity", "error.type"];
    /// Directory and ports given back.
    PROVISION_REMOVE = "provision.remove", Internal, "a step: directory and ports given back", ["provisioner", "instance.identity", "error.type"];
    /// A scenario fetched.
    SCENARIO_PULL = "scenario.pull", Client, "each scenario asked for, from the registry or the cache",
        ["oci.reference", "scenario.digest", "cache.hit", "error.type"];
    /// A scenario checked.
    SCENARIO_VALIDATE = "scenario.validate", Internal, "each scenario validated", ["scenario.digest", "error.type"];
    /// Scenarios removed from the disk.
    SCENARIO_EVICT = "scenario.evict", Internal, "each look that finds more scenarios kept than `--scenario-keep` allows, a root of its own",
        ["evicted.scenarios", "evicted.bytes", "error.type"];
    /// A pool brought back to its minimum.
    POOL_REFILL = "pool.refill", Internal, "each refill of a pool, a root of its own that links to its cause", ["challenge.id", "error.type"];
    /// One pass over what was left unfinished.
    RECONCILE = "reconcile", Internal, "each pass over work left unfinished, a root of its own; its locks link to the traces that began the work",
        ["reconcile.recovered", "reconcile.resumed", "reconcile.revived", "reconcile.orphans", "reconcile.failures", "error.type"];
    /// One sweep of the janitor.
    JANITOR_SWEEP = "janitor.sweep", Internal, "each sweep, a root of its own", ["janitor.scanned", "janitor.expired", "janitor.deleted", "janitor.failed", "outcome", "error.type"];
    /// One instance expired by the janitor.
    JANITOR_EXPIRE = "janitor.expire", Internal, "each expired instance, a child of its sweep", ["challenge.id", "source.id", "outcome", "error.type"];
}

/// The bounds that the semantic conventions advise for durations of calls, in seconds.
const CALL: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Bounds for waiting for and holding locks: from half a millisecond, where an uncontended lock is.
const LOCK: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Bounds for provisioning, which takes from a moment to minutes.
const PROVISION: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0];
/// Bounds for how late an expiry is: the janitor runs every some seconds or minutes.
const LAG: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

macro_rules! metrics {
    ($($(#[$doc:meta])* $id:ident = $row:expr;)*) => {
        $($(#[$doc])* pub static $id: Metric = $row;)*
        /// Every metric, in the order of the documentation.
        pub static METRICS: &[&Metric] = &[$(&$id),*];
    };
}

use MetricKind::{Counter, Gauge, UpDownCounter};

metrics! {
    /// Challenges in the store.
    CHALLENGES = Metric::new("challenges", Gauge, "{challenge}", &[],
        "Challenges in the store, read when collected.");
    /// Instances in the store.
    INSTANCES = Metric::new("instances", Gauge, "{instance}", &["challenge", "state", "pool"],
        "Instances in the store, read when collected.");
    /// Instances that should be gone.
    INSTANCES_OVERDUE = Metric::new("gauntlet.instances.overdue", Gauge, "{instance}", &[],
        "Instances past their end and still in the store, read when collected.");
    /// Time to serve a gRPC call.
    RPC_SERVER_CALL_DURATION = Metric::seconds("rpc.server.call.duration", CALL,
        &["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"],
        "Time to serve a gRPC call, from its headers to its trailers.");
    /// Time of a gRPC call made.
    RPC_CLIENT_CALL_DURATION = Metric::seconds("rpc.client.call.duration", CALL,
        &["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type", "server.address", "server.port"],
        "Time of a gRPC call made, from its headers to its trailers.");
    /// Time to serve an HTTP request.
    HTTP_SERVER_REQUEST_DURATION = Metric::seconds("http.server.request.duration", CALL,
        &["http.request.method", "http.route", "http.response.status_code", "url.scheme", "error.type"],
        "Time to serve a REST call, to the end of its body.");
    /// Time of a call to a database.
    DB_CLIENT_OPERATION_DURATION = Metric::seconds("db.client.operation.duration",
        &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0],
        &["db.system.name", "db.operation.name", "server.address", "server.port", "error.type"],
        "Time of a call to etcd.");
    /// Locks asked for.
    LOCK_ATTEMPTS = Metric::new("gauntlet.lock.attempts", Counter, "{attempt}", &["lock.kind", "outcome"],
        "Locks asked for, by how it ended.");
    /// Time spent waiting for a lock.
    LOCK_WAIT_DURATION = Metric::seconds("gauntlet.lock.wait.duration", LOCK, &["lock.kind", "outcome"],
        "Time from asking for a lock to having it or giving up.");
    /// Time a lock was held.
    LOCK_HOLD_DURATION = Metric::seconds("gauntlet.lock.hold.duration", LOCK, &["lock.kind"],
        "Time from having a lock to releasing it.");
    /// Who waits for a lock now.
    LOCK_WAITERS = Metric::new("gauntlet.lock.waiters", UpDownCounter, "{waiter}", &["lock.kind"],
        "Tasks of this process that wait for a lock now.");
    /// Locks lost while held.
    LOCK_LOST = Metric::new("gauntlet.lock.lost", Counter, "{lock}", &["lock.kind"],
        "Locks whose lease ran out, or may have, while they were held.");
    /// Time of a provisioning step.
    PROVISION_DURATION = Metric::seconds("gauntlet.provision.duration", PROVISION, &["provisioner", "step", "outcome"],
        "Time of a provisioning step.");
    /// Provisioning steps under way.
    PROVISION_ACTIVE = Metric::new("gauntlet.provision.active", UpDownCounter, "{step}", &["provisioner", "step"],
        "Provisioning steps of this process that are under way.");
    /// Claims on pools.
    POOL_CLAIMS = Metric::new("gauntlet.pool.claims", Counter, "{claim}", &["challenge", "result"],
        "Instances asked for from a pool: hit when one was ready, miss when one had to be made.");
    /// Operations on instances.
    INSTANCE_OPERATIONS = Metric::new("gauntlet.instance.operations", Counter, "{operation}",
        &["challenge", "operation", "outcome"],
        "Attempts to create, renew, update or delete an instance, each counted once, by its outcome: ok or the code of the error.");
    /// How late the janitor is.
    JANITOR_LAG = Metric::seconds("gauntlet.janitor.lag", LAG, &["outcome"],
        "Time from an instance's end to the janitor's attempt to delete it.");
    /// Clients refused.
    SERVER_REFUSED = Metric::new("gauntlet.server.refused", Counter, "{refusal}", &["server", "reason"],
        "Connections and calls that a port refused or closed: connections or calls beyond the bound (connections, calls), a head that took too long (header_timeout), an answer that was not read (stalled_reader), connections that the system could not accept (accept_failed).");
    /// Instances the janitor dealt with.
    JANITOR_EXPIRED = Metric::new("gauntlet.janitor.expired", Counter, "{instance}", &["outcome"],
        "Expired instances that the janitor tried to delete, by how it ended.");
    /// Work recovered after a crash.
    RECONCILE_RECOVERED = Metric::new("gauntlet.reconcile.recovered", Counter, "{instance}", &["phase", "action"],
        "Instances found half done and brought to an end: adopted or taken down.");
    /// Reads of gauges that failed.
    GAUGE_FAILURES = Metric::new("gauntlet.gauge.failures", Counter, "{read}", &["error.type"],
        "Reads behind a gauge that failed or took too long; the gauge then reports nothing.");
    /// CPU time used.
    PROCESS_CPU_TIME = Metric::new("process.cpu.time", Counter, "s", &["cpu.mode"], "CPU time used by the process.");
    /// Memory in use.
    PROCESS_MEMORY_USAGE = Metric::new("process.memory.usage", UpDownCounter, "By", &[], "Physical memory in use by the process.");
    /// Threads.
    PROCESS_THREAD_COUNT = Metric::new("process.thread.count", UpDownCounter, "{thread}", &[], "Threads of the process.");
    /// Open file descriptors.
    PROCESS_FILE_DESCRIPTORS = Metric::new("process.unix.file_descriptor.count", UpDownCounter, "{file_descriptor}", &[],
        "File descriptors that the process has open.");
    /// Uptime.
    PROCESS_UPTIME = Metric::new("process.uptime", Gauge, "s", &[], "Time since the process started.");
    /// Worker threads of the runtime.
    TOKIO_WORKERS = Metric::new("tokio.workers", UpDownCounter, "{thread}", &[], "Worker threads of the runtime.");
    /// Tasks alive.
    TOKIO_TASKS_ALIVE = Metric::new("tokio.tasks.alive", UpDownCounter, "{task}", &[], "Tasks of the runtime that are alive.");
    /// Tasks queued.
    TOKIO_QUEUE_DEPTH = Metric::new("tokio.global_queue.depth", UpDownCounter, "{task}", &[], "Tasks that wait in the runtime's global queue.");
    /// Spans that went through the batch processor.
    SDK_SPAN_PROCESSED = Metric::new("otel.sdk.processor.span.processed", Counter, "{span}",
        &["otel.component.type", "error.type"],
        "Spans handed to an exporter, or dropped because the queue was full (error.type=queue_full).");
    /// Spans queued.
    SDK_SPAN_QUEUE_SIZE = Metric::new("otel.sdk.processor.span.queue.size", UpDownCounter, "{span}", &["otel.component.type"],
        "Spans that wait to be exported.");
    /// Room for spans.
    SDK_SPAN_QUEUE_CAPACITY = Metric::new("otel.sdk.processor.span.queue.capacity", UpDownCounter, "{span}", &["otel.component.type"],
        "Spans that may wait to be exported.");
    /// Spans exported.
    SDK_SPAN_EXPORTED = Metric::new("otel.sdk.exporter.span.exported", Counter, "{span}", &["otel.component.type", "error.type"],
        "Spans whose export ended; with error.type when it failed and they are lost.");
    /// Log records that went through the batch processor.
    SDK_LOG_PROCESSED = Metric::new("otel.sdk.processor.log.processed", Counter, "{log_record}",
        &["otel.component.type", "error.type"],
        "Log records handed to an exporter, or dropped because the queue was full (error.type=queue_full).");
    /// Log records queued.
    SDK_LOG_QUEUE_SIZE = Metric::new("otel.sdk.processor.log.queue.size", UpDownCounter, "{log_record}", &["otel.component.type"],
        "Log records that wait to be exported.");
    /// Room for log records.
    SDK_LOG_QUEUE_CAPACITY = Metric::new("otel.sdk.processor.log.queue.capacity", UpDownCounter, "{log_record}", &["otel.component.type"],
        "Log records that may wait to be exported.");
    /// Log records exported.
    SDK_LOG_EXPORTED = Metric::new("otel.sdk.exporter.log.exported", Counter, "{log_record}", &["otel.component.type", "error.type"],
        "Log records whose export ended; with error.type when it failed and they are lost.");
    /// Metric data points exported.
    SDK_METRIC_EXPORTED = Metric::new("otel.sdk.exporter.metric_data_point.exported", Counter, "{data_point}",
        &["otel.component.type", "error.type"],
        "Metric data points whose export ended; with error.type when it failed.");
}
