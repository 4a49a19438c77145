#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex},
};

use gauntlet_domain::{Fact, Operation, OperationOutcome};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::fixture::Api;

/// Keeps the text of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{}={value:?} ", field.name()).unwrap();
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[tokio::test]
async fn each_instance_that_an_update_does_not_reach_is_logged_and_counted_and_the_reconciler_is_told() {
    let api = Api::with_instance().await;
    for source in ["8", "9"] {
        let create = format!(r#"{{"challengeId":"web","sourceId":"{source}"}}"#);
        api.done("POST /api/v1/instance", create).await;
    }
    let warnings = Warnings::default();
    let logs = tracing::subscriber::set_default(warnings.clone());
    let update = r#"{"updateMask":"scenario","scenario":"reg/fails","updateStrategy":"recreate"}"#;
    let answer = api.call("PATCH /api/v1/challenge/web", update).await;
    drop(logs);
    assert!(answer.starts_with("500 "), "{answer}");
    let logged = warnings.0.lock().unwrap().clone();
    assert_eq!(logged.iter().filter(|text| text.contains("not up to date")).count(), 3, "{logged:?}");
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
