//! The runtime on which exporters send.

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of one thread, so that export needs no other runtime. Unlike tokio's own, it may be dropped in any context.
#[derive(Debug)]
pub(crate) struct ExportRuntime(Option<Runtime>);

impl ExportRuntime {
    pub(crate) fn start() -> std::io::Result<(Self, Handle)> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            // Never left: a scope around the export call would not reach the tasks of its connection.
            .on_thread_start(|| std::mem::forget(opentelemetry::Context::enter_telemetry_suppressed_scope()))
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok((Self(Some(runtime)), handle))
    }
}

impl Drop for ExportRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
