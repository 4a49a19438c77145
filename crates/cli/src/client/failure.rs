//! Errors as users read them: what happened, the details, and what to do.

use std::{fmt::Write as _, io, process::ExitCode};

use anstyle::{AnsiColor, Style};
use gauntlet_client::ChannelError;
use gauntlet_domain::Error;
use gauntlet_scenario::{PushError, Report};
use gauntlet_startup::{EX_UNAVAILABLE, EX_USAGE};
use gauntlet_telemetry::layers::code_name;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::printable::printable;

/// The error of a command.
#[derive(Debug)]
pub(super) enum Failure {
    /// A call failed, or was not answered.
    Api { server: String, status: Box<Status> },
    /// The flags do not fit together. The text includes what to do.
    Usage(&'static str),
    /// The credentials or TLS cannot be used, whatever the server answers.
    Channel(ChannelError),
    /// The token file cannot be used. The text names it and the fix.
    TokenFile(String),
    /// A response cannot be converted to JSON.
    Json(String),
    /// The scenario is invalid.
    Invalid(Report),
    /// A scenario could not be validated or pushed.
    Scenario(Error),
    /// An error of standard input, standard output or the operating system.
    Io(io::Error),
}

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        Self::Channel(error)
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
            PushError::Unsound(report) => Self::Invalid(report),
            PushError::Failed(error) => Self::Scenario(error),
        }
    }
}

impl Failure {
    /// Prints the error to standard error and returns the exit code.
    pub(super) fn report(&self) -> ExitCode {
        anstream::eprint!("{}", self.text());
        match self {
            Self::Api { status, .. } if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
                EX_UNAVAILABLE.into()
            }
            Self::Usage(_) | Self::Channel(ChannelError::Credentials(_)) => EX_USAGE.into(),
            Self::Scenario(Error::Registry { .. }) => EX_UNAVAILABLE.into(),
            _ => ExitCode::FAILURE,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Api { server, status } => api(server, status),
            Self::Usage(problem) => render(problem, &[], None),
            Self::Channel(error) => render(&error.to_string(), &[], None),
            Self::TokenFile(problem) => render(problem, &[], None),
            Self::Json(why) => {
                render("The response cannot be shown as JSON.", std::slice::from_ref(why), Some("omit --output json"))
            }
            Self::Invalid(report) => render(
                "The scenario is invalid.",
                &report.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
                Some("docs/scenarios.md describes the format"),
            ),
            Self::Scenario(error) => scenario(error),
            Self::Io(error) => render(&error.to_string(), &[], None),
        }
    }
}

/// Renders an error, its details, one per line, and what to do.
fn render(error: &str, details: &[String], fix: Option<&str>) -> String {
    let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
    let green = Style::new().fg_color(Some(AnsiColor::Green.into()));
    let mut text = format!("{red}error:{red:#} {}\n", printable(error));
    for detail in details {
        let _ = writeln!(text, "  {}", printable(detail));
    }
    if let Some(fix) = fix {
        let _ = writeln!(text, "  {green}fix:{green:#} {fix}");
    }
    text
}

