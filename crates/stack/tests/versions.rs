//! What is deployed is what is tested: the images of deploy/compose have the versions of the binaries that tests run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use gauntlet_stack::{Tool, Tools, workspace_root};

fn file(path: &str) -> String {
    fs::read_to_string(workspace_root().join(path)).unwrap()
}

/// The tag of an image in deploy/compose/compose.yaml, without its `v`.
fn tag(image: &str) -> String {
    let compose = file("deploy/compose/compose.yaml");
    let mut tags = compose.lines().filter_map(|line| line.trim().strip_prefix("image: ")?.split_once(':'));
    let (_, tag) = tags.find(|(name, _)| *name == image).unwrap_or_else(|| panic!("compose has no image {image}"));
    tag.trim_start_matches('v').to_owned()
}

/// What the binary that tests run says about its version.
fn said(tool: Tool) -> String {
    let said = tool.version(&Tools::from_env().require(tool).unwrap());
    said.unwrap_or_else(|| panic!("{} does not say its version", tool.binary()))
}

/// Whether a text names a version: `v3.6.16`, `3.6.16+ds`, but not `3.6.160`.
fn names(text: &str, version: &str) -> bool {
    let mut words = text.split(|c: char| !(c.is_ascii_digit() || c == '.'));
    words.any(|word| word == version)
}

#[test]
fn images_have_the_versions_of_the_tested_binaries() {
    for (image, tools) in [
        ("quay.io/coreos/etcd", [Tool::Etcd, Tool::Etcdctl].as_slice()),
        ("prom/prometheus", &[Tool::Prometheus, Tool::Promtool]),
        ("prom/alertmanager", &[Tool::Alertmanager, Tool::Amtool]),
        ("jaegertracing/jaeger", &[Tool::Jaeger]),
    ] {
        let tag = tag(image);
        for tool in tools {
            let said = said(*tool);
            assert!(names(&said, &tag), "{image}:{tag} is deployed, and {} says {said}", tool.binary());
        }
    }
}

#[test]
fn the_collector_image_is_built_as_the_tested_collector_is() {
    let version = "0.159.0";
    for path in ["deploy/images/collector.Dockerfile", "crates/stack/src/tools/go.rs"] {
        let builder = format!("go.opentelemetry.io/collector/cmd/builder@v{version}");
        assert!(file(path).contains(&builder), "{path} does not install {builder}");
    }
    let said = said(Tool::Collector);
    assert!(file("deploy/collector/manifest.yaml").contains(&format!("/exporter/otlpexporter v{version}")));
    assert!(names(&said, version), "the manifest has v{version}, and the collector says {said}");
}

#[test]
fn versions_are_compared_whole() {
    assert!(names("etcd Version: 3.6.16", "3.6.16") && names("version 2.42.0+ds (x)", "2.42.0"));
    assert!(!names("etcd Version: 3.6.160", "3.6.16") && !names("3.4.23", "3.6.16"));
}
