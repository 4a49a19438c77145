//! Telemetry as a process has it: one subscriber for every thread, those of telemetry itself included.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use gauntlet_telemetry::{Env, Error, Sample, Settings, Telemetry, names};
use support::Collector;

#[test]
fn telemetry_does_not_tell_of_itself() {
    let collector = Collector::start();
    let mut env = collector.env();
    env.extend([
        ("RUST_LOG", "info,h2=debug,hyper=debug,tonic=debug,tower=debug".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10".into()),
    ]);
    let env: Env = env.into_iter().collect();
    let telemetry = Telemetry::start(&Settings::new("test", "0").with_debug(), &env).unwrap();
    assert!(matches!(Telemetry::start(&Settings::new("test", "0"), &env), Err(Error::Started)));
    telemetry.gauges().register(&[&names::CHALLENGES], async || {
        tracing::info_span!("a read for a gauge").in_scope(|| tracing::info!("reading"));
        Ok(vec![Sample::new(&names::CHALLENGES, 1)])
    });
    for _ in 0..3 {
        tracing::info_span!("work").in_scope(|| tracing::info!("said"));
        telemetry.flush().unwrap();
    }
    // A thread of the application, which is not telemetry's.
    std::thread::spawn(|| tracing::info_span!("work elsewhere").in_scope(|| {})).join().unwrap();
    telemetry.shutdown().unwrap();
    let mut names = collector.names();
    names.sort();
    // The collector runs in this process, so its own plumbing would show too, were it not left out.
    assert_eq!(names, [vec!["work"; 3], vec!["work elsewhere"]].concat());
    assert_eq!(collector.logs().len(), 3);
}
