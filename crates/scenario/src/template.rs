//! Templates for commands, environment, flags and connection info.
//!
//! MiniJinja expressions (`{{ … }}`) without statements or includes; undefined names are errors. The size of a result is bounded by the
//! length of the template times that of its values, because no allowed operator repeats text.

use std::{collections::BTreeMap, io, sync::LazyLock};

use gauntlet_domain::{Additional, Identity, Placement, PortHold};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, filters, tests};

use crate::{
    flag::{FlagKey, MAX_TEXT_BYTES},
    yaml::{Problems, nearest},
};

/// The size limit of a rendered text, in bytes.
pub(crate) const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// The size limit of a template, in bytes.
const MAX_SOURCE_BYTES: usize = 8 * 1024;
/// The instruction limit of one rendering.
const FUEL: u64 = 10_000;

/// A checked template.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    /// The field it belongs to, for messages.
    field: String,
    source: String,
}

/// The names that a template may use.
pub(crate) enum Scope<'a> {
    /// In flags: identity, additional and `vary`.
    Flag,
    /// Elsewhere: identity, additional, flags, host and ports.
    Placed {
        /// The names of the flags.
        flags: &'a [String],
        /// The names of the ports.
        ports: &'a [String],
    },
}

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut env = Environment::empty();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(32);
    env.add_filter("default", filters::default);
    env.add_filter("lower", filters::lower);
    env.add_filter("upper", filters::upper);
    env.add_filter("capitalize", filters::capitalize);
    env.add_filter("trim", filters::trim);
    env.add_filter("length", filters::length);
    env.add_filter("int", filters::int);
    env.add_filter("string", filters::string);
    env.add_test("defined", tests::is_defined);
    env.add_test("undefined", tests::is_undefined);
    env.add_test("startingwith", tests::is_startingwith);
    env.add_test("endingwith", tests::is_endingwith);
    env
});

impl Template {
    /// Checks syntax, names, filters and functions, and reports problems.
    pub(crate) fn check(line: u64, field: &str, source: String, scope: &Scope, problems: &mut Problems) -> Self {
        let template = Self { field: field.to_owned(), source };
        if let Err(text) = template.problem(scope) {
            problems.at(line, field, text);
        }
        template
    }

    fn problem(&self, scope: &Scope) -> Result<(), String> {
        if self.source.len() > MAX_SOURCE_BYTES {
            return Err(format!(
                "is {} bytes; at most {MAX_SOURCE_BYTES}: put long texts into a file",
                self.source.len()
            ));
        }
        if self.source.contains("{%") {
            return Err("statements ({% … %}) are not supported; use {{ a if condition else b }}".into());
        }
        if let Some(c) = unbounded(&self.source) {
            return Err(format!("{c} is not supported in an expression"));
        }
        let template = ENVIRONMENT.template_from_str(&self.source).map_err(|error| describe(&error))?;
        let (known, members): (&[&str], [(&str, &[String]); 2]) = match scope {
            Scope::Flag => (&["identity", "additional", "vary"], [("", &[]), ("", &[])]),
            Scope::Placed { flags, ports } => {
                (&["identity", "additional", "flags", "host", "ports"], [("flags", flags), ("ports", ports)])
            }
        };
        let mut used: Vec<String> = template.undeclared_variables(true).into_iter().collect();
        used.sort();
        for name in &used {
            let (root, member) = name.split_once('.').unwrap_or((name, ""));
            if !known.contains(&root) {
                let fix = match (root, nearest(root, known)) {
                    ("vary", _) => "vary works in flags only; use flags.NAME here".to_owned(),
                    ("flags" | "host" | "ports", _) => {
                        "flags are rendered before the instance has a host and ports".to_owned()
                    }
                    (_, Some(near)) => format!("did you mean {near}?"),
                    (_, None) => format!("known here: {}", known.join(", ")),
                };
                return Err(format!("unknown variable {root}; {fix}"));
            }
            for (group, names) in members {
                if root == group && !member.is_empty() && !names.iter().any(|known| known == member) {
                    let names: Vec<&str> = names.iter().map(String::as_str).collect();
                    let fix = match (nearest(member, &names), names.is_empty()) {
                        (Some(near), _) => format!("did you mean {group}.{near}?"),
                        (None, true) => format!("the document has no {group}"),
                        (None, false) => format!("known: {}", names.join(", ")),
                    };
                    return Err(format!("unknown {root}.{member}; {fix}"));
                }
            }
        }
        let sample = match scope {
            Scope::Flag => {
                Values::of(&Identity::from_bits(0), &Additional::new()).varying(&FlagKey::new([0; 32]), "sample")
            }
            Scope::Placed { flags, ports } => {
                let placement = Placement {
                    host: "localhost".into(),
                    ports: ports.iter().map(|name| (name.clone(), 1)).collect(),
                    dir: std::path::PathBuf::new(),
                    hold: PortHold::default(),
                };
                let flags = flags.iter().map(|name| (name.clone(), "FLAG{sample}".to_owned()));
                Values::of(&Identity::from_bits(0), &Additional::new()).placed(flags, &placement)
            }
        };
        match self.render_error(&sample) {
            // Only an instance provides this value.
            Err(error)
                if error.kind() == ErrorKind::UndefinedError && used.iter().any(|n| n.starts_with("additional")) =>
            {
                Ok(())
            }
            Err(error) => Err(describe(&error)),
            Ok(_) => Ok(()),
        }
    }

