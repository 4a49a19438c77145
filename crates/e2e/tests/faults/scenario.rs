//! What instances run here: next to nothing.

use std::path::PathBuf;

use crate::harness::{World, local};

/// Ready at once.
pub(super) fn quick() -> String {
    local("quick")
}

/// Ready when the [`Gate`] is open: what is to go wrong meanwhile does, however fast or slow the machine is.
pub(super) fn gated() -> String {
    local("gated")
}

/// Both, below the world's scenarios. An instance says its identity in its connection info.
pub(super) fn write_scenarios(world: &World) {
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done; ", Gate::of(world).0.display());
    for (name, before) in [("quick", ""), ("gated", &wait)] {
        let dir = world.path("scenarios").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let text = SCENARIO.replace("BEFORE", before);
        std::fs::write(dir.join("scenario.yaml"), text).unwrap();
    }
}

/// What instances of [`gated`] wait for while they are brought up. It is closed at first.
pub(super) struct Gate(PathBuf);

impl Gate {
    pub(super) fn of(world: &World) -> Gate {
        Gate(world.path("gate"))
    }

    pub(super) fn open(&self) {
        std::fs::write(&self.0, "").unwrap();
    }

    /// Closes it until what is answered is dropped, or it is opened.
    pub(super) fn close(&self) -> Closed {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => Closed(Gate(self.0.clone())),
        }
    }
}

/// Opens the gate when it is dropped.
pub(super) struct Closed(Gate);

impl Drop for Closed {
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
