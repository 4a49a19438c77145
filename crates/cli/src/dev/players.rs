//! A handful of players, so that there is something to see: they start instances, renew them, give up, and ask for what is not there.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use gauntlet_api::v1::{
    challenge::{CreateChallengeRequest, challenge_store_client::ChallengeStoreClient},
    instance::{
        CreateInstanceRequest, DeleteInstanceRequest, QueryInstanceRequest, RenewInstanceRequest,
        RetrieveInstanceRequest, instance_manager_client::InstanceManagerClient,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};

/// How many players there are.
const PLAYERS: u64 = 4;
/// Between two things a player does.
const PAUSE: Duration = Duration::from_millis(700);
/// How long instances live, so that some expire and are swept while one watches.
const LIVES: [i64; 2] = [20, 120];

async fn connect(url: &str) -> Result<Channel> {
    let endpoint =
        Channel::from_shared(url.to_owned())?.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30));
    endpoint.connect().await.with_context(|| format!("connect to {url}"))
}

/// Registers each `NAME/scenario` below `examples` as challenge NAME; those of an earlier run are kept as they are.
pub(super) async fn register(url: &str, examples: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(examples)
        .with_context(|| format!("list {}", examples.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("scenario").is_dir())
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    let mut client = ChallengeStoreClient::new(connect(url).await?);
    for (name, life) in names.iter().zip(LIVES.iter().cycle()) {
        let challenge = CreateChallengeRequest {
            id: name.clone(),
            scenario: format!("file://{name}/scenario"),
            timeout: Some(prost_types::Duration { seconds: *life, nanos: 0 }),
            min: 1,
            max: 10,
            ..CreateChallengeRequest::default()
        };
        match client.create_challenge(challenge).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(status).with_context(|| format!("register the example {name}")),
        }
    }
    Ok(names)
}

/// Plays until told to stop. What is refused is part of the game.
pub(super) async fn play(url: String, challenges: Vec<String>, stop: CancellationToken) {
    let playing = async {
        let channel = connect(&url).await?;
        let players = (1..=PLAYERS).map(|player| one(channel.clone(), &challenges, player));
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

async fn one(channel: Channel, challenges: &[String], player: u64) {
    let mut client = InstanceManagerClient::new(channel);
    for turn in player.. {
        let Some(challenge) = challenges.get((turn as usize / 8) % challenges.len().max(1)) else { return };
        let (challenge_id, source_id) = (challenge.clone(), format!("player-{player}"));
        let outcome = match turn % 8 {
            0 => {
                let request = CreateInstanceRequest { challenge_id, source_id, ..CreateInstanceRequest::default() };
                client.create_instance(request).await.map(drop)
            }
            3 => client.renew_instance(RenewInstanceRequest { challenge_id, source_id }).await.map(drop),
            5 => client.query_instance(QueryInstanceRequest { source_id }).await.map(drop),
            6 => client
                .retrieve_instance(RetrieveInstanceRequest { challenge_id, source_id: "nobody".into() })
                .await
                .map(drop),
            // Every other round they walk away, and the janitor finds the instance.
            7 if turn % 16 == 7 => {
                client.delete_instance(DeleteInstanceRequest { challenge_id, source_id }).await.map(drop)
            }
            _ => client.retrieve_instance(RetrieveInstanceRequest { challenge_id, source_id }).await.map(drop),
        };
        if let Err(status) = outcome {
            tracing::debug!(player, %status, "refused");
        }
        tokio::time::sleep(PAUSE + Duration::from_millis(37 * player)).await;
    }
}
