//! Alerts: a killed manager fires one, and its restart resolves it.

use gauntlet_testing::webhook::{Notification, WebhookSink};
use serde_json::Value;

use crate::harness::{Backend, SOON, World, eventually};

/// Selects the alert of this name and status from a notification.
fn alert<'a>(name: &'a str, status: &'a str) -> impl FnMut(&Notification) -> Option<Value> + 'a {
    move |notification| {
        let mut alerts = notification.body["alerts"].as_array()?.iter();
        alerts.find(|alert| alert["labels"]["alertname"] == name && alert["status"] == status).cloned()
    }
}

#[test]
fn killed_manager_pages_and_restarted_manager_resolves() {
    let webhook = WebhookSink::start();
    let mut world = World::alerting(Backend::Embedded, Some(webhook.url().to_owned()));
    let mut manager = world.manager("m1");
    eventually("the manager is scraped", || {
        let up = world.stack().prometheus.query("process_uptime_seconds{service_name=\"gauntlet-manager\"}");
        match up.map_err(|error| error.to_string())?.len() {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        }
    });
    // The alert also fired before the manager started. It must resolve first.
    eventually("the alert is resolved in Prometheus", || {
        let alerts = world.stack().prometheus.query("ALERTS{alertname=\"GauntletManagerDown\"}");
        match alerts.map_err(|error| error.to_string())?.len() {
            0 => Ok(()),
            _ => Err("still firing".to_owned()),
        }
    });
    eventually("the alert is resolved in Alertmanager", || {
        let alerts = world.stack().alertmanager.alerts().map_err(|error| error.to_string())?;
        let down =
            alerts.as_array().into_iter().flatten().any(|alert| alert["labels"]["alertname"] == "GauntletManagerDown");
        if down { Err(alerts.to_string()) } else { Ok(()) }
    });
    webhook.clear();

    manager.process.kill().unwrap();
    eventually("the alert fires in Prometheus", || {
        let firing = world.stack().prometheus.query("ALERTS{alertname=\"GauntletManagerDown\",alertstate=\"firing\"}");
        match firing.map_err(|error| error.to_string())?.len() {
            0 => Err("not firing".to_owned()),
            _ => Ok(()),
        }
    });
    let page = webhook.wait_for(SOON, "a page", alert("GauntletManagerDown", "firing"));
    assert_eq!(page["labels"]["severity"], "page");
    assert!(page["annotations"]["runbook_url"].as_str().unwrap().contains("GauntletManagerDown"));

    manager.process.start().unwrap();
    webhook.wait_for(SOON, "the resolved notification", alert("GauntletManagerDown", "resolved"));
}
