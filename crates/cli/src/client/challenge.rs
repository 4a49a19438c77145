//! `gauntlet challenge`.

use clap::{Args, Subcommand, ValueEnum};
use gauntlet_api::v1::challenge::{
    CreateChallengeRequest, DeleteChallengeRequest, RetrieveChallengeRequest, UpdateChallengeRequest, UpdateStrategy,
};
use gauntlet_client::challenge_store;
use tonic::Request;

use super::{
    Session,
    arguments::{Setting, setting, time, timeout},
    failure::Failure,
    printable::printable,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  gauntlet challenge create web-1 --scenario registry.lan:5000/web:1 --timeout 10m
  gauntlet challenge create web-2 --scenario registry.lan:5000/web:1 --min 2 --additional level=hard
  gauntlet challenge update web-1 --scenario registry.lan:5000/web:2 --strategy blue-green
  gauntlet challenge update web-1 --no-timeout --until 2026-01-31T18:00:00Z
  gauntlet challenge list --output json | jq -r .id";

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a challenge and fill its pool.
    Create(Create),
    /// Show a challenge and its instances.
    Get {
        /// The id of the challenge.
        id: String,
    },
    /// List all challenges.
    List,
    /// Update a challenge and its instances; settings without a flag are left unchanged.
    Update(Update),
    /// Delete a challenge and its instances.
    Delete {
        /// The id of the challenge.
        id: String,
    },
}

/// The challenge to create.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The id of the new challenge: 1 to 256 bytes without control characters.
    id: String,
    /// The reference of its scenario: registry/repository:tag, with @sha256:... to pin it.
    #[arg(long, value_name = "REF")]
    scenario: String,
    /// How long an instance lives after its creation or renewal, such as 10m; unlimited by default.
    #[arg(long, value_parser = timeout, value_name = "DURATION")]
    timeout: Option<prost_types::Duration>,
    /// When all instances expire at the latest, such as 2026-01-31T18:00:00Z.
    #[arg(long, value_parser = time, value_name = "TIME")]
    until: Option<prost_types::Timestamp>,
    /// A setting for the scenario. Can be repeated; if a key is repeated, its last value is used.
    #[arg(long, value_parser = setting, value_name = "KEY=VALUE")]
    additional: Vec<Setting>,
    /// The number of unclaimed instances that the pool keeps ready.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "COUNT")]
    min: i64,
    /// The pool is refilled only while there are fewer instances, claimed and pooled, than this; 0 for no bound.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "COUNT")]
    max: i64,
}

/// The changes. Without any, only the expiry of each instance is computed again.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// The id of the challenge.
    id: String,
    /// The reference of the new scenario.
    #[arg(long, value_name = "REF")]
    scenario: Option<String>,
    /// How running instances are updated.
    #[arg(long, value_name = "STRATEGY")]
    strategy: Option<Strategy>,
    /// How long an instance lives after its creation or renewal.
    #[arg(long, value_parser = timeout, value_name = "DURATION")]
    timeout: Option<prost_types::Duration>,
    /// Remove the timeout: instances need no renewal.
    #[arg(long, conflicts_with = "timeout")]
    no_timeout: bool,
    /// When all instances expire at the latest.
    #[arg(long, value_parser = time, value_name = "TIME")]
    until: Option<prost_types::Timestamp>,
    /// Remove the time when all instances expire.
    #[arg(long, conflicts_with = "until")]
    no_until: bool,
    /// A setting for the scenario. Can be repeated; the settings given replace all existing ones.
    #[arg(long, value_parser = setting, value_name = "KEY=VALUE")]
    additional: Vec<Setting>,
    /// Remove all settings.
    #[arg(long, conflicts_with = "additional")]
    no_additional: bool,
    /// The number of unclaimed instances that the pool keeps ready.
    #[arg(long, allow_negative_numbers = true, value_name = "COUNT")]
    min: Option<i64>,
    /// The pool is refilled only while there are fewer instances, claimed and pooled, than this; 0 for no bound.
    #[arg(long, allow_negative_numbers = true, value_name = "COUNT")]
    max: Option<i64>,
}

/// How running instances are updated to a new scenario.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Strategy {
    /// Update the running instance.
    InPlace,
    /// Start the new instance, then stop the old one.
    BlueGreen,
    /// Stop the old instance, then start the new one.
    Recreate,
}

impl From<Strategy> for UpdateStrategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::InPlace => Self::UpdateInPlace,
            Strategy::BlueGreen => Self::BlueGreen,
            Strategy::Recreate => Self::Recreate,
        }
    }
}

impl From<Create> for CreateChallengeRequest {
    fn from(create: Create) -> Self {
        Self {
            id: create.id,
            scenario: create.scenario,
            timeout: create.timeout,
            until: create.until,
            additional: create.additional.into_iter().collect(),
            min: create.min,
            max: create.max,
        }
    }
}

impl From<Update> for UpdateChallengeRequest {
    fn from(update: Update) -> Self {
        let changed = [
            ("scenario", update.scenario.is_some()),
            ("timeout", update.timeout.is_some() || update.no_timeout),
            ("until", update.until.is_some() || update.no_until),
            ("additional", !update.additional.is_empty() || update.no_additional),
            ("min", update.min.is_some()),
            ("max", update.max.is_some()),
        ];
        let paths: Vec<_> =
            changed.into_iter().filter(|(_, changed)| *changed).map(|(path, _)| path.to_owned()).collect();
        Self {
            id: update.id,
            scenario: update.scenario,
            update_strategy: update.strategy.map(|strategy| UpdateStrategy::from(strategy).into()),
            timeout: update.timeout,
            until: update.until,
            update_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
            additional: update.additional.into_iter().collect(),
            min: update.min.unwrap_or_default(),
            max: update.max.unwrap_or_default(),
        }
    }
}

pub(super) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = challenge_store(session.channel.clone());
    let output = session.output;
    match command {
        Command::Create(create) => {
            let created = session
                .call(create.into(), async |request: Request<CreateChallengeRequest>| {
                    client.create_challenge(request).await
                })
                .await?;
            output.challenge(&created)
        }
        Command::Get { id } => {
            let request = RetrieveChallengeRequest { id };
            let found = session.call(request, async |request| client.retrieve_challenge(request).await).await?;
            output.challenge(&found)
        }
        Command::List => {
            let query = async |request: Request<()>| client.query_challenge(request).await;
            session.list((), query, |found| output.challenges(found)).await
        }
        Command::Update(update) => {
            let updated = session
                .call(update.into(), async |request: Request<UpdateChallengeRequest>| {
                    client.update_challenge(request).await
                })
                .await?;
            output.challenge(&updated)
        }
        Command::Delete { id } => {
            let text = format!("Deleted challenge {}.", printable(&id));
            let request = DeleteChallengeRequest { id };
            session.call(request, async |request| client.delete_challenge(request).await).await?;
            output.done(&text)
        }
    }
}
