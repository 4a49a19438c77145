#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;

use insta::assert_snapshot;
use proptest::{collection, option, prelude::*};
use prost_reflect::Kind;
use prost_types::{Duration, FieldMask, Timestamp};

use super::*;
use crate::v1::{
    challenge::{Challenge, CreateChallengeRequest, UpdateChallengeRequest, UpdateStrategy},
    instance::{CreateInstanceRequest, Instance},
};

fn out<M: Message + Name>(message: &M) -> String {
    to_string(message).unwrap()
}

fn read<M: Message + Name + Default>(json: &str) -> M {
    from_slice(json.as_bytes()).unwrap_or_else(|error| panic!("{json}: {error}"))
}

/// The error of decoding a create request.
fn refusal(json: &str) -> String {
    from_slice::<CreateChallengeRequest>(json.as_bytes()).expect_err(json).to_string()
}

fn update_refusal(json: &str) -> String {
    from_slice::<UpdateChallengeRequest>(json.as_bytes()).expect_err(json).to_string()
}

fn timestamp(seconds: i64, nanos: i32) -> Timestamp {
    Timestamp { seconds, nanos }
}

#[test]
fn empty_challenge_has_every_field() {
    assert_snapshot!(
        out(&Challenge::default()),
        @r#"{"id":"","scenario":"","timeout":null,"until":null,"instances":[],"additional":{},"min":"0","max":"0"}"#
    );
}

