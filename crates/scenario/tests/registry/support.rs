//! A real registry with a scenario to push, and artifacts built by hand.

use std::{fs, path::PathBuf};

use gauntlet_domain::{Additional, Identity, Pinned, Scenarios as _};
use gauntlet_scenario::{Access, Config, FileLimits, FlagKey, Library, push};
use gauntlet_stack::{Registry, RegistryOptions};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A valid `scenario.yaml`.
pub(crate) const DOCUMENT: &str = "version: 1\nprovisioner: process\nprocess: { command: [\"./bin/run\"] }\nports: { a: tcp }\n\
                        ready: { tcp: { port: a } }\nflags: { main: \"{{ vary('x') }}\" }\nconnection_info: \"{{ ports.a }}\"\n";

/// A real registry, a scenario to push, and directories for caches.
pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) registry: Registry,
}

/// Access without TLS or credentials.
pub(crate) fn plain() -> Access {
    Access { insecure: true, ..Access::default() }
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(RegistryOptions::default())
    }

    pub(crate) fn with(options: RegistryOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start(dir.path().join("registry"), &options).expect("the registry did not start");
        let scenario = dir.path().join("scenario");
        fs::create_dir_all(scenario.join("bin")).unwrap();
        fs::write(scenario.join("scenario.yaml"), DOCUMENT).unwrap();
        fs::write(scenario.join("bin/run"), "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::write(scenario.join("empty"), "").unwrap();
        fs::write(scenario.join("large"), vec![7; 5 << 20]).unwrap();
        Self { dir, registry }
    }

    pub(crate) fn scenario(&self) -> PathBuf {
        self.dir.path().join("scenario")
    }

    pub(crate) fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.registry.address())
    }

    pub(crate) fn library(&self, access: Access) -> Library {
        self.library_at("cache", access, FileLimits::default())
    }

    pub(crate) fn library_at(&self, cache: &str, access: Access, limits: FileLimits) -> Library {
        let mut config = Config::new(self.dir.path().join(cache), FlagKey::new([1; 32]));
        config.access = access;
        config.limits = limits;
        Library::new(config).unwrap()
    }

    pub(crate) async fn push(&self, rest: &str) -> String {
        push(&self.scenario(), &self.reference(rest), &plain(), &|_| {}).await.unwrap()
    }

    pub(crate) fn cached(&self, cache: &str) -> usize {
        fs::read_dir(self.dir.path().join(cache).join("sha256")).unwrap().count()
    }

    pub(crate) fn drafts(&self, cache: &str) -> usize {
        fs::read_dir(self.dir.path().join(cache).join("drafts")).unwrap().count()
    }

    /// Returns the number of blobs that the registry has served.
    pub(crate) fn blobs_served(&self) -> usize {
        let log = fs::read_to_string(self.registry.process.log()).unwrap();
        log.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/sha256:")).count()
    }

    pub(crate) fn url(&self, rest: &str) -> String {
        format!("http://{}/v2/{rest}", self.registry.address())
    }

    /// Uploads a blob over plain HTTP and returns its digest and size.
    pub(crate) fn put_blob(&self, repository: &str, content: &[u8]) -> (String, usize) {
        let digest = digest(content);
        let begun = ureq::post(self.url(&format!("{repository}/blobs/uploads/"))).send_empty().unwrap();
        let location = begun.headers()["location"].to_str().unwrap().to_owned();
        let separator = if location.contains('?') { '&' } else { '?' };
        ureq::put(format!("{location}{separator}digest={digest}")).send(content).unwrap();
        (digest, content.len())
    }

    pub(crate) fn put_manifest(&self, repository: &str, manifest: &Value) {
        let kind = manifest["mediaType"].as_str().unwrap().to_owned();
        ureq::put(self.url(&format!("{repository}/manifests/latest")))
            .header("content-type", kind)
            .send(manifest.to_string())
            .unwrap();
    }

    /// Pushes an artifact with these layers (overrides of the descriptor, content) and a valid `scenario.yaml`; returns its reference.
    pub(crate) fn put(&self, repository: &str, layers: &[(Value, &[u8])]) -> String {
        let mut all = vec![self.layer(repository, &json!({}), "scenario.yaml", DOCUMENT.as_bytes())];
        for (over, content) in layers {
            all.push(self.layer(repository, over, "file", content));
        }
        self.put_manifest(repository, &self.manifest(repository, all));
        self.reference(repository)
    }

    pub(crate) fn layer(&self, repository: &str, over: &Value, title: &str, content: &[u8]) -> Value {
        let (digest, size) = self.put_blob(repository, content);
        let mut layer = json!({
            "mediaType": "application/vnd.ctfer-io.file", "digest": digest, "size": size,
            "annotations": { "org.opencontainers.image.title": title }
        });
        merge(&mut layer, over);
        layer
    }

    pub(crate) fn manifest(&self, repository: &str, layers: Vec<Value>) -> Value {
        let (digest, size) = self.put_blob(repository, b"{}");
        json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.ctfer-io.scenario",
            "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": size },
            "layers": layers
        })
    }
}

pub(crate) fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

pub(crate) fn merge(into: &mut Value, over: &Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            over.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, over) => *into = over.clone(),
    }
}

pub(crate) fn titled(title: &str) -> Value {
    json!({ "annotations": { "org.opencontainers.image.title": title } })
}

pub(crate) fn unpacked(title: &str) -> Value {
    json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "annotations": { "org.opencontainers.image.title": title, "io.deis.oras.content.unpack": "true" }
    })
}

/// Builds a gzipped tar of entries (kind, name, content or link target). Names are written unchecked.
pub(crate) fn packed(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (kind, name, text) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o777);
        let content = if kind.is_file() { text.as_bytes() } else { &[] };
        if !kind.is_file() {
            header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap().finish().unwrap()
}

pub(crate) async fn files_of(library: &Library, pinned: &Pinned) -> PathBuf {
    library.prepare(pinned, &Identity::from_bits(1), None, &Additional::new()).await.unwrap().files
}
