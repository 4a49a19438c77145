//! A handful of players, so that there is something to see: they start instances, renew them, give up, walk away, and ask for what is not
//! there.

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

/// How many players there are.
const PLAYERS: usize = 4;
/// Between two things a player does.
const PAUSE: Duration = Duration::from_millis(700);
/// How long instances of a challenge live, so that some expire and are swept while one watches.
const LIVES: [i64; 3] = [15, 20, 120];
/// How many instances a challenge may have: the players', some of the pool, and some of whoever tries it.
const MOST: i64 = 10;

async fn connect(url: &str) -> Result<Channel> {
    let endpoint =
        Channel::from_shared(url.to_owned())?.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30));
    endpoint.connect().await.with_context(|| format!("connect to {url}"))
}

/// One challenge, or why it could not be registered.
pub(super) type Registered = std::result::Result<String, String>;

/// Registers each `NAME/scenario` below `scenarios` as challenge NAME; those of an earlier run are kept as they are.
pub(super) async fn register(url: &str, scenarios: &Path) -> Result<Vec<Registered>> {
    let mut names: Vec<String> = std::fs::read_dir(scenarios)
        .with_context(|| format!("list {}", scenarios.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("scenario").is_dir())
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    let mut client = ChallengeStoreClient::new(connect(url).await?);
    let mut registered = Vec::with_capacity(names.len());
    for (name, life) in names.into_iter().zip(LIVES.into_iter().cycle()) {
        let challenge = CreateChallengeRequest {
            id: name.clone(),
            scenario: format!("file://{name}/scenario"),
            timeout: Some(prost_types::Duration { seconds: life, nanos: 0 }),
            // What may not start is not kept ready.
            min: i64::from(name != "flaky"),
            max: MOST,
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

/// Plays until told to stop. What is refused is part of the game.
pub(super) async fn play(url: String, challenges: Vec<String>, stop: CancellationToken) {
    let playing = async {
        let channel = connect(&url).await?;
        let players = (0..PLAYERS).map(|player| one(channel.clone(), &challenges, player));
        futures::future::join_all(players).await;
        anyhow::Ok(())
    };
    tokio::select! {
        () = stop.cancelled() => {}
        played = playing => if let Err(error) = played {
            tracing::warn!(%error, "no players");
        },
    }
}

/// One round a challenge, without end.
async fn one(channel: Channel, challenges: &[String], player: usize) {
    let client = InstanceManagerClient::new(channel);
    for (round, challenge) in challenges.iter().cycle().skip(player).enumerate() {
        // Every other round they walk away, and the janitor finds the instance.
        let stays = (round + player).is_multiple_of(2);
        if let Err(status) = play_round(client.clone(), challenge, &format!("player-{}", player + 1), stays).await {
            tracing::debug!(player, challenge, %status, "refused");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn play_round(
    mut client: InstanceManagerClient<Channel>,
    challenge: &str,
    source: &str,
    stays: bool,
) -> std::result::Result<(), Status> {
    let (challenge_id, source_id) = (challenge.to_owned(), source.to_owned());
    let retrieve = RetrieveInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
    // They ask before they know that there is none.
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
    if stays {
        let renew = RenewInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
        client.renew_instance(renew).await?;
        tokio::time::sleep(2 * PAUSE).await;
        client.delete_instance(DeleteInstanceRequest { challenge_id, source_id }).await?;
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}
