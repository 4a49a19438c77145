//! Web pages that a developer or an operator opens in a browser.

use serde_json::json;

use super::Target;
use crate::harness::{Backend, World, local, rest_with};

/// A manager of a developer: on loopback, without credentials.
#[test]
fn web_pages_of_others_change_nothing() {
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    let body = json!({ "id": "evil", "scenario": local("web") }).to_string();
    let evil = |headers: &[(&str, &str)]| {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        rest_with(&manager.url, "POST", "/api/v1/challenge", Some(body.as_bytes()), &headers).unwrap()
    };
    for headers in [
        // The content types that need no preflight.
        &[("origin", "http://evil.example"), ("content-type", "text/plain")] as &[_],
        &[("origin", "http://evil.example"), ("content-type", "application/x-www-form-urlencoded")],
        &[("origin", "http://evil.example"), ("content-type", "multipart/form-data; boundary=x")],
        &[("origin", "null")],
        &[("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "same-site"), ("origin", "http://sub.localhost")],
        // A name of the attacker that resolves to 127.0.0.1 after the page was loaded.
        &[("host", "evil.example")],
        &[("host", "evil.example"), ("origin", "http://evil.example"), ("sec-fetch-site", "same-origin")],
        &[("host", "127.0.0.1.evil.example")],
        &[("host", "localhost.evil.example")],
    ] {
        let answer = evil(headers);
        assert!([400, 403, 421].contains(&answer.status), "{headers:?}: {} {}", answer.status, answer.text);
    }
    let reads =
        rest_with(&manager.url, "GET", "/api/v1/challenge", None, &[("host", "evil.example".to_owned())]).unwrap();
    assert!(reads.status >= 400, "a rebound page reads nothing: {}", reads.text);
    assert_eq!(manager.get("/api/v1/challenge").lines(), Vec::<serde_json::Value>::new(), "nothing was created");
    // Callers that are no browsers send no origin, and any content type.
    let honest = rest_with(
        &manager.url,
        "POST",
        "/api/v1/challenge",
        Some(body.as_bytes()),
        &[("content-type", "text/plain".to_owned())],
    );
    assert_eq!(honest.unwrap().status, 200);
}

/// A browser that has the credentials of a proxy in front of the manager sends them for pages of others, too.
#[test]
fn web_pages_of_others_are_refused_with_credentials_too() {
    let target = Target::start();
    let headers = [("authorization", format!("Bearer {}", target.token)), ("origin", "http://evil.example".to_owned())];
    let body = json!({ "id": "evil", "scenario": local("web") }).to_string();
    let answer = rest_with(&target.manager.url, "POST", "/api/v1/challenge", Some(body.as_bytes()), &headers).unwrap();
    assert_eq!(answer.status, 403, "{}", answer.text);
}
