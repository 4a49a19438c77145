//! The environment of a process, and errors about its variables.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

/// The environment of a process. As OpenTelemetry requires, empty variables count as unset. `Debug` shows only their names.
#[derive(Clone, Default)]
pub struct Env(BTreeMap<String, String>);

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Env {
    /// The environment of this process, without variables that are not Unicode.
    pub fn process() -> Self {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect()
    }

    /// Removes the variable `name`, because a flag may have overridden it.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.0.remove(name);
        self
    }

    /// The value of `name` without surrounding whitespace, if it is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The name and the value of the first of `names` that is set.
    pub(crate) fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &str)> {
        names.iter().find_map(|name| Some((*name, self.get(name)?)))
    }

    /// A boolean: `true` or `false`, in any case. Unset is false.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, EnvError> {
        match self.get(name).map(str::to_ascii_lowercase).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(value) => Err(EnvError::new(name, value, "set it to true or false, or unset it")),
        }
    }

    /// A whole number of at least `minimum`.
    pub(crate) fn number<T: FromStr + PartialOrd + Display>(
        &self,
        name: &str,
        minimum: T,
    ) -> Result<Option<T>, EnvError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse::<T>() {
            Ok(number) if number >= minimum => Ok(Some(number)),
            _ => Err(EnvError::new(name, value, format!("set it to a whole number, {minimum} or more"))),
        }
    }

    /// The first of `names` that is set, in milliseconds, the unit of all durations in OpenTelemetry's environment.
    pub(crate) fn millis(&self, names: &[&str]) -> Result<Option<Duration>, EnvError> {
        let Some((name, _)) = self.first(names) else { return Ok(None) };
        match self.number::<u64>(name, 1) {
            Ok(number) => Ok(number.map(Duration::from_millis)),
            Err(error) => Err(EnvError { fix: "set it to a number of milliseconds, 1 or more".into(), ..error }),
        }
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Env {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// A variable has a value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("environment variable {variable}: {value:?} cannot be used: {fix}")]
pub struct EnvError {
    /// The variable.
    pub variable: String,
    /// Its value, or `(hidden)` if it may contain a secret.
    pub value: String,
    /// What to set instead.
    pub fix: String,
}

impl EnvError {
    pub(crate) fn new(variable: &str, value: &str, fix: impl Into<String>) -> Self {
        Self { variable: variable.to_owned(), value: value.to_owned(), fix: fix.into() }
    }
}
