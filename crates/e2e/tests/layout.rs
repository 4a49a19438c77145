//! Dependencies between our crates run one way.

use std::collections::BTreeMap;

/// The crates of this workspace that each crate may depend on, outside of its tests.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("gauntlet-api", &[] as &[_]),
        ("gauntlet-access", &[]),
        ("gauntlet-sandbox", &[]),
        ("gauntlet-domain", &[]),
        ("gauntlet-telemetry", &[]),
        ("gauntlet-stack", &[]),
        ("gauntlet-startup", &[]),
        ("gauntlet-client", &["gauntlet-api", "gauntlet-telemetry"]),
        ("gauntlet-coordination", &["gauntlet-domain", "gauntlet-telemetry"]),
        ("gauntlet-scenario", &["gauntlet-domain", "gauntlet-telemetry"]),
        ("gauntlet-provision", &["gauntlet-domain", "gauntlet-sandbox", "gauntlet-telemetry"]),
        (
            "gauntlet-manager",
            &[
                "gauntlet-access",
                "gauntlet-api",
                "gauntlet-coordination",
                "gauntlet-domain",
                "gauntlet-provision",
                "gauntlet-scenario",
                "gauntlet-startup",
                "gauntlet-telemetry",
            ],
        ),
        ("gauntlet-janitor", &["gauntlet-api", "gauntlet-client", "gauntlet-startup", "gauntlet-telemetry"]),
        (
            "gauntlet-cli",
            &[
                "gauntlet-access",
                "gauntlet-api",
                "gauntlet-client",
                "gauntlet-domain",
                "gauntlet-janitor",
                "gauntlet-manager",
                "gauntlet-scenario",
                "gauntlet-startup",
                "gauntlet-telemetry",
            ],
        ),
        ("gauntlet-testing", &["gauntlet-api", "gauntlet-domain"]),
        ("gauntlet-e2e", &[]),
        ("gauntlet-simulation", &[]),
        ("xtask", &["gauntlet-sandbox", "gauntlet-stack"]),
        ("example-web", &[]),
        ("example-vault", &[]),
        ("gauntlet-fuzz", &["gauntlet-access", "gauntlet-api", "gauntlet-manager", "gauntlet-scenario"]),
    ])
}

#[test]
fn dependencies_run_one_way() {
    let metadata =
        cargo_metadata::MetadataCommand::new().no_deps().other_options(["--offline".to_owned()]).exec().unwrap();
    let allowed = allowed();
    let ours: Vec<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let may = allowed
            .get(name)
            .unwrap_or_else(|| panic!("{name} has no row in this test: add one with the crates that it may depend on"));
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            let counts = dependency.kind != cargo_metadata::DependencyKind::Development && ours.contains(&to);
            assert!(!counts || may.contains(&to), "{name} must not depend on {to}");
        }
    }
}

/// The domain depends on no transport, runtime or store.
#[test]
fn domain_depends_on_no_transport() {
    let manifest = std::fs::read_to_string(gauntlet_stack::workspace_root().join("crates/domain/Cargo.toml")).unwrap();
    // Dev-dependencies may be anything.
    let manifest = manifest.split("[dev-dependencies]").next().unwrap();
    for transport in ["prost", "tonic", "http", "axum", "opentelemetry", "tracing", "tokio", "clap", "redb", "etcd"] {
        assert!(!manifest.contains(transport), "the domain depends on {transport}");
    }
}
