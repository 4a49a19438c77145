//! The stored form is an interface: later builds must read what earlier ones wrote.
#![allow(clippy::unwrap_used, reason = "tests")]

use gauntlet_domain::{Assignment, SourceId};
use proptest::{collection, option, prelude::*, strategy::Strategy as Generate};

use super::{Strategy, *};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn pinned() -> Pinned {
    Pinned { reference: "registry.test/web:1".to_owned(), digest: "sha256:ab".to_owned() }
}

fn id() -> ChallengeId {
    ChallengeId::new("web").unwrap()
}

fn key() -> InstanceKey {
    InstanceKey { challenge: id(), assignment: Assignment::Source(SourceId::new("alice").unwrap()) }
}

fn full_challenge() -> Challenge {
    Challenge {
        id: id(),
        scenario: pinned(),
        timeout: Some(Duration::new(90, 5)),
        until: Some(at(1_700_000_000)),
        additional: Additional::from([("key".to_owned(), "value".to_owned())]),
        bounds: PoolBounds::new(2, 5).unwrap(),
        revision: 3,
        content_revision: 2,
        rollout: Some(Rollout { strategy: Strategy::BlueGreen, traceparent: Some("00-aa-bb-01".to_owned()) }),
        deleting: false,
        traceparent: None,
    }
}

fn full_instance() -> Instance {
    Instance {
        key: key(),
        identity: Identity::from_bits(7),
        phase: Phase::Failed(Failure {
            during: Operation::Update,
            reason: "no port".to_owned(),
            since: at(20),
            attempts: 3,
            retry_at: at(40),
        }),
        since: at(10),
        last_renew: at(15),
        until: Some(at(70)),
        scenario: pinned(),
        applied_revision: 2,
        additional: Additional::new(),
        connection_info: "http://ctf.test:31337".to_owned(),
        flags: vec!["CTF{one}".to_owned()],
        flag_key: Some("0a1b2c3d".to_owned()),
        target: Some(Target {
            identity: Identity::from_bits(8),
            scenario: pinned(),
            revision: 3,
            strategy: Strategy::Recreate,
        }),
        traceparent: Some("00-aa-bb-01".to_owned()),
    }
}

fn pretty(bytes: &[u8]) -> String {
    serde_json::to_string_pretty(&serde_json::from_slice::<serde_json::Value>(bytes).unwrap()).unwrap()
}