fn api(server: &str, status: &Status) -> String {
    let status_details = status.get_error_details();
    let mut details = Vec::new();
    let mut reason = None;
    match status_details.error_info() {
        Some(info) => {
            let mut metadata: Vec<_> = info.metadata.iter().map(|(key, value)| format!("{key}: {value}")).collect();
            metadata.sort();
            let metadata = if metadata.is_empty() { String::new() } else { format!(" ({})", metadata.join(", ")) };
            details.push(format!("reason: {}{metadata}", info.reason));
            reason = Some(info.reason.as_str());
        }
        None => details.push(format!("code: {}", code_name(status.code()))),
    }
    if let Some(request) = status_details.bad_request() {
        // The message may contain the violation already.
        let violations =
            request.field_violations.iter().filter(|violation| !status.message().contains(&violation.description));
        details.extend(violations.map(|violation| format!("{}: {}", violation.field, violation.description)));
    }
    if let Some(failure) = status_details.precondition_failure() {
        details.extend(failure.violations.iter().map(|violation| violation.description.clone()));
    }
    if let Some(resource) = status_details.resource_info() {
        details.push(format!("{} {}: {}", resource.resource_type, resource.resource_name, resource.description));
    }
    if let Some(help) = status_details.help() {
        details.extend(help.links.iter().map(|link| format!("see: {} {}", link.description, link.url)));
    }
    let fix = match (reason, status.code()) {
        (Some(reason), _) => fix(reason).map(str::to_owned),
        (None, Code::Unavailable) => Some(format!(
            "check that a manager is listening at {server}; start one with `gauntlet dev`, or pass another address with --url"
        )),
        (None, Code::DeadlineExceeded) => {
            Some("allow more time with --deadline; the call may still have an effect".into())
        }
        (None, Code::Unimplemented) => {
            Some(format!("check that {server} serves the v1 API; pass another address with --url"))
        }
        _ => None,
    };
    render(status.message(), &details, fix.as_deref())
}

/// Returns what to do about a reason of the v1 contract.
fn fix(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "CHALLENGE_ALREADY_EXISTS" => "update it with `gauntlet challenge update`, or choose another id",
        "CHALLENGE_NOT_FOUND" => "list the challenges with `gauntlet challenge list`",
        "CHALLENGE_EXPIRED" => {
            "change its end with `gauntlet challenge update ID --until TIME`, or remove it with --no-until"
        }
        "CHALLENGE_NO_RENEWAL" => "set a timeout with `gauntlet challenge update ID --timeout 10m`",
        "INSTANCE_ALREADY_EXISTS" => "renew it with `gauntlet instance renew`, or delete it first",
        "INSTANCE_NOT_FOUND" => "create one with `gauntlet instance create`",
        "INSTANCE_EXPIRED" => "delete it with `gauntlet instance delete` and create another",
        "OCI_REFERENCE_MALFORMED" => "use the form registry/repository:tag, such as registry.lan:5000/web:1",
        "OCI_REFERENCE_NOT_FOUND" => "push it with `gauntlet scenario push DIR REF`",
        "SCENARIO_NON_MATCHING_SPECIFICATION" => "find the line and field with `gauntlet scenario validate DIR`",
        "CREDENTIALS_REQUIRED" => {
            "set GAUNTLET_TOKEN or pass --token-file or --cert; an operator makes tokens with `gauntlet token create`"
        }
        "CREDENTIALS_INVALID" => "check that the whole token of this manager was given; it may have been revoked",
        "CREDENTIALS_EXPIRED" => "ask the operator for another token (`gauntlet token create`)",
        "SCOPE_INSUFFICIENT" => "use a token with the required scope",
        "CHALLENGE_NOT_PERMITTED" => "use a token that is not bound to other challenges",
        "CALL_RATE_EXCEEDED" | "SOURCE_RATE_EXCEEDED" => "try again later, or ask the operator for a higher limit",
        "INTERNAL_ERROR" => "see the manager's log and traces",
        _ => return None,
    })
}

fn scenario(error: &Error) -> String {
    render(&error.to_string(), &[format!("reason: {}", error.code())], fix(error.code()))
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
    fn errors_as_users_read_them() {
        let all = [
            error::challenge_not_found("web-1"),
            error::challenge_no_renewal("web-1"),
            error::challenge_pooler_out_of_bounds(-1, -2, 1000),
            error::challenge_invalid_update_mask(&["id"]),
            error::instance_already_exists("web-1", "42"),
            error::oci_reference_malformed("a b", "It has a space."),
            error::invalid_field("id", "must not be empty"),
            error::internal_error(),
            error::credentials_required(),
            error::scope_insufficient("admin", "read"),
            error::unavailable("BUSY"),
            Status::unavailable("tcp connect error"),
            Status::deadline_exceeded("no answer within 2m"),
            Status::unknown("two\nlines \u{1b}[31m"),
        ];
        insta::assert_snapshot!(all.map(text).join("\n"));
    }
}
