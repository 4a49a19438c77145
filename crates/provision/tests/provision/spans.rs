//! The spans of each step.

use std::sync::{Arc, Mutex};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{self, Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

use crate::support::{Fixture, LaunchExt as _, launch, remove};

#[tokio::test]
async fn each_step_has_a_span_and_none_contains_a_secret() {
    let fixture = Fixture::new();
    let seen = Seen::default();
    // Other tests run on threads without a subscriber. Without a global one, the first to reach a span would disable its callsite for all.
    tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap();
    let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(seen.clone()));
    let manager = fixture.manager();
    let plan = |greeting: &str| fixture.greeter().greeting(greeting);
    manager.launch(&launch(1, 1, &plan("secret-one"))).await.unwrap();
    manager.relaunch(&launch(1, 1, &plan("secret-two"))).await.unwrap();
    manager.launch(&launch(2, 1, &fixture.script("echo FLAG{$GREETING}; exit 1"))).await.unwrap_err();
    remove(&manager, 1).await;
    drop(Fixture::without_cgroups().manager());
    drop(guard);
    let seen = std::mem::take(&mut *seen.0.lock().unwrap());
    let names: Vec<_> = seen.iter().filter_map(|line| line.strip_prefix("span ")).collect();
    let (up, update) = (["allocate", "start", "ready"], ["allocate", "stop", "start", "ready"]);
    let failed = ["allocate", "start", "ready", "stop"];
    let steps: Vec<_> = [&up[..], &update[..], &failed[..], &["stop", "remove"]].concat();
    assert_eq!(names, steps.iter().map(|step| format!("provision.{step}")).collect::<Vec<_>>());
    let all = seen.join("\n");
    assert!(all.contains("instance.identity=\"0000000000000001\"") && all.contains("provisioner=\"process\""), "{all}");
    assert_eq!(all.matches("otel.status_code=\"ERROR\"").count(), 1, "{all}");
    assert!(all.contains("error.type="), "{all}");
    let why = "why=\"switched off\"";
    assert!(
        all.contains(why) && all.contains("instances have no control groups"),
        "the reason must be reported: {all}"
    );
    assert!(!all.contains("secret-") && !all.contains("FLAG{"), "{all}");
}

/// The names and fields of all spans and events.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{field}={value:?}"));
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.0.lock().unwrap().push(format!("span {}", attributes.metadata().name()));
        attributes.record(&mut self.clone());
    }

    fn on_record(&self, _: &Id, values: &span::Record<'_>, _: Context<'_, S>) {
        values.record(&mut self.clone());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        event.record(&mut self.clone());
    }
}
