//! Commands of cargo that come from crates.io: found, or installed at a fixed version into the cache of tools.

use std::path::PathBuf;

use anyhow::Result;
use gauntlet_stack::Tools;

use crate::command::{cargo, run};
use crate::console::say;

/// A crate with a binary of the same name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CargoTool {
    pub(crate) name: &'static str,
    /// The version that is installed. Its own `Cargo.lock` pins what it is built from.
    pub(crate) version: &'static str,
}

/// Checks licences, bans, sources and advisories.
pub(crate) const DENY: CargoTool = CargoTool { name: "cargo-deny", version: "0.20.2" };
/// Writes bills of materials.
pub(crate) const CYCLONEDX: CargoTool = CargoTool { name: "cargo-cyclonedx", version: "0.5.9" };
/// Makes mutants.
pub(crate) const MUTANTS: CargoTool = CargoTool { name: "cargo-mutants", version: "27.1.0" };

impl CargoTool {
    /// Returns the binary in `GAUNTLET_TOOLS` or on `PATH`, otherwise the one in the cache, which is installed if it is missing. If several
    /// processes install it, cargo lets one do the work.
    ///
    /// # Errors
    /// When it cannot be installed.
    pub(crate) fn ensure(self, tools: &Tools) -> Result<PathBuf> {
        let CargoTool { name, version } = self;
        let root = tools.cache.join(format!("{name}-{version}"));
        let kept = root.join("bin").join(name);
        let mut places = tools.dir.iter().chain(&tools.path).map(|dir| dir.join(name)).chain([kept.clone()]);
        if let Some(found) = places.find(|path| path.is_file()) {
            return Ok(found);
        }
        say(&format!("installing {name} {version} (minutes, only once)"));
        run(cargo().args(["install", name, "--locked", "--version", version, "--root"]).arg(&root))?;
        Ok(kept)
    }
}
