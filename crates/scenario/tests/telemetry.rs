//! Spans of `resolve`: their fields, and that they contain no secrets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fmt, fs,
    sync::{Arc, Mutex},
};

use gauntlet_domain::Scenarios as _;
use gauntlet_scenario::{Access, Config, Credentials, FlagKey, Library, push};
use gauntlet_stack::{Registry, RegistryOptions};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

type Fields = BTreeMap<String, String>;

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<BTreeMap<u64, (String, Fields)>>>);

struct Recorder<'a>(&'a mut Fields);

impl Visit for Recorder<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

impl<S: Subscriber> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, _: Context<'_, S>) {
        let mut fields = Fields::new();
        attributes.record(&mut Recorder(&mut fields));
        let mut spans = self.0.lock().unwrap();
        spans.insert(id.into_u64(), (attributes.metadata().name().to_owned(), fields));
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        if let Some((_, fields)) = self.0.lock().unwrap().get_mut(&id.into_u64()) {
            values.record(&mut Recorder(fields));
        }
    }
}

impl Spans {
    fn named(&self, name: &str) -> Vec<Fields> {
        self.0.lock().unwrap().values().filter(|(n, _)| n == name).map(|(_, fields)| fields.clone()).collect()
    }
}

#[tokio::test]
async fn spans_describe_the_fetch_without_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path().join("registry"), &RegistryOptions::with_user()).unwrap();
    let scenario = dir.path().join("scenario");
    fs::create_dir(&scenario).unwrap();
    let document = "version: 1\nprovisioner: process\nprocess: { command: [a] }\nready: { output: { contains: up } }\nconnection_info: x\n";
    fs::write(scenario.join("scenario.yaml"), document).unwrap();
    let access = Access {
        insecure: true,
        credentials: vec![Credentials {
            registry: registry.address().parse().unwrap(),
            username: RegistryOptions::USER.into(),
            password: RegistryOptions::PASSWORD.into(),
        }],
        ..Access::default()
    };
    let reference = format!("{}/web:v1", registry.address());
    let digest = push(&scenario, &reference, &access, &|_| {}).await.unwrap();
    let mut config = Config::new(dir.path().join("cache"), FlagKey::new([1; 32]));
    config.access = access;
    let library = Library::new(config).unwrap();

    let seen = async |reference: &str| {
        let spans = Spans::default();
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(spans.clone()));
        let result = library.resolve(reference).await;
        drop(guard);
        let all = format!("{:?} {result:?}", spans.0.lock().unwrap());
        assert!(!all.contains(RegistryOptions::PASSWORD), "{all}");
        spans
    };
    for hit in ["false", "true"] {
        let spans = seen(&reference).await;
        let [pull] = <[Fields; 1]>::try_from(spans.named("scenario.pull")).expect("one scenario.pull span");
        let expected =
            [("cache.hit", hit), ("oci.reference", &reference), ("otel.kind", "client"), ("scenario.digest", &digest)];
        assert_eq!(pull, expected.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect());
        let [validate] = <[Fields; 1]>::try_from(spans.named("scenario.validate")).expect("one scenario.validate span");
        assert_eq!(validate.get("scenario.digest"), Some(&digest));
    }
    let spans = seen(&format!("{}/none:v1", registry.address())).await;
    let [pull] = <[Fields; 1]>::try_from(spans.named("scenario.pull")).expect("one scenario.pull span");
    assert_eq!(pull.get("error.type").map(String::as_str), Some("OCI_REFERENCE_NOT_FOUND"));
    assert_eq!(pull.get("otel.status_code").map(String::as_str), Some("ERROR"));
}
