//! The instruments, built from the table of metrics, with a method for each event that is measured.
//!
//! No method blocks or fails. Labels of type `&'static str` come from closed sets, so cardinality stays bounded. The only open label is the
//! challenge's id.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, MeterProvider, UpDownCounter};

use crate::names::{self, Metric};

pub(crate) const SCOPE: &str = "gauntlet";

/// Starts building an instrument from its row. The SDK has one builder for each kind, with the same methods and no common trait.
macro_rules! instrument {
    ($meter:expr, $kind:ident, $row:expr) => {
        $meter.$kind($row.name).with_unit($row.unit).with_description($row.description)
    };
}
pub(crate) use instrument;

/// All instruments, by area. Clones share them.
#[derive(Clone, Debug)]
pub struct Instruments {
    pub(crate) calls: Calls,
    /// Locks.
    pub lock: Lock,
    /// Provisioning steps.
    pub provision: Provision,
    /// Pools.
    pub pool: Pool,
    /// Operations on instances.
    pub instance: Instance,
    /// Servers.
    pub server: Server,
    /// Access to the API.
    pub access: Access,
    /// The scenario cache.
    pub scenario: Scenario,
    /// The janitor.
    pub janitor: Janitor,
    /// The reconciler.
    pub reconcile: Reconcile,
}

impl Instruments {
    /// Creates the instruments of `provider`.
    pub fn new(provider: &dyn MeterProvider) -> Self {
        let meter = provider.meter(SCOPE);
        Self {
            calls: Calls {
                rpc_server: histogram(&meter, &names::RPC_SERVER_CALL_DURATION),
                rpc_client: histogram(&meter, &names::RPC_CLIENT_CALL_DURATION),
                http_server: histogram(&meter, &names::HTTP_SERVER_REQUEST_DURATION),
                database: histogram(&meter, &names::DB_CLIENT_OPERATION_DURATION),
            },
            lock: Lock {
                attempts: counter(&meter, &names::LOCK_ATTEMPTS),
                wait: histogram(&meter, &names::LOCK_WAIT_DURATION),
                hold: histogram(&meter, &names::LOCK_HOLD_DURATION),
                waiters: up_down_counter(&meter, &names::LOCK_WAITERS),
                lost: counter(&meter, &names::LOCK_LOST),
            },
            provision: Provision {
                duration: histogram(&meter, &names::PROVISION_DURATION),
                active: up_down_counter(&meter, &names::PROVISION_ACTIVE),
            },
            pool: Pool { claims: counter(&meter, &names::POOL_CLAIMS) },
            instance: Instance {
                operations: counter(&meter, &names::INSTANCE_OPERATIONS),
                exceeded: counter(&meter, &names::INSTANCE_EXCEEDED),
            },
            server: Server { refused: counter(&meter, &names::SERVER_REFUSED) },
            access: Access { denied: counter(&meter, &names::ACCESS_DENIED) },
            scenario: Scenario { damaged: counter(&meter, &names::SCENARIO_DAMAGED) },
            janitor: Janitor {
                lag: histogram(&meter, &names::JANITOR_LAG),
                expired: counter(&meter, &names::JANITOR_EXPIRED),
            },
            reconcile: Reconcile { recovered: counter(&meter, &names::RECONCILE_RECOVERED) },
        }
    }

    /// Instruments that record nothing, for tests and for a disabled SDK.
    pub fn noop() -> Self {
        Self::new(&opentelemetry::metrics::noop::NoopMeterProvider::new())
    }
}

pub(crate) fn counter(meter: &Meter, row: &'static Metric) -> Counter<u64> {
    instrument!(meter, u64_counter, row).build()
}

fn up_down_counter(meter: &Meter, row: &'static Metric) -> UpDownCounter<i64> {
    instrument!(meter, i64_up_down_counter, row).build()
}

fn histogram(meter: &Meter, row: &'static Metric) -> Histogram<f64> {
    instrument!(meter, f64_histogram, row).with_boundaries(row.buckets.to_vec()).build()
}

fn labels<const N: usize>(labels: [(&'static str, &'static str); N]) -> [KeyValue; N] {
    labels.map(|(key, value)| KeyValue::new(key, value))
}

fn challenge_label(id: &str) -> KeyValue {
    KeyValue::new("challenge", id.to_owned())
}

/// Durations of calls, recorded by the layers and by [`crate::db::Database`].
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) rpc_server: Histogram<f64>,
    pub(crate) rpc_client: Histogram<f64>,
    pub(crate) http_server: Histogram<f64>,
    pub(crate) database: Histogram<f64>,
}

/// Counts one as active until dropped, so that cancelled work does not stay counted.
#[derive(Debug)]
#[must_use = "the work counts as active until this is dropped"]
pub struct ActiveGuard {
    counter: UpDownCounter<i64>,
    attributes: Vec<KeyValue>,
}

impl ActiveGuard {
    fn new(counter: &UpDownCounter<i64>, attributes: impl Into<Vec<KeyValue>>) -> Self {
        let attributes = attributes.into();
        counter.add(1, &attributes);
        Self { counter: counter.clone(), attributes }
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.counter.add(-1, &self.attributes);
    }
}

