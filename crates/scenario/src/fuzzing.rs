//! Entry points for the fuzz targets of `fuzz/`: what registries and authors send. Only with the feature `fuzzing`.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed property must end the fuzzer")]

use std::{
    io::{Seek as _, Write as _},
    path::Path,
};

use gauntlet_domain::{Additional, Identity, Pinned, Placement, PreparedScenario};

use crate::{
    archive,
    document::Document,
    draft::Draft,
    files::FileLimits,
    flag::FlagKey,
    plan,
    registry::{self, manifest::Manifest},
    template::{Scope, Template, Values},
    yaml::Problems,
};

/// Smaller than the defaults: a fuzzer must not fill the disk.
const LIMITS: FileLimits = FileLimits { file: 1 << 16, total: 1 << 18, count: 32 };

fn identity() -> Identity {
    Identity::from_bits(0x0123_4567_89ab_cdef)
}

fn additional() -> Additional {
    Additional::from([("motd".to_owned(), "hello {{ host }}".to_owned())])
}

fn placement(ports: impl Iterator<Item = String>) -> Placement {
    Placement {
        host: "127.0.0.1".to_owned(),
        ports: ports.zip(20000..).collect(),
        dir: "/work".into(),
        hold: gauntlet_domain::PortHold::default(),
    }
}

/// Reads a `scenario.yaml`, and renders the launch plan of one that is valid.
pub fn scenario_file(text: &str) {
    let Ok(document) = Document::parse(text) else { return };
    let pinned = Pinned { reference: "registry.example/x:v1".to_owned(), digest: String::new() };
    let key = FlagKey::new([7; 32]);
    let Ok(flags) = plan::flags(&pinned.reference, &document, &key, &identity(), &additional()) else { return };
    let prepared = PreparedScenario { flags, ..PreparedScenario::new(&pinned, &identity(), &additional()) };
    let placement = placement(document.ports.iter().map(|port| port.name.clone()));
    let _ = plan::render(&document, &prepared, &placement);
}

/// Checks a template as a flag and as another text, and renders one without problems.
pub fn template(source: &str) {
    let mut problems = Problems::default();
    let flag = Template::check(1, "flags.main", source.to_owned(), &Scope::Flag, &mut problems);
    if problems.0.is_empty() {
        let _ = flag.render(&Values::of(&identity(), &additional()).varying(&FlagKey::new([7; 32]), "main"));
    }
    let names = ["main".to_owned()];
    let mut problems = Problems::default();
    let scope = Scope::Placed { flags: &names, ports: &names };
    let text = Template::check(1, "connection_info", source.to_owned(), &scope, &mut problems);
    if problems.0.is_empty() {
        let flags = [("main".to_owned(), "FLAG{x}".to_owned())];
        let placement = placement(names.iter().cloned());
        let _ = text.render(&Values::of(&identity(), &additional()).placed(flags.into_iter(), &placement));
    }
}

/// Parses a reference. One that is accepted names the same artifact once it is written out.
pub fn reference(text: &str) {
    let Ok((reference, digest)) = registry::parse(text) else { return };
    let (again, digest_again) = registry::parse(&reference.whole()).expect("a parsed reference is valid");
    assert_eq!((again.whole(), digest_again), (reference.whole(), digest));
}

/// Parses a manifest, and checks its layers.
pub fn manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    let _ = manifest.layers(&LIMITS);
}

/// Unpacks an archive below `dir`. Nothing is written elsewhere, nor more than the limits allow.
pub fn archive(bytes: &[u8], dir: &Path) {
    let mut packed = tempfile::tempfile().expect("a temporary file");
    packed.write_all(bytes).expect("write the archive");
    packed.rewind().expect("rewind");
    let mut draft = Draft::within(dir, &LIMITS).expect("a draft");
    let _ = archive::unpack(packed, "files", &mut draft);
}
