//! Gauges whose values are read at collection, usually from the store.
//!
//! The SDK collects synchronously, on a thread of its own, but reads are asynchronous. A source is such a read: a collection runs it on
//! telemetry's runtime and waits for it, at most [`READ_TIMEOUT`]. When the read fails, the gauge has no value; it never has an old one. Gauges of
//! the same source share one read per collection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Meter};
use tokio::runtime::Handle;

use crate::instruments::{counter, instrument};
use crate::names::{self, Metric};

/// The deadline of a read.
pub const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// How much longer a collection waits for a read whose deadline has passed.
const READ_GRACE: Duration = Duration::from_millis(500);
/// How long a vanished set of attributes is reported as 0. Prometheus keeps showing an unreported value for as long.
const ZERO_FOR: Duration = Duration::from_secs(300);
/// How long gauges of one source may share a read.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// The error of a read.
pub type ReadError = Box<dyn std::error::Error + Send + Sync>;

/// One value of a gauge.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The gauge.
    pub metric: &'static Metric,
    /// The value.
    pub value: u64,
    /// The attributes, in the order in which they were added.
    pub attributes: Vec<(&'static str, String)>,
}

impl Sample {
    /// A value of `metric` without attributes.
    pub fn new(metric: &'static Metric, value: u64) -> Self {
        Self { metric, value, attributes: Vec::new() }
    }

    /// Adds an attribute, which must be one of the metric's row.
    #[must_use]
    pub fn with_attribute(mut self, key: &'static str, value: impl Into<String>) -> Self {
        debug_assert!(self.metric.attributes.contains(&key), "{} has no attribute {key}", self.metric.name);
        self.attributes.push((key, value.into()));
        self
    }
}

type Read = dyn Fn() -> BoxFuture<'static, Result<Vec<Sample>, ReadError>> + Send + Sync;

/// Gauges that are read at collection. Clones share the sources.
#[derive(Clone)]
pub struct Gauges {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Gauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gauges").finish_non_exhaustive()
    }
}

struct Shared {
    runtime: Handle,
    meter: Meter,
    failures: Counter<u64>,
    sources: Mutex<Vec<Arc<Source>>>,
}

struct Source {
    read: Box<Read>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    read_at: Option<Instant>,
    samples: Vec<Sample>,
    /// The gauges that have already reported the last read.
    served: Vec<&'static str>,
    seen: Seen,
}

