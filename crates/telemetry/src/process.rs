//! Saturation of the process and its runtime, and the health of its exporters, read when collected.

use std::sync::Arc;
use std::time::Instant;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;
use tokio::runtime::Handle;

use crate::config::Signal;
use crate::export::Health;
use crate::names::{self, Metric};

/// Registers `process.*`.
pub(crate) fn observe_process(meter: &Meter, started: Instant) {
    let row = &names::PROCESS_CPU_TIME;
    meter
        .f64_observable_counter(row.name)
        .with_unit(row.unit)
        .with_description(row.description)
        .with_callback(|observer| {
            if let Some((user, system)) = cpu_time() {
                observer.observe(user, &[KeyValue::new("cpu.mode", "user")]);
                observer.observe(system, &[KeyValue::new("cpu.mode", "system")]);
            }
        })
        .build();
    let row = &names::PROCESS_UPTIME;
    meter
        .f64_observable_gauge(row.name)
        .with_unit(row.unit)
        .with_description(row.description)
        .with_callback(move |observer| observer.observe(started.elapsed().as_secs_f64(), &[]))
        .build();
    level(meter, &names::PROCESS_MEMORY_USAGE, || Some(status("VmRSS:")? * 1024));
    level(meter, &names::PROCESS_THREAD_COUNT, || status("Threads:"));
    level(meter, &names::PROCESS_FILE_DESCRIPTORS, || {
        i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()
    });
}

/// Registers `tokio.*` for the runtime of `handle`.
pub(crate) fn observe_runtime(meter: &Meter, handle: &Handle) {
    let metrics = handle.metrics();
    let number = |value: usize| i64::try_from(value).ok();
    let (workers, tasks, queue) = (metrics.clone(), metrics.clone(), metrics);
    level(meter, &names::TOKIO_WORKERS, move || number(workers.num_workers()));
    level(meter, &names::TOKIO_TASKS_ALIVE, move || number(tasks.num_alive_tasks()));
    level(meter, &names::TOKIO_QUEUE_DEPTH, move || number(queue.global_queue_depth()));
}

fn level(meter: &Meter, row: &'static Metric, read: impl Fn() -> Option<i64> + Send + Sync + 'static) {
    meter
        .i64_observable_up_down_counter(row.name)
        .with_unit(row.unit)
        .with_description(row.description)
        .with_callback(move |observer| {
            if let Some(value) = read() {
                observer.observe(value, &[]);
            }
        })
        .build();
}

/// Registers `otel.sdk.*` for `exporters`.
pub(crate) fn observe_exporters(meter: &Meter, exporters: &[Arc<Health>]) {
    let of = |signal: Signal| -> Arc<[Arc<Health>]> {
        exporters.iter().filter(|health| health.signal == signal).cloned().collect()
    };
    queue(
        meter,
        of(Signal::Traces),
        "batching_span_processor",
        [&names::SDK_SPAN_PROCESSED, &names::SDK_SPAN_QUEUE_SIZE, &names::SDK_SPAN_QUEUE_CAPACITY],
    );
    queue(
        meter,
        of(Signal::Logs),
        "batching_log_processor",
        [&names::SDK_LOG_PROCESSED, &names::SDK_LOG_QUEUE_SIZE, &names::SDK_LOG_QUEUE_CAPACITY],
    );
    exported(meter, of(Signal::Traces), &names::SDK_SPAN_EXPORTED);
    exported(meter, of(Signal::Logs), &names::SDK_LOG_EXPORTED);
    exported(meter, of(Signal::Metrics), &names::SDK_METRIC_EXPORTED);
}

fn queue(
    meter: &Meter,
    exporters: Arc<[Arc<Health>]>,
    processor: &'static str,
    [processed, size, capacity]: [&'static Metric; 3],
) {
    let kind = KeyValue::new("otel.component.type", processor);
    let (all, attribute) = (Arc::clone(&exporters), kind.clone());
    meter
        .u64_observable_counter(processed.name)
        .with_unit(processed.unit)
        .with_description(processed.description)
        .with_callback(move |observer| {
            let states = || all.iter().map(|health| health.state());
            observer.observe(states().map(|state| state.processed).sum(), std::slice::from_ref(&attribute));
            let full = [attribute.clone(), KeyValue::new("error.type", "queue_full")];
            observer.observe(states().map(|state| state.dropped).sum(), &full);
        })
        .build();
    for (row, read) in
        [(size, (|state| state.queued) as fn(&crate::export::ExportState) -> u64), (capacity, |state| state.capacity)]
    {
        let (all, attribute) = (Arc::clone(&exporters), kind.clone());
        meter
            .i64_observable_up_down_counter(row.name)
            .with_unit(row.unit)
            .with_description(row.description)
            .with_callback(move |observer| {
                let sum: u64 = all.iter().map(|health| read(&health.state())).sum();
                observer.observe(i64::try_from(sum).unwrap_or(i64::MAX), std::slice::from_ref(&attribute));
            })
            .build();
    }
}

fn exported(meter: &Meter, exporters: Arc<[Arc<Health>]>, row: &'static Metric) {
    meter
        .u64_observable_counter(row.name)
        .with_unit(row.unit)
        .with_description(row.description)
        .with_callback(move |observer| {
            for health in exporters.iter() {
                let state = health.state();
                let kind = KeyValue::new("otel.component.type", health.exporter);
                observer.observe(state.exported, std::slice::from_ref(&kind));
                observer.observe(state.failed, &[kind, KeyValue::new("error.type", "export_failed")]);
            }
        })
        .build();
}

/// A number of `/proc/self/status`.
fn status(field: &str) -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Seconds of CPU time in user and system mode, from `/proc/self/stat`.
fn cpu_time() -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name in parentheses, which may hold anything; utime and stime are the 14th and 15th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut seconds = || Some(fields.next()?.parse::<f64>().ok()? / ticks);
    Some((seconds()?, seconds()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    #[test]
    fn the_process_reads_itself() {
        assert!(super::status("VmRSS:").unwrap() > 0);
        assert!(super::status("Threads:").unwrap() > 0);
        assert!(super::cpu_time().unwrap().0 >= 0.0);
    }
}
