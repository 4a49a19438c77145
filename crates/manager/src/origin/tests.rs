#![allow(clippy::unwrap_used, reason = "tests")]
use proptest::prelude::*;

use super::*;

/// A request with these headers; the first value is the method.
fn request(method: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::builder().method(method).uri("/api/v1/challenge");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

fn policy(origins: &[&str], hosts: &[&str]) -> OriginPolicy {
    OriginPolicy {
        allowed_origins: origins.iter().map(|origin| origin.parse().unwrap()).collect(),
        allowed_hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        hosts: Hosts::Listed,
    }
}

/// The metric's reason of a refusal.
fn check(policy: &OriginPolicy, request: &Request<()>) -> Result<(), &'static str> {
    policy.check(request).map_err(|refusal| refusal.reason)
}

const HERE: (&str, &str) = ("host", "localhost:8080");

#[test]
fn clients_that_are_not_browsers_pass() {
    let policy = policy(&[], &[]);
    for content_type in ["text/plain", "application/json", "application/x-www-form-urlencoded", "application/grpc"] {
        assert_eq!(check(&policy, &request("POST", &[HERE, ("content-type", content_type)])), Ok(()));
    }
    // HTTP/1.0 has no Host.
    assert_eq!(check(&policy, &request("GET", &[])), Ok(()));
}

