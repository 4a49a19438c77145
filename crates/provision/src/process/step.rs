//! The spans of an operation's steps.

use gauntlet_domain::Result;
use tracing::{Instrument as _, Span};

/// A span for one step, below the span of the operation.
macro_rules! step_span {
    ($name:literal, $instance:expr $(, $field:literal = $value:expr)?) => {
        tracing::info_span!(
            $name,
            otel.kind = "internal",
            provisioner = "process",
            instance.identity = $instance.identity(),
            instance.end = tracing::field::Empty,
            instance.exceeded = tracing::field::Empty,
            otel.status_code = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
            $($field = $value,)?
        )
    };
}

pub(super) use step_span;

/// Runs a step in its span, and records its error there.
pub(super) async fn run_step<T>(span: Span, work: impl Future<Output = Result<T>>) -> Result<T> {
    let result = work.instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", error.code());
    }
    result
}
