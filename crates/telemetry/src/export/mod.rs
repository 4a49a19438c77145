//! Export that never blocks a caller, never floods the log, and counts what it loses.
//!
//! The SDK's batch processors drop silently when their queue is full, its periodic reader waits for an exporter without a deadline, and every
//! failed batch is an error in the log. [`BoundedProcessor`] therefore admits only what the queue has room for and counts the rest;
//! [`GuardedExporter`] gives each export a deadline, counts its result, and warns at most once a minute.

mod exporter;
mod health;
mod hold;
mod processor;

pub(crate) use self::exporter::GuardedExporter;
pub use self::health::ExportState;
pub(crate) use self::health::{Health, WarningLimit};
pub(crate) use self::hold::ExportHold;
pub use self::hold::ExportStart;
pub(crate) use self::processor::BoundedProcessor;

/// The calls of the SDK's exporter and processor traits that the wrappers pass on unchanged.
macro_rules! forward {
    (exporter) => {
        fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> opentelemetry_sdk::error::OTelSdkResult {
            self.inner.shutdown_with_timeout(timeout)
        }

        fn set_resource(&mut self, resource: &opentelemetry_sdk::Resource) {
            self.inner.set_resource(resource);
        }
    };
    (processor) => {
        forward!(exporter);

        fn force_flush(&self) -> opentelemetry_sdk::error::OTelSdkResult {
            self.inner.force_flush()
        }
    };
}
use forward;
