//! For authors: validate a scenario directory and push it.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::Error;

use crate::{
    digest::Digest,
    files::{self, FileError, FileLimits, blocking},
    registry::{
        Access, Registry,
        manifest::{ARTIFACT_TYPE, Descriptor, EMPTY_TYPE, FILE_TYPE, MANIFEST_TYPE, Manifest, TITLE},
        parse,
    },
    scenario_file::{Unread, read_document},
    yaml::Problem,
};

/// The result of [`validate`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, by line; empty if the scenario is valid.
    pub problems: Vec<Problem>,
    /// What works but is probably not intended.
    pub warnings: Vec<String>,
    /// The files that a push would send, by path.
    pub files: Vec<ReportFile>,
}

/// A file of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportFile {
    /// Relative to the scenario's directory.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Whether it will be executable: a script (`#!`) or an ELF program.
    pub executable: bool,
}

impl Report {
    /// Whether the directory can be pushed and run.
    pub fn is_valid(&self) -> bool {
        self.problems.is_empty()
    }
}

/// The progress of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A file is in the registry now.
    File {
        /// Its path.
        path: String,
        /// The number of files in the registry, this one included.
        done: usize,
        /// The number of files to push.
        of: usize,
        /// Whether the registry had it before.
        known: bool,
    },
    /// The tag points to the new manifest: the push is complete.
    Manifest {
        /// Its digest.
        digest: String,
    },
}

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The scenario is invalid; nothing was sent.
    #[error("the scenario has {} problems", .0.problems.len())]
    Unsound(Report),
    /// The reference is malformed or has a digest, the registry failed, or a file can't be read.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// Validates a directory: its `scenario.yaml` with all templates, and its files against [`FileLimits::default`]. Blocks on the file system.
///
/// # Errors
/// [`Error::Unavailable`] if the directory or a file in it can't be read.
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

/// Validates a directory and pushes it to a tag. Returns the digest. The same files always give the same digest, and blobs that the registry
/// has are not sent again. Takes at most [`Access::timeout`].
///
/// # Errors
/// See [`PushError`].
///
/// # Cancel safety
/// Dropping the future leaves the tag unchanged: it is moved last.
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
    if !report.is_valid() {
        return Err(PushError::Unsound(report));
    }
    let registry = Registry::new(access).map_err(Error::Internal)?;
    let send = async {
        let mut push = registry.push(reference, &target)?;
        let mut layers = Vec::with_capacity(report.files.len());
        for (at, file) in report.files.iter().enumerate() {
            let content = read(reference, dir.to_owned(), file).await?;
            let descriptor = Descriptor {
                media_type: FILE_TYPE.to_owned(),
                digest: Digest::of(&content).to_string(),
                size: i64::try_from(content.len()).unwrap_or(i64::MAX),
                annotations: Some(BTreeMap::from([(TITLE.to_owned(), file.path.clone())])),
            };
            let known = push.blob(&descriptor.digest, content).await?;
            layers.push(descriptor);
            progress(Progress::File { path: file.path.clone(), done: at + 1, of: report.files.len(), known });
        }
        // The empty configuration of the OCI image specification 1.1.
        let digest = Digest::of(b"{}").to_string();
        let config = Descriptor { media_type: EMPTY_TYPE.to_owned(), digest, size: 2, annotations: None };
        push.blob(&config.digest, b"{}".to_vec()).await?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST_TYPE.to_owned()),
            config,
            layers,
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        };
        let body = serde_json::to_vec(&manifest).map_err(|error| Error::Internal(format!("manifest: {error}")))?;
        let digest = Digest::of(&body).to_string();
        push.manifest(body).await?;
        progress(Progress::Manifest { digest: digest.clone() });
        Ok(digest)
    };
    Ok(registry.with_timeout(reference, send).await?)
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
