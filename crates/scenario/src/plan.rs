//! From a checked document to the launch plan of one instance: first the flags, then, once the placement is known, everything else.

use gauntlet_domain::{Additional, Error, Identity, LaunchPlan, Placement, PreparedScenario, Result};

use crate::{
    document::Document,
    flag::FlagKey,
    template::{Template, Values},
};

/// The largest total size of `additional`, keys and values together.
const MAX_ADDITIONAL_BYTES: usize = 256 * 1024;

/// Renders the flags: by name, in the order of the document.
pub(crate) fn flags(
    reference: &str,
    document: &Document,
    key: &FlagKey,
    identity: &Identity,
    additional: &Additional,
) -> Result<Vec<(String, String)>> {
    let size: usize = additional.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_ADDITIONAL_BYTES {
        let problem = format!("additional holds {size} bytes; at most {MAX_ADDITIONAL_BYTES}");
        return Err(failed(reference, problem));
    }
    let values = Values::of(identity, additional);
    let flag = |(name, template): &(String, Template)| {
        let flag = template.render(&values.clone().varying(key, name)).map_err(|problem| failed(reference, problem))?;
        Ok((name.clone(), flag))
    };
    document.flags.iter().map(flag).collect()
}

/// Renders the plan.
pub(crate) fn render(document: &Document, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan> {
    let PreparedScenario { scenario, identity, additional, files, flags, .. } = prepared;
    let values = Values::of(identity, additional).placed(flags.iter().cloned(), placement);
    let text = |template: &Template| {
        let text = template.render(&values)?;
        if text.contains('\0') { Err(format!("{}: holds a NUL byte", template.field())) } else { Ok(text) }
    };
    let variable = |(name, template): &(String, Template)| Ok((name.clone(), text(template)?));
    let rendered = || -> Result<LaunchPlan, String> {
        Ok(LaunchPlan {
            ports: document.ports.clone(),
            files: files.clone(),
            command: document.command.iter().map(text).collect::<Result<_, _>>()?,
            env: document.env.iter().map(variable).collect::<Result<_, String>>()?,
            readiness: document.readiness.clone(),
            limits: document.limits.clone(),
            isolation: document.isolation,
            connection_info: text(&document.connection_info)?,
            flags: flags.iter().map(|(_, flag)| flag.clone()).collect(),
        })
    };
    rendered().map_err(|problem| failed(&scenario.reference, problem))
}

fn failed(reference: &str, problem: String) -> Error {
    Error::ScenarioPreprocessing { reference: reference.to_owned(), problem }
}
