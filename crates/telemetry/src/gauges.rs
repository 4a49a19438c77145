//! Gauges that are read at the moment they are collected, from wherever the truth is.
//!
//! The SDK collects synchronously on a thread of its own, the truth is behind an asynchronous call. A source is such a call;
//! a collection runs it on telemetry's own runtime and waits for it, for at most [`DEADLINE`]. If it fails
//! the gauge reports nothing, never an old value. One read serves all gauges of the source in one collection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Meter};
use tokio::runtime::Handle;

use crate::names::{self, Metric};

/// How long a read may take.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// How long a set of attributes that is gone is reported as 0: as long as Prometheus keeps a value that nobody
/// reports, so that no backend shows the old one.
const ZERO_FOR: Duration = Duration::from_secs(300);
/// How long one read may serve the gauges of a collection that have not been served by it.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// The error of a read.
pub type ReadError = Box<dyn std::error::Error + Send + Sync>;

/// One value of one gauge.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The gauge.
    pub metric: &'static Metric,
    /// Its value.
    pub value: u64,
    /// The attributes, in order.
    pub attributes: Vec<(&'static str, String)>,
}

impl Sample {
    /// A value of `metric` without attributes.
    pub fn new(metric: &'static Metric, value: u64) -> Self {
        Self { metric, value, attributes: Vec::new() }
    }

    /// The same with an attribute, which must be one that the metric's row names.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        debug_assert!(self.metric.attributes.contains(&key), "{} has no attribute {key}", self.metric.name);
        self.attributes.push((key, value.into()));
        self
    }
}

type Read = dyn Fn() -> BoxFuture<'static, Result<Vec<Sample>, ReadError>> + Send + Sync;

/// The gauges that are read when collected. Clones share the sources.
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
    served: Vec<&'static str>,
    seen: Seen,
}

/// Which attributes were seen when with a value, so that those that are gone can be reported as 0.
#[derive(Default)]
struct Seen(HashMap<Series, Instant>);

/// The name of a gauge and the attributes of one of its values.
type Series = (&'static str, Vec<(&'static str, String)>);

impl Seen {
    /// Adds a 0 for everything that was there a while ago and is not in `samples`.
    fn complete(&mut self, now: Instant, mut samples: Vec<Sample>) -> Vec<Sample> {
        for sample in &samples {
            if sample.value > 0 {
                self.0.insert((sample.metric.name, sample.attributes.clone()), now);
            }
        }
        self.0.retain(|_, seen| now.duration_since(*seen) < ZERO_FOR);
        for (metric, attributes) in self.0.keys() {
            let there = samples.iter().any(|sample| sample.metric.name == *metric && sample.attributes == *attributes);
            let row = names::METRICS.iter().find(|row| row.name == *metric);
            if let (false, Some(row)) = (there, row) {
                samples.push(Sample { metric: row, value: 0, attributes: attributes.clone() });
            }
        }
        samples
    }
}

impl Gauges {
    pub(crate) fn new(runtime: Handle, meter: Meter) -> Self {
        let row = &names::GAUGE_FAILURES;
        let failures = meter.u64_counter(row.name).with_unit(row.unit).with_description(row.description).build();
        Self { shared: Arc::new(Shared { runtime, meter, failures, sources: Mutex::default() }) }
    }

    /// Has `metrics` read by `read` whenever they are collected.
    ///
    /// `read` runs on telemetry's own runtime, where nothing it does is traced; it must not block its thread and is
    /// dropped after [`DEADLINE`]. It answers all values of all of `metrics` at once, so that they agree. When it fails,
    /// none of them is reported and `gauntlet.gauge.failures` counts it.
    pub fn register<F, Fut>(&self, metrics: &[&'static Metric], read: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<Sample>, ReadError>> + Send + 'static,
    {
        let source = Arc::new(Source { read: Box::new(move || Box::pin(read())), state: Mutex::new(State::default()) });
        for metric in metrics {
            let (shared, source) = (Arc::clone(&self.shared), Arc::clone(&source));
            let metric: &'static Metric = metric;
            self.shared
                .meter
                .u64_observable_gauge(metric.name)
                .with_unit(metric.unit)
                .with_description(metric.description)
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

    /// Reads every source now, for the debug page. Sources that fail add nothing.
    pub async fn read(&self) -> Vec<Sample> {
        let sources = self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let reads = sources.iter().map(|source| self.shared.runtime.spawn(self.shared.begin(source)));
        let read = futures::future::join_all(reads).await;
        read.into_iter().flatten().flatten().flatten().collect()
    }
}

impl Shared {
    /// A bounded read of `source`, which counts its failure.
    fn begin(&self, source: &Arc<Source>) -> impl Future<Output = Option<Vec<Sample>>> + Send + 'static {
        let source = Arc::clone(source);
        let failures = self.failures.clone();
        async move {
            // Called in here, so that a panic ends this task and not the SDK's collection.
            let error = match tokio::time::timeout(DEADLINE, async { (source.read)().await }).await {
                Ok(Ok(samples)) => return Some(samples),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a gauge could not be read");
                    "failed"
                }
                Err(_) => "timeout",
            };
            failures.add(1, &[KeyValue::new("error.type", error)]);
            None
        }
    }

    /// The values of `metric`, read now unless this collection has read its source already.
    fn collect(&self, source: &Arc<Source>, metric: &'static Metric) -> Vec<Sample> {
        let now = Instant::now();
        let mut state = source.state.lock().unwrap_or_else(PoisonError::into_inner);
        let shared =
            state.read_at.is_some_and(|at| now.duration_since(at) < SHARED_FOR) && !state.served.contains(&metric.name);
        if !shared {
            drop(state);
            // Not block_on: this may be asked on any thread, and a panic here would end all collection.
            let (sender, receiver) = mpsc::sync_channel(1);
            let read = self.begin(source);
            self.runtime.spawn(async move {
                let _ = sender.send(read.await);
            });
            let samples = receiver.recv_timeout(DEADLINE + Duration::from_millis(500)).unwrap_or_else(|_| {
                self.failures.add(1, &[KeyValue::new("error.type", "panicked")]);
                None
            });
            state = source.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.samples = match samples {
                Some(samples) => state.seen.complete(now, samples),
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
    fn what_is_gone_is_zero_for_a_while() {
        let start = Instant::now();
        let ready = |value| Sample::new(&names::INSTANCES, value).with("state", "ready");
        let mut seen = Seen::default();
        assert_eq!(seen.complete(start, vec![ready(2)]), vec![ready(2)]);
        assert_eq!(seen.complete(start + Duration::from_secs(1), vec![]), vec![ready(0)]);
        assert_eq!(seen.complete(start + Duration::from_secs(2), vec![ready(0)]), vec![ready(0)]);
        assert_eq!(seen.complete(start + ZERO_FOR, vec![]), vec![]);
    }
}
