//! Scenario references, OCI pull and push, templates, flag variation.
//!
//! A scenario is a directory with a `scenario.yaml`, named by an OCI reference (`registry/repository:tag@sha256:…`) or, where the
//! operator allows it, by `file://PATH`. [`Library`] fetches and checks it, caches it by digest, and renders launch plans from it.
//! [`validate`] and [`push`] are for authors. `docs/scenarios.md` describes the format.

mod archive;
mod author;
mod cache;
mod digest;
mod document;
mod documents;
mod draft;
mod files;
mod flag;
mod flag_keys;
mod flights;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod library;
mod limits;
mod local;
mod plan;
mod quantity;
mod registry;
mod scenario_file;
mod seal;
mod template;
mod yaml;

pub use author::{Progress, PushError, Report, ReportFile, push, validate};
pub use cache::Evicted;
pub use files::FileLimits;
pub use flag::{FlagKey, MAX_TEXT_BYTES, MIN_ENTROPY_BITS};
pub use flag_keys::FlagKeys;
pub use library::{Config, Library};
pub use limits::parse_limits;
pub use registry::{Access, Allowed, Credentials, Host, InvalidPattern, RegistryPattern};
pub use yaml::Problem;