    /// The field it belongs to, for messages.
    pub(crate) fn field(&self) -> &str {
        &self.field
    }

    /// Returns the text if it contains no expression.
    pub(crate) fn literal(&self) -> Option<&str> {
        (!self.source.contains("{{")).then_some(&self.source)
    }

    /// Renders the template. The error names the field and may be shown to the client.
    pub(crate) fn render(&self, values: &Values) -> Result<String, String> {
        self.render_error(values).map_err(|error| {
            let missing = match error.kind() {
                ErrorKind::UndefinedError => values.missing(&self.source),
                _ => Vec::new(),
            };
            match missing.first() {
                Some(key) => format!(
                    "{}: additional has no {key:?}; give it there, or a default: {{{{ additional[{key:?}] | default('…') }}}}",
                    self.field
                ),
                None => format!("{}: {}", self.field, describe(&error)),
            }
        })
    }

    fn render_error(&self, values: &Values) -> Result<String, minijinja::Error> {
        let template = ENVIRONMENT.template_from_str(&self.source)?;
        let mut output = Bounded(Vec::new());
        template.render_captured_to(Value::from(values.0.clone()), &mut output)?;
        String::from_utf8(output.0).map_err(|_| minijinja::Error::new(ErrorKind::WriteFailure, "is not UTF-8"))
    }
}

/// The values that templates are rendered with.
#[derive(Debug, Clone)]
pub(crate) struct Values(BTreeMap<String, Value>);

impl Values {
    pub(crate) fn of(identity: &Identity, additional: &Additional) -> Self {
        let additional = Value::from(additional.clone());
        Self(BTreeMap::from([
            ("identity".to_owned(), Value::from(identity.as_str())),
            ("additional".to_owned(), additional),
        ]))
    }

    /// Returns the keys of `additional` that a template names and that are missing.
    fn missing<'a>(&self, source: &'a str) -> Vec<&'a str> {
        let additional = self.0.get("additional");
        let there =
            |key: &str| additional.is_some_and(|map| map.get_attr(key).is_ok_and(|value| !value.is_undefined()));
        let named = source.split("additional").skip(1).filter_map(|rest| {
            let quoted = |quote: char| rest.strip_prefix('[')?.trim_start().strip_prefix(quote)?.split(quote).next();
            let plain = || rest.strip_prefix('.')?.split(|c: char| !(c.is_alphanumeric() || c == '_')).next();
            quoted('\'').or_else(|| quoted('"')).or_else(plain)
        });
        named.filter(|key| !key.is_empty() && !there(key)).collect()
    }

    /// Adds the function `vary` for one flag.
    pub(crate) fn varying(mut self, key: &FlagKey, flag: &str) -> Self {
        let (key, flag) = (key.clone(), flag.to_owned());
        let identity = self.0.get("identity").map(ToString::to_string).unwrap_or_default();
        let vary = move |text: &str| {
            if text.len() > MAX_TEXT_BYTES {
                let problem = format!("vary takes at most {MAX_TEXT_BYTES} bytes, got {}", text.len());
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
            }
            Ok(key.vary(&identity, &flag, text))
        };
        self.0.insert("vary".to_owned(), Value::from_function(vary));
        self
    }

    /// Adds flags, host and ports.
    pub(crate) fn placed(mut self, flags: impl Iterator<Item = (String, String)>, placement: &Placement) -> Self {
        self.0.insert("flags".to_owned(), Value::from(flags.collect::<BTreeMap<_, _>>()));
        self.0.insert("host".to_owned(), Value::from(placement.host.as_str()));
        self.0.insert("ports".to_owned(), Value::from(placement.ports.clone()));
        self
    }
}

