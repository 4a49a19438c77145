//! A few simulated players that generate activity: they create, renew, delete and abandon instances, and retrieve missing ones.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use gauntlet_api::v1::{
    challenge::{CreateChallengeRequest, challenge_store_client::ChallengeStoreClient},
    instance::{
        CreateInstanceRequest, DeleteInstanceRequest, QueryInstanceRequest, RenewInstanceRequest,
        RetrieveInstanceRequest, instance_manager_client::InstanceManagerClient,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

/// The number of players.
const PLAYERS: usize = 4;
/// The pause between two actions of a player.
const PAUSE: Duration = Duration::from_millis(700);
/// The timeouts of the challenges in seconds: short enough that some instances expire and are swept while somebody watches.
const TIMEOUTS: [i64; 3] = [15, 20, 120];
/// The upper bound of each pool: enough for the players, the pool and manual calls of the API.
const POOL_MAX: i64 = 10;

async fn connect(url: &str) -> Result<Channel> {
    let endpoint =
        Channel::from_shared(url.to_owned())?.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30));
    endpoint.connect().await.with_context(|| format!("cannot connect to {url}"))
}

/// The id of a registered challenge, or the error.
pub(super) type Registered = std::result::Result<String, String>;

/// Registers each `NAME/scenario` below `scenarios` as challenge NAME. Challenges of an earlier run are left unchanged.
pub(super) async fn register(url: &str, scenarios: &Path) -> Result<Vec<Registered>> {
    let mut names: Vec<String> = std::fs::read_dir(scenarios)
        .with_context(|| format!("cannot list {}", scenarios.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("scenario").is_dir())
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    let mut client = ChallengeStoreClient::new(connect(url).await?);
    let mut registered = Vec::with_capacity(names.len());
    for (name, timeout) in names.into_iter().zip(TIMEOUTS.into_iter().cycle()) {
        let challenge = CreateChallengeRequest {
            id: name.clone(),
            scenario: format!("file://{name}/scenario"),
            timeout: Some(prost_types::Duration { seconds: timeout, nanos: 0 }),
            // An example that often fails to start has no pool.
            min: i64::from(name != "flaky"),
            max: POOL_MAX,
            ..CreateChallengeRequest::default()
        };
        registered.push(match client.create_challenge(challenge).await {
            Ok(_) => Ok(name),
            Err(status) if status.code() == Code::AlreadyExists => Ok(name),
            Err(status) => Err(format!("{name}: {}", status.message())),
        });
    }
    Ok(registered)
}

/// Plays until `stop` is cancelled. Failed calls are part of the demonstration.
pub(super) async fn play(url: String, challenges: Vec<String>, stop: CancellationToken) {
    let playing = async {
        let channel = connect(&url).await?;
        let players = (0..PLAYERS).map(|player| play_rounds(channel.clone(), &challenges, player));
        futures::future::join_all(players).await;
        anyhow::Ok(())
    };
    tokio::select! {
        () = stop.cancelled() => {}
        played = playing => if let Err(error) = played {
            tracing::warn!(%error, "the players failed");
        },
    }
}

/// Plays one challenge after another, forever.
async fn play_rounds(channel: Channel, challenges: &[String], player: usize) {
    let client = InstanceManagerClient::new(channel);
    for (round, challenge) in challenges.iter().cycle().skip(player).enumerate() {
        // In every other round the player leaves the instance to the janitor.
        let deletes = (round + player).is_multiple_of(2);
        if let Err(status) = play_round(client.clone(), challenge, &format!("player-{}", player + 1), deletes).await {
            tracing::debug!(player, challenge, %status, "a call of a player failed");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn play_round(
    mut client: InstanceManagerClient<Channel>,
    challenge: &str,
    source: &str,
    deletes: bool,
) -> std::result::Result<(), Status> {
    let (challenge_id, source_id) = (challenge.to_owned(), source.to_owned());
    let retrieve = RetrieveInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
    // The platform also looks for an instance before it creates one.
    if client.retrieve_instance(retrieve.clone()).await.is_err() {
        tokio::time::sleep(PAUSE).await;
        let create = CreateInstanceRequest {
            challenge_id: challenge_id.clone(),
            source_id: source_id.clone(),
            ..CreateInstanceRequest::default()
        };
        client.create_instance(create).await?;
    }
    for _ in 0..3 {
        tokio::time::sleep(PAUSE).await;
        client.retrieve_instance(retrieve.clone()).await?;
    }
    let mine = client.query_instance(QueryInstanceRequest { source_id: source_id.clone() }).await?.into_inner();
    mine.try_for_each(async |_| Ok(())).await?;
    tokio::time::sleep(PAUSE).await;
    if deletes {
        let renew = RenewInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
        client.renew_instance(renew).await?;
        tokio::time::sleep(2 * PAUSE).await;
        client.delete_instance(DeleteInstanceRequest { challenge_id, source_id }).await?;
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}
