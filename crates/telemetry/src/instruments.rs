//! The instruments, built from the table of names, and the plain methods that record on them.
//!
//! Code that measures says what happened (`lock.waited(..)`), never which instrument to touch. All methods are
//! cheap, never block and never fail. Labels that are `&'static str` come from closed sets, so that
//! cardinality stays bounded; a challenge's id is the one open label.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, MeterProvider, UpDownCounter};

use crate::names::{self, Metric};

pub(crate) const SCOPE: &str = "gauntlet";

/// Every instrument, by area. Clones share the instruments.
#[derive(Clone, Debug)]
pub struct Instruments {
    /// Calls served and made.
    pub(crate) calls: Calls,
    /// Locks.
    pub lock: Lock,
    /// Provisioning.
    pub provision: Provision,
    /// Pools.
    pub pool: Pool,
    /// Operations on instances.
    pub instance: Instance,
    /// Ports that are served.
    pub server: Server,
    /// The janitor.
    pub janitor: Janitor,
    /// The reconciler.
    pub reconcile: Reconcile,
}

impl Instruments {
    /// Instruments on `provider`.
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
                waiters: up_down(&meter, &names::LOCK_WAITERS),
                lost: counter(&meter, &names::LOCK_LOST),
            },
            provision: Provision {
                duration: histogram(&meter, &names::PROVISION_DURATION),
                active: up_down(&meter, &names::PROVISION_ACTIVE),
            },
            pool: Pool { claims: counter(&meter, &names::POOL_CLAIMS) },
            instance: Instance { operations: counter(&meter, &names::INSTANCE_OPERATIONS) },
            server: Server { refused: counter(&meter, &names::SERVER_REFUSED) },
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

fn counter(meter: &Meter, row: &'static Metric) -> Counter<u64> {
    meter.u64_counter(row.name).with_unit(row.unit).with_description(row.description).build()
}

fn up_down(meter: &Meter, row: &'static Metric) -> UpDownCounter<i64> {
    meter.i64_up_down_counter(row.name).with_unit(row.unit).with_description(row.description).build()
}

fn histogram(meter: &Meter, row: &'static Metric) -> Histogram<f64> {
    meter
        .f64_histogram(row.name)
        .with_unit(row.unit)
        .with_description(row.description)
        .with_boundaries(row.buckets.to_vec())
        .build()
}

/// Calls served and made; recorded by the layers and by [`crate::db::Database`].
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) rpc_server: Histogram<f64>,
    pub(crate) rpc_client: Histogram<f64>,
    pub(crate) http_server: Histogram<f64>,
    pub(crate) database: Histogram<f64>,
}

/// Takes back what it added when it is dropped, so that a cancelled task is not counted for ever.
#[derive(Debug)]
#[must_use = "the work counts as under way until this is dropped"]
pub struct UnderWay {
    counter: UpDownCounter<i64>,
    attributes: Vec<KeyValue>,
}

impl UnderWay {
    fn begin(counter: &UpDownCounter<i64>, attributes: impl Into<Vec<KeyValue>>) -> Self {
        let attributes = attributes.into();
        counter.add(1, &attributes);
        Self { counter: counter.clone(), attributes }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.counter.add(-1, &self.attributes);
    }
}

/// Locks: `kind` is what is locked (`challenge`, `rollout`, `instance`).
#[derive(Clone, Debug)]
pub struct Lock {
    attempts: Counter<u64>,
    wait: Histogram<f64>,
    hold: Histogram<f64>,
    waiters: UpDownCounter<i64>,
    lost: Counter<u64>,
}

impl Lock {
    /// Somebody waits for a lock until the answer is dropped.
    pub fn waiting(&self, kind: &'static str) -> UnderWay {
        UnderWay::begin(&self.waiters, [lock(kind)])
    }

