//! The trace context as text: for records that outlive a request, for logs and for error texts.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanContext, TraceContextExt};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_opentelemetry::OpenTelemetrySpanExt;

fn current() -> Option<SpanContext> {
    let context = tracing::Span::current().context().span().span_context().clone();
    context.is_valid().then_some(context)
}

/// The current span as a W3C `traceparent`, for a record that later work links back to with [`link_to`].
/// `None` outside a span and when tracing is off.
pub fn current_traceparent() -> Option<String> {
    current()
        .map(|context| format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8()))
}

/// Links the current span to the one that `traceparent` names. Text that is no `traceparent` is ignored: it is
/// opaque to whoever stored it.
pub fn link_to(traceparent: &str) {
    link(&tracing::Span::current(), traceparent);
}

/// Links `span` to the one that `traceparent` names, as [`link_to`] does for the current span.
pub fn link(span: &tracing::Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract_with_context(&opentelemetry::Context::new(), &carrier);
    let linked = context.span().span_context().clone();
    if linked.is_valid() {
        span.add_link(linked);
    }
}

/// The id of the current trace in hex, for texts that lead an operator to it. `None` outside a span and when
/// tracing is off.
pub fn trace_id() -> Option<String> {
    current().map(|context| context.trace_id().to_string())
}

/// Sets an attribute of the current span that is only known while it runs.
pub fn attribute(key: &'static str, value: impl Into<opentelemetry::Value>) {
    tracing::Span::current().set_attribute(key, value);
}

/// Marks the current span as failed, with a text for operators. Later marks win.
pub fn fail_span(description: impl Into<std::borrow::Cow<'static, str>>) {
    tracing::Span::current().set_status(opentelemetry::trace::Status::error(description));
}