/// Returns the first `*` or `{` in an expression, outside quotes. `*` can repeat a text without bound, and `{` starts a map, which would hide
/// the end of the expression.
fn unbounded(source: &str) -> Option<char> {
    let mut rest = source;
    while let Some((_, after)) = rest.split_once('{') {
        rest = match after.chars().next() {
            Some('#') => after.split_once("#}").map_or("", |(_, after)| after),
            Some('{') => {
                let mut chars = after.char_indices().skip(1);
                let mut quote = None;
                loop {
                    match (chars.next(), quote) {
                        (None, _) => return None,
                        (Some((_, '\\')), Some(_)) => drop(chars.next()),
                        (Some((_, c)), Some(open)) if c == open => quote = None,
                        (_, Some(_)) => {}
                        (Some((_, c @ ('\'' | '"'))), None) => quote = Some(c),
                        (Some((_, c @ ('*' | '{'))), None) => return Some(c),
                        (Some((at, '}')), None) => {
                            let end = after.get(at + 1..).unwrap_or_default();
                            if let Some(end) = end.strip_prefix('}') {
                                break end;
                            }
                        }
                        (Some(_), None) => {}
                    }
                }
            }
            _ => after,
        };
    }
    None
}

fn describe(error: &minijinja::Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("takes more than {FUEL} steps"),
        (ErrorKind::WriteFailure, _) => format!("renders to more than {MAX_OUTPUT_BYTES} bytes"),
        (ErrorKind::UndefinedError, None) => "uses a name that does not exist".into(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    }
}

struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod checks {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn template(source: &str) -> Template {
        Template { field: "field".into(), source: source.into() }
    }

    fn values() -> Values {
        let additional = [("add-flag", "FLAG{x}"), ("a b", "1"), ("n", "3")];
        let additional = additional.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let ports = BTreeMap::from([("http".into(), 80)]);
        let placement = Placement { host: "h".into(), ports, dir: "/d".into(), hold: PortHold::default() };
        let flags = [("main".to_owned(), "F".to_owned())].into_iter();
        Values::of(&Identity::from_bits(1), &additional).placed(flags, &placement)
    }

    #[test]
    fn allowed_expressions_are_rendered() {
        let says = |source: &str| template(source).render(&values()).unwrap();
        assert_eq!(says("plain"), "plain");
        assert_eq!(says("{{ identity }}"), "0000000000000001");
        assert_eq!(says("{{ additional['add-flag'] }}{{ additional['a b'] }}"), "FLAG{x}1");
        assert_eq!(says("{{ additional['none'] | default('d') }}"), "d");
        assert_eq!(says("{{ 'y' if additional.n == '3' else 'n' }}"), "y");
        assert_eq!(says("{{ 'y' if 'none' in additional else 'n' }}"), "n");
        assert_eq!(says("{{ additional.n | int + 1 }}"), "4");
        assert_eq!(says("{{ host }}:{{ ports.http }}:{{ ports['http'] }}:{{ flags.main | lower }}"), "h:80:80:f");
        assert_eq!(says("<{{ '<&>' }}>"), "<<&>>", "nothing is escaped: these are not pages");
    }

    #[test]
    fn failed_rendering_is_explained() {
        let fails = |source: &str| template(source).render(&values()).unwrap_err();
        insta::assert_snapshot!(fails("{{ additional['motd'] }}"));
        let long = "x".repeat(MAX_OUTPUT_BYTES / 2);
        insta::assert_snapshot!(fails(&format!("{{{{ '{long}' }}}}{{{{ '{long}' }}}}!")));
        insta::assert_snapshot!(fails("{{ range(5) }}"));
        insta::assert_snapshot!(fails("{{ 1 / 0 }}"));
        insta::assert_snapshot!(fails(&format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000))));
    }

    #[test]
    fn repetition_and_maps_are_detected() {
        for source in [
            "{{ 'x' * 9 }}",
            "a{{ 1 }}b{{- '}}' ~ [1]*9 }}",
            "{# ' #}{{ 2 ** 9 }}",
            "{{ '\\'' * 9 }}",
            "{{ {'a': 1} }}",
            "{{{ 1 }}}",
            "{ {{ '{' * 2",
        ] {
            assert!(unbounded(source).is_some(), "{source}");
        }
        for source in [
            "* { } {",
            "{{ '*{' }} * {",
            "{# {{ * #} *",
            "{ {{- \"a'*\" -}} }",
            "{{ additional['*'] }}",
            "{{ '\\\\' }}*",
        ] {
            assert_eq!(unbounded(source), None, "{source}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(source in "(\\{\\{ |\\}\\}|additional|\\['|'\\]|ports|\\.|\\||default|vary|\\(|\\)|[0-9]{1,12}|'|\\*|~|-| |\\PC){0,24}") {
            let scope = Scope::Placed { flags: &["main".to_owned()], ports: &["http".to_owned()] };
            let mut problems = Problems::default();
            let checked = Template::check(1, "field", source, &scope, &mut problems);
            if problems.0.is_empty() {
                let _ = checked.render(&values());
            }
        }
    }
}
