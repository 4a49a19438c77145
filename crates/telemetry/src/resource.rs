//! The resource: which service, host and process emits the telemetry.

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

use crate::config::Config;
use crate::settings::Settings;

/// The resource of this process. Attributes set in the environment override detected ones.
pub(crate) fn resource(settings: &Settings, config: &Config) -> Resource {
    let mut attributes = vec![
        KeyValue::new("service.namespace", "gauntlet"),
        KeyValue::new("service.version", settings.service_version.clone()),
        KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
        KeyValue::new("host.name", rustix::system::uname().nodename().to_string_lossy().into_owned()),
        KeyValue::new("host.arch", std::env::consts::ARCH),
        KeyValue::new("os.type", std::env::consts::OS),
        KeyValue::new("process.pid", i64::from(std::process::id())),
        KeyValue::new("process.runtime.name", "rust"),
    ];
    if let Ok(executable) = std::env::current_exe() {
        let name = executable.file_name().map(|name| name.to_string_lossy().into_owned());
        attributes.extend(name.map(|name| KeyValue::new("process.executable.name", name)));
        attributes.push(KeyValue::new("process.executable.path", executable.to_string_lossy().into_owned()));
    }
    attributes.extend(config.resource.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())));
    let name = config.service_name.clone().unwrap_or_else(|| settings.service_name.clone());
    attributes.push(KeyValue::new("service.name", name));
    Resource::builder_empty()
        .with_detector(Box::new(opentelemetry_sdk::resource::TelemetryResourceDetector))
        .with_attributes(attributes)
        .build()
}
