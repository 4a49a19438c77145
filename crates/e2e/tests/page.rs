//! What a person sees without any stack: the debug page.

use serde_json::json;

use crate::harness::{Backend, World, eventually, fetch, local};

#[test]
fn debug_page_shows_live_operations() {
    // Nothing is exported, everything is seen.
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    manager.create_challenge("broken", &local("broken"), &json!({}));
    manager.create_instance("web", "a").ok();
    assert_eq!(manager.create_instance("broken", "a").status, 500);

    let page = fetch(&manager.debug).unwrap();
    assert!(
        page.contains("<html") && !page.contains("http://") && !page.contains("https://"),
        "one page, no assets from elsewhere"
    );
    let state = eventually("the page has seen the calls", || {
        let state: serde_json::Value =
            serde_json::from_str(&fetch(&format!("{}/debug/state.json", manager.debug))?).unwrap();
        let operations = state["operations"].as_array().unwrap();
        let create =
            operations.iter().find(|operation| operation["name"] == "POST /api/v1/instance").ok_or("no create yet")?;
        if create["count"] == 2 && create["errors"] == 1 { Ok(state) } else { Err(create.to_string()) }
    });
    let gauge = |name: &str| {
        state["gauges"].as_array().unwrap().iter().find(|gauge| gauge["name"] == name).unwrap()["value"].clone()
    };
    assert_eq!(gauge("challenges"), 2);
    assert_eq!(gauge("instances"), 1);
    let operations = state["operations"].as_array().unwrap();
    let create = operations.iter().find(|operation| operation["name"] == "POST /api/v1/instance").unwrap();
    for quantile in ["p50", "p95", "p99"] {
        assert!(create["latency"][quantile].as_f64().unwrap() > 0.0);
    }
    assert!(operations.iter().any(|operation| operation["name"] == "lock.acquire"), "lock waits");
    let failed = state["failed"].as_array().unwrap();
    assert!(
        failed.iter().any(|trace| trace.to_string().contains("provision.up")),
        "the failed trace is there with its steps"
    );
    assert!(!state["slow"].as_array().unwrap().is_empty());
}
