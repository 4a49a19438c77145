//! A killed manager wakes somebody, and its return is told too.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{Backend, World, eventually};

/// A webhook that keeps what it was sent.
struct Pager {
    url: String,
    received: Arc<Mutex<Vec<Value>>>,
}

impl Pager {
    fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(Vec::new()));
        let keep = received.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut stream = stream;
                let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
                let body = loop {
                    let Ok(read @ 1..) = stream.read(&mut buffer) else { break None };
                    text.extend_from_slice(&buffer[..read]);
                    let seen = String::from_utf8_lossy(&text);
                    let Some((head, body)) = seen.split_once("\r\n\r\n") else { continue };
                    let length = head
                        .lines()
                        .find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
                    if body.len() >= length.unwrap_or(0) {
                        break serde_json::from_str(body).ok();
                    }
                };
                keep.lock().unwrap().extend(body);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        Self { url, received }
    }

    fn heard(&self, alert: &str, status: &str) -> Result<Value, String> {
        let received = self.received.lock().unwrap();
        let alerts = received.iter().flat_map(|message| message["alerts"].as_array().cloned().unwrap_or_default());
        let mut matching = alerts.filter(|one| one["labels"]["alertname"] == alert && one["status"] == status);
        matching.next().ok_or_else(|| format!("no {status} {alert} among {} messages", received.len()))
    }
}

#[test]
fn a_killed_manager_pages_and_its_return_resolves() {
    let pager = Pager::listen();
    let mut world = World::alerting(Backend::Embedded, Some(pager.url.clone()));
    let mut manager = world.manager("m1");
    eventually("the manager is seen", || {
        let up = world.stack().prometheus.query("process_uptime_seconds{service_name=\"gauntlet-manager\"}");
        match up.map_err(|error| error.to_string())?.len() {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        }
    });
    // Before the manager was there the alert was right, too; while it runs nobody is woken.
    eventually("the alert is quiet", || {
        let alerts = world.stack().prometheus.query("ALERTS{alertname=\"GauntletManagerDown\"}");
        match alerts.map_err(|error| error.to_string())?.len() {
            0 => Ok(()),
            _ => Err("not quiet".to_owned()),
        }
    });
    eventually("Alertmanager has forgotten it", || {
        let alerts = world.stack().alertmanager.alerts().map_err(|error| error.to_string())?;
        let down =
            alerts.as_array().into_iter().flatten().any(|alert| alert["labels"]["alertname"] == "GauntletManagerDown");
        if down { Err(alerts.to_string()) } else { Ok(()) }
    });
    pager.received.lock().unwrap().clear();

    manager.process.kill().unwrap();
    eventually("the alert fires in Prometheus", || {
        let firing = world.stack().prometheus.query("ALERTS{alertname=\"GauntletManagerDown\",alertstate=\"firing\"}");
        match firing.map_err(|error| error.to_string())?.len() {
            0 => Err("not firing".to_owned()),
            _ => Ok(()),
        }
    });
    let page = eventually("the page is delivered", || pager.heard("GauntletManagerDown", "firing"));
    assert_eq!(page["labels"]["severity"], "page");
    assert!(page["annotations"]["runbook_url"].as_str().unwrap().contains("GauntletManagerDown"));

    manager.process.start().unwrap();
    eventually("the all-clear is delivered", || pager.heard("GauntletManagerDown", "resolved"));
}