/// When each gauge last had a value above 0, by attributes, so that those that vanish can be reported as 0.
#[derive(Default)]
struct Seen(HashMap<Series, (&'static Metric, Instant)>);

/// The name of a gauge and the attributes of one of its values.
type Series = (&'static str, Vec<(&'static str, String)>);

impl Seen {
    /// Adds a 0 for every recently seen series that `samples` lacks.
    fn add_zeros(&mut self, now: Instant, mut samples: Vec<Sample>) -> Vec<Sample> {
        for sample in samples.iter().filter(|sample| sample.value > 0) {
            self.0.insert((sample.metric.name, sample.attributes.clone()), (sample.metric, now));
        }
        self.0.retain(|_, (_, seen)| now.duration_since(*seen) < ZERO_FOR);
        for ((_, attributes), (metric, _)) in &self.0 {
            let is_present =
                samples.iter().any(|sample| sample.metric.name == metric.name && sample.attributes == *attributes);
            if !is_present {
                samples.push(Sample { metric, value: 0, attributes: attributes.clone() });
            }
        }
        samples
    }
}

impl Gauges {
    pub(crate) fn new(runtime: Handle, meter: Meter) -> Self {
        let failures = counter(&meter, &names::GAUGE_FAILURES);
        Self { shared: Arc::new(Shared { runtime, meter, failures, sources: Mutex::default() }) }
    }

    /// Reads the values of `metrics` with `read` at each collection.
    ///
    /// `read` returns the values of all `metrics` at once, so that they are consistent. If it fails, none of them has a value and
    /// `gauntlet.gauge.failures` counts it. It runs on telemetry's runtime, where nothing is traced. It must not block its thread, and is
    /// dropped after [`READ_TIMEOUT`].
    pub fn register<F, Fut>(&self, metrics: &[&'static Metric], read: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<Sample>, ReadError>> + Send + 'static,
    {
        let source = Arc::new(Source { read: Box::new(move || Box::pin(read())), state: Mutex::new(State::default()) });
        for &metric in metrics {
            let (shared, source) = (Arc::clone(&self.shared), Arc::clone(&source));
            instrument!(self.shared.meter, u64_observable_gauge, metric)
                .with_callback(move |observer| {
                    for sample in shared.collect(&source, metric) {
                        let attributes: Vec<_> =
                            sample.attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
                        observer.observe(sample.value, &attributes);
                    }
                })
                .build();
        }
        self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    /// Reads every source now, for the debug page. A source that fails adds nothing.
    pub async fn read(&self) -> Vec<Sample> {
        let sources = self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let reads = sources.iter().map(|source| self.shared.runtime.spawn(self.shared.read(source)));
        let results = futures::future::join_all(reads).await;
        results.into_iter().flatten().flatten().flatten().collect()
    }
}

impl Shared {
    /// Reads `source` within [`READ_TIMEOUT`]. Returns `None` if it fails, and counts the failure.
    fn read(&self, source: &Arc<Source>) -> impl Future<Output = Option<Vec<Sample>>> + Send + 'static {
        let source = Arc::clone(source);
        let failures = self.failures.clone();
        async move {
            // `read` is called inside the task, so that a panic ends the task and not the SDK's collection.
            let error_type = match tokio::time::timeout(READ_TIMEOUT, async { (source.read)().await }).await {
                Ok(Ok(samples)) => return Some(samples),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "cannot read a gauge");
                    "failed"
                }
                Err(_) => "timeout",
            };
            failures.add(1, &[KeyValue::new("error.type", error_type)]);
            None
        }
    }

    /// The values of `metric`. Reads its source, unless another gauge of the same collection has just done so.
    fn collect(&self, source: &Arc<Source>, metric: &'static Metric) -> Vec<Sample> {
        let now = Instant::now();
        let mut state = source.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_fresh = state.read_at.is_some_and(|at| now.duration_since(at) < SHARED_FOR);
        if !is_fresh || state.served.contains(&metric.name) {
            drop(state);
            // Not `block_on`: the collection may run on a thread of a runtime, and a panic here would end all collections.
            let (sender, receiver) = mpsc::sync_channel(1);
            let read = self.read(source);
            self.runtime.spawn(async move {
                let _ = sender.send(read.await);
            });
            let samples = receiver.recv_timeout(READ_TIMEOUT + READ_GRACE).unwrap_or_else(|_| {
                self.failures.add(1, &[KeyValue::new("error.type", "panicked")]);
                None
            });
            state = source.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.samples = match samples {
                Some(samples) => state.seen.add_zeros(now, samples),
                None => Vec::new(),
            };
            state.read_at = Some(Instant::now());
            state.served.clear();
        }
        state.served.push(metric.name);
        state.samples.iter().filter(|sample| sample.metric == metric).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vanished_series_is_zero_for_a_while() {
        let start = Instant::now();
        let ready = |value| Sample::new(&names::INSTANCES, value).with_attribute("state", "ready");
        let mut seen = Seen::default();
        assert_eq!(seen.add_zeros(start, vec![ready(2)]), vec![ready(2)]);
        assert_eq!(seen.add_zeros(start + Duration::from_secs(1), vec![]), vec![ready(0)]);
        assert_eq!(seen.add_zeros(start + Duration::from_secs(2), vec![ready(0)]), vec![ready(0)]);
        assert_eq!(seen.add_zeros(start + ZERO_FOR, vec![]), vec![]);

        let failed = |value| Sample::new(&names::INSTANCES, value).with_attribute("state", "failed");
        let mut seen = Seen::default();
        assert_eq!(seen.add_zeros(start, vec![ready(2), failed(1)]), vec![ready(2), failed(1)]);
        assert_eq!(seen.add_zeros(start, vec![ready(2)]), vec![ready(2), failed(0)], "one of two series vanished");
    }
}
