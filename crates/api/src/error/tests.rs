#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::Duration;

use insta::assert_snapshot;
use tonic_types::RetryInfo;

use super::*;
use crate::v1::challenge::CreateChallengeRequest;

#[test]
fn challenge_errors() {
    assert_snapshot!(body(&challenge_already_exists("web-1")), @r#"{"code":6,"message":"Challenge already exists.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_ALREADY_EXISTS","domain":"github.com/ctfer-io/chall-manager","metadata":{"id":"web-1"}},{"@type":"type.googleapis.com/google.rpc.ResourceInfo","resourceType":"Challenge","resourceName":"web-1","owner":"","description":"Another challenge has this id."}]}"#);
    assert_snapshot!(body(&challenge_not_found("web-1")), @r#"{"code":5,"message":"Challenge not found.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_NOT_FOUND","domain":"github.com/ctfer-io/chall-manager","metadata":{"id":"web-1"}},{"@type":"type.googleapis.com/google.rpc.ResourceInfo","resourceType":"Challenge","resourceName":"web-1","owner":"","description":"No challenge has this id."}]}"#);
    assert_snapshot!(body(&challenge_expired("web-1")), @r#"{"code":9,"message":"Challenge has expired.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_EXPIRED","domain":"github.com/ctfer-io/chall-manager","metadata":{"id":"web-1"}},{"@type":"type.googleapis.com/google.rpc.PreconditionFailure","violations":[{"type":"EXPIRATION","subject":"github.com/ctfer-io/chall-manager/Challenge","description":"The challenge takes no new instance after its until."}]}]}"#);
    assert_snapshot!(body(&challenge_no_renewal("web-1")), @r#"{"code":9,"message":"Challenge does not accept renewal.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_NO_RENEWAL","domain":"github.com/ctfer-io/chall-manager","metadata":{"id":"web-1"}},{"@type":"type.googleapis.com/google.rpc.PreconditionFailure","violations":[{"type":"RENEWAL","subject":"github.com/ctfer-io/chall-manager/Challenge","description":"The challenge has no timeout, so there is nothing to renew by."}]}]}"#);
}

#[test]
fn pool_bounds() {
    assert_snapshot!(body(&challenge_pooler_out_of_bounds(-1, -2, 1000)), @r#"{"code":3,"message":"Pooler configuration out of bounds.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_POOLER_OUT_OF_BOUNDS","domain":"github.com/ctfer-io/chall-manager","metadata":{"max":"-2","min":"-1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"min","description":"min is -1; it must be 0 or more.","reason":"MUST_BE_POSITIVE","localizedMessage":null},{"field":"max","description":"max is -2; it must be 0 or more.","reason":"MUST_BE_POSITIVE","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&challenge_pooler_out_of_bounds(0, -2, 1000)), @r#"{"code":3,"message":"Pooler configuration out of bounds.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_POOLER_OUT_OF_BOUNDS","domain":"github.com/ctfer-io/chall-manager","metadata":{"max":"-2","min":"0"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"max","description":"max is -2; it must be 0 or more.","reason":"MUST_BE_POSITIVE","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&challenge_pooler_out_of_bounds(5, 2, 1000)), @r#"{"code":3,"message":"Pooler configuration out of bounds.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_POOLER_OUT_OF_BOUNDS","domain":"github.com/ctfer-io/chall-manager","metadata":{"max":"2","min":"5"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"min","description":"min is 5, above max, which is 2; raise max, or set it to 0 for no bound.","reason":"INVERTED_BOUNDARIES","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&challenge_pooler_out_of_bounds(1001, i64::MAX, 1000)), @r#"{"code":3,"message":"Pooler configuration out of bounds.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_POOLER_OUT_OF_BOUNDS","domain":"github.com/ctfer-io/chall-manager","metadata":{"max":"9223372036854775807","min":"1001"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"min","description":"min is 1001; it must be 1000 or less.","reason":"MUST_NOT_EXCEED_LIMIT","localizedMessage":null},{"field":"max","description":"max is 9223372036854775807; it must be 1000 or less.","reason":"MUST_NOT_EXCEED_LIMIT","localizedMessage":null}]}]}"#);
}

#[test]
fn update_mask() {
    assert_snapshot!(body(&challenge_invalid_update_mask(&["scenario", "no\"body"])), @r#"{"code":3,"message":"Invalid update mask.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"CHALLENGE_INVALID_UPDATE_MASK","domain":"github.com/ctfer-io/chall-manager","metadata":{"update-mask":"paths:\"scenario\" paths:\"no\\\"body\""}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"update-mask","description":"The mask names something that an update cannot change; it can change scenario, update_strategy, timeout, until, additional, min and max.","reason":"INVALID_UPDATE_MASK","localizedMessage":null}]},{"@type":"type.googleapis.com/google.rpc.Help","links":[{"description":"What a field mask is.","url":"https://protobuf.dev/reference/protobuf/google.protobuf/#field-mask"}]}]}"#);
}

#[test]
fn instance_errors() {
    assert_snapshot!(body(&instance_already_exists("web-1", "7")), @r#"{"code":6,"message":"Instance already exists.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INSTANCE_ALREADY_EXISTS","domain":"github.com/ctfer-io/chall-manager","metadata":{"challenge_id":"web-1","source_id":"7"}},{"@type":"type.googleapis.com/google.rpc.ResourceInfo","resourceType":"Instance","resourceName":"web-1/7","owner":"","description":"The source has an instance of this challenge; renew or delete that one."}]}"#);
    assert_snapshot!(body(&instance_not_found("web-1", "7")), @r#"{"code":5,"message":"Instance not found.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INSTANCE_NOT_FOUND","domain":"github.com/ctfer-io/chall-manager","metadata":{"challenge_id":"web-1","source_id":"7"}},{"@type":"type.googleapis.com/google.rpc.ResourceInfo","resourceType":"Instance","resourceName":"web-1/7","owner":"","description":"The source has no instance of this challenge."}]}"#);
    assert_snapshot!(body(&instance_expired("web-1", "7")), @r#"{"code":9,"message":"Instance can't be renewed as it expired.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INSTANCE_EXPIRED","domain":"github.com/ctfer-io/chall-manager","metadata":{"challenge_id":"web-1","source_id":"7"}},{"@type":"type.googleapis.com/google.rpc.PreconditionFailure","violations":[{"type":"EXPIRATION","subject":"github.com/ctfer-io/chall-manager/Instance","description":"The instance is past its until; delete it and create another."}]}]}"#);
}

#[test]
fn registry_errors() {
    assert_snapshot!(body(&oci_reference_malformed("a b", "A reference has no spaces.")), @r#"{"code":3,"message":"OCI reference is malformed.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"OCI_REFERENCE_MALFORMED","domain":"github.com/ctfer-io/chall-manager/OCI","metadata":{"reference":"a b"}},{"@type":"type.googleapis.com/google.rpc.ResourceInfo","resourceType":"Reference","resourceName":"a b","owner":"","description":"A reference has no spaces."},{"@type":"type.googleapis.com/google.rpc.Help","links":[{"description":"How references are written.","url":"https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests"}]}]}"#);
    assert_snapshot!(body(&oci_registry_not_allowed("localhost:5000/a:1")), @r#"{"code":9,"message":"Registry is not allowed.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"OCI_REGISTRY_NOT_ALLOWED","domain":"github.com/ctfer-io/chall-manager/OCI","metadata":{"reference":"localhost:5000/a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"Scenarios of this registry or repository are not allowed here; use another registry, or ask the operator.","reason":"OCI_REGISTRY_NOT_ALLOWED","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&oci_interaction("localhost:5000/a:1")), @r#"{"code":9,"message":"Registry interaction failed.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"OCI_INTERACTION","domain":"github.com/ctfer-io/chall-manager/OCI","metadata":{"reference":"localhost:5000/a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"The registry cannot be reached or refuses the credentials; try again, or ask the operator.","reason":"OCI_INTERACTION","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&oci_reference_not_found("localhost:5000/a:1")), @r#"{"code":3,"message":"Registry does not contain reference.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"OCI_REFERENCE_NOT_FOUND","domain":"github.com/ctfer-io/chall-manager/OCI","metadata":{"reference":"localhost:5000/a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"The registry has no such reference; push the scenario, or correct repository, tag or digest.","reason":"OCI_REFERENCE_NOT_FOUND","localizedMessage":null}]}]}"#);
}

#[test]
fn scenario_errors() {
    assert_snapshot!(body(&scenario_non_matching_specification("a:1", "scenario.yaml has no provisioner.")), @r#"{"code":3,"message":"Scenario does not match the specification.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"SCENARIO_NON_MATCHING_SPECIFICATION","domain":"github.com/ctfer-io/chall-manager","metadata":{"reference":"a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"scenario.yaml has no provisioner.","reason":"SCENARIO_NON_MATCHING_SPECIFICATION","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&scenario_not_found("a:1", "The directory does not exist.")), @r#"{"code":3,"message":"Scenario not found.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"SCENARIO_NOT_FOUND","domain":"github.com/ctfer-io/chall-manager","metadata":{"reference":"a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"The directory does not exist.","reason":"SCENARIO_NOT_FOUND","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&scenario_preprocessing("a:1", "The archive is cut short.")), @r#"{"code":3,"message":"Scenario failed to prepare.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"SCENARIO_PREPROCESSING","domain":"github.com/ctfer-io/chall-manager","metadata":{"reference":"a:1"}},{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"scenario","description":"The archive is cut short.","reason":"SCENARIO_PREPROCESSING","localizedMessage":null}]}]}"#);
}

#[test]
fn other_errors() {
    assert_snapshot!(body(&internal_error()), @r#"{"code":13,"message":"An internal error occurred.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INTERNAL_ERROR","domain":"github.com/ctfer-io/chall-manager","metadata":{}}]}"#);
    assert_snapshot!(body(&unavailable("BUSY")), @r#"{"code":14,"message":"Not available at the moment; try again.","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"BUSY","domain":"github.com/ctfer-io/chall-manager","metadata":{}}]}"#);
    assert_snapshot!(body(&invalid_field("id", "It is empty; give 1 to 256 bytes.")), @r#"{"code":3,"message":"Invalid id: It is empty; give 1 to 256 bytes.","details":[{"@type":"type.googleapis.com/google.rpc.BadRequest","fieldViolations":[{"field":"id","description":"It is empty; give 1 to 256 bytes.","reason":"","localizedMessage":null}]}]}"#);
    assert_snapshot!(body(&unknown_path()), @r#"{"code":5,"message":"Not Found","details":[]}"#);
    assert_snapshot!(body(&unknown_method()), @r#"{"code":12,"message":"Method Not Allowed","details":[]}"#);
    let malformed = json::from_slice::<CreateChallengeRequest>(b"{\"min\":[]}").unwrap_err();
    assert_snapshot!(body(&malformed.into()), @r#"{"code":3,"message":"Field \"min\" (line 1, column 9): invalid type: sequence, expected a whole number of 64 bits, plain or as a string.","details":[]}"#);
}

#[test]
fn error_in_a_stream_is_one_line() {
    let status = challenge_not_found("a\nb");
    let line = stream_line(&status);
    assert_eq!(line, format!("{{\"error\":{}}}\n", body(&status)));
    assert_eq!(line.matches('\n').count(), 1);
}

#[test]
fn every_code_has_an_http_status() {
    let table: Vec<_> = (0..=16)
        .map(|code| {
            let code = Code::from_i32(code);
            format!("{} {code:?} {}", code as i32, http_status(code).as_u16())
        })
        .collect();
    assert_snapshot!(table.join("\n"), @r#"
0 Ok 200
1 Cancelled 499
2 Unknown 500
3 InvalidArgument 400
4 DeadlineExceeded 504
5 NotFound 404
6 AlreadyExists 409
7 PermissionDenied 403
8 ResourceExhausted 429
9 FailedPrecondition 400
10 Aborted 409
11 OutOfRange 400
12 Unimplemented 501
13 Internal 500
14 Unavailable 503
15 DataLoss 500
16 Unauthenticated 401
"#);
}

#[test]
fn reason_round_trips() {
    assert_eq!(reason(&instance_not_found("c", "s")).as_deref(), Some("INSTANCE_NOT_FOUND"));
    assert_eq!(reason(&unknown_path()), None);
}

#[test]
fn details_are_bounded_and_survive_a_header() {
    let status = oci_reference_malformed(&"é".repeat(100_000), "Too long.");
    assert!(status.details().len() < 4096);
    let mut headers = http::HeaderMap::new();
    status.add_header(&mut headers).unwrap();
    let again = Status::from_header_map(&headers).unwrap();
    assert_eq!(body(&again), body(&status));
}

#[test]
fn foreign_details_are_omitted() {
    let of = |details: Vec<prost_types::Any>| {
        let status = pb::Status { code: 14, message: String::new(), details };
        Status::with_details(Code::Unavailable, "Busy.", status.encode_to_vec().into())
    };
    let bare = r#"{"code":14,"message":"Busy.","details":[]}"#;
    let any = |type_url: &str, value: &[u8]| prost_types::Any { type_url: type_url.into(), value: value.to_vec() };
    assert_eq!(body(&of(vec![any("elsewhere/a.Message", b"\x01")])), bare);
    assert_eq!(body(&of(vec![any("type.googleapis.com/google.rpc.Help", b"\xff")])), bare);
    let garbage = Status::with_details(Code::Unavailable, "Busy.", vec![0xff].into());
    assert_eq!(body(&garbage), bare);
    let retry = Status::with_error_details_vec(
        Code::Unavailable,
        "Busy.",
        [RetryInfo::new(Some(Duration::from_millis(1500))).into()],
    );
    assert_snapshot!(body(&retry), @r#"{"code":14,"message":"Busy.","details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"1.500s"}]}"#);
}