#[test]
fn full_challenge_is_encoded() {
    #[allow(deprecated, reason = "the field is part of the contract")]
    let instance = Instance {
        challenge_id: "c".into(),
        source_id: "7".into(),
        since: Some(timestamp(1_767_225_600, 0)),
        last_renew: Some(timestamp(1_767_225_600, 120_000_000)),
        until: Some(timestamp(1_767_225_600, 123_456_000)),
        connection_info: "nc host 4242".into(),
        flag: Some("FLAG{é\"}".into()),
        additional: BTreeMap::from([("z".into(), "1".into()), ("add-flag".into(), "2".into())]),
        flags: vec!["FLAG{é\"}".into()],
    };
    let challenge = Challenge {
        id: "c".into(),
        scenario: "registry/repo:tag".into(),
        timeout: Some(Duration { seconds: 1, nanos: 500_000_000 }),
        until: Some(timestamp(1_767_225_600, 123_456_789)),
        instances: vec![instance],
        additional: BTreeMap::from([("b".into(), "2".into()), ("a".into(), "1".into())]),
        min: 1,
        max: i64::MAX,
    };
    assert_snapshot!(out(&challenge), @r#"{"id":"c","scenario":"registry/repo:tag","timeout":"1.500s","until":"2026-01-01T00:00:00.123456789Z","instances":[{"challengeId":"c","sourceId":"7","since":"2026-01-01T00:00:00Z","lastRenew":"2026-01-01T00:00:00.120Z","until":"2026-01-01T00:00:00.123456Z","connectionInfo":"nc host 4242","flag":"FLAG{é\"}","additional":{"add-flag":"2","z":"1"},"flags":["FLAG{é\"}"]}],"additional":{"a":"1","b":"2"},"min":"1","max":"9223372036854775807"}"#);
}

#[test]
fn instance_omits_unset_optional_fields_only() {
    let instance = Instance { since: Some(timestamp(0, 0)), last_renew: Some(timestamp(0, 0)), ..Instance::default() };
    assert_snapshot!(out(&instance), @r#"{"challengeId":"","sourceId":"","since":"1970-01-01T00:00:00Z","lastRenew":"1970-01-01T00:00:00Z","connectionInfo":"","additional":{},"flags":[]}"#);
}

#[test]
fn empty_message_is_an_empty_object() {
    assert_snapshot!(out(&()), @"{}");
}

#[test]
fn update_request_encodes_masks_and_enums() {
    let request = UpdateChallengeRequest {
        id: "c".into(),
        update_strategy: Some(UpdateStrategy::BlueGreen.into()),
        update_mask: Some(FieldMask { paths: vec!["scenario".into(), "update_strategy".into()] }),
        ..UpdateChallengeRequest::default()
    };
    assert_snapshot!(out(&request), @r#"{"id":"c","updateStrategy":"blue_green","timeout":null,"until":null,"updateMask":"scenario,updateStrategy","additional":{},"min":"0","max":"0"}"#);
    let unknown = UpdateChallengeRequest { update_strategy: Some(9), ..UpdateChallengeRequest::default() };
    assert!(out(&unknown).contains(r#""updateStrategy":9"#));
}

#[test]
fn durations_have_0_3_6_or_9_digits() {
    let written = |seconds, nanos| {
        let challenge = Challenge { timeout: Some(Duration { seconds, nanos }), ..Challenge::default() };
        let value: serde_json::Value = serde_json::from_str(&out(&challenge)).unwrap();
        value["timeout"].as_str().unwrap().to_owned()
    };
    assert_eq!(written(600, 0), "600s");
    assert_eq!(written(0, 0), "0s");
    assert_eq!(written(1, 500_000_000), "1.500s");
    assert_eq!(written(1, 1_000), "1.000001s");
    assert_eq!(written(1, 1), "1.000000001s");
    assert_eq!(written(-1, -500_000_000), "-1.500s");
    assert_eq!(written(999_999_999, 0), "999999999s");
}

#[test]
fn out_of_range_values_are_rejected() {
    let challenge = Challenge { until: Some(timestamp(i64::MAX, 0)), ..Challenge::default() };
    assert_snapshot!(to_string(&challenge).unwrap_err(), @"message api.v1.challenge.Challenge has no JSON form: timestamp out of range");
}

#[test]
fn stream_item_is_one_line() {
    let instance = CreateInstanceRequest { challenge_id: "a\nb".into(), ..CreateInstanceRequest::default() };
    assert_eq!(
        stream_line(&instance).unwrap(),
        "{\"result\":{\"challengeId\":\"a\\nb\",\"sourceId\":\"\",\"additional\":{}}}\n"
    );
}

#[test]
fn both_spellings_of_a_name_are_accepted() {
    let camel: CreateInstanceRequest = read(r#"{"challengeId":"c","sourceId":"1"}"#);
    let snake: CreateInstanceRequest = read(r#"{"challenge_id":"c","source_id":"1"}"#);
    assert_eq!(camel, snake);
    assert_eq!(camel.challenge_id, "c");
}

#[test]
fn integers_are_decoded_from_numbers_and_strings() {
    for (json, min) in [
        ("3", 3),
        ("\"3\"", 3),
        ("3.0", 3),
        ("3e2", 300),
        ("\"3e2\"", 300),
        ("\"3.0\"", 3),
        ("-1", -1),
        ("-0", 0),
        ("\"-9223372036854775808\"", i64::MIN),
        ("9223372036854775807", i64::MAX),
        ("null", 0),
    ] {
        let request: CreateChallengeRequest = read(&format!(r#"{{"min":{json}}}"#));
        assert_eq!(request.min, min, "{json}");
    }
}

#[test]
fn null_and_unknown_fields_and_names_are_ignored() {
    let request: UpdateChallengeRequest = read(
        r#"{"id":null,"scenario":null,"updateStrategy":"sideways","timeout":null,"until":null,"updateMask":null,
            "additional":null,"min":null,"max":null,"nobody":{"knows":[1,{}]}}"#,
    );
    assert_eq!(request, UpdateChallengeRequest::default());
}

#[test]
fn enum_values_are_decoded_by_name_and_number() {
    for (json, strategy) in
        [(r#""update_in_place""#, 0), (r#""blue_green""#, 1), (r#""recreate""#, 2), ("2", 2), ("9", 9)]
    {
        let request: UpdateChallengeRequest = read(&format!(r#"{{"updateStrategy":{json}}}"#));
        assert_eq!(request.update_strategy, Some(strategy));
    }
}

#[test]
fn masks_durations_and_timestamps_are_decoded() {
    let request: UpdateChallengeRequest = read(
        r#"{"updateMask":"scenario,updateStrategy","timeout":"999999999s","until":"2026-01-01T02:00:00.5+02:00"}"#,
    );
    assert_eq!(request.update_mask.unwrap().paths, ["scenario", "update_strategy"]);
    assert_eq!(request.timeout.unwrap().seconds, 999_999_999);
    assert_eq!(request.until.unwrap(), timestamp(1_767_225_600, 500_000_000));
    let empty: UpdateChallengeRequest = read(r#"{"update_mask":""}"#);
    assert!(empty.update_mask.unwrap().paths.is_empty());
    for legal in ["-1s", "1.5s", "315576000000s", "0.000000001s"] {
        read::<CreateChallengeRequest>(&format!(r#"{{"timeout":"{legal}"}}"#));
    }
    for legal in ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z"] {
        read::<CreateChallengeRequest>(&format!(r#"{{"until":"{legal}"}}"#));
    }
}

#[test]
fn invalid_json_is_rejected_with_its_position() {
    assert_snapshot!(refusal(""), @"Malformed JSON (line 1, column 0): EOF while parsing a value.");
    assert_snapshot!(refusal("{\n  \"id\": \"c\",\n}"), @"Malformed JSON (line 3, column 1): trailing comma.");
    assert_snapshot!(refusal("{} {}"), @"Malformed JSON (line 1, column 4): trailing characters.");
    assert_snapshot!(refusal("[]"), @"Malformed JSON (line 1, column 0): invalid type: sequence, expected an object.");
    assert_snapshot!(refusal("null"), @"Malformed JSON (line 1, column 4): invalid type: null, expected an object.");
    assert!(from_slice::<CreateChallengeRequest>(b"{\"id\":\"\xff\"}").is_err());
    assert!(refusal(&"[".repeat(100_000)).len() < 300);
    assert!(refusal(&format!("{{\"x\":{}", "[".repeat(100_000))).len() < 300);
}

#[test]
fn invalid_field_is_named_with_its_position() {
    assert_snapshot!(refusal(r#"{"id":"c","min":"many"}"#), @r#"Field "min" (line 1, column 22): invalid value: string "many", expected a whole number of 64 bits, plain or as a string."#);
    assert_snapshot!(refusal(r#"{"min":1.5}"#), @r#"Field "min" (line 1, column 10): invalid value: floating point `1.5`, expected a whole number of 64 bits, plain or as a string."#);
    assert_snapshot!(refusal(r#"{"min":9223372036854775808}"#), @r#"Field "min" (line 1, column 26): invalid value: integer `9223372036854775808`, expected a whole number of 64 bits, plain or as a string."#);
    assert_snapshot!(refusal(r#"{"min":"9007199254740993.0"}"#), @r#"Field "min" (line 1, column 27): invalid value: string "9007199254740993.0", expected a whole number of 64 bits, plain or as a string."#);
    assert_snapshot!(refusal(r#"{"min":" 1"}"#), @r#"Field "min" (line 1, column 11): invalid value: string " 1", expected a whole number of 64 bits, plain or as a string."#);
    assert_snapshot!(refusal(r#"{"id":7}"#), @r#"Field "id" (line 1, column 7): invalid type: integer `7`, expected a string."#);
    assert_snapshot!(refusal("{\"id\":\"c\",\n\"additional\":{\"k\":true}}"), @r#"Field "additional.k" (line 2, column 22): invalid type: boolean `true`, expected a string."#);
    assert_snapshot!(refusal(r#"{"additional":{"k":null}}"#), @r#"Field "additional.k" (line 1, column 23): invalid type: null, expected a string."#);
    assert_snapshot!(refusal(r#"{"additional":[]}"#), @r#"Field "additional" (line 1, column 16): invalid type: sequence, expected an object."#);
    assert_snapshot!(update_refusal(r#"{"updateStrategy":true}"#), @r#"Field "updateStrategy" (line 1, column 22): invalid type: boolean `true`, expected the name or the number of one of update_in_place, blue_green, recreate."#);
    assert_snapshot!(update_refusal(r#"{"updateStrategy":99999999999}"#), @r#"Field "updateStrategy" (line 1, column 29): invalid value: integer `99999999999`, expected the name or the number of one of update_in_place, blue_green, recreate."#);
}

#[test]
fn invalid_durations_are_rejected() {
    assert_snapshot!(refusal(r#"{"timeout":"1h"}"#), @r#"Field "timeout" (line 1, column 15): invalid value: string "1h", expected a duration: seconds with up to 9 decimals and an "s", as in "600s" or "1.5s", within 315576000000s."#);
    for bad in [
        "\"600\"",
        "\"\"",
        "\"s\"",
        "\"1.0000000001s\"",
        "\"315576000001s\"",
        "\"+1s\"",
        "\" 1s\"",
        "\"1é\"",
        "600",
        "{}",
    ] {
        let refusal = refusal(&format!(r#"{{"timeout":{bad}}}"#));
        assert!(refusal.starts_with("Field \"timeout\" (line 1, column"), "{refusal}");
    }
}

#[test]
fn invalid_timestamps_are_rejected() {
    assert_snapshot!(refusal(r#"{"until":"tomorrow"}"#), @r#"Field "until" (line 1, column 19): invalid value: string "tomorrow", expected a time in RFC 3339 within the years 1 to 9999, with up to 9 decimals, as in "2026-01-31T18:00:00Z"."#);
    for bad in [
        "\"2026-01-01\"",
        "\"2026-01-01T00:00:00\"",
        "\"2026-02-30T00:00:00Z\"",
        "\"0000-01-01T00:00:00Z\"",
        "\"10000-01-01T00:00:00Z\"",
        "\"0001-01-01T00:00:00+01:00\"",
        "\"2026-01-01T00:00:00.0000000001Z\"",
        "1767225600",
    ] {
        let refusal = refusal(&format!(r#"{{"until":{bad}}}"#));
        assert!(refusal.starts_with("Field \"until\" (line 1, column"), "{refusal}");
    }
}

#[test]
fn mask_path_with_an_underscore_is_rejected() {
    assert_snapshot!(update_refusal(r#"{"updateMask":"scenario,update_strategy"}"#), @r#"Field "updateMask" (line 1, column 40): invalid value: string "scenario,update_strategy", expected field names in lowerCamelCase separated by commas, as in "scenario,additional"."#);
    assert_snapshot!(update_refusal(r#"{"updateMask":["scenario"]}"#), @r#"Field "updateMask" (line 1, column 15): invalid type: sequence, expected field names in lowerCamelCase separated by commas, as in "scenario,additional"."#);
}

#[test]
fn duplicate_field_is_rejected() {
    assert_snapshot!(update_refusal(r#"{"updateMask":"min","update_mask":"max"}"#), @r#"Field "update_mask" (line 1, column 40): given twice; give updateMask once."#);
    assert_snapshot!(update_refusal(r#"{"scenario":"a","scenario":"b"}"#), @r#"Field "scenario" (line 1, column 31): given twice; give scenario once."#);
    assert_snapshot!(refusal(r#"{"additional":{"k":"1","k":"2"}}"#), @r#"Field "additional" (line 1, column 31): a key is given twice; give it once."#);
}

#[test]
fn error_contains_no_string_value_and_is_bounded() {
    let secret = "hunter2";
    let error = refusal(&format!(r#"{{"id":"{secret}","min":true}}"#));
    assert!(!error.contains(secret));
    let long = "9".repeat(10_000);
    assert!(refusal(&format!(r#"{{"timeout":"{long}"}}"#)).len() < 400);
    assert!(refusal(&format!(r#"{{"additional":{{"{long}":1}}}}"#)).len() < 400);
}

/// The mapping supports only the kinds that the contract uses; a field of another kind must fail here first.
#[test]
fn contract_uses_supported_kinds_only() {
    let messages = POOL.all_messages().filter(|message| message.package_name().starts_with("api.v1."));
    let fields: Vec<_> = messages.flat_map(|message| message.fields().collect::<Vec<_>>()).collect();
    assert!(fields.len() > 40);
    for field in fields {
        assert!(matches!(field.kind(), Kind::String | Kind::Int64 | Kind::Enum(_) | Kind::Message(_)), "{field:?}");
        if field.is_map() {
            assert_eq!(field.kind().as_message().unwrap().map_entry_key_field().kind(), Kind::String);
        }
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["\\PC{0,12}", any::<String>()]
}

fn texts() -> impl Strategy<Value = BTreeMap<String, String>> {
    collection::btree_map(text(), text(), 0..4)
}

fn durations() -> impl Strategy<Value = Duration> {
    (-315_576_000_000_i64..=315_576_000_000, 0..1_000_000_000_i32)
        .prop_map(|(seconds, nanos)| Duration { seconds, nanos: if seconds < 0 { -nanos } else { nanos } })
}

fn timestamps() -> impl Strategy<Value = Timestamp> {
    (-62_135_596_800_i64..=253_402_300_799, 0..1_000_000_000_i32)
        .prop_map(|(seconds, nanos)| Timestamp { seconds, nanos })
}

prop_compose! {
    fn instances()(
        challenge_id in text(), source_id in text(), since in option::of(timestamps()), last_renew in option::of(timestamps()),
        until in option::of(timestamps()), connection_info in text(), flag in option::of(text()), additional in texts(),
        flags in collection::vec(text(), 0..3),
    ) -> Instance {
        #[allow(deprecated, reason = "the field is part of the contract")]
        Instance { challenge_id, source_id, since, last_renew, until, connection_info, flag, additional, flags }
    }
}

prop_compose! {
    fn challenges()(
        id in text(), scenario in text(), timeout in option::of(durations()), until in option::of(timestamps()),
        instances in collection::vec(instances(), 0..3), additional in texts(), min: i64, max: i64,
    ) -> Challenge {
        Challenge { id, scenario, timeout, until, instances, additional, min, max }
    }
}

prop_compose! {
    fn updates()(
        id in text(), scenario in option::of(text()), update_strategy in option::of(-1..4_i32),
        timeout in option::of(durations()), until in option::of(timestamps()),
        paths in option::of(collection::vec("[a-z]{1,5}(_[a-z]{1,5}){0,2}", 0..4)), additional in texts(), min: i64, max: i64,
    ) -> UpdateChallengeRequest {
        let update_mask = paths.map(|paths| FieldMask { paths });
        UpdateChallengeRequest { id, scenario, update_strategy, timeout, until, update_mask, additional, min, max }
    }
}

fn survives<M: Message + Name + Default + PartialEq + std::fmt::Debug>(message: M) -> Result<(), TestCaseError> {
    let json = out(&message);
    let again: M = from_slice(json.as_bytes()).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(out(&again), json);
    prop_assert_eq!(again, message);
    Ok(())
}

/// JSON that resembles a request, with values that may be invalid.
fn almost_requests() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        Just("id"),
        Just("scenario"),
        Just("timeout"),
        Just("until"),
        Just("updateMask"),
        Just("update_mask"),
        Just("updateStrategy"),
        Just("additional"),
        Just("min"),
        Just("max"),
        Just("x"),
    ];
    let value = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        "\"[0-9TZ:.+-]{0,30}s?\"",
        "\"\\PC{0,8}\"",
        "[\\[\\]{}\",:0-9a-z]{0,12}",
        Just("null".to_owned()),
        Just("{\"k\":\"v\"}".to_owned()),
    ];
    collection::vec((name, value), 0..5).prop_map(|fields| {
        let fields: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", fields.join(","))
    })
}

proptest! {
    #[test]
    fn challenges_survive(challenge in challenges()) {
        survives(challenge)?;
    }

    #[test]
    fn instances_survive(instance in instances()) {
        survives(instance)?;
    }

    #[test]
    fn updates_survive(update in updates()) {
        survives(update)?;
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in collection::vec(any::<u8>(), 0..200)) {
        let _ = from_slice::<UpdateChallengeRequest>(&bytes);
        let _ = from_slice::<Challenge>(&bytes);
    }

    #[test]
    fn any_request_is_read_or_refused_in_bounded_words(json in almost_requests()) {
        match from_slice::<UpdateChallengeRequest>(json.as_bytes()) {
            Ok(request) => survives(request)?,
            Err(error) => prop_assert!(error.to_string().len() < 600, "{error}"),
        }
    }
}
