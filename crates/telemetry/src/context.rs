//! Trace context: in headers between processes, in records that outlive a request, and in logs and messages.

use std::collections::HashMap;

use http::HeaderMap;
use opentelemetry::global;
use opentelemetry::propagation::{TextMapCompositePropagator, TextMapPropagator};
use opentelemetry::trace::{SpanContext, TraceContextExt};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::config::Propagator;

/// The propagator of this process.
pub(crate) fn propagator(propagators: &[Propagator]) -> TextMapCompositePropagator {
    TextMapCompositePropagator::new(
        propagators
            .iter()
            .map(|propagator| -> Box<dyn TextMapPropagator + Send + Sync> {
                match propagator {
                    Propagator::TraceContext => Box::new(TraceContextPropagator::new()),
                    Propagator::Baggage => Box::new(BaggagePropagator::new()),
                }
            })
            .collect(),
    )
}

/// Makes the span in the headers of a request the parent of `span`.
pub(crate) fn set_parent_from(headers: &HeaderMap, span: &tracing::Span) {
    let parent = global::get_text_map_propagator(|propagator| {
        propagator.extract_with_context(&opentelemetry::Context::new(), &HeaderExtractor(headers))
    });
    // Fails only when tracing is disabled.
    let _ = span.set_parent(parent);
}

/// Puts the context of `span` into the headers of a request.
pub(crate) fn inject_into(headers: &mut HeaderMap, span: &tracing::Span) {
    let context = span.context();
    global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut HeaderInjector(headers)));
}

fn current() -> Option<SpanContext> {
    let context = tracing::Span::current().context().span().span_context().clone();
    context.is_valid().then_some(context)
}

/// The current span as a W3C `traceparent`, for a record to which later work links with [`link_to`]. `None` outside a span and when tracing
/// is disabled.
pub fn current_traceparent() -> Option<String> {
    current()
        .map(|context| format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8()))
}

/// Links the current span to the span in `traceparent`. Ignores text that is not a valid `traceparent`.
pub fn link_to(traceparent: &str) {
    link_span(&tracing::Span::current(), traceparent);
}

/// Links `span` to the span in `traceparent`. Ignores text that is not a valid `traceparent`.
pub fn link_span(span: &tracing::Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract_with_context(&opentelemetry::Context::new(), &carrier);
    let linked = context.span().span_context().clone();
    if linked.is_valid() {
        span.add_link(linked);
    }
}

/// The id of the current trace in hex, for messages that lead an operator to it. `None` outside a span and when tracing is disabled.
pub fn trace_id() -> Option<String> {
    current().map(|context| context.trace_id().to_string())
}

/// Sets an attribute of the current span.
pub fn set_attribute(key: &'static str, value: impl Into<opentelemetry::Value>) {
    tracing::Span::current().set_attribute(key, value);
}

/// Marks the current span as failed, with a description for operators. The last call wins.
pub fn fail_span(description: impl Into<std::borrow::Cow<'static, str>>) {
    tracing::Span::current().set_status(opentelemetry::trace::Status::error(description));
}
