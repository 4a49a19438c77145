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

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create an instance of a challenge for a source, from the pool if it has one ready.
    Create {
        #[command(flatten)]
        key: Key,
        /// A setting for the scenario, which overrides the challenge's. Can be repeated; if a key is repeated, its last value is used.
        #[arg(long, value_parser = setting, value_name = "KEY=VALUE")]
        additional: Vec<Setting>,
    },
    /// Show an instance and its flags.
    Get(Key),
    /// List the instances of a source, or of all sources if the server allows that.
    List {
        /// The id of the user or team on the platform.
        source: Option<String>,
    },
    /// Extend the life of an instance by its challenge's timeout.
    Renew(Key),
    /// Delete an instance.
    Delete(Key),
}

/// Identifies an instance.
#[derive(Debug, Args)]
pub(crate) struct Key {
    /// The id of the challenge.
    challenge: String,
    /// The id of the user or team on the platform.
    source: String,
}

pub(super) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = InstanceManagerClient::new(session.channel.clone());
    let output = session.output;
    match command {
        Command::Create { key: Key { challenge: challenge_id, source: source_id }, additional } => {
            let additional = additional.into_iter().collect();
            let request = CreateInstanceRequest { challenge_id, source_id, additional };
            output.instance(&session.call(request, async |request| client.create_instance(request).await).await?)
        }
        Command::Get(Key { challenge: challenge_id, source: source_id }) => {
            let request = RetrieveInstanceRequest { challenge_id, source_id };
            output.instance(&session.call(request, async |request| client.retrieve_instance(request).await).await?)
        }
        Command::List { source } => {
            let request = QueryInstanceRequest { source_id: source.unwrap_or_default() };
            let query = async |request: Request<QueryInstanceRequest>| client.query_instance(request).await;
            session.list(request, query, |found| output.instances(found)).await
        }
        Command::Renew(Key { challenge: challenge_id, source: source_id }) => {
            let request = RenewInstanceRequest { challenge_id, source_id };
            output.instance(&session.call(request, async |request| client.renew_instance(request).await).await?)
        }
        Command::Delete(Key { challenge: challenge_id, source: source_id }) => {
            let text = format!("Deleted instance {}/{}.", printable(&challenge_id), printable(&source_id));
            let request = DeleteInstanceRequest { challenge_id, source_id };
            session.call(request, async |request| client.delete_instance(request).await).await?;
            output.done(&text)
        }
    }
}
