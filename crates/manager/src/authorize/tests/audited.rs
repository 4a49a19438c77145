//! The audit log.

use super::*;

#[tokio::test]
async fn every_change_is_audited_with_who_what_where_and_outcome() {
    let api = Api::with_instance().await;
    let router = api.service(Files::new().credentials(), None);
    let logs = Logs::of_target(audit::TARGET);
    let recording = tracing::subscriber::set_default(logs.clone());
    let (admin, operate, bound) = (bearer(&text(&token(3))), bearer(&text(&token(2))), bearer(&text(&token(4))));
    let create = r#"{"id":"new","scenario":"reg/web:v1","additional":{"password":"hunter2"}}"#;
    let instance = r#"{"challengeId":"new","sourceId":"9"}"#;
    for (method, target, authorization, body) in [
        ("POST", "/api/v1/challenge", &admin, create),
        ("POST", "/api/v1/challenge", &admin, create),
        ("POST", "/api/v1/challenge", &operate, create),
        ("PATCH", "/api/v1/challenge/new", &admin, "{}"),
        ("PATCH", "/api/v1/challenge/new", &bound, "{}"),
        ("POST", "/api/v1/instance", &operate, instance),
        ("PATCH", "/api/v1/instance/new/9", &operate, "{}"),
        ("DELETE", "/api/v1/instance/new/9", &operate, ""),
        ("DELETE", "/api/v1/challenge/new", &admin, ""),
        ("GET", "/api/v1/challenge/web", &admin, ""),
    ] {
        rest(&router, method, target, authorization, body).await;
    }
    drop(recording);
    let author =
        "enduser.id=\"author\" access.kind=\"token\" access.token_id=\"030303030303\" client.address=\"10.0.0.7\"";
    let platform = author.replace("author", "platform").replace("03", "02");
    let holder = author.replace("author", "bound").replace("03", "04");
    let on = |operation: &str, target: &str, outcome: &str| {
        format!("access.operation={operation:?} {target}outcome={outcome:?} message=change ")
    };
    let (challenge, both) = ("challenge.id=\"new\" ", "challenge.id=\"new\" source.id=\"9\" ");
    let expected = [
        format!("{author} {}", on("CreateChallenge", challenge, "ok")),
        format!("{author} {}", on("CreateChallenge", challenge, "CHALLENGE_ALREADY_EXISTS")),
        format!("{platform} {}", on("CreateChallenge", "", "SCOPE_INSUFFICIENT")),
        format!("{author} {}", on("UpdateChallenge", challenge, "ok")),
        format!("{holder} {}", on("UpdateChallenge", challenge, "CHALLENGE_NOT_PERMITTED")),
        format!("{platform} {}", on("CreateInstance", both, "ok")),
        format!("{platform} {}", on("RenewInstance", both, "CHALLENGE_NO_RENEWAL")),
        format!("{platform} {}", on("DeleteInstance", both, "ok")),
        format!("{author} {}", on("DeleteChallenge", challenge, "ok")),
    ];
    let logged = logs.lines();
    let sorted = |line: &String| {
        let (message, fields) =
            line.split_once("message=change ").map_or(("", line.as_str()), |_| ("message=change ", line));
        fields.replace("message=change ", "") + message
    };
    assert_eq!(logged.iter().map(sorted).collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn change_of_a_client_that_disconnects_is_audited() {
    let api = Api::new().await;
    let logs = Logs::of_target(audit::TARGET);
    let recording = tracing::subscriber::set_default(logs.clone());
    let router = api.service(Files::new().credentials(), None);
    let authorization = bearer(&text(&token(3)));
    let create = r#"{"id":"web","scenario":"reg/web:v1"}"#;
    let mut call = Box::pin(rest(&router, "POST", "/api/v1/challenge", &authorization, create));
    // The first poll begins the change.
    assert!(futures::poll!(&mut call).is_pending());
    drop(call);
    gauntlet_testing::eventually("an audit record", async || (logs.containing("outcome=\"ok\"") == 1).then_some(()))
        .await;
    drop(recording);
}
