//! Aggregates finished spans into operations, and keeps the slow and the failed traces.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::Histogram;
use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId};
use opentelemetry_sdk::trace::SpanData;

use super::{Group, Latency, Operation, Trace, TraceSpan};
use crate::names;

/// Rates and percentiles cover the last [`SLOTS`] slots of this length.
const SLOT: Duration = Duration::from_secs(10);
const SLOTS: usize = 6;
/// The longest duration that is distinguished.
const MAX_DURATION: Duration = Duration::from_secs(3600);
/// The most operations. Further names are counted together.
const MAX_OPERATIONS: usize = 128;
/// The most unfinished traces.
const MAX_PENDING: usize = 512;
/// The most spans of a trace.
const MAX_SPANS: usize = 200;
/// The most slow and the most failed traces.
const MAX_TRACES: usize = 12;
/// How long a slow trace is kept.
const SLOW_FOR: Duration = Duration::from_secs(600);
/// The most attributes of a span.
const MAX_ATTRIBUTES: usize = 16;
/// The most characters of a name, an attribute or an error.
const MAX_TEXT: usize = 200;

#[derive(Debug)]
pub(super) struct View {
    started: Instant,
    operations: BTreeMap<(Group, String), Stats>,
    /// Traces whose first span in this process has not finished.
    pending: HashMap<TraceId, Pending>,
    /// The pending traces, oldest first.
    arrivals: VecDeque<TraceId>,
    /// Slowest first, each with the time at which it ended.
    slow: Vec<(Instant, Trace)>,
    /// Newest first.
    failed: VecDeque<Trace>,
}

#[derive(Debug, Default)]
struct Pending {
    spans: Vec<FinishedSpan>,
    cut: bool,
}

#[derive(Debug)]
struct FinishedSpan {
    id: SpanId,
    parent: SpanId,
    name: String,
    start: SystemTime,
    duration: Duration,
    error: Option<String>,
    attributes: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Stats {
    count: u64,
    errors: u64,
    refused: u64,
    /// The durations of each recent slot, oldest first.
    slots: VecDeque<(u64, Histogram<u32>)>,
}

impl View {
    pub(super) fn new(started: Instant) -> Self {
        Self {
            started,
            operations: BTreeMap::new(),
            pending: HashMap::new(),
            arrivals: VecDeque::new(),
            slow: Vec::new(),
            failed: VecDeque::new(),
        }
    }

    /// Adds a span that finished at `now`.
    pub(super) fn add(&mut self, now: Instant, span: SpanData) {
        let duration = span.end_time.duration_since(span.start_time).unwrap_or_default();
        let failed = matches!(span.status, Status::Error { .. });
        let refused = !failed && span.attributes.iter().any(|attribute| attribute.key.as_str() == "error.type");
        self.count(now, group(&span), &span.name, duration, failed, refused);

        let trace = span.span_context.trace_id();
        let is_root = span.parent_span_id == SpanId::INVALID || span.parent_span_is_remote;
        let id = span.span_context.span_id();
        self.keep(trace, finished(span, duration));
        if is_root {
            self.complete(now, trace, id);
        }
    }

    fn count(&mut self, now: Instant, group: Group, name: &str, duration: Duration, failed: bool, refused: bool) {
        let slot = self.slot(now);
        let is_known =
            self.operations.len() < MAX_OPERATIONS || self.operations.contains_key(&(group, name.to_owned()));
        let name = if is_known { name } else { "(others)" };
        let stats = self.operations.entry((group, name.to_owned())).or_default();
        stats.count += 1;
        stats.errors += u64::from(failed);
        stats.refused += u64::from(refused);
        stats.drop_old_slots(slot);
        if stats.slots.back().is_none_or(|(last, _)| *last != slot) {
            let Ok(histogram) = Histogram::new(2) else { return };
            stats.slots.push_back((slot, histogram));
        }
        if let Some((_, histogram)) = stats.slots.back_mut() {
            // The histogram resizes itself to the longest duration, hence the bound. Recording cannot fail.
            let micros = duration.min(MAX_DURATION).as_micros().max(1);
            let _ = histogram.record(u64::try_from(micros).unwrap_or(u64::MAX));
        }
    }