/// Locks. `kind` is what is locked: `challenge`, `rollout` or `instance`.
#[derive(Clone, Debug)]
pub struct Lock {
    attempts: Counter<u64>,
    wait: Histogram<f64>,
    hold: Histogram<f64>,
    waiters: UpDownCounter<i64>,
    lost: Counter<u64>,
}

impl Lock {
    /// Counts a waiter until the guard is dropped.
    pub fn start_wait(&self, kind: &'static str) -> ActiveGuard {
        ActiveGuard::new(&self.waiters, labels([("lock.kind", kind)]))
    }

    /// Records an attempt and how long it waited. `outcome` is `acquired` or the reason why the lock was not acquired.
    pub fn record_attempt(&self, kind: &'static str, outcome: &'static str, wait: Duration) {
        let labels = labels([("lock.kind", kind), ("outcome", outcome)]);
        self.attempts.add(1, &labels);
        self.wait.record(wait.as_secs_f64(), &labels);
    }

    /// Records the release of a lock that was held for `hold`.
    pub fn record_release(&self, kind: &'static str, hold: Duration) {
        self.hold.record(hold.as_secs_f64(), &labels([("lock.kind", kind)]));
    }

    /// Records that a lock was lost while held.
    pub fn record_loss(&self, kind: &'static str) {
        self.lost.add(1, &labels([("lock.kind", kind)]));
    }
}

/// Provisioning steps: `prepare`, `up`, `update`, `down` and the steps within them.
#[derive(Clone, Debug)]
pub struct Provision {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
}

impl Provision {
    /// Counts a step as in progress until the guard is dropped.
    pub fn start_step(&self, provisioner: &'static str, step: &'static str) -> ActiveGuard {
        ActiveGuard::new(&self.active, labels([("provisioner", provisioner), ("step", step)]))
    }

    /// Records a step that took `duration`. `outcome` is `ok` or the error code.
    pub fn record_step(
        &self,
        provisioner: &'static str,
        step: &'static str,
        outcome: &'static str,
        duration: Duration,
    ) {
        let labels = labels([("provisioner", provisioner), ("step", step), ("outcome", outcome)]);
        self.duration.record(duration.as_secs_f64(), &labels);
    }
}

/// Pools.
#[derive(Clone, Debug)]
pub struct Pool {
    claims: Counter<u64>,
}

impl Pool {
    /// Records that an instance was requested from a challenge's pool. `is_hit` says whether one was ready.
    pub fn record_claim(&self, challenge: &str, is_hit: bool) {
        let result = if is_hit { "hit" } else { "miss" };
        self.claims.add(1, &[challenge_label(challenge), KeyValue::new("result", result)]);
    }
}

/// Operations on instances.
#[derive(Clone, Debug)]
pub struct Instance {
    operations: Counter<u64>,
    exceeded: Counter<u64>,
}

impl Instance {
    /// Records the end of an instance that had reached the limit of that name.
    pub fn record_exceeded(&self, challenge: &str, limit: &'static str) {
        let [limit] = labels([("limit", limit)]);
        self.exceeded.add(1, &[challenge_label(challenge), limit]);
    }

    /// Records a `create`, `renew`, `update` or `delete`. `outcome` is `ok` or the error code.
    pub fn record_operation(&self, challenge: &str, operation: &'static str, outcome: &'static str) {
        let [operation, outcome] = labels([("operation", operation), ("outcome", outcome)]);
        self.operations.add(1, &[challenge_label(challenge), operation, outcome]);
    }
}

/// Servers.
#[derive(Clone, Debug)]
pub struct Server {
    refused: Counter<u64>,
}

impl Server {
    /// Records that `server` refused a call or a connection, or closed one, because of `reason`.
    pub fn record_refusal(&self, server: &'static str, reason: &'static str) {
        self.refused.add(1, &labels([("server", server), ("reason", reason)]));
    }
}

/// Access to the API.
#[derive(Clone, Debug)]
pub struct Access {
    denied: Counter<u64>,
}

impl Access {
    /// Records that a call was denied. `reason` is the code of its error.
    pub fn record_denial(&self, reason: &'static str) {
        self.denied.add(1, &labels([("reason", reason)]));
    }
}

/// The scenario cache.
#[derive(Clone, Debug)]
pub struct Scenario {
    damaged: Counter<u64>,
}

impl Scenario {
    /// Records that a cached scenario was not as it was unpacked.
    pub fn record_damage(&self) {
        self.damaged.add(1, &[]);
    }
}

/// The janitor.
#[derive(Clone, Debug)]
pub struct Janitor {
    lag: Histogram<f64>,
    expired: Counter<u64>,
}

impl Janitor {
    /// Records an attempt to delete an expired instance, `lag` after its expiry. `outcome` is `ok` or the error code.
    pub fn record_expiry(&self, outcome: &'static str, lag: Duration) {
        let labels = labels([("outcome", outcome)]);
        self.expired.add(1, &labels);
        self.lag.record(lag.as_secs_f64(), &labels);
    }
}

/// The reconciler.
#[derive(Clone, Debug)]
pub struct Reconcile {
    recovered: Counter<u64>,
}

impl Reconcile {
    /// Records that the work of an instance left in `phase` was finished by `action`: `adopted` or `taken_down`.
    pub fn record_recovery(&self, phase: &'static str, action: &'static str) {
        self.recovered.add(1, &labels([("phase", phase), ("action", action)]));
    }
}
