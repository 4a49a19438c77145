//! What a binary decides about its telemetry. Everything else comes from the environment.

/// The settings of a binary.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `service.name`, unless the environment sets one.
    pub service_name: String,
    /// The `service.version`.
    pub service_version: String,
    /// The log filter, unless the environment sets one, such as `info`.
    pub log_filter: String,
    /// Whether finished spans also feed the debug page. Spans that the sampler drops are then recorded too, but never exported.
    pub debug: bool,
    /// Whether export waits for [`ExportStart::start`](crate::ExportStart::start).
    pub hold_export: bool,
}

impl Settings {
    /// Settings of a service that logs at `info` and has no debug page.
    pub fn new(service_name: impl Into<String>, service_version: impl Into<String>) -> Self {
        Self {
            service_name: service_name.into(),
            service_version: service_version.into(),
            log_filter: "info".into(),
            debug: false,
            hold_export: false,
        }
    }

    /// Feeds the debug page.
    #[must_use]
    pub fn with_debug(self) -> Self {
        Self { debug: true, ..self }
    }

    /// Holds export until [`ExportStart::start`](crate::ExportStart::start), for a collector that is not up yet. Nothing is buffered meanwhile:
    /// spans and log records of that time are discarded and not counted as lost.
    #[must_use]
    pub fn with_export_held(self) -> Self {
        Self { hold_export: true, ..self }
    }
}
