//! Processors that bound their queue.

use std::sync::Arc;

use opentelemetry::InstrumentationScope;
use opentelemetry_sdk::logs::{LogProcessor, SdkLogRecord};
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};

use super::{Health, forward};

/// A batch processor that takes no more than its queue has room for, and counts the rest as dropped.
#[derive(Debug)]
pub(crate) struct BoundedProcessor<P> {
    pub(crate) inner: P,
    pub(crate) health: Arc<Health>,
}

impl<P: SpanProcessor> SpanProcessor for BoundedProcessor<P> {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        // Unsampled spans are recorded for the debug page only.
        if span.span_context.is_sampled() && self.health.try_enqueue() {
            self.inner.on_end(span);
        }
    }

    forward!(processor);
}

impl<P: LogProcessor> LogProcessor for BoundedProcessor<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.health.try_enqueue() {
            self.inner.emit(record, scope);
        }
    }

    forward!(processor);
}
