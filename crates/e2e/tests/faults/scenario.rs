//! What instances run here: next to nothing.

use crate::harness::{World, local};

/// Ready at once.
pub(super) fn quick() -> String {
    local("quick")
}

/// Ready after a second: time enough to go wrong.
pub(super) fn slow() -> String {
    local("slow")
}

/// Both, below the world's scenarios. An instance says its identity in its connection info.
pub(super) fn write_scenarios(world: &World) {
    for (name, before) in [("quick", ""), ("slow", "sleep 1; ")] {
        let dir = world.path("scenarios").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let text = SCENARIO.replace("BEFORE", before);
        std::fs::write(dir.join("scenario.yaml"), text).unwrap();
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
flags:
  main: "FLAG{ {{- vary('whatever happens') -}} }"
connection_info: "{{ identity }}"
"#;
