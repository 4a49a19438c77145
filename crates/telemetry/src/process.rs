//! Metrics of the process, its runtime and its exporters, read at collection.

use std::slice::from_ref;
use std::sync::Arc;
use std::time::Instant;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;
use tokio::runtime::Handle;

use crate::config::Signal;
use crate::export::{ExportState, Health};
use crate::instruments::instrument;
use crate::names::{self, Metric};

/// Registers `process.*`.
pub(crate) fn observe_process(meter: &Meter, started: Instant) {
    instrument!(meter, f64_observable_counter, names::PROCESS_CPU_TIME)
        .with_callback(|observer| {
            if let Some((user, system)) = cpu_time() {
                observer.observe(user, &[KeyValue::new("cpu.mode", "user")]);
                observer.observe(system, &[KeyValue::new("cpu.mode", "system")]);
            }
        })
        .build();
    instrument!(meter, f64_observable_gauge, names::PROCESS_UPTIME)
        .with_callback(move |observer| observer.observe(started.elapsed().as_secs_f64(), &[]))
        .build();
    observe_level(meter, &names::PROCESS_MEMORY_USAGE, &[], || Some(status_field("VmRSS:")? * 1024));
    observe_level(meter, &names::PROCESS_THREAD_COUNT, &[], || status_field("Threads:"));
    observe_level(meter, &names::PROCESS_FILE_DESCRIPTORS, &[], || {
        i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()
    });
}

/// Registers `tokio.*` for the runtime of `handle`.
pub(crate) fn observe_runtime(meter: &Meter, handle: &Handle) {
    let metrics = handle.metrics();
    let number = |value: usize| i64::try_from(value).ok();
    let (workers, tasks, queue) = (metrics.clone(), metrics.clone(), metrics);
    observe_level(meter, &names::TOKIO_WORKERS, &[], move || number(workers.num_workers()));
    observe_level(meter, &names::TOKIO_TASKS_ALIVE, &[], move || number(tasks.num_alive_tasks()));
    observe_level(meter, &names::TOKIO_QUEUE_DEPTH, &[], move || number(queue.global_queue_depth()));
}

/// Registers an up-down counter that has no value when `read` returns `None`.
fn observe_level(
    meter: &Meter,
    row: &'static Metric,
    attributes: &[KeyValue],
    read: impl Fn() -> Option<i64> + Send + Sync + 'static,
) {
    let attributes = attributes.to_vec();
    instrument!(meter, i64_observable_up_down_counter, row)
        .with_callback(move |observer| {
            if let Some(value) = read() {
                observer.observe(value, &attributes);
            }
        })
        .build();
}

/// Registers `otel.sdk.*` for `exporters`.
pub(crate) fn observe_exporters(meter: &Meter, exporters: &[Arc<Health>]) {
    let of = |signal: Signal| -> Arc<[Arc<Health>]> {
        exporters.iter().filter(|health| health.signal == signal).cloned().collect()
    };
    let (spans, logs) = (of(Signal::Traces), of(Signal::Logs));
    observe_queue(
        meter,
        &spans,
        "batching_span_processor",
        [&names::SDK_SPAN_PROCESSED, &names::SDK_SPAN_QUEUE_SIZE, &names::SDK_SPAN_QUEUE_CAPACITY],
    );
    observe_queue(
        meter,
        &logs,
        "batching_log_processor",
        [&names::SDK_LOG_PROCESSED, &names::SDK_LOG_QUEUE_SIZE, &names::SDK_LOG_QUEUE_CAPACITY],
    );
    observe_exported(meter, spans, &names::SDK_SPAN_EXPORTED);
    observe_exported(meter, logs, &names::SDK_LOG_EXPORTED);
    observe_exported(meter, of(Signal::Metrics), &names::SDK_METRIC_EXPORTED);
}

/// One of the counts of an exporter.
type Count = fn(&ExportState) -> u64;

/// The sum of a count over several exporters.
fn total(exporters: &[Arc<Health>], count: Count) -> u64 {
    exporters.iter().map(|health| count(&health.state())).sum()
}

fn observe_queue(
    meter: &Meter,
    exporters: &Arc<[Arc<Health>]>,
    processor: &'static str,
    [processed, size, capacity]: [&'static Metric; 3],
) {
    let component = KeyValue::new("otel.component.type", processor);
    let (all, attribute) = (Arc::clone(exporters), component.clone());
    instrument!(meter, u64_observable_counter, processed)
        .with_callback(move |observer| {
            observer.observe(total(&all, |state| state.processed), from_ref(&attribute));
            let full = [attribute.clone(), KeyValue::new("error.type", "queue_full")];
            observer.observe(total(&all, |state| state.dropped), &full);
        })
        .build();
    let counts: [(_, Count); 2] = [(size, |state| state.queued), (capacity, |state| state.capacity)];
    for (row, count) in counts {
        let all = Arc::clone(exporters);
        observe_level(meter, row, from_ref(&component), move || {
            Some(i64::try_from(total(&all, count)).unwrap_or(i64::MAX))
        });
    }
}

fn observe_exported(meter: &Meter, exporters: Arc<[Arc<Health>]>, row: &'static Metric) {
    instrument!(meter, u64_observable_counter, row)
        .with_callback(move |observer| {
            for health in exporters.iter() {
                let state = health.state();
                let component = KeyValue::new("otel.component.type", health.exporter);
                observer.observe(state.exported, from_ref(&component));
                observer.observe(state.failed, &[component, KeyValue::new("error.type", "export_failed")]);
            }
        })
        .build();
}

/// A number from `/proc/self/status`.
fn status_field(field: &str) -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Seconds of CPU time in user and system mode, from `/proc/self/stat`.
fn cpu_time() -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in parentheses and may contain anything. utime and stime are the 14th and 15th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut seconds = || Some(fields.next()?.parse::<f64>().ok()? / ticks);
    Some((seconds()?, seconds()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    #[test]
    fn process_metrics_are_read_from_proc() {
        assert!(super::status_field("VmRSS:").unwrap() > 0);
        assert!(super::status_field("Threads:").unwrap() > 0);
        assert!(super::cpu_time().unwrap().0 >= 0.0);
    }
}
