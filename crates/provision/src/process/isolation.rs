//! How strongly instances are isolated on this machine.

use std::{fmt, path::Path};

use gauntlet_domain::{Error, Isolation as Requested, Result};
use gauntlet_sandbox::{Level, Probe, probe};

use super::{Config, ports};

/// The isolation of instances: what this machine and the operator allow. `Display` describes it for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// The level of instances whose scenario asks for none.
    pub level: Level,
    /// The weakest level that a scenario may ask for.
    floor: Level,
    probe: Probe,
}

impl Isolation {
    /// Finds the strongest level that the machine and the operator allow, by trying. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`Error::Provision`] if that is less than the operator requires.
    pub(super) fn detect(config: &Config, supervisor: &Path) -> Result<Self> {
        let ceiling = config.isolation.unwrap_or(Level::Uid);
        let probe = probe(supervisor, &config.system, *config.uids.start(), ceiling, ports::spawn);
        let level = probe.best;
        let wanted = config.require_isolation.max(config.isolation).unwrap_or(Level::None);
        if level < wanted {
            let why =
                if wanted > ceiling { format!("the operator allows at most {ceiling}") } else { probe.explanation() };
            let detail = format!("isolation {wanted} is required, and instances would have {level}: {why}");
            return Err(Error::Provision { step: "configure", detail });
        }
        Ok(Self { level, floor: config.require_isolation.unwrap_or(level), probe })
    }

    /// The level of an instance whose scenario asks for `requested`.
    ///
    /// # Errors
    /// [`Error::Provision`] if the machine can't have the level, or the operator doesn't allow it.
    pub(super) fn choose(&self, requested: Option<Requested>) -> Result<Level> {
        let Some(requested) = requested.map(level) else { return Ok(self.level) };
        let refused = |why: String| {
            let detail = format!("the scenario asks for isolation {requested}, {why}");
            Error::Provision { step: "prepare", detail }
        };
        if requested > self.level {
            let why = self.probe.refusal(requested).map_or("the operator's choice".to_owned(), ToString::to_string);
            return Err(refused(format!("this machine has at most {}: {why}", self.level)));
        }
        if requested < self.floor {
            let why = format!(
                "the operator allows nothing below {}; --require-isolation {requested} would allow it",
                self.floor
            );
            return Err(refused(why));
        }
        Ok(requested)
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.level)?;
        if self.level.has_namespaces() && !self.probe.landlock {
            f.write_str(" (without Landlock, which this kernel lacks)")?;
        }
        let why = self.probe.explanation();
        if why.is_empty() { Ok(()) } else { write!(f, "; no stronger level works: {why}") }
    }
}

fn level(requested: Requested) -> Level {
    match requested {
        Requested::None => Level::None,
        Requested::Landlock => Level::Landlock,
        Requested::Userns => Level::Userns,
        Requested::Uid => Level::Uid,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn isolation(level: Level, floor: Level) -> Isolation {
        Isolation { level, floor, probe: Probe { best: level, refused: Vec::new(), landlock: true } }
    }

    #[test]
    fn scenario_gets_what_machine_and_operator_allow() {
        let one = isolation(Level::Userns, Level::Landlock);
        assert_eq!(one.choose(None).unwrap(), Level::Userns);
        assert_eq!(one.choose(Some(Requested::Landlock)).unwrap(), Level::Landlock);
        let more = one.choose(Some(Requested::Uid)).unwrap_err().to_string();
        assert!(more.contains("asks for isolation uid, this machine has at most userns"), "{more}");
        let less = one.choose(Some(Requested::None)).unwrap_err().to_string();
        assert!(less.contains("nothing below landlock; --require-isolation none would allow it"), "{less}");
    }
}
