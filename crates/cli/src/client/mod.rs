//! The commands that talk to a manager or a registry, or edit a file, and exit.

mod arguments;
mod challenge;
mod failure;
mod flags;
mod instance;
mod output;
mod printable;
mod scenario;
mod token;
mod token_file;

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use gauntlet_client::{Channel, Credentials, ServerAddress, call_with_deadline};
use gauntlet_startup::EX_USAGE;
use gauntlet_telemetry::{Env, Instruments, Settings, Telemetry};
use prost::{Message, Name};
use tonic::{Request, Response, Status, Streaming};

use self::{
    failure::Failure,
    output::{Format, Output},
};

const USER_AGENT: &str = concat!("gauntlet/", env!("CARGO_PKG_VERSION"));

/// A command exports telemetry only if one of these variables is set: otherwise it would wait for a collector that nobody runs.
const TELEMETRY_VARIABLES: [&str; 3] =
    ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"];

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, show, update and delete challenges.
    #[command(after_help = challenge::EXAMPLES)]
    Challenge {
        #[command(flatten)]
        api: Api,
        #[command(subcommand)]
        command: challenge::Command,
    },
    /// Create, show, renew and delete instances.
    #[command(after_help = instance::EXAMPLES)]
    Instance {
        #[command(flatten)]
        api: Api,
        #[command(subcommand)]
        command: instance::Command,
    },
    /// Validate a scenario and push it to a registry.
    #[command(after_help = scenario::EXAMPLES)]
    Scenario {
        #[command(subcommand)]
        command: scenario::Command,
    },
    /// Rotate and list the keys that flags are derived from.
    #[command(after_help = flags::EXAMPLES)]
    Flags {
        #[command(flatten)]
        file: flags::File,
        #[command(subcommand)]
        command: flags::Command,
    },
    /// Create, list and revoke the tokens of a token file.
    #[command(after_help = token::EXAMPLES)]
    Token {
        #[command(flatten)]
        file: token::File,
        #[command(subcommand)]
        command: token::Command,
    },
}

/// The API to call, and how to show its responses.
#[derive(Debug, Args)]
#[command(next_help_heading = "API")]
pub(crate) struct Api {
    /// The address of the manager's API: host:port, http://host:port or https://host.
    #[arg(long, env = "URL", default_value = "localhost:8080", global = true, value_name = "URL")]
    url: ServerAddress,
    /// What to show to the manager.
    #[command(flatten)]
    credentials: Credentials,
    /// The deadline of each call.
    #[arg(long, default_value = "2m", value_parser = gauntlet_startup::duration, global = true, value_name = "DURATION")]
    deadline: Duration,
    /// A table, or the JSON of the REST API with one object per line.
    #[arg(long, short, default_value = "table", global = true, value_name = "FORMAT")]
    output: Format,
}

/// A channel to the API, and the settings of every call.
struct Session {
    server: ServerAddress,
    deadline: Duration,
    channel: Channel,
    output: Output,
}

impl Session {
    /// Makes one call within the deadline.
    async fn call<Q, M>(
        &self,
        query: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<Response<M>, Status>,
    ) -> Result<M, Failure> {
        call_with_deadline(self.deadline, query, call)
            .await
            .map(Response::into_inner)
            .map_err(|status| self.failure(status))
    }

    /// Makes one call that returns a stream, and shows the messages: in JSON as they arrive, as a table at the end. When the stream fails, the
    /// messages before the failure are shown.
    async fn list<Q, M: Message + Name + Default>(
        &self,
        query: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<Response<Streaming<M>>, Status>,
        table: impl FnOnce(&[M]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let json = self.output.is_json();
        let mut found = Vec::new();
        let mut shown = Ok(());
        let read = call_with_deadline(self.deadline, query, async |request| {
            let mut messages = call(request).await?.into_inner();
            while let Some(message) = messages.message().await? {
                if !json {
                    found.push(message);
                } else if shown.is_ok() {
                    shown = self.output.json(&message);
                }
            }
            Ok(())
        })
        .await;
        if !json && (read.is_ok() || !found.is_empty()) {
            shown = table(&found);
        }
        read.map_err(|status| self.failure(status)).and(shown)
    }

    fn failure(&self, status: Status) -> Failure {
        Failure::Api { server: self.server.to_string(), status: Box::new(status) }
    }
}

/// Runs one command on a runtime of its own, and returns the exit code.
pub(crate) fn run(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Io(error).report(),
    };
    runtime.block_on(async {
        let env = Env::process();
        let telemetry = if TELEMETRY_VARIABLES.iter().any(|variable| env.get(variable).is_some()) {
            let settings =
                Settings { log_filter: "warn".into(), ..Settings::new("gauntlet", env!("CARGO_PKG_VERSION")) };
            match Telemetry::start(&settings, &env) {
                Ok(telemetry) => Some(telemetry),
                Err(error) => {
                    anstream::eprintln!("error: {error}");
                    return EX_USAGE.into();
                }
            }
        } else {
            None
        };
        let instruments =
            telemetry.as_ref().map_or_else(Instruments::noop, |telemetry| telemetry.instruments().clone());
        let result = execute(command, &instruments).await;
        if let Some(Err(error)) = telemetry.map(|telemetry| telemetry.shutdown()) {
            anstream::eprintln!("warning: {error}");
        }
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => failure.report(),
        }
    })
}

async fn execute(command: Command, instruments: &Instruments) -> Result<(), Failure> {
    let session = |api: Api| -> Result<Session, Failure> {
        let channel = api.url.channel(&api.credentials, USER_AGENT, instruments)?;
        Ok(Session { server: api.url, deadline: api.deadline, channel, output: Output::new(api.output) })
    };
    match command {
        Command::Challenge { api, command } => challenge::run(&session(api)?, command).await,
        Command::Instance { api, command } => instance::run(&session(api)?, command).await,
        Command::Scenario { command } => scenario::run(command).await,
        Command::Flags { file, command } => flags::run(&file, &command),
        Command::Token { file, command } => token::run(&file, command),
    }
}