    /// A wait ended after `wait`: counts the attempt too. `outcome` is `acquired`, or why it was given up.
    pub fn waited(&self, kind: &'static str, outcome: &'static str, wait: Duration) {
        let attributes = [lock(kind), KeyValue::new("outcome", outcome)];
        self.attempts.add(1, &attributes);
        self.wait.record(wait.as_secs_f64(), &attributes);
    }

    /// A lock was released after it was held for `held`.
    pub fn held(&self, kind: &'static str, held: Duration) {
        self.hold.record(held.as_secs_f64(), &[lock(kind)]);
    }

    /// A lock was lost while it was held.
    pub fn lost(&self, kind: &'static str) {
        self.lost.add(1, &[lock(kind)]);
    }
}

fn lock(kind: &'static str) -> KeyValue {
    KeyValue::new("lock.kind", kind)
}

/// Provisioning: `step` is `prepare`, `up`, `update`, `down` or a finer one.
#[derive(Clone, Debug)]
pub struct Provision {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
}

impl Provision {
    /// A step is under way until the answer is dropped.
    pub fn begin(&self, provisioner: &'static str, step: &'static str) -> UnderWay {
        UnderWay::begin(&self.active, [KeyValue::new("provisioner", provisioner), KeyValue::new("step", step)])
    }

    /// A step ended after `took`. `outcome` is `ok` or the error's code.
    pub fn finished(&self, provisioner: &'static str, step: &'static str, outcome: &'static str, took: Duration) {
        self.duration.record(
            took.as_secs_f64(),
            &[
                KeyValue::new("provisioner", provisioner),
                KeyValue::new("step", step),
                KeyValue::new("outcome", outcome),
            ],
        );
    }
}

/// Pools.
#[derive(Clone, Debug)]
pub struct Pool {
    claims: Counter<u64>,
}

impl Pool {
    /// An instance was asked for from the pool of `challenge`, and one was ready (`hit`) or not.
    pub fn claimed(&self, challenge: &str, hit: bool) {
        let result = if hit { "hit" } else { "miss" };
        self.claims.add(1, &[KeyValue::new("challenge", challenge.to_owned()), KeyValue::new("result", result)]);
    }
}

/// Operations on instances.
#[derive(Clone, Debug)]
pub struct Instance {
    operations: Counter<u64>,
}

impl Instance {
    /// An `operation` (`create`, `renew`, `update`, `delete`) ended. `outcome` is `ok` or the error's code.
    pub fn operation(&self, challenge: &str, operation: &'static str, outcome: &'static str) {
        self.operations.add(
            1,
            &[
                KeyValue::new("challenge", challenge.to_owned()),
                KeyValue::new("operation", operation),
                KeyValue::new("outcome", outcome),
            ],
        );
    }
}

/// Ports that are served.
#[derive(Clone, Debug)]
pub struct Server {
    refused: Counter<u64>,
}

impl Server {
    /// A client of port `server` was refused, or its connection closed, for `reason`.
    pub fn refused(&self, server: &'static str, reason: &'static str) {
        self.refused.add(1, &[KeyValue::new("server", server), KeyValue::new("reason", reason)]);
    }
}

/// The janitor.
#[derive(Clone, Debug)]
pub struct Janitor {
    lag: Histogram<f64>,
    expired: Counter<u64>,
}

impl Janitor {
    /// An expired instance was dealt with, `lag` after its end. `outcome` is `ok` or the error's code.
    pub fn expired(&self, outcome: &'static str, lag: Duration) {
        let attributes = [KeyValue::new("outcome", outcome)];
        self.expired.add(1, &attributes);
        self.lag.record(lag.as_secs_f64(), &attributes);
    }
}

/// The reconciler.
#[derive(Clone, Debug)]
pub struct Reconcile {
    recovered: Counter<u64>,
}

impl Reconcile {
    /// An instance left in `phase` was brought to an end by `action` (`adopted`, `taken_down`).
    pub fn recovered(&self, phase: &'static str, action: &'static str) {
        self.recovered.add(1, &[KeyValue::new("phase", phase), KeyValue::new("action", action)]);
    }
}
