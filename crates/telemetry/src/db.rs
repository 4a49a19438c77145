//! Calls to a database: a CLIENT span and a duration for each.

use std::time::Instant;

use opentelemetry::KeyValue;
use opentelemetry::trace::Status;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::instruments::Instruments;
use crate::names;

/// What is asked of etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A transaction.
    Txn,
    /// A range read.
    Range,
    /// A put outside a transaction.
    Put,
    /// A delete outside a transaction.
    Delete,
    /// A lease granted, kept alive or revoked.
    Lease,
    /// A watch opened.
    Watch,
}

impl Operation {
    const fn row(self) -> names::Span {
        match self {
            Self::Txn => names::ETCD_TXN,
            Self::Range => names::ETCD_RANGE,
            Self::Put => names::ETCD_PUT,
            Self::Delete => names::ETCD_DELETE,
            Self::Lease => names::ETCD_LEASE,
            Self::Watch => names::ETCD_WATCH,
        }
    }

    /// The value of `db.operation.name`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Txn => "txn",
            Self::Range => "range",
            Self::Put => "put",
            Self::Delete => "delete",
            Self::Lease => "lease",
            Self::Watch => "watch",
        }
    }
}

/// Observes the calls of an etcd client. Clones share the instruments.
#[derive(Clone, Debug)]
pub struct Database {
    instruments: Instruments,
}

impl Database {
    /// An observer that records on `instruments`.
    pub fn etcd(instruments: &Instruments) -> Self {
        Self { instruments: instruments.clone() }
    }

    /// Runs `call`, one call to the endpoint `server` (`host:port`), in a span named after `operation`; outside of any span it is measured
    /// only.
    ///
    /// `error_type` gives the short code of a failed call (`UNAVAILABLE`), never a text of high cardinality. A call
    /// that is dropped before it ends is recorded with the error type `cancelled`.
    ///
    /// # Errors
    /// Those of `call`, untouched.
    pub async fn call<T, E>(
        &self,
        operation: Operation,
        server: &str,
        error_type: impl FnOnce(&E) -> &'static str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let (address, port) = split(server);
        // What a replica does for itself (its lease, its watch) belongs to no trace: it is measured, and makes no traces of one span.
        let background = tracing::Span::current().is_none();
        let span = if background {
            tracing::Span::none()
        } else {
            tracing::info_span!(
                "etcd",
                otel.name = operation.row().name,
                otel.kind = operation.row().kind.as_str(),
                db.system.name = "etcd",
                db.operation.name = operation.as_str(),
                server.address = address,
                server.port = port,
            )
        };
        let mut observed = Observed {
            instruments: &self.instruments,
            span: span.clone(),
            operation,
            address,
            port,
            started: Instant::now(),
            error: Some("cancelled"),
        };
        let result = call.instrument(span).await;
        observed.error = result.as_ref().err().map(error_type);
        result
    }
}

/// Records when it is dropped, so that a cancelled call is recorded too.
struct Observed<'a> {
    instruments: &'a Instruments,
    span: tracing::Span,
    operation: Operation,
    address: &'a str,
    port: Option<u16>,
    started: Instant,
    error: Option<&'static str>,
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        let mut attributes = vec![
            KeyValue::new("db.system.name", "etcd"),
            KeyValue::new("db.operation.name", self.operation.as_str()),
            KeyValue::new("server.address", self.address.to_owned()),
        ];
        if let Some(port) = self.port {
            attributes.push(KeyValue::new("server.port", i64::from(port)));
        }
        if let Some(error) = self.error {
            self.span.set_attribute("error.type", error);
            self.span.set_status(Status::error(error));
            attributes.push(KeyValue::new("error.type", error));
        }
        self.instruments.calls.database.record(self.started.elapsed().as_secs_f64(), &attributes);
    }
}

/// `host:port` in its parts; what has no port is a host.
fn split(server: &str) -> (&str, Option<u16>) {
    match server.rsplit_once(':') {
        Some((host, port)) => port.parse().map_or((server, None), |port| (host, Some(port))),
        None => (server, None),
    }
}
