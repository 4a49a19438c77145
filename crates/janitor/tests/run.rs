//! The janitor against a server that fails as it is told.

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

fn past(sources: &[&'static str]) -> Vec<(&'static str, Option<prost_types::Timestamp>)> {
    sources.iter().map(|source| (*source, from_now(-60))).collect()
}

#[tokio::test]
async fn deletes_what_has_expired_and_nothing_else() {
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
async fn what_the_server_lists_is_all_that_is_read() {
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
async fn a_list_that_breaks_or_hangs_is_no_reason_to_read_everything() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1", "2"]))]).extended();
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
async fn goes_on_past_failures() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["fails", "gone", "hangs", "ok", "refused"]))])
        .deletion("fails", Deletion::Fails(Code::Internal))
        .deletion("refused", Deletion::Fails(Code::Unavailable))
        .deletion("hangs", Deletion::Hangs)
        .deletion("gone", Deletion::NotFound);
    let server = fake.serve().await;
    let config = Config { timeout: Duration::from_millis(500), concurrency: NonZeroUsize::MIN, ..config(&server) };
    let summary = sweep(&config).await.unwrap();
    assert_eq!(summary, Summary { seen: 5, expired: 5, deleted: 1, gone: 1, failed: 3, ..Summary::default() });
    assert_eq!(fake.deleted(), ["ok"]);
    assert!(fake.with(|state| state.timeouts.len()) >= 6, "every call tells its deadline");
}

#[tokio::test]
async fn every_deletion_failing_is_an_error() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1", "2"]))])
        .deletion("1", Deletion::Fails(Code::Internal))
        .deletion("2", Deletion::Fails(Code::Internal));
    let server = fake.serve().await;
    let error = sweep(&config(&server)).await.unwrap_err();
    insta::assert_snapshot!(error, @"none of 2 expired instances could be deleted; the first: injected (INTERNAL)");
}

#[tokio::test]
async fn only_gone_ones_are_success() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1"]))]).deletion("1", Deletion::NotFound);
    let server = fake.serve().await;
    assert_eq!(sweep(&config(&server)).await.unwrap().gone, 1);
}

#[tokio::test]
async fn what_was_read_before_the_stream_broke_is_swept() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1"])), challenge("b", None, &past(&["2"]))]);
    fake.with(|state| state.breaks_after = Some(1));
    let server = fake.serve().await;
    let summary = sweep(&config(&server)).await.unwrap();
    assert_eq!(summary, Summary { seen: 1, expired: 1, deleted: 1, ..Summary::default() });
    let error = sweep(&config(&server)).await.unwrap_err().to_string();
    assert!(
        error.starts_with("what has expired on http://127.0.0.1:") && error.ends_with("broke (INTERNAL)"),
        "{error}"
    );
}

#[tokio::test]
async fn a_stream_that_hangs_is_given_up_and_what_it_gave_is_swept() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1"]))]);
    fake.with(|state| state.streams_hang = true);
    let server = fake.serve().await;
    let config = Config { timeout: Duration::from_millis(500), ..config(&server) };
    assert_eq!(sweep(&config).await.unwrap().deleted, 1);
    let error = sweep(&config).await.unwrap_err().to_string();
    assert!(error.ends_with("no answer within 500ms (DEADLINE_EXCEEDED)"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_away_is_an_error_that_says_why() {
    let server = FakeApi::default().serve().await;
    let config = config(&server);
    drop(server);
    // The port is free again once the server has ended.
    let error = loop {
        if let Err(error) = sweep(&config).await {
            break error.to_string();
        }
    };
    assert!(error.contains("could not be read") && error.contains("(UNAVAILABLE)"), "{error}");
}

#[tokio::test]
async fn so_many_at_once_and_no_more() {
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
async fn a_stop_lets_deletions_under_way_end_and_begins_none() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1", "2", "3"]))])
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
async fn a_service_outlives_failures_and_sweeps_on_its_beat() {
    let fake = FakeApi::new(vec![challenge("a", None, &past(&["1"]))]);
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
        state.challenges.push(challenge("b", None, &past(&["2"])));
        state.queries
    });
    fake.wait_until("instance 2 is deleted by a later sweep", |state| {
        state.deleted == ["1", "2"] && state.queries > before
    })
    .await;
    stop.cancel();
    assert_eq!(running.await.unwrap().unwrap().deleted, 2);
}
