//! What went wrong, in words that say what to do.

use std::{fmt::Write as _, io, process::ExitCode};

use anstyle::{AnsiColor, Style};
use gauntlet_client::TlsError;
use gauntlet_domain::Error;
use gauntlet_scenario::{PushError, Report};
use gauntlet_startup::{EX_UNAVAILABLE, EX_USAGE};
use gauntlet_telemetry::layers::code_name;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::printable::printable;

/// Why a command failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The API's answer, or the lack of one.
    Api { server: String, status: Box<Status> },
    /// What was given does not do; says the fix.
    Usage(&'static str),
    /// TLS cannot be set up, whatever the server.
    Tls(TlsError),
    /// The API's answer has no JSON form.
    Answer(String),
    /// The directory is no sound scenario.
    Unsound(Report),
    /// A scenario could not be checked or pushed.
    Scenario(Error),
    /// Standard input or output, or the machine.
    Io(io::Error),
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Self {
        Self::Tls(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Scenario(error)
    }
}

impl From<PushError> for Failure {
    fn from(error: PushError) -> Self {
        match error {
            PushError::Unsound(report) => Self::Unsound(report),
            PushError::Failed(error) => Self::Scenario(error),
        }
    }
}

impl Failure {
    /// Says it on standard error; answers with the exit code.
    pub(super) fn report(&self) -> ExitCode {
        anstream::eprint!("{}", self.text());
        match self {
            Self::Api { status, .. } if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
                EX_UNAVAILABLE.into()
            }
            Self::Usage(_) => EX_USAGE.into(),
            Self::Scenario(Error::Registry { .. }) => EX_UNAVAILABLE.into(),
            _ => ExitCode::FAILURE,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Api { server, status } => api(server, status),
            Self::Usage(problem) => said(problem, &[], None),
            Self::Tls(error) => said(&error.to_string(), &[], None),
            Self::Answer(why) => {
                said("The answer cannot be shown as JSON.", std::slice::from_ref(why), Some("leave --output json out"))
            }
            Self::Unsound(report) => said(
                "This is no sound scenario.",
                &report.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
                Some("docs/scenarios.md describes the format"),
            ),
            Self::Scenario(error) => scenario(error),
            Self::Io(error) => said(&error.to_string(), &[], None),
        }
    }
}

/// An error, its particulars, each on a line, and the fix.
fn said(error: &str, particulars: &[String], fix: Option<&str>) -> String {
    let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
    let green = Style::new().fg_color(Some(AnsiColor::Green.into()));
    let mut text = format!("{red}error:{red:#} {}\n", printable(error));
    for particular in particulars {
        let _ = writeln!(text, "  {}", printable(particular));
    }
    if let Some(fix) = fix {
        let _ = writeln!(text, "  {green}fix:{green:#} {fix}");
    }
    text
}

fn api(server: &str, status: &Status) -> String {
    let details = status.get_error_details();
    let mut particulars = Vec::new();
    let mut reason = None;
    match details.error_info() {
        Some(info) => {
            let mut metadata: Vec<_> = info.metadata.iter().map(|(key, value)| format!("{key}: {value}")).collect();
            metadata.sort();
            let metadata = if metadata.is_empty() { String::new() } else { format!(" ({})", metadata.join(", ")) };
            particulars.push(format!("reason: {}{metadata}", info.reason));
            reason = Some(info.reason.as_str());
        }
        None => particulars.push(format!("code: {}", code_name(status.code()))),
    }
    if let Some(request) = details.bad_request() {
        // A field that is refused may be named in the message already.
        let news =
            request.field_violations.iter().filter(|violation| !status.message().contains(&violation.description));
        particulars.extend(news.map(|violation| format!("{}: {}", violation.field, violation.description)));
    }
    if let Some(failure) = details.precondition_failure() {
        particulars.extend(failure.violations.iter().map(|violation| violation.description.clone()));
    }
    if let Some(resource) = details.resource_info() {
        particulars.push(format!("{} {}: {}", resource.resource_type, resource.resource_name, resource.description));
    }
    if let Some(help) = details.help() {
        particulars.extend(help.links.iter().map(|link| format!("see: {} {}", link.description, link.url)));
    }
    let fix = match (reason, status.code()) {
        (Some(reason), _) => fix(reason).map(str::to_owned),
        (None, Code::Unavailable) => Some(format!(
            "is a manager listening at {server}? start one with `gauntlet dev`, or name another with --url"
        )),
        (None, Code::DeadlineExceeded) => Some("give it more time with --deadline; it may still go through".into()),
        (None, Code::Unimplemented) => Some(format!("is {server} a v1 API? name another with --url")),
        _ => None,
    };
    said(status.message(), &particulars, fix.as_deref())
}

/// What to do about a reason of the v1 contract.
fn fix(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "CHALLENGE_ALREADY_EXISTS" => "change it with `gauntlet challenge update`, or choose another id",
        "CHALLENGE_NOT_FOUND" => "`gauntlet challenge list` shows those there are",
        "CHALLENGE_EXPIRED" => {
            "move its end with `gauntlet challenge update ID --until TIME`, or drop it with --no-until"
        }
        "CHALLENGE_NO_RENEWAL" => "give it a timeout with `gauntlet challenge update ID --timeout 10m`",
        "INSTANCE_ALREADY_EXISTS" => "give it more time with `gauntlet instance renew`, or delete it first",
        "INSTANCE_NOT_FOUND" => "start one with `gauntlet instance create`",
        "INSTANCE_EXPIRED" => "delete it with `gauntlet instance delete` and create another",
        "OCI_REFERENCE_MALFORMED" => "write it as registry/repository:tag, as in registry.lan:5000/web:1",
        "OCI_REFERENCE_NOT_FOUND" => "push it with `gauntlet scenario push DIR REF`",
        "SCENARIO_NON_MATCHING_SPECIFICATION" => "`gauntlet scenario validate DIR` names line and field",
        "INTERNAL_ERROR" => "the manager's log and traces say more",
        _ => return None,
    })
}

fn scenario(error: &Error) -> String {
    said(&error.to_string(), &[format!("reason: {}", error.code())], fix(error.code()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use gauntlet_api::error;

    use super::*;

    fn text(status: Status) -> String {
        let failure = Failure::Api { server: "http://localhost:8080".into(), status: Box::new(status) };
        anstream::adapter::strip_str(&failure.text()).to_string()
    }

    #[test]
    fn texts() {
        let all = [
            error::challenge_not_found("web-1"),
            error::challenge_no_renewal("web-1"),
            error::challenge_pooler_out_of_bounds(-1, -2, 1000),
            error::challenge_invalid_update_mask(&["id"]),
            error::instance_already_exists("web-1", "42"),
            error::oci_reference_malformed("a b", "It has a space."),
            error::invalid_field("id", "must not be empty"),
            error::internal_error(),
            error::unavailable("BUSY"),
            Status::unavailable("tcp connect error"),
            Status::deadline_exceeded("no answer within 2m"),
            Status::unknown("two\nlines \u{1b}[31m"),
        ];
        insta::assert_snapshot!(all.map(text).join("\n"));
    }
}
