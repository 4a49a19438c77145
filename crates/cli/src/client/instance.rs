//! `gauntlet instance`.

use clap::{Args, Subcommand};
use gauntlet_api::v1::instance::{
    CreateInstanceRequest, DeleteInstanceRequest, QueryInstanceRequest, RenewInstanceRequest, RetrieveInstanceRequest,
    instance_manager_client::InstanceManagerClient,
};
use tonic::Request;

use super::{
    Session,
    arguments::{Setting, setting},
    failure::Failure,
    printable::printable,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  gauntlet instance create web-1 42
  gauntlet instance renew web-1 42
  gauntlet instance list 42
  gauntlet instance get web-1 42 --output json | jq -r .connectionInfo
  gauntlet instance delete web-1 42 --url https://ctf.example.org";

/// What to do with instances.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Give a source its instance of a challenge, from the pool where one waits.
    Create {
        #[command(flatten)]
        slot: Slot,
        /// A setting for the scenario, over those of the challenge; may be given again, and the last of a key counts.
        #[arg(long, value_parser = setting, value_name = "KEY=VALUE")]
        additional: Vec<Setting>,
    },
    /// Show an instance, with its flags.
    Get(Slot),
    /// Show the instances of a source, or of every source where the server allows that.
    List {
        /// The user or team.
        source: Option<String>,
    },
    /// Push the end of an instance back by its challenge's timeout.
    Renew(Slot),
    /// Take an instance down.
    Delete(Slot),
}

/// Whose instance of what.
#[derive(Debug, Args)]
pub(crate) struct Slot {
    /// The challenge.
    challenge: String,
    /// The user or team, as the platform names it.
    source: String,
}

pub(super) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = InstanceManagerClient::new(session.channel.clone());
    let output = session.output;
    match command {
        Command::Create { slot: Slot { challenge: challenge_id, source: source_id }, additional } => {
            let additional = additional.into_iter().collect();
            let request = CreateInstanceRequest { challenge_id, source_id, additional };
            output.instance(&session.call(request, async |request| client.create_instance(request).await).await?)
        }
        Command::Get(Slot { challenge: challenge_id, source: source_id }) => {
            let request = RetrieveInstanceRequest { challenge_id, source_id };
            output.instance(&session.call(request, async |request| client.retrieve_instance(request).await).await?)
        }
        Command::List { source } => {
            let request = QueryInstanceRequest { source_id: source.unwrap_or_default() };
            let query = async |request: Request<QueryInstanceRequest>| client.query_instance(request).await;
            session.list(request, query, |found| output.instances(found)).await
        }
        Command::Renew(Slot { challenge: challenge_id, source: source_id }) => {
            let request = RenewInstanceRequest { challenge_id, source_id };
            output.instance(&session.call(request, async |request| client.renew_instance(request).await).await?)
        }
        Command::Delete(Slot { challenge: challenge_id, source: source_id }) => {
            let text = format!("Deleted instance {}/{}.", printable(&challenge_id), printable(&source_id));
            let request = DeleteInstanceRequest { challenge_id, source_id };
            session.call(request, async |request| client.delete_instance(request).await).await?;
            output.done(&text)
        }
    }
}
