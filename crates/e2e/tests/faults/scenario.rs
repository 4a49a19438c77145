//! Minimal scenarios for instances under test.

use std::{fs::Permissions, os::unix::fs::PermissionsExt as _, path::PathBuf};

use crate::harness::{World, binaries, local};

/// The reference of a scenario whose instances are ready at once.
pub(super) fn quick_scenario() -> String {
    local("quick")
}

/// The reference of a scenario whose instances are ready once the [`Gate`] is open. A test can inject its fault before that, independent of
/// timing.
pub(super) fn gated_scenario() -> String {
    local("gated")
}

/// Writes both scenarios. The connection info of their instances is the identity.
pub(super) fn write_scenarios(world: &World) {
    let wait_for_gate = format!("while ! command -v {GATE}; do sleep 0.05; done; ");
    let dir = gate_dir(world);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    for (name, before) in [("quick", ""), ("gated", &wait_for_gate)] {
        let dir = world.path("scenarios").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let text = SCENARIO.replace("BEFORE", before);
        std::fs::write(dir.join("scenario.yaml"), text).unwrap();
    }
}

/// The name of the program that is there while the gate is open. An instance sees nothing else of the test that changes while it runs.
const GATE: &str = "gate-is-open";

fn gate_dir(world: &World) -> PathBuf {
    world.path("gate")
}

/// The `INSTANCE_PATH` of managers that run these scenarios.
pub(super) fn instance_path(world: &World) -> String {
    format!("{}:{}", gate_dir(world).display(), binaries().display())
}

/// Blocks instances of [`gated_scenario`] while they are provisioned. The gate is closed at first.
pub(super) struct Gate(PathBuf);

impl Gate {
    pub(super) fn of(world: &World) -> Gate {
        Gate(gate_dir(world).join(GATE))
    }

    pub(super) fn open(&self) {
        std::fs::write(&self.0, "").unwrap();
        std::fs::set_permissions(&self.0, Permissions::from_mode(0o755)).unwrap();
    }

    /// Closes the gate until the returned guard is dropped.
    pub(super) fn close(&self) -> ClosedGate {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => ClosedGate(Gate(self.0.clone())),
        }
    }
}

/// Opens the gate when it is dropped.
pub(super) struct ClosedGate(Gate);

impl Drop for ClosedGate {
    fn drop(&mut self) {
        self.0.open();
    }
}

const SCENARIO: &str = r#"version: 1
provisioner: process
process:
  command: ["/bin/sh", "-c", "BEFOREecho up; exec sleep infinity"]
  env:
    MOTD: "{{ additional['motd'] | default('none') }}"
ready:
  output: { contains: up }
  interval: 20ms
  timeout: 5m
flags:
  main: "FLAG{ {{- vary('whatever happens') -}} }"
connection_info: "{{ identity }}"
"#;
