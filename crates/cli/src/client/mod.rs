//! The commands that talk to a manager or a registry, and end.

mod arguments;
mod challenge;
mod failure;
mod instance;
mod output;
mod printable;
mod scenario;

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use gauntlet_client::{Channel, ServerAddress, call_with_deadline};
use gauntlet_startup::EX_USAGE;
use gauntlet_telemetry::{Env, Instruments, Settings, Telemetry};
use prost::{Message, Name};
use tonic::{Request, Response, Status, Streaming};

use self::{
    failure::Failure,
    output::{Format, Output},
};

const AGENT: &str = concat!("gauntlet/", env!("CARGO_PKG_VERSION"));

/// One of these in the environment asks a command to export telemetry, which otherwise it does not: it would wait for a collector.
const ASKS_FOR_TELEMETRY: [&str; 3] =
    ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"];

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Register, read, change and remove challenges.
    #[command(after_help = challenge::EXAMPLES)]
    Challenge {
        #[command(flatten)]
        api: Api,
        #[command(subcommand)]
        command: challenge::Command,
    },
    /// Start, read, renew and delete instances.
    #[command(after_help = instance::EXAMPLES)]
    Instance {
        #[command(flatten)]
        api: Api,
        #[command(subcommand)]
        command: instance::Command,
    },
    /// Check a scenario and push it to a registry.
    #[command(after_help = scenario::EXAMPLES)]
    Scenario {
        #[command(subcommand)]
        command: scenario::Command,
    },
}

/// Which API, and how to show what it says.
#[derive(Debug, Args)]
#[command(next_help_heading = "API")]
pub(crate) struct Api {
    /// The manager's API, as host:port, http://host:port or https://host.
    #[arg(long, env = "URL", default_value = "localhost:8080", global = true, value_name = "URL")]
    url: ServerAddress,
    /// How long a call may take.
    #[arg(long, default_value = "2m", value_parser = gauntlet_startup::duration, global = true, value_name = "DURATION")]
    deadline: Duration,
    /// A table for people, or the JSON of the REST API, one object a line.
    #[arg(long, short, default_value = "table", global = true, value_name = "FORMAT")]
    output: Format,
}

/// A way to the API, and what every call to it needs.
struct Session {
    server: ServerAddress,
    deadline: Duration,
    channel: Channel,
    output: Output,
}

impl Session {
    /// One call, within the deadline.
    async fn call<Q, M>(
        &self,
        query: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<Response<M>, Status>,
    ) -> Result<M, Failure> {
        call_with_deadline(self.deadline, query, call)
            .await
            .map(Response::into_inner)
            .map_err(|status| self.failed(status))
    }

    /// One call whose answer is a stream, shown: as it comes in JSON, at its end as a table. What came before a failure is shown.
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
            let mut answers = call(request).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                if !json {
                    found.push(answer);
                } else if shown.is_ok() {
                    shown = self.output.json(&answer);
                }
            }
            Ok(())
        })
        .await;
        if !json && (read.is_ok() || !found.is_empty()) {
            shown = table(&found);
        }
        read.map_err(|status| self.failed(status)).and(shown)
    }

    fn failed(&self, status: Status) -> Failure {
        Failure::Api { server: self.server.to_string(), status: Box::new(status) }
    }
}

/// Runs one command to its end, on a runtime of its own.
pub(crate) fn run(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Io(error).report(),
    };
    runtime.block_on(async {
        let env = Env::process();
        let telemetry = if ASKS_FOR_TELEMETRY.iter().any(|variable| env.get(variable).is_some()) {
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
        let channel = api.url.channel(AGENT, instruments)?;
        Ok(Session { server: api.url, deadline: api.deadline, channel, output: Output::new(api.output) })
    };
    match command {
        Command::Challenge { api, command } => challenge::run(&session(api)?, command).await,
        Command::Instance { api, command } => instance::run(&session(api)?, command).await,
        Command::Scenario { command } => scenario::run(command).await,
    }
}
