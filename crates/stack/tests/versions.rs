//! The images of deploy/compose have the versions of the binaries that the tests run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use gauntlet_stack::{Tool, Tools, workspace_root};

fn file(path: &str) -> String {
    fs::read_to_string(workspace_root().join(path)).unwrap()
}

/// Returns the tag of an image in deploy/compose/compose.yaml, without its `v`.
fn tag(image: &str) -> String {
    let compose = file("deploy/compose/compose.yaml");
    let mut tags = compose.lines().filter_map(|line| line.trim().strip_prefix("image: ")?.split_once(':'));
    let (_, tag) = tags.find(|(name, _)| *name == image).unwrap_or_else(|| panic!("compose has no image {image}"));
    tag.trim_start_matches('v').to_owned()
}

/// Returns the version printed by the binary that the tests use.
fn reported_version(tool: Tool) -> String {
    let version = tool.version(&Tools::from_env().require(tool).unwrap());
    version.unwrap_or_else(|| panic!("{} does not print its version", tool.binary()))
}

/// Returns whether a text contains the version: `v3.6.16`, `3.6.16+ds`, but not `3.6.160`.
fn contains_version(text: &str, version: &str) -> bool {
    let mut words = text.split(|c: char| !(c.is_ascii_digit() || c == '.'));
    words.any(|word| word == version)
}

#[test]
fn compose_images_have_the_versions_of_the_tested_binaries() {
    for (image, tools) in [
        ("quay.io/coreos/etcd", [Tool::Etcd, Tool::Etcdctl].as_slice()),
        ("prom/prometheus", &[Tool::Prometheus, Tool::Promtool]),
        ("prom/alertmanager", &[Tool::Alertmanager, Tool::Amtool]),
        ("jaegertracing/jaeger", &[Tool::Jaeger]),
    ] {
        let tag = tag(image);
        for tool in tools {
            let reported = reported_version(*tool);
            assert!(
                contains_version(&reported, &tag),
                "{image}:{tag} is deployed, but {} is {reported}",
                tool.binary()
            );
        }
    }
}

#[test]
fn image_that_sets_up_etcd_has_its_version() {
    let image = format!("quay.io/coreos/etcd:v{}", tag("quay.io/coreos/etcd"));
    assert!(file("deploy/images/etcd-auth.Dockerfile").contains(&format!("FROM {image} ")));
}

#[test]
fn collector_image_is_built_like_the_tested_collector() {
    let version = "0.159.0";
    for path in ["deploy/images/collector.Dockerfile", "crates/stack/src/tools/go.rs"] {
        let builder = format!("go.opentelemetry.io/collector/cmd/builder@v{version}");
        assert!(file(path).contains(&builder), "{path} does not install {builder}");
    }
    let reported = reported_version(Tool::Collector);
    assert!(file("deploy/collector/manifest.yaml").contains(&format!("/exporter/otlpexporter v{version}")));
    assert!(contains_version(&reported, version), "the manifest has v{version}, but the collector is {reported}");
}

#[test]
fn versions_match_only_as_a_whole() {
    assert!(contains_version("etcd Version: 3.6.16", "3.6.16") && contains_version("version 2.42.0+ds (x)", "2.42.0"));
    assert!(!contains_version("etcd Version: 3.6.160", "3.6.16") && !contains_version("3.4.23", "3.6.16"));
}
