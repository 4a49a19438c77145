#![allow(clippy::unwrap_used, reason = "tests")]

use gauntlet_telemetry::Instruments;
use proptest::prelude::*;

use super::*;
use gauntlet_testing::api::{CREATED, FakeApi, challenge, from_now};

fn sources(challenge: Challenge, now: Timestamp) -> Vec<String> {
    expired(challenge, now).map(|expired| expired.source).collect()
}

#[test]
fn instances_expire_by_their_own_end_or_the_challenges() {
    let now = Timestamp::now();
    let live = from_now(3600);
    let past = from_now(-3600);
    assert_eq!(sources(challenge("c", None, &[("1", past), ("2", live), ("3", None)]), now), ["1"]);
    assert_eq!(sources(challenge("c", past, &[("1", live), ("2", None)]), now), ["1", "2"]);
    assert_eq!(sources(challenge("c", live, &[("1", past), ("2", None)]), now), ["1"]);
    // An instance expires exactly at its end.
    let end = Some(prost_types::Timestamp { seconds: 10, nanos: 5 });
    assert_eq!(sources(challenge("c", None, &[("1", end)]), Timestamp::new(10, 5).unwrap()), ["1"]);
    assert_eq!(sources(challenge("c", None, &[("1", end)]), Timestamp::new(10, 4).unwrap()), [""; 0]);
}

proptest! {
    #[test]
    fn any_timestamp_is_accepted(seconds: i64, nanos: i32) {
        let ends = challenge("c", None, &[("1", Some(prost_types::Timestamp { seconds, nanos }))]);
        let found: Vec<_> = expired(ends, Timestamp::now()).collect();
        prop_assert!(found.iter().all(|expired| expired.until <= Timestamp::now()));
    }
}

fn sweeper(url: &str) -> Sweeper {
    let instruments = Instruments::noop();
    let channel = url
        .parse::<gauntlet_client::ServerAddress>()
        .unwrap()
        .channel(&Default::default(), "test", &instruments)
        .unwrap();
    Sweeper::new(channel, instruments.janitor, 1, Duration::from_secs(10), false)
}

fn stale(challenge: &str, source: &str, challenge_until: Option<Timestamp>) -> Expired {
    Expired {
        challenge: challenge.into(),
        source: source.into(),
        since: CREATED,
        until: Timestamp::UNIX_EPOCH,
        challenge_until,
        listed: false,
    }
}

#[tokio::test]
async fn v1_instance_is_read_again_before_it_is_deleted() {
    let fake = FakeApi::new(vec![challenge(
        "c",
        None,
        &[("renewed", from_now(60)), ("endless", None), ("still", from_now(-60))],
    )]);
    let server = fake.serve().await;
    let sweeper = sweeper(&server.url);
    let delete = async |source, challenge_until| sweeper.delete(&stale("c", source, challenge_until)).await.unwrap();
    assert_eq!(delete("renewed", None).await, Outcome::Renewed);
    assert_eq!(delete("endless", None).await, Outcome::Renewed);
    assert_eq!(delete("deleted", None).await, Outcome::Gone);
    assert_eq!(delete("still", None).await, Outcome::Deleted);
    assert_eq!(delete("renewed", Some(Timestamp::UNIX_EPOCH)).await, Outcome::Deleted);
    assert_eq!(fake.deleted(), ["renewed", "still"]);
}

#[tokio::test]
async fn newer_instance_of_the_same_source_is_kept() {
    for (extended, only_lists) in [(false, false), (true, true), (true, false)] {
        let fake = FakeApi::new(vec![challenge("c", None, &[("1", from_now(-60)), ("2", from_now(-60))])]);
        fake.with(|state| (state.extended, state.only_lists) = (extended, only_lists));
        let server = fake.serve().await;
        let sweeper = sweeper(&server.url);
        // The instance that was listed is older than the one that is there, which has expired as well.
        let mut listed = Expired { listed: extended, ..stale("c", "1", None) };
        listed.since = Some(prost_types::Timestamp { seconds: 1, nanos: 1 });
        assert_eq!(sweeper.delete(&listed).await.unwrap(), Outcome::Renewed, "{extended} {only_lists}");
        let same = Expired { listed: extended, ..stale("c", "2", None) };
        assert_eq!(sweeper.delete(&same).await.unwrap(), Outcome::Deleted, "{extended} {only_lists}");
        assert_eq!(sweeper.delete(&same).await.unwrap(), Outcome::Gone, "{extended} {only_lists}");
        assert_eq!(fake.deleted(), ["2"]);
    }
}

#[tokio::test]
async fn missing_list_is_tried_again_after_a_while() {
    let fake = FakeApi::new(vec![challenge("a", None, &[("1", from_now(3600))])]);
    let server = fake.serve().await;
    let mut sweeper = sweeper(&server.url);
    let stop = CancellationToken::new();
    let calls = || fake.with(|state| (state.lists, state.queries));
    sweeper.sweep(&stop).await;
    assert_eq!(calls(), (1, 1));
    sweeper.sweep(&stop).await;
    assert_eq!(calls(), (1, 2), "the missing list is remembered");
    // A manager of a newer version takes over.
    fake.with(|state| state.extended = true);
    sweeper.recheck_interval = Duration::ZERO;
    assert_eq!(sweeper.sweep(&stop).await.summary.seen, 0);
    assert_eq!(calls(), (2, 2));
    sweeper.recheck_interval = RECHECK_INTERVAL;
    sweeper.sweep(&stop).await;
    assert_eq!(calls(), (3, 2));
    // Then one of the older version again.
    fake.with(|state| state.extended = false);
    assert_eq!(sweeper.sweep(&stop).await.summary.seen, 1);
    assert_eq!(calls(), (4, 3));
}

#[tokio::test]
async fn list_is_tried_again_after_the_server_was_unavailable() {
    let fake = FakeApi::default();
    let server = fake.serve().await;
    let mut sweeper = sweeper(&server.url);
    let stop = CancellationToken::new();
    sweeper.sweep(&stop).await;
    assert!(matches!(sweeper.list_support, ListSupport::MissingSince(_)));
    fake.with(|state| (state.breaks_after, state.breaks_with) = (Some(0), Some(Code::Internal)));
    sweeper.sweep(&stop).await;
    assert!(matches!(sweeper.list_support, ListSupport::MissingSince(_)));
    fake.with(|state| state.breaks_with = Some(Code::Unavailable));
    sweeper.sweep(&stop).await;
    assert_eq!(sweeper.list_support, ListSupport::Assumed);
}

#[tokio::test]
async fn server_clock_may_be_ahead_of_the_janitors() {
    let fake = FakeApi::new(vec![challenge("c", None, &[("ahead", from_now(60)), ("renewed", from_now(90))])]);
    let server = fake.serve().await;
    let sweeper = sweeper(&server.url);
    let listed = |source| ExpiredInstance {
        challenge_id: "c".into(),
        source_id: String::from(source),
        until: from_now(60),
        since: CREATED,
    };
    let delete = async |source| {
        let mut expired = Expired::from_listed(listed(source)).unwrap();
        // The fake rounds to seconds, so a second may pass in between.
        expired.until += Duration::from_secs(10);
        sweeper.delete(&expired).await.unwrap()
    };
    assert_eq!((delete("ahead").await, delete("renewed").await), (Outcome::Deleted, Outcome::Renewed));
    assert_eq!(Expired::from_listed(ExpiredInstance { until: None, ..listed("ahead") }), None);
}
