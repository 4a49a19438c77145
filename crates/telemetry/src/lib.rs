//! OpenTelemetry bootstrap, the table of names, tower layers, debug page.
