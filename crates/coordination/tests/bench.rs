//! Runs the bench briefly, so that it keeps working. Asserts no times.
#![allow(clippy::expect_used, reason = "tests")]

#[path = "../benches/coordination/measure.rs"]
mod measure;
#[path = "../benches/coordination/noop.rs"]
mod noop;
#[path = "../benches/coordination/store.rs"]
mod store;
#[path = "../benches/coordination/workloads.rs"]
mod workloads;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_runs_on_etcd() {
    workloads::smoke(store::Backend::Etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_runs_on_the_embedded_store() {
    workloads::smoke(store::Backend::Embedded).await;
}
