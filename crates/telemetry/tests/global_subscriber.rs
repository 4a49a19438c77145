//! Telemetry with a global subscriber, which every thread has, including telemetry's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use gauntlet_telemetry::{Env, Error, Sample, Settings, Telemetry, names};
use support::Collector;

#[test]
fn telemetry_records_nothing_about_its_own_export() {
    let collector = Collector::start();
    let mut env = collector.env();
    env.extend([
        ("RUST_LOG", "info,h2=debug,hyper=debug,tonic=debug,tower=debug".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10".into()),
    ]);
    let env: Env = env.into_iter().collect();
    let telemetry = Telemetry::start(&Settings::new("test", "0").with_debug(), &env).unwrap();
    assert!(matches!(Telemetry::start(&Settings::new("test", "0"), &env), Err(Error::AlreadyStarted)));
    telemetry.gauges().register(&[&names::CHALLENGES], async || {
        tracing::info_span!("gauge read").in_scope(|| tracing::info!("reading"));
        Ok(vec![Sample::new(&names::CHALLENGES, 1)])
    });
    for _ in 0..3 {
        tracing::info_span!("work").in_scope(|| tracing::info!("a log record"));
        telemetry.flush().unwrap();
    }
    // Other threads of the application use the global subscriber too.
    std::thread::spawn(|| tracing::info_span!("work elsewhere").in_scope(|| {})).join().unwrap();
    telemetry.shutdown().unwrap();
    let mut names = collector.names();
    names.sort();
    // The collector runs in this process: the spans of its libraries would appear too if they were not filtered.
    assert_eq!(names, [vec!["work"; 3], vec!["work elsewhere"]].concat());
    assert_eq!(collector.logs().len(), 3);
}
