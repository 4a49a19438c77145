//! The bench in short, so that it does not rot. Nothing is asserted of time.
#![allow(clippy::expect_used, reason = "tests")]

#[path = "../benches/coordination/measure.rs"]
mod measure;
#[path = "../benches/coordination/nothing.rs"]
mod nothing;
#[path = "../benches/coordination/store.rs"]
mod store;
#[path = "../benches/coordination/work.rs"]
mod work;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_measures_etcd() {
    work::smoke(store::Backend::Etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_measures_the_embedded_store() {
    work::smoke(store::Backend::Embedded).await;
}
