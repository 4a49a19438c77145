//! Log lines on standard error: human on a terminal, JSON elsewhere; each with the ids of its trace and span.

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

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Human,
    Json,
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
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
        self.put(field, Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::from(value));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, Value::String(value.to_string()));
    }
}

impl<S, N> FormatEvent<S, N> for Line
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
                    // A field never hides one of the line's own.
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
                line.push_str(&one_line(&fields.message));
                for (name, value) in &fields.rest {
                    match value {
                        Value::String(text) => write!(line, " {dim}{name}={reset}{}", one_line(text))?,
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

/// Text that came from outside cannot begin a line of its own, nor steer a terminal.
fn one_line(text: &str) -> String {
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
