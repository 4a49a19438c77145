//! The format of log lines: human-readable or JSON, with the ids of trace and span.

use std::fmt::{self, Write as _};

use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The format of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LineFormat {
    Human,
    Json,
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn insert(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
        } else {
            self.rest.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, Value::from(value));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.insert(field, Value::String(value.to_string()));
    }
}

impl<S, N> FormatEvent<S, N> for LineFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let context = Context::map_current(|context| context.span().span_context().clone());
        let ids = context.is_valid().then(|| (context.trace_id().to_string(), context.span_id().to_string()));
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let metadata = event.metadata();
        match self {
            Self::Json => {
                let mut line = Map::new();
                line.insert("timestamp".into(), time.into());
                line.insert("level".into(), metadata.level().as_str().into());
                line.insert("target".into(), metadata.target().into());
                line.insert("message".into(), fields.message.into());
                if let Some((trace, span)) = ids {
                    line.insert("trace_id".into(), trace.into());
                    line.insert("span_id".into(), span.into());
                }
                for (name, value) in fields.rest {
                    // A field never replaces one of the members above.
                    line.entry(name).or_insert(value);
                }
                writeln!(writer, "{}", Value::Object(line))
            }
            Self::Human => {
                let (colour, dim, reset) = match (writer.has_ansi_escapes(), *metadata.level()) {
                    (false, _) => ("", "", ""),
                    (true, Level::ERROR) => ("\x1b[31m", "\x1b[2m", "\x1b[0m"),
                    (true, Level::WARN) => ("\x1b[33m", "\x1b[2m", "\x1b[0m"),
                    (true, Level::INFO) => ("\x1b[32m", "\x1b[2m", "\x1b[0m"),
                    (true, _) => ("\x1b[34m", "\x1b[2m", "\x1b[0m"),
                };
                let mut line = String::new();
                write!(
                    line,
                    "{dim}{time}{reset} {colour}{:>5}{reset} {dim}{}:{reset} ",
                    metadata.level(),
                    metadata.target()
                )?;
                line.push_str(&escape_controls(&fields.message));
                for (name, value) in &fields.rest {
                    match value {
                        Value::String(text) => write!(line, " {dim}{name}={reset}{}", escape_controls(text))?,
                        other => write!(line, " {dim}{name}={reset}{other}")?,
                    }
                }
                if let Some((trace, span)) = ids {
                    write!(line, " {dim}trace_id={trace} span_id={span}{reset}")?;
                }
                writeln!(writer, "{line}")
            }
        }
    }
}

/// Escapes control characters, so that text from outside can neither start a new line nor control the terminal.
fn escape_controls(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars().fold(String::with_capacity(text.len()), |mut line, c| {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
        line
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn log_output(format: LineFormat, ansi: bool, log: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let lines =
            tracing_subscriber::fmt::layer().with_ansi(ansi).event_format(format).with_writer(move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    fn in_trace() -> opentelemetry::ContextGuard {
        let ids = (TraceId::from(0xabc_u128), SpanId::from(0xdef_u64));
        let span = SpanContext::new(ids.0, ids.1, TraceFlags::SAMPLED, true, TraceState::default());
        Context::new().with_remote_span_context(span).attach()
    }

    #[test]
    fn json_line_has_trace_ids_and_fields_do_not_replace_its_members() {
        let text = log_output(LineFormat::Json, false, || {
            let _trace = in_trace();
            tracing::warn!(answer = 42, level = "mine", "two\nlines");
        });
        let line: Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert_eq!(
            (&line["message"], &line["answer"], &line["level"]),
            (&"two\nlines".into(), &42.into(), &"WARN".into())
        );
        assert_eq!(line["trace_id"], "00000000000000000000000000000abc");
        assert_eq!(line["span_id"], "0000000000000def");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn human_line_escapes_control_characters() {
        let log = || {
            let _trace = in_trace();
            let name = "a\x1b[2J\nERROR forged";
            tracing::info!(name, "a message {}", "x\ny");
        };
        let text = log_output(LineFormat::Human, false, log);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        assert!(text.contains(r"name=a\u{1b}[2J\nERROR forged"), "{text}");
        assert!(text.contains(" INFO ") && text.contains("trace_id=00000000000000000000000000000abc"), "{text}");
        assert!(log_output(LineFormat::Human, true, log).contains("\x1b[32m"));
    }

    #[test]
    fn line_outside_a_trace_has_no_ids() {
        assert!(!log_output(LineFormat::Json, false, || tracing::info!("a message")).contains("trace_id"));
    }
}
