//! One observed call: its span and its duration.

use std::borrow::Cow;
use std::time::Instant;

use opentelemetry::metrics::Histogram;
use opentelemetry::trace::Status;
use opentelemetry::{KeyValue, Value};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A call in progress. Attributes that are known only at its end are set on the span and on the measurement.
#[derive(Debug)]
pub(crate) struct Call {
    span: tracing::Span,
    duration: Histogram<f64>,
    attributes: Vec<KeyValue>,
    started: Instant,
}

impl Call {
    /// Starts the clock. `attributes` are those of the measurement; the span has its own already.
    pub(crate) fn start(span: tracing::Span, duration: &Histogram<f64>, attributes: Vec<KeyValue>) -> Self {
        Self { span, duration: duration.clone(), attributes, started: Instant::now() }
    }

    pub(crate) fn span(&self) -> &tracing::Span {
        &self.span
    }

    /// Sets an attribute of the span and of the measurement.
    pub(crate) fn set_attribute(&mut self, key: &'static str, value: impl Into<Value>) {
        let value = value.into();
        self.span.set_attribute(key, value.clone());
        self.attributes.push(KeyValue::new(key, value));
    }

    /// Gives the span the status Error.
    pub(crate) fn fail(&self, description: impl Into<Cow<'static, str>>) {
        self.span.set_status(Status::error(description));
    }

    /// Records the time since the start.
    pub(crate) fn record_duration(&self) {
        self.duration.record(self.started.elapsed().as_secs_f64(), &self.attributes);
    }
}

/// The measurement's attributes for a server.
pub(crate) fn server_attributes(address: Option<&str>, port: Option<u16>) -> impl Iterator<Item = KeyValue> {
    let address = address.map(|address| KeyValue::new("server.address", address.to_owned()));
    let port = port.map(|port| KeyValue::new("server.port", i64::from(port)));
    address.into_iter().chain(port)
}
