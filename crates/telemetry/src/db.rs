//! Calls to etcd: a CLIENT span and a duration for each.

use opentelemetry::KeyValue;
use tracing::Instrument;

use crate::call::{Call, server_attributes};
use crate::instruments::Instruments;
use crate::names;

/// The kind of an etcd call.
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
    /// Granting, keeping alive or revoking a lease.
    Lease,
    /// Opening a watch.
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

    /// Runs one call to the endpoint `server` (`host:port`) and measures it. Within a span it also gets a span of its own, named after
    /// `operation`.
    ///
    /// `error_type` returns the error code of a failed call, such as `UNAVAILABLE`. It must be of low cardinality.
    ///
    /// # Errors
    /// Those of `call`, unchanged.
    ///
    /// # Cancel safety
    /// As safe as `call`. A dropped call is recorded with the error type `cancelled`.
    pub async fn call<T, E>(
        &self,
        operation: Operation,
        server: &str,
        error_type: impl FnOnce(&E) -> &'static str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let (address, port) = split_port(server);
        // A replica's own lease and watch belong to no trace. A span for each of their calls would be a trace of one span.
        let span = if tracing::Span::current().is_none() {
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
        let mut attributes =
            vec![KeyValue::new("db.system.name", "etcd"), KeyValue::new("db.operation.name", operation.as_str())];
        attributes.extend(server_attributes(Some(address), port));
        let mut observed = ObservedCall {
            call: Call::start(span.clone(), &self.instruments.calls.database, attributes),
            error: Some("cancelled"),
        };
        let result = call.instrument(span).await;
        observed.error = result.as_ref().err().map(error_type);
        result
    }
}

/// Records its call when dropped, so that a cancelled call is recorded too.
struct ObservedCall {
    call: Call,
    error: Option<&'static str>,
}

impl Drop for ObservedCall {
    fn drop(&mut self) {
        if let Some(error) = self.error {
            self.call.set_attribute("error.type", error);
            self.call.fail(error);
        }
        self.call.record_duration();
    }
}

/// Splits `host:port`. Text without a port is a host.
fn split_port(server: &str) -> (&str, Option<u16>) {
    match server.rsplit_once(':') {
        Some((host, port)) => port.parse().map_or((server, None), |port| (host, Some(port))),
        None => (server, None),
    }
}
