//! Invalid requests: each fails with the status and code of the contract, and changes nothing in the store.

use serde_json::{Value, json};

use crate::harness::{Backend, Manager, World, local};

/// An invalid request and the expected error: HTTP status, gRPC code and reason. The reason is empty where the contract gives none.
struct BadInput {
    description: &'static str,
    method: &'static str,
    path: String,
    body: Option<Vec<u8>>,
    status: u16,
    code: u64,
    reason: &'static str,
}

fn refused(
    description: &'static str,
    method: &'static str,
    path: &str,
    body: Option<&str>,
    status: u16,
    code: u64,
    reason: &'static str,
) -> BadInput {
    BadInput {
        description,
        method,
        path: path.to_owned(),
        body: body.map(|body| body.as_bytes().to_vec()),
        status,
        code,
        reason,
    }
}

const CHALLENGE: &str = "/api/v1/challenge";
const INSTANCE: &str = "/api/v1/instance";

fn inputs() -> Vec<BadInput> {
    let long = "x".repeat(257);
    let mut inputs = vec![
        refused("a body that is not JSON", "POST", CHALLENGE, Some("{"), 400, 3, ""),
        refused("plain text", "POST", CHALLENGE, Some("hello"), 400, 3, ""),
        refused("a list as body", "POST", CHALLENGE, Some("[]"), 400, 3, ""),
        refused("two JSON documents", "POST", CHALLENGE, Some("{} {}"), 400, 3, ""),
        refused("a number as id", "POST", CHALLENGE, Some(r#"{"id":7,"scenario":"file://web"}"#), 400, 3, ""),
        refused("a list as scenario", "POST", CHALLENGE, Some(r#"{"id":"n","scenario":["a"]}"#), 400, 3, ""),
        refused(
            "text as min",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":"two"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a fraction as max",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","max":1.5}"#),
            400,
            3,
            "",
        ),
        refused(
            "a min beyond int64",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":"9223372036854775808"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a list as additional",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","additional":[1]}"#),
            400,
            3,
            "",
        ),
        refused(
            "a nested additional",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","additional":{"a":{}}}"#),
            400,
            3,
            "",
        ),
        refused(
            "a duplicate id field",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","id":"m","scenario":"file://web"}"#),
            400,
            3,
            "",
        ),
        refused("no id", "POST", CHALLENGE, Some(r#"{"scenario":"file://web"}"#), 400, 3, ""),
        refused("an empty id", "POST", CHALLENGE, Some(r#"{"id":"","scenario":"file://web"}"#), 400, 3, ""),
        refused(
            "a control character in an id",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"a\nb","scenario":"file://web"}"#),
            400,
            3,
            "",
        ),
        refused("no scenario", "POST", CHALLENGE, Some(r#"{"id":"n"}"#), 400, 3, ""),
        refused(
            "a duration without unit",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"600"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a duration in minutes",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"10m"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a negative duration",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"-1s"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a duration out of range",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"315576000001s"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a number as duration",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":600}"#),
            400,
            3,
            "",
        ),
        refused(
            "a date without a time",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"2026-11-22"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a time in the 13th month",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"2026-13-01T00:00:00Z"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a time in the year 10000",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"10000-01-01T00:00:00Z"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a negative min",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":-1}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        refused(
            "a negative max",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","max":-1}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        refused(
            "a max below min",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":3,"max":2}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        refused(
            "a scenario outside the root",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://../../etc"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        refused(
            "an absolute path outside the root",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file:///etc"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        refused(
            "a missing scenario",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://nothing"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        refused(
            "a reference with a space",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"regi stry/x:y"}"#),
            400,
            3,
            "OCI_REFERENCE_MALFORMED",
        ),
        refused(
            "a reference in capitals",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"127.0.0.1:1/UPPER/x:y"}"#),
            400,
            3,
            "OCI_REFERENCE_MALFORMED",
        ),
        refused(
            "an unreachable registry",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"127.0.0.1:1/a/b:c"}"#),
            400,
            9,
            "OCI_INTERACTION",
        ),
        refused(
            "an existing challenge",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"web","scenario":"file://web"}"#),
            409,
            6,
            "CHALLENGE_ALREADY_EXISTS",
        ),
        refused("an unknown challenge", "GET", "/api/v1/challenge/nope", None, 404, 5, "CHALLENGE_NOT_FOUND"),
        refused(
            "a file path as id",
            "GET",
            "/api/v1/challenge/..%2F..%2Fetc%2Fpasswd",
            None,
            404,
            5,
            "CHALLENGE_NOT_FOUND",
        ),
        refused("deletion of a file path", "DELETE", "/api/v1/challenge/..%2Fweb", None, 404, 5, "CHALLENGE_NOT_FOUND"),
        refused("an id that is not UTF-8", "GET", "/api/v1/challenge/%ff", None, 400, 3, ""),
        refused(
            "a mask with an underscore",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"update_strategy"}"#),
            400,
            3,
            "",
        ),
        refused(
            "a mask with an immutable field",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"id"}"#),
            400,
            3,
            "CHALLENGE_INVALID_UPDATE_MASK",
        ),
        refused(
            "a mask with an unknown field",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"instances,min"}"#),
            400,
            3,
            "CHALLENGE_INVALID_UPDATE_MASK",
        ),
        refused("a number as mask", "PATCH", "/api/v1/challenge/web", Some(r#"{"updateMask":3}"#), 400, 3, ""),
        refused(
            "an update to a max below min",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"min":5,"max":1,"updateMask":"min,max"}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        refused(
            "a boolean as strategy",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateStrategy":true}"#),
            400,
            3,
            "",
        ),
        refused(
            "an update of an unknown challenge",
            "PATCH",
            "/api/v1/challenge/nope",
            Some("{}"),
            404,
            5,
            "CHALLENGE_NOT_FOUND",
        ),
        refused(
            "an instance of an unknown challenge",
            "POST",
            INSTANCE,
            Some(r#"{"challengeId":"nope","sourceId":"1"}"#),
            404,
            5,
            "CHALLENGE_NOT_FOUND",
        ),
        refused("an instance without a source", "POST", INSTANCE, Some(r#"{"challengeId":"web"}"#), 400, 3, ""),
        refused(
            "a second instance for a source",
            "POST",
            INSTANCE,
            Some(r#"{"challengeId":"web","sourceId":"1"}"#),
            409,
            6,
            "INSTANCE_ALREADY_EXISTS",
        ),
        refused("an unknown instance", "GET", "/api/v1/instance/web/nobody", None, 404, 5, "INSTANCE_NOT_FOUND"),
        refused(
            "deletion of an unknown instance",
            "DELETE",
            "/api/v1/instance/web/nobody",
            None,
            404,
            5,
            "INSTANCE_NOT_FOUND",
        ),
        refused(
            "a renewal of a challenge without timeout",
            "PATCH",
            "/api/v1/instance/web/1",
            Some("{}"),
            400,
            9,
            "CHALLENGE_NO_RENEWAL",
        ),
        refused("an unknown path", "GET", "/api/v2/challenge", None, 404, 5, ""),
        refused("an unknown method", "PUT", CHALLENGE, Some("{}"), 501, 12, ""),
    ];
    let invalid_challenge = |description, value: Value| BadInput {
        description,
        method: "POST",
        path: CHALLENGE.into(),
        body: Some(value.to_string().into_bytes()),
        status: 400,
        code: 3,
        reason: "",
    };
    inputs.push(invalid_challenge("an id that is too long", json!({ "id": long, "scenario": local("web") })));
    inputs.push(invalid_challenge(
        "a body that is too large",
        json!({ "id": "n", "scenario": local("web"), "additional": { "a": "x".repeat(3 << 20) } }),
    ));
    inputs.push(invalid_challenge(
        "additional values that are too large",
        json!({ "id": "n", "scenario": local("web"), "additional": { "a": "x".repeat(300 << 10) } }),
    ));
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    inputs.push(BadInput {
        body: Some(format!(r#"{{"id":"n","x":{nested}}}"#).into_bytes()),
        ..invalid_challenge("a body nested too deeply", Value::Null)
    });
    inputs.push(BadInput {
        body: Some(b"{\"id\":\"\xff\"}".to_vec()),
        ..invalid_challenge("a body that is not UTF-8", Value::Null)
    });
    inputs
}

/// Returns every challenge and instance in the store, as the API lists them.
fn snapshot(manager: &Manager) -> (String, String) {
    (manager.get(CHALLENGE).text, manager.get(INSTANCE).text)
}

fn assert_bad_inputs_change_nothing(backend: Backend) {
    let world = World::bare(backend);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    manager.create_instance("web", "1").ok();
    let before = snapshot(&manager);

    let inputs = inputs();
    assert!(inputs.len() >= 50, "{}", inputs.len());
    let mut failures = Vec::new();
    for input in &inputs {
        let response = manager.call(input.method, &input.path, input.body.as_deref());
        let body: Value = serde_json::from_str(&response.text).unwrap_or_default();
        let reasons: Vec<_> =
            body["details"].as_array().into_iter().flatten().filter_map(|detail| detail["reason"].as_str()).collect();
        let as_expected = response.status == input.status
            && body["code"] == input.code
            && body["message"].as_str().is_some_and(|message| !message.is_empty())
            && body["details"].is_array()
            && (input.reason.is_empty() || reasons == [input.reason]);
        if !as_expected {
            failures.push(format!(
                "{}: expected {} {} {}, got {} {}",
                input.description, input.status, input.code, input.reason, response.status, response.text
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(snapshot(&manager), before);
}

#[test]
fn bad_inputs_change_nothing_embedded() {
    assert_bad_inputs_change_nothing(Backend::Embedded);
}

#[test]
fn bad_inputs_change_nothing_etcd() {
    assert_bad_inputs_change_nothing(Backend::Etcd);
}
