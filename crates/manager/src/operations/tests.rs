#![allow(clippy::unwrap_used, reason = "tests")]

use gauntlet_domain::{Fact, Operation, OperationOutcome};

use crate::fixture::{Api, Logs};

#[tokio::test]
async fn failed_update_logs_and_counts_each_instance_and_requests_a_reconcile_pass() {
    let api = Api::with_instance().await;
    for source in ["8", "9"] {
        let create = format!(r#"{{"challengeId":"web","sourceId":"{source}"}}"#);
        api.call_ok("POST /api/v1/instance", create).await;
    }
    let logs = Logs::default();
    let recording = tracing::subscriber::set_default(logs.clone());
    let update = r#"{"updateMask":"scenario","scenario":"reg/fails","updateStrategy":"recreate"}"#;
    let response = api.call("PATCH /api/v1/challenge/web", update).await;
    drop(recording);
    assert!(response.starts_with("500 "), "{response}");
    let logged = logs.lines();
    assert_eq!(logged.iter().filter(|text| text.contains("cannot update an instance")).count(), 3, "{logged:?}");
    assert!(
        logged.iter().all(|text| text.contains("PROVISION_FAILED") && text.contains("challenge=web")),
        "{logged:?}"
    );
    let failed = |fact: &&Fact| {
        let outcome = OperationOutcome::Failed("PROVISION_FAILED");
        matches!(fact, Fact::InstanceOperation { operation: Operation::Update, outcome: of, .. } if *of == outcome)
    };
    assert_eq!(api.facts().iter().filter(failed).count(), 3);
    assert!(api.reconcile_is_requested());
}

#[tokio::test]
async fn changes_beyond_the_limit_are_refused() {
    let api = Api::with_instance().await;
    let running = api.operations.running.clone().try_acquire_many_owned(100).unwrap();
    let create = r#"{"challengeId":"web","sourceId":"8"}"#;
    let response = api.call("POST /api/v1/instance", create).await;
    assert!(response.starts_with("503 ") && response.contains("OVERLOADED"), "{response}");
    assert!(response.contains("retryDelay"), "{response}");
    assert!(!api.reconcile_is_requested());
    drop(running);
    api.call_ok("POST /api/v1/instance", create).await;
    assert_eq!(api.operations.running.available_permits(), 100);
}
