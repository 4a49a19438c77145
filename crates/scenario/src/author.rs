//! The author's side: check a directory, push it.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::Error;
use oci_client::manifest::{OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageManifest};

use crate::{
    digest::Digest,
    files::{self, FileError, FileLimits, blocking},
    registry::{ARTIFACT_TYPE, Access, FILE_TYPE, Registry, TITLE, parse},
    scenario_file::{Unread, read_document},
    yaml::Problem,
};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What keeps the directory from being a scenario, in order of lines; empty for a sound one.
    pub problems: Vec<Problem>,
    /// What its author may not have meant.
    pub warnings: Vec<String>,
    /// What would be pushed, in order of paths.
    pub files: Vec<ReportFile>,
}

/// A file of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportFile {
    /// Relative to the scenario's directory.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Whether it will be executable: it starts with `#!` or as an ELF program.
    pub executable: bool,
}

impl Report {
    /// Whether the directory can be pushed and run.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// How far a push has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A file is in the registry.
    File {
        /// Its path.
        path: String,
        /// How many are there, this one included.
        done: usize,
        /// How many there are to be.
        of: usize,
        /// Whether it was there before.
        known: bool,
    },
    /// The manifest is there and the tag names it: the push is done.
    Manifest {
        /// Its digest.
        digest: String,
    },
}

/// Why a push did not happen.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The directory is no scenario; nothing was sent.
    #[error("the scenario has {} problems", .0.problems.len())]
    Unsound(Report),
    /// The reference is malformed or has a digest, the registry refuses, a file cannot be read.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// Checks a directory: its `scenario.yaml`, every template in it, and its files against [`FileLimits::default`]. Blocks on the file
/// system.
///
/// # Errors
/// [`Error::Unavailable`] if the directory or a file in it cannot be read.
pub fn validate(dir: &Path) -> Result<Report, Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::Unavailable {
        what: "scenario directory",
        detail: format!("{}: {error}", dir.display()),
    };
    let whole = |text: String| Problem { line: None, field: String::new(), text };
    if !dir.is_dir() {
        return Err(unreadable(&"is not a directory"));
    }
    let mut report = Report::default();
    match read_document(dir) {
        Ok(document) => {
            let program = document.command.first().and_then(|word| word.literal());
            if let Some(program) =
                program.filter(|program| !Path::new(program).is_absolute() && !dir.join(program).is_file())
            {
                report.warnings.push(format!(
                    "process.command: {program:?} is not a file of this scenario; it is looked for in PATH where the instance runs"
                ));
            }
        }
        Err(Unread::Invalid(problems)) => report.problems.extend(problems),
        Err(Unread::Io(error)) => return Err(unreadable(&error)),
    }
    match files::list(dir, &FileLimits::default()) {
        Ok(listed) => {
            for file in listed {
                let mut start = Vec::with_capacity(4);
                let opened = files::open(dir, &file).map_err(|error| unreadable(&error))?;
                opened.take(4).read_to_end(&mut start).map_err(|error| unreadable(&error))?;
                let executable = files::is_program(&start);
                report.files.push(ReportFile { path: file.path, size: file.size, executable });
            }
        }
        Err(FileError::Refused(text)) => report.problems.push(whole(text)),
        Err(error) => return Err(unreadable(&error)),
    }
    Ok(report)
}

/// Checks a directory and pushes it under a tag. The same files give the same digest, whenever and wherever they are pushed; what the
/// registry has already is not sent again. Dropping the future leaves the tag as it was.
///
/// # Errors
/// See [`PushError`]; bounded by [`Access::timeout`].
pub async fn push(
    dir: &Path,
    reference: &str,
    access: &Access,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<String, PushError> {
    let (target, digest) = parse(reference)?;
    if digest.is_some() || target.tag().is_none() {
        let problem = "a push goes to a tag; the digest is its result".to_owned();
        return Err(Error::ReferenceMalformed { reference: reference.to_owned(), problem }.into());
    }
    let checked = dir.to_owned();
    let report = blocking(move || validate(&checked)).await?;
    if !report.is_sound() {
        return Err(PushError::Unsound(report));
    }
    let registry = Registry::new(access).map_err(Error::Internal)?;
    let send = async {
        let mut layers = Vec::with_capacity(report.files.len());
        for (at, file) in report.files.iter().enumerate() {
            let content = read(reference, dir.to_owned(), file).await?;
            let descriptor = OciDescriptor {
                media_type: FILE_TYPE.to_owned(),
                digest: Digest::of(&content).to_string(),
                size: i64::try_from(content.len()).unwrap_or(i64::MAX),
                annotations: Some(BTreeMap::from([(TITLE.to_owned(), file.path.clone())])),
                ..OciDescriptor::default()
            };
            let known = registry.put_blob(reference, &target, &descriptor.digest, content).await?;
            layers.push(descriptor);
            progress(Progress::File { path: file.path.clone(), done: at + 1, of: report.files.len(), known });
        }
        // The empty configuration of the OCI image specification, 1.1.
        let config = OciDescriptor {
            media_type: "application/vnd.oci.empty.v1+json".to_owned(),
            digest: Digest::of(b"{}").to_string(),
            size: 2,
            ..OciDescriptor::default()
        };
        registry.put_blob(reference, &target, &config.digest, b"{}".to_vec()).await?;
        let manifest = OciImageManifest {
            media_type: Some(OCI_IMAGE_MEDIA_TYPE.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config,
            layers,
            ..OciImageManifest::default()
        };
        let body = serde_json::to_vec(&manifest).map_err(|error| Error::Internal(format!("manifest: {error}")))?;
        let digest = Digest::of(&body).to_string();
        registry.put_manifest(reference, &target, body).await?;
        progress(Progress::Manifest { digest: digest.clone() });
        Ok(digest)
    };
    Ok(registry.in_time(reference, send).await?)
}

async fn read(reference: &str, dir: PathBuf, file: &ReportFile) -> Result<Vec<u8>, Error> {
    let listed = files::Listed { path: file.path.clone(), size: file.size };
    let reference = reference.to_owned();
    blocking(move || {
        let mut content = Vec::new();
        let opened = files::open(&dir, &listed).map_err(|error| error.of_scenario(&reference))?;
        let read = opened.take(listed.size + 1).read_to_end(&mut content);
        read.map_err(|error| FileError::Io(dir.join(&listed.path), error).of_scenario(&reference))?;
        if content.len() as u64 == listed.size {
            Ok(content)
        } else {
            let problem = format!("{:?} changed while it was read; push again", listed.path);
            Err(Error::ScenarioInvalid { reference, problem })
        }
    })
    .await
}
