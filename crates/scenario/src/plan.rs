//! A scenario prepared for one instance.

use std::{collections::BTreeMap, path::PathBuf};

use gauntlet_domain::{Additional, Error, Identity, Place, PortSpec, Result, Workload};

use crate::{
    document::Document,
    flag::FlagKey,
    template::{Template, Values},
};

/// The most that `additional` may hold, keys and values together.
const MAX_ADDITIONAL_BYTES: usize = 256 * 1024;

/// What an instance runs, once host and ports are known. Its `Debug` shows no flags.
pub(crate) struct Plan {
    reference: String,
    files: PathBuf,
    document: Document,
    values: Values,
    flags: Vec<(String, String)>,
}

impl Plan {
    /// Renders the flags; what `additional` lacks for them is told now.
    pub(crate) fn new(
        reference: &str,
        files: PathBuf,
        document: Document,
        key: &FlagKey,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<Self> {
        let size: usize = additional.iter().map(|(key, value)| key.len() + value.len()).sum();
        if size > MAX_ADDITIONAL_BYTES {
            return Err(unprepared(
                reference,
                format!("additional holds {size} bytes; at most {MAX_ADDITIONAL_BYTES}"),
            ));
        }
        let values = Values::of(identity, additional);
        let mut flags = Vec::with_capacity(document.flags.len());
        for (name, template) in &document.flags {
            let flag = template.render(&values.clone().varying(key, name)).map_err(|p| unprepared(reference, p))?;
            flags.push((name.clone(), flag));
        }
        Ok(Self { reference: reference.to_owned(), files, document, values, flags })
    }
}

impl gauntlet_domain::Plan for Plan {
    fn ports(&self) -> &[PortSpec] {
        &self.document.ports
    }

    fn render(&self, place: &Place) -> Result<Workload> {
        let values = self.values.clone().placed(self.flags.iter().cloned(), place);
        let text = |template: &Template| {
            let text = template.render(&values)?;
            if text.contains('\0') { Err(format!("{}: holds a NUL byte", template.field())) } else { Ok(text) }
        };
        let rendered = || -> Result<Workload, String> {
            Ok(Workload {
                files: self.files.clone(),
                command: self.document.command.iter().map(text).collect::<Result<_, _>>()?,
                env: self
                    .document
                    .env
                    .iter()
                    .map(|(name, template)| Ok((name.clone(), text(template)?)))
                    .collect::<Result<BTreeMap<_, _>, String>>()?,
                readiness: self.document.readiness.clone(),
                limits: self.document.limits.clone(),
                connection_info: text(&self.document.connection_info)?,
                flags: self.flags.iter().map(|(_, flag)| flag.clone()).collect(),
            })
        };
        rendered().map_err(|problem| unprepared(&self.reference, problem))
    }
}

fn unprepared(reference: &str, problem: String) -> Error {
    Error::ScenarioPreprocessing { reference: reference.to_owned(), problem }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("reference", &self.reference).field("files", &self.files).finish_non_exhaustive()
    }
}
