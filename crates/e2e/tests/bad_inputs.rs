//! Inputs that no platform should send: each is refused as the contract says, and the store is as before.

use serde_json::{Value, json};

use crate::harness::{Backend, Manager, World, local};

/// Method, path, body, and what is answered: HTTP status, code, and the reason (empty where the contract gives none).
struct Bad {
    what: &'static str,
    method: &'static str,
    path: String,
    body: Option<Vec<u8>>,
    status: u16,
    code: u64,
    reason: &'static str,
}

fn bad(
    what: &'static str,
    method: &'static str,
    path: &str,
    body: Option<&str>,
    status: u16,
    code: u64,
    reason: &'static str,
) -> Bad {
    Bad { what, method, path: path.to_owned(), body: body.map(|body| body.as_bytes().to_vec()), status, code, reason }
}

const CHALLENGE: &str = "/api/v1/challenge";
const INSTANCE: &str = "/api/v1/instance";

fn inputs() -> Vec<Bad> {
    let long = "x".repeat(257);
    let mut inputs = vec![
        bad("no JSON", "POST", CHALLENGE, Some("{"), 400, 3, ""),
        bad("text", "POST", CHALLENGE, Some("hello"), 400, 3, ""),
        bad("a list", "POST", CHALLENGE, Some("[]"), 400, 3, ""),
        bad("two documents", "POST", CHALLENGE, Some("{} {}"), 400, 3, ""),
        bad("a number as id", "POST", CHALLENGE, Some(r#"{"id":7,"scenario":"file://web"}"#), 400, 3, ""),
        bad("a list as scenario", "POST", CHALLENGE, Some(r#"{"id":"n","scenario":["a"]}"#), 400, 3, ""),
        bad("text as min", "POST", CHALLENGE, Some(r#"{"id":"n","scenario":"file://web","min":"two"}"#), 400, 3, ""),
        bad(
            "a fraction as max",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","max":1.5}"#),
            400,
            3,
            "",
        ),
        bad(
            "min past int64",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":"9223372036854775808"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a list as additional",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","additional":[1]}"#),
            400,
            3,
            "",
        ),
        bad(
            "a nested additional",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","additional":{"a":{}}}"#),
            400,
            3,
            "",
        ),
        bad("an id given twice", "POST", CHALLENGE, Some(r#"{"id":"n","id":"m","scenario":"file://web"}"#), 400, 3, ""),
        bad("no id", "POST", CHALLENGE, Some(r#"{"scenario":"file://web"}"#), 400, 3, ""),
        bad("an empty id", "POST", CHALLENGE, Some(r#"{"id":"","scenario":"file://web"}"#), 400, 3, ""),
        bad(
            "a control character in an id",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"a\nb","scenario":"file://web"}"#),
            400,
            3,
            "",
        ),
        bad("no scenario", "POST", CHALLENGE, Some(r#"{"id":"n"}"#), 400, 3, ""),
        bad(
            "a duration without unit",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"600"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a duration in minutes",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"10m"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a negative duration",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"-1s"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a duration past the range",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":"315576000001s"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a number as duration",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","timeout":600}"#),
            400,
            3,
            "",
        ),
        bad(
            "a day as time",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"2026-11-22"}"#),
            400,
            3,
            "",
        ),
        bad(
            "the 13th month",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"2026-13-01T00:00:00Z"}"#),
            400,
            3,
            "",
        ),
        bad(
            "the year 10000",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","until":"10000-01-01T00:00:00Z"}"#),
            400,
            3,
            "",
        ),
        bad(
            "min below zero",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":-1}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        bad(
            "max below zero",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","max":-1}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        bad(
            "max below min",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://web","min":3,"max":2}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        bad(
            "a scenario out of the root",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://../../etc"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        bad(
            "an absolute scenario elsewhere",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file:///etc"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        bad(
            "a scenario that is not there",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"file://nothing"}"#),
            400,
            3,
            "SCENARIO_NOT_FOUND",
        ),
        bad(
            "a reference with a blank",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"regi stry/x:y"}"#),
            400,
            3,
            "OCI_REFERENCE_MALFORMED",
        ),
        bad(
            "a reference in capitals",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"127.0.0.1:1/UPPER/x:y"}"#),
            400,
            3,
            "OCI_REFERENCE_MALFORMED",
        ),
        bad(
            "a registry that is not there",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"n","scenario":"127.0.0.1:1/a/b:c"}"#),
            400,
            9,
            "OCI_INTERACTION",
        ),
        bad(
            "a known challenge",
            "POST",
            CHALLENGE,
            Some(r#"{"id":"web","scenario":"file://web"}"#),
            409,
            6,
            "CHALLENGE_ALREADY_EXISTS",
        ),
        bad("an unknown challenge", "GET", "/api/v1/challenge/nope", None, 404, 5, "CHALLENGE_NOT_FOUND"),
        bad("a path as id", "GET", "/api/v1/challenge/..%2F..%2Fetc%2Fpasswd", None, 404, 5, "CHALLENGE_NOT_FOUND"),
        bad("deleting a path", "DELETE", "/api/v1/challenge/..%2Fweb", None, 404, 5, "CHALLENGE_NOT_FOUND"),
        bad("no UTF-8 in an id", "GET", "/api/v1/challenge/%ff", None, 400, 3, ""),
        bad(
            "a mask with an underscore",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"update_strategy"}"#),
            400,
            3,
            "",
        ),
        bad(
            "a mask of what cannot change",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"id"}"#),
            400,
            3,
            "CHALLENGE_INVALID_UPDATE_MASK",
        ),
        bad(
            "a mask of nothing known",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateMask":"instances,min"}"#),
            400,
            3,
            "CHALLENGE_INVALID_UPDATE_MASK",
        ),
        bad("a number as mask", "PATCH", "/api/v1/challenge/web", Some(r#"{"updateMask":3}"#), 400, 3, ""),
        bad(
            "an update to bounds that cannot be",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"min":5,"max":1,"updateMask":"min,max"}"#),
            400,
            3,
            "CHALLENGE_POOLER_OUT_OF_BOUNDS",
        ),
        bad(
            "a strategy of another type",
            "PATCH",
            "/api/v1/challenge/web",
            Some(r#"{"updateStrategy":true}"#),
            400,
            3,
            "",
        ),
        bad("an update of nothing", "PATCH", "/api/v1/challenge/nope", Some("{}"), 404, 5, "CHALLENGE_NOT_FOUND"),
        bad(
            "an instance of nothing",
            "POST",
            INSTANCE,
            Some(r#"{"challengeId":"nope","sourceId":"1"}"#),
            404,
            5,
            "CHALLENGE_NOT_FOUND",
        ),
        bad("an instance for nobody", "POST", INSTANCE, Some(r#"{"challengeId":"web"}"#), 400, 3, ""),
        bad(
            "a second instance",
            "POST",
            INSTANCE,
            Some(r#"{"challengeId":"web","sourceId":"1"}"#),
            409,
            6,
            "INSTANCE_ALREADY_EXISTS",
        ),
        bad("an unknown instance", "GET", "/api/v1/instance/web/nobody", None, 404, 5, "INSTANCE_NOT_FOUND"),
        bad(
            "deleting an unknown instance",
            "DELETE",
            "/api/v1/instance/web/nobody",
            None,
            404,
            5,
            "INSTANCE_NOT_FOUND",
        ),
        bad("a renewal without timeout", "PATCH", "/api/v1/instance/web/1", Some("{}"), 400, 9, "CHALLENGE_NO_RENEWAL"),
        bad("an unknown path", "GET", "/api/v2/challenge", None, 404, 5, ""),
        bad("an unknown method", "PUT", CHALLENGE, Some("{}"), 501, 12, ""),
    ];
    let with = |what, value: Value| Bad {
        what,
        method: "POST",
        path: CHALLENGE.into(),
        body: Some(value.to_string().into_bytes()),
        status: 400,
        code: 3,
        reason: "",
    };
    inputs.push(with("an id too long", json!({ "id": long, "scenario": local("web") })));
    inputs.push(with(
        "a body too large",
        json!({ "id": "n", "scenario": local("web"), "additional": { "a": "x".repeat(3 << 20) } }),
    ));
    inputs.push(with(
        "additional too large",
        json!({ "id": "n", "scenario": local("web"), "additional": { "a": "x".repeat(300 << 10) } }),
    ));
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    inputs.push(Bad {
        body: Some(format!(r#"{{"id":"n","x":{nested}}}"#).into_bytes()),
        ..with("a body too deep", Value::Null)
    });
    inputs.push(Bad { body: Some(b"{\"id\":\"\xff\"}".to_vec()), ..with("no UTF-8 in a body", Value::Null) });
    inputs
}

/// Everything that is stored, as the API tells it.
fn stored(manager: &Manager) -> (String, String) {
    (manager.get(CHALLENGE).text, manager.get(INSTANCE).text)
}

fn bad_inputs_change_nothing(backend: Backend) {
    let world = World::bare(backend);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    manager.create_instance("web", "1").ok();
    let before = stored(&manager);

    let inputs = inputs();
    assert!(inputs.len() >= 50, "{}", inputs.len());
    let mut wrong = Vec::new();
    for input in &inputs {
        let answer = manager.call(input.method, &input.path, input.body.as_deref());
        let body: Value = serde_json::from_str(&answer.text).unwrap_or_default();
        let reasons: Vec<_> =
            body["details"].as_array().into_iter().flatten().filter_map(|detail| detail["reason"].as_str()).collect();
        let as_said = answer.status == input.status
            && body["code"] == input.code
            && body["message"].as_str().is_some_and(|message| !message.is_empty())
            && body["details"].is_array()
            && (input.reason.is_empty() || reasons == [input.reason]);
        if !as_said {
            wrong.push(format!(
                "{}: expected {} {} {}, got {} {}",
                input.what, input.status, input.code, input.reason, answer.status, answer.text
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(stored(&manager), before);
}

#[test]
fn change_nothing_embedded() {
    bad_inputs_change_nothing(Backend::Embedded);
}

#[test]
fn change_nothing_etcd() {
    bad_inputs_change_nothing(Backend::Etcd);
}