#[test]
fn version_1_challenge() {
    insta::assert_snapshot!(pretty(&write_challenge(&full_challenge())), @r#"
    {
      "additional": {
        "key": "value"
      },
      "closing": false,
      "content": 2,
      "max": 5,
      "min": 2,
      "origin": null,
      "revision": 3,
      "rollout": {
        "origin": "00-aa-bb-01",
        "strategy": "blue_green"
      },
      "scenario": {
        "digest": "sha256:ab",
        "reference": "registry.test/web:1"
      },
      "timeout": "90.000000005s",
      "until": "2023-11-14T22:13:20Z",
      "v": 1
    }
    "#);
}

#[test]
fn version_1_instance() {
    insta::assert_snapshot!(pretty(&write_instance(&full_instance())), @r#"
    {
      "additional": {},
      "applied": 2,
      "connection_info": "http://ctf.test:31337",
      "flag_key": "0a1b2c3d",
      "flags": [
        "CTF{one}"
      ],
      "identity": "0000000000000007",
      "last_renew": "1970-01-01T00:00:15Z",
      "origin": "00-aa-bb-01",
      "phase": {
        "attempts": 3,
        "during": "update",
        "name": "failed",
        "reason": "no port",
        "retry_at": "1970-01-01T00:00:40Z",
        "since": "1970-01-01T00:00:20Z"
      },
      "scenario": {
        "digest": "sha256:ab",
        "reference": "registry.test/web:1"
      },
      "since": "1970-01-01T00:00:10Z",
      "target": {
        "applied": 3,
        "identity": "0000000000000008",
        "scenario": {
          "digest": "sha256:ab",
          "reference": "registry.test/web:1"
        },
        "strategy": "recreate"
      },
      "until": "1970-01-01T00:01:10Z",
      "v": 1
    }
    "#);
}

#[test]
fn version_1_intent_and_owner() {
    let target = full_instance().target;
    insta::assert_snapshot!(pretty(&write_intent(target.as_ref())), @r#"
    {
      "intent": "update",
      "target": {
        "applied": 3,
        "identity": "0000000000000008",
        "scenario": {
          "digest": "sha256:ab",
          "reference": "registry.test/web:1"
        },
        "strategy": "recreate"
      },
      "v": 1
    }
    "#);
    insta::assert_snapshot!(String::from_utf8(write_intent(None)).unwrap(), @r#"{"v":1,"intent":"delete"}"#);
    let owner = Owner { replica: "a".to_owned(), origin: None, since: at(5), unique: "7-1".to_owned() };
    insta::assert_snapshot!(String::from_utf8(owner.write()).unwrap(), @r#"{"v":1,"replica":"a","origin":null,"since":"1970-01-01T00:00:05Z","unique":"7-1"}"#);
}

#[test]
fn unreadable_record_names_the_problem() {
    let problem = |text: &str| read_challenge(id(), text.as_bytes()).unwrap_err().0;
    insta::assert_snapshot!(problem("{\"v\":2}"), @"version 2 is not supported (this build reads 1): run a newer build");
    insta::assert_snapshot!(problem("{}"), @"missing field `v` at line 1 column 2");
    insta::assert_snapshot!(problem(""), @"EOF while parsing a value at line 1 column 0");
    let text = String::from_utf8(write_challenge(&full_challenge())).unwrap();
    insta::assert_snapshot!(problem(&text.replace("\"90.000000005s\"", "\"90s\"")), @r#""90s" is not a duration such as "60.000000000s" at line 1 column 90"#);
    insta::assert_snapshot!(problem(&text.replace("\"min\":2", "\"min\":9")), @"pool bounds 9 and 5 are invalid");
    insta::assert_snapshot!(problem(&text.replace("blue_green", "purple")), @"unknown variant `purple`, expected one of `update_in_place`, `blue_green`, `recreate` at line 1 column 232");
}

#[test]
fn unknown_fields_are_ignored() {
    let text = String::from_utf8(write_challenge(&full_challenge())).unwrap();
    let longer = text.replacen('{', "{\"later\":[1,2],", 1);
    assert_eq!(read_challenge(id(), longer.as_bytes()).unwrap(), full_challenge());
}

fn timestamp() -> impl Generate<Value = Timestamp> {
    (-62_135_596_800i64..253_402_207_200, 0i32..1_000_000_000).prop_map(|(s, n)| Timestamp::new(s, n).unwrap())
}

fn strategy() -> impl Generate<Value = Strategy> {
    prop_oneof![Just(Strategy::UpdateInPlace), Just(Strategy::BlueGreen), Just(Strategy::Recreate)]
}

fn operation() -> impl Generate<Value = Operation> {
    prop_oneof![Just(Operation::Create), Just(Operation::Renew), Just(Operation::Update), Just(Operation::Delete)]
}

fn any_pinned() -> impl Generate<Value = Pinned> {
    (any::<String>(), any::<String>()).prop_map(|(reference, digest)| Pinned { reference, digest })
}

fn any_target() -> impl Generate<Value = Target> {
    (any::<u64>(), any_pinned(), any::<u64>(), strategy()).prop_map(|(bits, scenario, revision, strategy)| Target {
        identity: Identity::from_bits(bits),
        scenario,
        revision,
        strategy,
    })
}

fn phase() -> impl Generate<Value = Phase> {
    let failure = (operation(), any::<String>(), timestamp(), any::<u32>(), timestamp()).prop_map(
        |(during, reason, since, attempts, retry_at)| {
            Phase::Failed(Failure { during, reason, since, attempts, retry_at })
        },
    );
    prop_oneof![Just(Phase::Provisioning), Just(Phase::Ready), Just(Phase::Updating), Just(Phase::Deleting), failure]
}

fn additional() -> impl Generate<Value = Additional> {
    collection::btree_map(any::<String>(), any::<String>(), 0..4)
}

prop_compose! {
    fn any_challenge()(
        scenario in any_pinned(), timeout in option::of(any::<Duration>()), until in option::of(timestamp()),
        additional in additional(), min in 0i64..9, room in option::of(0i64..9), counts in any::<(u64, u64)>(),
        rollout in option::of((strategy(), any::<Option<String>>())), deleting: bool, traceparent: Option<String>,
    ) -> Challenge {
        Challenge {
            id: id(), scenario, timeout, until, additional,
            bounds: PoolBounds::new(min, room.map_or(0, |room| min + room)).unwrap(),
            revision: counts.0, content_revision: counts.1,
            rollout: rollout.map(|(strategy, traceparent)| Rollout { strategy, traceparent }),
            deleting, traceparent,
        }
    }
}

prop_compose! {
    fn any_instance()(
        bits: u64, phase in phase(), times in (timestamp(), timestamp(), option::of(timestamp())), scenario in any_pinned(),
        applied_revision: u64, additional in additional(), connection_info: String, flags: Vec<String>, flag_key: Option<String>,
        target in option::of(any_target()), traceparent: Option<String>,
    ) -> Instance {
        Instance {
            key: key(), identity: Identity::from_bits(bits), phase, since: times.0, last_renew: times.1, until: times.2,
            scenario, applied_revision, additional, connection_info, flags, flag_key, target, traceparent,
        }
    }
}

proptest! {
    #[test]
    fn challenges_round_trip(challenge in any_challenge()) {
        prop_assert_eq!(read_challenge(id(), &write_challenge(&challenge)).unwrap(), challenge);
    }

    #[test]
    fn instances_round_trip(instance in any_instance()) {
        prop_assert_eq!(read_instance(key(), &write_instance(&instance)).unwrap(), instance);
    }

    #[test]
    fn intent_overrides_phase_and_target(instance in any_instance(), target in any_target()) {
        let mut updating = instance.clone();
        apply_intent(&mut updating, &write_intent(Some(&target))).unwrap();
        prop_assert_eq!(&updating, &Instance { phase: Phase::Updating, target: Some(target), ..instance.clone() });
        let mut deleting = instance.clone();
        apply_intent(&mut deleting, &write_intent(None)).unwrap();
        prop_assert_eq!(deleting, Instance { phase: Phase::Deleting, ..instance });
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>, text in "\\{\"v\":1[a-z0-9:,\"{}]{0,40}") {
        for bytes in [bytes.as_slice(), text.as_bytes()] {
            let _ = read_challenge(id(), bytes);
            let _ = read_instance(key(), bytes);
            let _ = apply_intent(&mut full_instance(), bytes);
            let _ = Owner::read(bytes);
        }
    }
}
