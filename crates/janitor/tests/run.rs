//! The janitor against a fake server that fails on request.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{num::NonZeroUsize, time::Duration};

use gauntlet_janitor::{Config, Error, Summary, run};
use gauntlet_telemetry::Instruments;
use gauntlet_testing::api::{Deletion, FakeApi, Serving, challenge, from_now};
use tokio_util::sync::CancellationToken;
use tonic::Code;

fn config(server: &Serving) -> Config {
    Config { timeout: Duration::from_secs(10), ..Config::new(server.url.parse().unwrap()) }
}

async fn sweep(config: &Config) -> Result<Summary, Error> {
    run(config, &Instruments::noop(), CancellationToken::new()).await
}

fn expired(sources: &[&'static str]) -> Vec<(&'static str, Option<prost_types::Timestamp>)> {
    sources.iter().map(|source| (*source, from_now(-60))).collect()
}

#[tokio::test]
async fn only_expired_instances_are_deleted() {
    let fake = FakeApi::new(vec![
        challenge("a", None, &[("1", from_now(-60)), ("2", from_now(3600)), ("3", None)]),
        challenge("b", from_now(-60), &[("4", None), ("5", from_now(3600))]),
        challenge("c", None, &[]),
    ]);
    let server = fake.serve().await;
    let summary = sweep(&config(&server)).await.unwrap();
    assert_eq!(summary, Summary { seen: 5, expired: 3, deleted: 3, ..Summary::default() });
    assert_eq!(fake.deleted(), ["1", "4", "5"]);
    assert_eq!(sweep(&config(&server)).await.unwrap(), Summary { seen: 2, ..Summary::default() });
}

#[tokio::test]
async fn listed_instances_are_read_without_a_query() {
    let fake = FakeApi::new(vec![
        challenge("a", None, &[("1", from_now(-60)), ("2", from_now(3600)), ("3", None)]),
        challenge("b", from_now(-60), &[("4", from_now(-60))]),
    ])
    .extended();
    let server = fake.serve().await;
    let summary = sweep(&config(&server)).await.unwrap();
    assert_eq!(summary, Summary { seen: 2, expired: 2, deleted: 2, ..Summary::default() });
    assert_eq!(fake.deleted(), ["1", "4"]);
    assert_eq!(sweep(&config(&server)).await.unwrap(), Summary::default());
    assert_eq!(fake.with(|state| (state.lists, state.queries)), (2, 0));
    let v1 = Config { v1_only: true, ..config(&server) };
    assert_eq!(sweep(&v1).await.unwrap(), Summary { seen: 2, ..Summary::default() });
    assert_eq!(fake.with(|state| (state.lists, state.queries)), (2, 1));
}

#[tokio::test]
async fn broken_list_does_not_fall_back_to_a_query() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1", "2"]))]).extended();
    fake.with(|state| state.breaks_after = Some(1));
    let server = fake.serve().await;
    let config = Config { timeout: Duration::from_millis(500), ..config(&server) };
    assert_eq!(sweep(&config).await.unwrap(), Summary { seen: 1, expired: 1, deleted: 1, ..Summary::default() });
    fake.with(|state| (state.breaks_after, state.streams_hang) = (None, true));
    assert_eq!(sweep(&config).await.unwrap().deleted, 1);
    let error = sweep(&config).await.unwrap_err().to_string();
    assert!(error.ends_with("no answer within 500ms (DEADLINE_EXCEEDED)"), "{error}");
    assert_eq!(fake.with(|state| (state.lists, state.queries)), (3, 0));
}

#[tokio::test]
async fn failed_deletions_do_not_stop_the_others() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["fails", "gone", "hangs", "ok", "refused"]))])
        .deletion("fails", Deletion::Fails(Code::Internal))
        .deletion("refused", Deletion::Fails(Code::Unavailable))
        .deletion("hangs", Deletion::Hangs)
        .deletion("gone", Deletion::NotFound);
    let server = fake.serve().await;
    let config = Config { timeout: Duration::from_millis(500), concurrency: NonZeroUsize::MIN, ..config(&server) };
    let summary = sweep(&config).await.unwrap();
    assert_eq!(summary, Summary { seen: 5, expired: 5, deleted: 1, gone: 1, failed: 3, ..Summary::default() });
    assert_eq!(fake.deleted(), ["ok"]);
    assert!(fake.with(|state| state.timeouts.len()) >= 6, "every call carries its deadline");
}

#[tokio::test]
async fn sweep_fails_if_every_deletion_fails() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1", "2"]))])
        .deletion("1", Deletion::Fails(Code::Internal))
        .deletion("2", Deletion::Fails(Code::Internal));
    let server = fake.serve().await;
    let error = sweep(&config(&server)).await.unwrap_err();
    insta::assert_snapshot!(error, @"cannot delete any of the 2 expired instances; first error: injected (INTERNAL)");
}

