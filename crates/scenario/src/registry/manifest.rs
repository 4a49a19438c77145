//! The manifest of a scenario: its form, and the checks before anything else is downloaded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    files::{FileError, FileLimits, refused, relative},
    registry::failure::one_line,
};

/// The artifact type of a scenario.
pub(crate) const ARTIFACT_TYPE: &str = "application/vnd.ctfer-io.scenario";
/// The media type of one of its files.
pub(crate) const FILE_TYPE: &str = "application/vnd.ctfer-io.file";
/// The media type of a directory packed as one layer.
pub(crate) const ARCHIVE_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The media type of a manifest.
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of the empty configuration, `{}`.
pub(crate) const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// The media types that are asked for. Those that are no scenarios are rejected with a better message than the registry's.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// The largest manifest, in bytes: the size that the distribution specification asks registries to support.
pub(crate) const MAX_BYTES: usize = 4 << 20;
/// The annotation that holds a layer's path.
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
/// The annotation of a layer that must be unpacked.
const UNPACK: &str = "io.deis.oras.content.unpack";

/// An OCI image manifest, as far as scenarios use it. The order of the fields decides the digest of a push.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
}

/// A reference to a blob.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

/// A layer whose descriptor was checked.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) title: String,
    pub(crate) size: u64,
    pub(crate) archive: bool,
    pub(crate) digest: Digest,
}

impl Manifest {
    /// Parses the manifest of a scenario.
    ///
    /// # Errors
    /// The text says why this is no scenario.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| one_line(&format!("its manifest is not an OCI image manifest: {error}")))?;
        // Manifests older than OCI 1.1 have no artifact type; their configuration's type takes its place.
        let kind = manifest.artifact_type.as_deref().unwrap_or(&manifest.config.media_type);
        if kind != ARTIFACT_TYPE {
            let fix = "push it with `gauntlet scenario push`";
            return Err(format!("is an artifact of type {:?}, a scenario is {ARTIFACT_TYPE:?}; {fix}", shown(kind)));
        }
        Ok(manifest)
    }

    /// Checks the layers against the limits, before anything is downloaded.
    pub(crate) fn layers(&self, limits: &FileLimits) -> Result<Vec<Layer>, FileError> {
        if self.layers.is_empty() || self.layers.len() > limits.count {
            return refused(format!("has {} files; 1 to {} are right", self.layers.len(), limits.count));
        }
        let mut total = 0u64;
        let mut layers = Vec::with_capacity(self.layers.len());
        for descriptor in &self.layers {
            let annotation = |name: &str| descriptor.annotations.as_ref().and_then(|all| all.get(name));
            let Ok(digest) = descriptor.digest.parse() else {
                return refused(format!("layer {:?} is not named by a SHA-256 digest", shown(&descriptor.digest)));
            };
            let Some(title) = annotation(TITLE) else {
                return refused(format!("layer {digest} has no annotation {TITLE}"));
            };
            let title = relative(title)?;
            let archive = annotation(UNPACK).is_some_and(|unpack| unpack == "true");
            let kind = descriptor.media_type.as_str();
            if !(kind == FILE_TYPE || archive && kind == ARCHIVE_TYPE) {
                return refused(format!(
                    "layer {title:?} is of type {:?}; a scenario's file is {FILE_TYPE:?}",
                    shown(kind)
                ));
            }
            let size = match u64::try_from(descriptor.size) {
                Ok(size) if size <= limits.file => size,
                _ => return refused(format!("file {title:?} is {} bytes; at most {}", descriptor.size, limits.file)),
            };
            total = total.saturating_add(size);
            if total > limits.total {
                return refused(format!("its files hold over {} bytes together", limits.total));
            }
            layers.push(Layer { title, size, archive, digest });
        }
        Ok(layers)
    }
}

/// The start of a text that the registry chose.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}
