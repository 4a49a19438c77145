//! A file that is reloaded when it changes.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use anyhow::Context as _;

/// The maximum size of a file, in bytes: more than 50,000 tokens.
const MAX_FILE_SIZE: u64 = 16 << 20;

type Parse<T> = Box<dyn Fn(&str) -> Result<T, String> + Send + Sync>;

/// The contents of a file, as of the last time that it could be used.
pub(super) struct Reloaded<T> {
    flag: &'static str,
    path: PathBuf,
    parse: Parse<T>,
    state: RwLock<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    /// The text, or the error, that was seen last. Contents are compared, and not times, which may be the same after a change.
    seen: Result<String, String>,
}

impl<T> Reloaded<T> {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read or parsed; the text names flag and file.
    pub(super) fn load<E: std::error::Error>(
        flag: &'static str,
        path: &Path,
        parse: impl Fn(&str) -> Result<T, E> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let parse: Parse<T> = Box::new(move |text| parse(text).map_err(|error| error.to_string()));
        let name = || format!("cannot use {flag} {}", path.display());
        let text = read(path).with_context(name)?;
        let current = Arc::new(parse(&text).map_err(anyhow::Error::msg).with_context(name)?);
        Ok(Self { flag, path: path.to_owned(), parse, state: RwLock::new(State { current, seen: Ok(text) }) })
    }

    /// What the file had the last time that it could be used.
    pub(super) fn current(&self) -> Arc<T> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Reads the file again. A file that cannot be used changes nothing, and is logged once.
    pub(super) fn reload(&self) {
        let seen = read(&self.path).map_err(|error| error.to_string());
        if self.state.read().unwrap_or_else(PoisonError::into_inner).seen == seen {
            return;
        }
        let parsed = match &seen {
            Ok(text) => (self.parse)(text),
            Err(error) => Err(error.clone()),
        };
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.seen = seen;
        match parsed {
            Ok(current) => {
                state.current = Arc::new(current);
                tracing::info!(file = %self.path.display(), "{} has changed and is in use", self.flag);
            }
            Err(error) => {
                tracing::error!(file = %self.path.display(), error, "{} cannot be used; keeping what was read before", self.flag);
            }
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_SIZE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(io::Error::other(format!("larger than {MAX_FILE_SIZE} bytes")));
    }
    Ok(text)
}