#[tokio::test]
async fn instances_already_deleted_count_as_success() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1"]))]).deletion("1", Deletion::NotFound);
    let server = fake.serve().await;
    assert_eq!(sweep(&config(&server)).await.unwrap().gone, 1);
}

#[tokio::test]
async fn instances_read_before_the_stream_broke_are_deleted() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1"])), challenge("b", None, &expired(&["2"]))]);
    fake.with(|state| state.breaks_after = Some(1));
    let server = fake.serve().await;
    let summary = sweep(&config(&server)).await.unwrap();
    assert_eq!(summary, Summary { seen: 1, expired: 1, deleted: 1, ..Summary::default() });
    let error = sweep(&config(&server)).await.unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read the expired instances from http://127.0.0.1:")
            && error.ends_with("broke (INTERNAL)"),
        "{error}"
    );
}

#[tokio::test]
async fn hanging_stream_times_out_and_its_instances_are_deleted() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1"]))]);
    fake.with(|state| state.streams_hang = true);
    let server = fake.serve().await;
    let config = Config { timeout: Duration::from_millis(500), ..config(&server) };
    assert_eq!(sweep(&config).await.unwrap().deleted, 1);
    let error = sweep(&config).await.unwrap_err().to_string();
    assert!(error.ends_with("no answer within 500ms (DEADLINE_EXCEEDED)"), "{error}");
}

#[tokio::test]
async fn unreachable_server_fails_with_the_cause() {
    let server = FakeApi::default().serve().await;
    let config = config(&server);
    drop(server);
    // The port is free again once the server has ended.
    let error = loop {
        if let Err(error) = sweep(&config).await {
            break error.to_string();
        }
    };
    assert!(error.contains("cannot read") && error.contains("(UNAVAILABLE)"), "{error}");
}

#[tokio::test]
async fn deletions_are_bounded_by_concurrency() {
    let sources: Vec<String> = (0..20).map(|source| source.to_string()).collect();
    let sources: Vec<_> = sources.iter().map(|source| (source.as_str(), from_now(-60))).collect();
    let fake = sources.iter().fold(FakeApi::new(vec![challenge("a", None, &sources)]), |fake, (source, _)| {
        fake.deletion(source, Deletion::Waits)
    });
    let server = fake.serve().await;
    let config = Config { concurrency: NonZeroUsize::new(3).unwrap(), ..config(&server) };
    let sweeping = tokio::spawn(async move { sweep(&config).await });
    fake.wait_until("three deletions are in flight", |state| state.in_flight == 3).await;
    while !sweeping.is_finished() {
        fake.release.notify_waiters();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(sweeping.await.unwrap().unwrap().deleted, 20);
    assert_eq!(fake.with(|state| state.peak_in_flight), 3);
}

#[tokio::test]
async fn stop_finishes_deletions_under_way_and_begins_none() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1", "2", "3"]))])
        .deletion("1", Deletion::Waits)
        .deletion("2", Deletion::Waits)
        .deletion("3", Deletion::Waits);
    let server = fake.serve().await;
    let config = Config { concurrency: NonZeroUsize::MIN, every: Some(Duration::from_secs(3600)), ..config(&server) };
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { run(&config, &Instruments::noop(), stop).await }
    });
    fake.wait_until("a deletion is in flight", |state| state.in_flight == 1).await;
    stop.cancel();
    fake.release.notify_one();
    let summary = running.await.unwrap().unwrap();
    assert_eq!((summary.expired, summary.deleted, summary.left()), (3, 1, 2));
}

#[tokio::test]
async fn service_survives_failures_and_sweeps_periodically() {
    let fake = FakeApi::new(vec![challenge("a", None, &expired(&["1"]))]);
    fake.with(|state| state.breaks_after = Some(0));
    let server = fake.serve().await;
    let config = Config { every: Some(Duration::from_millis(20)), ..config(&server) };
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { run(&config, &Instruments::noop(), stop).await }
    });
    fake.wait_until("three failed queries", |state| state.queries >= 3).await;
    fake.with(|state| state.breaks_after = None);
    fake.wait_until("instance 1 is deleted", |state| state.deleted == ["1"]).await;
    let before = fake.with(|state| {
        state.challenges.push(challenge("b", None, &expired(&["2"])));
        state.queries
    });
    fake.wait_until("instance 2 is deleted by a later sweep", |state| {
        state.deleted == ["1", "2"] && state.queries > before
    })
    .await;
    stop.cancel();
    assert_eq!(running.await.unwrap().unwrap().deleted, 2);
}
