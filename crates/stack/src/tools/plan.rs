//! What [`Tools::ensure`] would do, to be shown before it does anything.

use std::path::PathBuf;

use super::{Source, Tool, Tools, apt, go};

/// What [`Tools::ensure`] would install and build, and what prevents it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Debian packages to install.
    pub packages: Vec<&'static str>,
    /// The names of the builds, each with its usual duration.
    pub builds: Vec<(&'static str, &'static str)>,
    /// Where builds are stored.
    pub cache: PathBuf,
    /// What prevents the work, each with the remedy.
    pub obstacles: Vec<String>,
}

impl Plan {
    pub(super) fn new(tools: &Tools, wanted: &[Tool]) -> Plan {
        let missing = wanted.iter().copied().filter(|tool| tools.find(*tool).is_none());
        let (named, missing): (Vec<Tool>, Vec<Tool>) = missing.partition(|tool| tools.named(*tool).is_some());
        let (mut packages, mut builds) = (Vec::new(), Vec::new());
        for tool in missing {
            match tool.source() {
                Source::Debian(package) => packages.push(package),
                Source::Go(recipe) => builds.push((recipe.name, recipe.usual)),
            }
        }
        packages.sort_unstable();
        packages.dedup();
        let mut obstacles: Vec<String> =
            named.iter().map(|tool| format!("{} ({})", tool.binary(), tools.missing_hint(*tool))).collect();
        if !packages.is_empty() {
            let names = packages.join(", ");
            obstacles.extend(apt::obstacle(&packages).map(|how| format!("Debian's {names} ({how})")));
        }
        if !builds.is_empty() {
            let names: Vec<_> = builds.iter().map(|(name, _)| *name).collect();
            obstacles.extend(go::missing().map(|why| format!("Go, to build {} ({why})", names.join(" and "))));
        }
        Plan { packages, builds, cache: tools.cache.clone(), obstacles }
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.packages.is_empty() && self.builds.is_empty() && self.obstacles.is_empty()
    }

    /// One line for each install and build.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.packages.is_empty() {
            let packages = self.packages.join(", ");
            lines.push(format!(
                "install Debian's {packages}: under a minute; starts and enables none of their services"
            ));
        }
        for (what, usual) in &self.builds {
            lines.push(format!("build {what} with Go: {usual}; stored in {}", self.cache.display()));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::workspace_root;

    #[test]
    fn plan_lists_missing_tools_and_where_builds_are_stored() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = Tools {
            named: Vec::new(),
            dir: None,
            path: Vec::new(),
            cache: dir.path().into(),
            source: workspace_root(),
        };
        let plan = tools.plan(&[Tool::Prometheus, Tool::Promtool, Tool::Jaeger]);
        assert_eq!(plan.packages, ["prometheus"]);
        assert_eq!(plan.builds, [("jaeger", "about 6 min the first time")]);
        let lines = plan.lines().join("\n");
        assert!(lines.contains("Debian's prometheus:") && lines.contains(&dir.path().display().to_string()), "{lines}");
        tools.named.push((Tool::Jaeger, "/bin/sh".into()));
        assert!(tools.plan(&[Tool::Jaeger]).is_empty());
        tools.named.push((Tool::Collector, "/nowhere".into()));
        let plan = tools.plan(&[Tool::Collector]);
        assert!(plan.builds.is_empty() && !plan.is_empty(), "{plan:?}");
        assert!(plan.obstacles.iter().any(|line| line.contains("GAUNTLET_COLLECTOR names /nowhere")), "{plan:?}");
    }
}