#[test]
fn page_of_another_origin_is_refused() {
    let policy = policy(&[], &[]);
    for headers in [
        &[("origin", "http://evil.example")][..],
        &[("origin", "null")],
        &[("origin", "")],
        &[("origin", "http://localhost:8081")],
        &[("origin", "http://localhost:8080"), ("origin", "http://evil.example")],
        &[("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "same-site"), ("origin", "http://localhost:3000")],
        &[("sec-fetch-site", "cross-site"), ("origin", "http://localhost:8080")],
        &[("sec-fetch-site", "unheard-of")],
        &[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")],
    ] {
        for method in ["POST", "PATCH", "DELETE", "OPTIONS"] {
            let request = request(method, &[&[HERE], headers].concat());
            assert_eq!(check(&policy, &request), Err("cross_origin"), "{request:?}");
        }
    }
    let status = policy.check(&request("POST", &[HERE, ("origin", "http://evil.example")])).unwrap_err().status;
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    assert_eq!(error::reason(&status).unwrap(), "CROSS_ORIGIN");
    assert!(status.message().contains("--allow-origin"));
}

#[test]
fn pages_of_the_listener_itself_pass() {
    let policy = policy(&[], &["gauntlet.example"]);
    for headers in [
        &[HERE, ("origin", "http://localhost:8080")][..],
        &[HERE, ("sec-fetch-site", "same-origin"), ("origin", "http://localhost:8080")],
        &[HERE, ("sec-fetch-site", "none")],
        // A proxy terminates TLS and forwards the name.
        &[("host", "gauntlet.example"), ("origin", "https://GAUNTLET.example")],
        &[("host", "gauntlet.example:443"), ("origin", "https://gauntlet.example")],
    ] {
        assert_eq!(check(&policy, &request("POST", headers)), Ok(()), "{headers:?}");
    }
}

#[test]
fn links_from_other_pages_are_followed_and_their_frames_and_images_are_not_served() {
    let policy = policy(&[], &[]);
    let from = |mode, destination| {
        request(
            "GET",
            &[HERE, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", mode), ("sec-fetch-dest", destination)],
        )
    };
    assert_eq!(check(&policy, &from("navigate", "document")), Ok(()));
    for (mode, destination) in [("navigate", "iframe"), ("no-cors", "image"), ("no-cors", "script"), ("cors", "empty")]
    {
        assert_eq!(check(&policy, &from(mode, destination)), Err("cross_origin"), "{mode} {destination}");
    }
}

#[test]
fn listed_origin_passes() {
    let policy = policy(&["https://ctf.example", "http://localhost:3000"], &[]);
    for (origin, expected) in [
        ("https://ctf.example", Ok(())),
        ("https://ctf.example:443", Ok(())),
        ("http://localhost:3000", Ok(())),
        ("http://ctf.example", Err("cross_origin")),
        ("https://ctf.example:444", Err("cross_origin")),
        ("https://ctf.example.evil.example", Err("cross_origin")),
        ("https://evil.example/?https://ctf.example", Err("cross_origin")),
    ] {
        let headers = [HERE, ("origin", origin), ("sec-fetch-site", "cross-site")];
        assert_eq!(check(&policy, &request("POST", &headers)), expected, "{origin}");
    }
}

#[test]
fn rebound_host_is_refused() {
    let policy = policy(&[], &["gauntlet.example", "10.0.0.7", "fd00::1"]);
    for host in [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "web.localhost:1",
        "127.0.0.1:8080",
        "127.9.9.9",
        "[::1]:8080",
        "[::ffff:127.0.0.1]",
        "gauntlet.example",
        "Gauntlet.Example.:99",
        "10.0.0.7:8080",
        "[fd00::1]:8080",
    ] {
        assert_eq!(check(&policy, &request("GET", &[("host", host)])), Ok(()), "{host}");
    }
    for host in [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "evillocalhost",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
        "evil.example@localhost",
        "0.0.0.0:8080",
        "10.0.0.8",
        "[::]",
        "a b",
        "127.1",
    ] {
        assert_eq!(check(&policy, &request("GET", &[("host", host)])), Err("host"), "{host}");
    }
    // HTTP/2 has it in the request line, and so have requests to proxies. Every name must be accepted.
    let named = |uri: &str, host: &[(&str, &str)]| {
        let mut request = request("GET", host);
        *request.uri_mut() = uri.parse().unwrap();
        request
    };
    assert_eq!(check(&policy, &named("http://localhost:8080/", &[])), Ok(()));
    assert_eq!(check(&policy, &named("http://evil.example/", &[])), Err("host"));
    assert_eq!(check(&policy, &named("http://evil.example/", &[HERE])), Err("host"));
    assert_eq!(check(&policy, &named("http://localhost/", &[("host", "evil.example")])), Err("host"));
    assert_eq!(check(&policy, &request("GET", &[HERE, ("host", "evil.example")])), Err("host"));
    let any = OriginPolicy { hosts: Hosts::Any, ..policy };
    assert_eq!(check(&any, &request("GET", &[("host", "evil.example")])), Ok(()));
}

#[test]
fn origins_and_hosts_in_another_form_are_explained() {
    for text in [
        "ctf.example",
        "ftp://ctf.example",
        "https://ctf.example/",
        "https://ctf.example/a",
        "https://a@b",
        "https://a?b",
        "*",
        "null",
        "",
    ] {
        let error = text.parse::<Origin>().unwrap_err();
        assert!(error.contains("expected an origin such as https://ctf.example"), "{error}");
    }
    for text in ["gauntlet.example:8080", "https://gauntlet.example", "a/b", "*", ""] {
        let error = text.parse::<HostName>().unwrap_err();
        assert!(error.contains("expected a host name such as gauntlet.example"), "{error}");
    }
}

proptest! {
    #[test]
    fn any_foreign_name_is_refused(host in "\\PC{0,40}") {
        let foreign = format!("{host}.evil.example");
        prop_assert!(!policy(&["https://ctf.example"], &["gauntlet.example"]).is_allowed_host(&foreign));
    }

    #[test]
    fn origins_survive_their_header(host in "[a-z]([a-z0-9-]{0,10}[a-z0-9])?", port: u16, tls: bool) {
        let origin: Origin = format!("{}://{host}:{port}", if tls { "https" } else { "http" }).parse().unwrap();
        let header = origin.header().unwrap();
        prop_assert_eq!(header.to_str().unwrap().parse::<Origin>().unwrap(), origin);
    }
}