    fn slot(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs() / SLOT.as_secs()
    }

    fn keep(&mut self, trace: TraceId, span: FinishedSpan) {
        if !self.pending.contains_key(&trace) {
            while self.pending.len() >= MAX_PENDING {
                let Some(oldest) = self.arrivals.pop_front() else { break };
                self.pending.remove(&oldest);
            }
            self.arrivals.push_back(trace);
        }
        let pending = self.pending.entry(trace).or_default();
        // The root finishes last, so it is always kept.
        if pending.spans.len() >= MAX_SPANS {
            pending.spans.pop();
            pending.cut = true;
        }
        pending.spans.push(span);
    }

    /// Takes the tree below the finished span `root` out of the pending spans, and keeps it if it failed or is slow.
    fn complete(&mut self, now: Instant, trace: TraceId, root: SpanId) {
        let Some(pending) = self.pending.get_mut(&trace) else { return };
        let mut tree_ids = HashSet::from([root]);
        // Children usually finish before their parents, so one pass from the back finds nearly all of them.
        loop {
            let before = tree_ids.len();
            for span in pending.spans.iter().rev() {
                if tree_ids.contains(&span.parent) {
                    tree_ids.insert(span.id);
                }
            }
            if tree_ids.len() == before {
                break;
            }
        }
        let cut = pending.cut;
        let (spans, rest): (Vec<_>, Vec<_>) = pending.spans.drain(..).partition(|span| tree_ids.contains(&span.id));
        if rest.is_empty() {
            self.pending.remove(&trace);
            // It is usually one of the newest.
            if let Some(index) = self.arrivals.iter().rposition(|arrival| *arrival == trace) {
                self.arrivals.remove(index);
            }
        } else {
            pending.spans = rest;
        }
        let is_failed = spans.iter().any(|span| span.error.is_some());
        let duration = spans.iter().find(|span| span.id == root).map_or(Duration::ZERO, |span| span.duration);
        self.slow.retain(|(ended, _)| now.saturating_duration_since(*ended) < SLOW_FOR);
        let is_slow =
            self.slow.len() < MAX_TRACES || self.slow.last().is_some_and(|(_, last)| last.duration < millis(duration));
        if !is_failed && !is_slow {
            return;
        }
        let tree = tree(trace, root, spans, cut);
        if is_failed {
            self.failed.push_front(tree.clone());
            self.failed.truncate(MAX_TRACES);
        }
        if is_slow {
            self.slow.push((now, tree));
            self.slow.sort_by(|(_, a), (_, b)| b.duration.total_cmp(&a.duration));
            self.slow.truncate(MAX_TRACES);
        }
    }

    /// Returns the operations, the slow traces and the failed traces.
    pub(super) fn read(&mut self, now: Instant) -> (Vec<Operation>, Vec<Trace>, Vec<Trace>) {
        let slot = self.slot(now);
        let window = now.saturating_duration_since(self.started).as_secs_f64().clamp(1.0, 60.0);
        let operations = self.operations.iter_mut().map(|((group, name), stats)| {
            stats.drop_old_slots(slot);
            let recent = stats.recent();
            Operation {
                group: *group,
                name: name.clone(),
                count: stats.count,
                errors: stats.errors,
                refused: stats.refused,
                rate: recent.as_ref().map_or(0.0, |recent| recent.len() as f64 / window),
                latency: recent.map(|recent| {
                    let at = |quantile| recent.value_at_quantile(quantile) as f64 / 1000.0;
                    Latency { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
                }),
            }
        });
        let operations = operations.collect();
        self.slow.retain(|(ended, _)| now.saturating_duration_since(*ended) < SLOW_FOR);
        let slow = self.slow.iter().map(|(_, trace)| trace.clone()).collect();
        (operations, slow, self.failed.iter().cloned().collect())
    }
}

impl Stats {
    fn drop_old_slots(&mut self, current: u64) {
        while self.slots.front().is_some_and(|(first, _)| first + SLOTS as u64 <= current) {
            self.slots.pop_front();
        }
    }

