//! How strongly a program is isolated.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How strongly a program is isolated from the machine and from other programs, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It may not gain privileges, and has resource limits. It has the supervisor's user, files and network.
    None,
    /// Landlock and seccomp as well: only the given paths, no signals to other processes. It has the supervisor's user and network.
    Landlock,
    /// Namespaces and a root of its own as well. Its user outside is that of the supervisor.
    Userns,
    /// As [`Level::Userns`], with a user of its own outside, too. Needs root.
    Uid,
}

impl Level {
    /// All levels, strongest first.
    pub const ALL: [Self; 4] = [Self::Uid, Self::Userns, Self::Landlock, Self::None];

    /// The name on the command line, in logs and in telemetry.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uid => "uid",
            Self::Userns => "userns",
            Self::Landlock => "landlock",
            Self::None => "none",
        }
    }

    /// How many threads of its own a sandbox has, besides those of the program: process 1 has two.
    pub const fn own_threads(self) -> u64 {
        match self {
            Self::None | Self::Landlock => 0,
            Self::Userns | Self::Uid => 2,
        }
    }

    /// Whether the program has a root, a process tree and a network of its own.
    pub fn has_namespaces(self) -> bool {
        self >= Self::Userns
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|level| level.name() == text)
            .ok_or_else(|| format!("expected uid, userns, landlock or none; got {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_keep_their_names() {
        assert!(Level::ALL.is_sorted_by(|stronger, weaker| stronger > weaker));
        for level in Level::ALL {
            assert_eq!(level.name().parse(), Ok(level));
        }
        assert!("root".parse::<Level>().is_err_and(|error| error.contains("expected uid")));
    }
}