    fn recent(&self) -> Option<Histogram<u32>> {
        let mut slots = self.slots.iter();
        let mut all = slots.next()?.1.clone();
        for (_, slot) in slots {
            // Cannot fail: the histogram resizes itself.
            let _ = all.add(slot);
        }
        Some(all)
    }
}

fn group(span: &SpanData) -> Group {
    match span.span_kind {
        SpanKind::Server | SpanKind::Consumer => Group::Served,
        SpanKind::Client | SpanKind::Producer => Group::Called,
        SpanKind::Internal if [names::LOCK_ACQUIRE.name, names::LOCK_HOLD.name].contains(&span.name.as_ref()) => {
            Group::Locks
        }
        SpanKind::Internal => Group::Work,
    }
}

fn finished(span: SpanData, duration: Duration) -> FinishedSpan {
    let error = match span.status {
        Status::Error { description } if description.is_empty() => Some("failed".to_owned()),
        Status::Error { description } => Some(truncate(&description)),
        Status::Unset | Status::Ok => None,
    };
    FinishedSpan {
        id: span.span_context.span_id(),
        parent: span.parent_span_id,
        name: truncate(&span.name),
        start: span.start_time,
        duration,
        error,
        attributes: span
            .attributes
            .iter()
            .take(MAX_ATTRIBUTES)
            .map(|attribute| (attribute.key.to_string(), truncate(&attribute.value.as_str())))
            .collect(),
    }
}

fn truncate(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

fn tree(trace: TraceId, root: SpanId, spans: Vec<FinishedSpan>, cut: bool) -> Trace {
    let mut children: HashMap<SpanId, Vec<FinishedSpan>> = HashMap::new();
    let mut top = None;
    for span in spans {
        if span.id == root {
            top = Some(span);
        } else {
            children.entry(span.parent).or_default().push(span);
        }
    }
    for siblings in children.values_mut() {
        // The stack below is taken from the back.
        siblings.sort_by_key(|span| Reverse(span.start));
    }
    let start = top.as_ref().map_or(SystemTime::UNIX_EPOCH, |top| top.start);
    let name = top.as_ref().map(|top| top.name.clone()).unwrap_or_default();
    let duration = top.as_ref().map_or(0.0, |top| millis(top.duration));
    let mut stack: Vec<(usize, FinishedSpan)> = top.into_iter().map(|top| (0, top)).collect();
    let mut rows = Vec::new();
    while let Some((depth, span)) = stack.pop() {
        let below = children.remove(&span.id).unwrap_or_default();
        stack.extend(below.into_iter().map(|child| (depth + 1, child)));
        rows.push(TraceSpan {
            span_id: span.id.to_string(),
            depth,
            name: span.name,
            offset: millis(span.start.duration_since(start).unwrap_or_default()),
            duration: millis(span.duration),
            error: span.error,
            attributes: span.attributes,
        });
    }
    let started = start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    Trace {
        trace_id: trace.to_string(),
        name,
        started: u64::try_from(started).unwrap_or(u64::MAX),
        duration,
        cut,
        spans: rows,
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use opentelemetry::trace::{SpanContext, TraceFlags, TraceState};
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    use super::*;

    fn span(trace: u128, id: u64, parent: u64, name: &str, millis: u64) -> SpanData {
        let (trace, id) = (TraceId::from(trace), SpanId::from(id));
        SpanData {
            span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::default()),
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.to_owned().into(),
            start_time: SystemTime::UNIX_EPOCH,
            end_time: SystemTime::UNIX_EPOCH + Duration::from_millis(millis),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: opentelemetry::InstrumentationScope::default(),
        }
    }

    fn failed(mut span: SpanData, why: &'static str) -> SpanData {
        span.status = Status::error(why);
        span
    }

    #[test]
    fn rates_and_percentiles_cover_the_last_minute() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut view = View::new(start);
        for second in 0..60 {
            view.add(at(second), span(u128::from(second) + 1, 1, 0, "work", second + 1));
        }
        let (operations, ..) = view.read(at(59));
        assert_eq!(operations[0].count, 60);
        assert!((operations[0].rate - 60.0 / 59.0).abs() < 0.01);
        let latency = operations[0].latency.unwrap();
        assert!((29.0..=31.0).contains(&latency.p50) && (59.0..=61.0).contains(&latency.p99), "{latency:?}");
        // Half of the spans are outside the window now.
        let (operations, ..) = view.read(at(90));
        assert!((operations[0].rate - 0.5).abs() < 0.2, "{}", operations[0].rate);
        let (operations, ..) = view.read(at(200));
        assert_eq!((operations[0].count, operations[0].rate, operations[0].latency), (60, 0.0, None));
    }

    #[test]
    fn call_served_within_a_longer_trace_is_a_tree_of_its_own() {
        let now = Instant::now();
        let mut view = View::new(now);
        let mut served = span(1, 2, 1, "served", 9);
        served.parent_span_is_remote = true;
        view.add(now, span(1, 5, 9, "elsewhere", 1));
        view.add(now, failed(span(1, 3, 2, "inner", 5), "broken"));
        view.add(now, served);
        view.add(now, span(1, 1, 0, "sweep", 20));
        let (_, slow, failed) = view.read(now);
        let names = |trace: &Trace| trace.spans.iter().map(|span| span.name.clone()).collect::<Vec<_>>();
        assert_eq!(failed.iter().map(names).collect::<Vec<_>>(), [vec!["served", "inner"]]);
        assert_eq!(slow.iter().map(names).collect::<Vec<_>>(), [vec!["sweep"], vec!["served", "inner"]]);
    }

    #[test]
    fn memory_is_bounded() {
        let now = Instant::now();
        let mut view = View::new(now);
        for n in 0..3000 {
            // The roots of these traces never finish.
            view.add(now, span(u128::from(n) + 1, 2, 1, &format!("name {n}"), 1));
            view.add(now, span(7_000_000, n + 2, 1, "child", 1));
        }
        assert!(view.pending.len() <= MAX_PENDING && view.arrivals.len() <= MAX_PENDING);
        let mut root = span(7_000_000, 1, 0, "root", 1);
        root.status = Status::error("x".repeat(5000));
        view.add(now, root);
        let (operations, slow, broken) = view.read(now);
        // Each group may have a row for the other names.
        assert!(operations.len() <= MAX_OPERATIONS + 4);
        assert!(slow.len() <= MAX_TRACES && broken.len() <= MAX_TRACES);
        assert!(broken[0].spans.len() <= MAX_SPANS);
        assert!(broken[0].spans.iter().all(|span| span.error.as_ref().is_none_or(|error| error.len() <= MAX_TEXT)));
        for n in 0..100_u64 {
            view.add(now, failed(span(8_000_000 + u128::from(n), 1, 0, "root", n), "again"));
        }
        let (_, slow, broken) = view.read(now);
        assert_eq!((slow.len(), broken.len()), (MAX_TRACES, MAX_TRACES));
        assert_eq!(slow[0].duration, 99.0);
        assert!(view.read(now + SLOW_FOR).1.is_empty());
    }

    #[test]
    fn spans_that_finish_after_their_root_are_dropped_eventually() {
        let now = Instant::now();
        let mut view = View::new(now);
        for n in 1..=2000 {
            view.add(now, span(n, 1, 0, "root", 1));
            view.add(now, span(n, 2, 1, "late", 1));
        }
        assert!(view.pending.len() <= MAX_PENDING);
        assert_eq!(view.read(now).0.iter().map(|operation| operation.count).sum::<u64>(), 4000);
    }
}
