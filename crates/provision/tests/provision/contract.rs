//! Tests of the [`Provisioner`] contract, run on every backend. To add a backend, implement [`Backend`] and add a `contract!` line at the end.

use std::sync::Arc;

use crate::support::{Fixture, LaunchExt as _, Script, challenge, greeting_at, launch};
use gauntlet_domain::{Error, Identity, Provisioner};
use gauntlet_testing::eventually;

/// What the tests need from a backend.
trait Backend {
    /// Creates another manager of the same resources.
    fn manager(&self) -> Arc<dyn Provisioner>;
    /// Returns a script whose instance sends the greeting to each client and has the flag `FLAG{greeting}`.
    fn plan(&self, greeting: &str) -> Script;
    /// Returns a script whose instance never becomes ready.
    fn broken(&self) -> Script;
}

impl Backend for Fixture {
    fn manager(&self) -> Arc<dyn Provisioner> {
        Arc::new(Fixture::manager(self))
    }

    fn plan(&self, greeting: &str) -> Script {
        self.greeter().greeting(greeting)
    }

    fn broken(&self) -> Script {
        self.script("echo no such luck; exit 3")
    }
}

async fn up_returns_the_outputs_of_the_instance(backend: impl Backend) {
    let manager = backend.manager();
    let outputs = manager.launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"));
    assert_eq!(outputs.flags, ["FLAG{one}"]);
    let found = manager.list().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].challenge, challenge("a challenge"));
    assert_eq!(found[0].identity, Identity::from_bits(1));
    assert_eq!(found[0].generation, 1);
}

async fn second_up_keeps_the_instance(backend: impl Backend) {
    let first = backend.manager().launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    // Another manager, a later generation and a different plan: the running instance is kept.
    let again = backend.manager().launch(&launch(1, 2, &backend.plan("two"))).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(backend.manager().list().await.unwrap().len(), 1);
}

async fn concurrent_ups_launch_one_instance(backend: impl Backend) {
    let (one, two, plan) = (backend.manager(), backend.manager(), backend.plan("one"));
    let launch = launch(1, 1, &plan);
    let (a, b) = futures::join!(one.launch(&launch), two.launch(&launch));
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(one.list().await.unwrap().len(), 1);
}

async fn instances_are_independent(backend: impl Backend) {
    let manager = backend.manager();
    let one = manager.launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    let two = manager.launch(&launch(2, 1, &backend.plan("two"))).await.unwrap();
    assert_ne!(one.connection_info, two.connection_info);
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
    assert_eq!(greeting_at(&one.connection_info), None);
    assert_eq!(greeting_at(&two.connection_info).as_deref(), Some("two"));
}

async fn down_removes_the_instance_and_may_be_repeated(backend: impl Backend) {
    let manager = backend.manager();
    let outputs = manager.launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    for _ in 0..2 {
        manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
        assert_eq!(greeting_at(&outputs.connection_info), None);
        assert_eq!(manager.list().await.unwrap(), []);
    }
    manager.down(&challenge("never was"), &Identity::from_bits(9), 1).await.unwrap();
    assert_eq!(manager.list().await.unwrap(), []);
}

async fn update_keeps_the_address_and_changes_the_program(backend: impl Backend) {
    let manager = backend.manager();
    let before = manager.launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    let after = manager.relaunch(&launch(1, 2, &backend.plan("two"))).await.unwrap();
    assert_eq!(before.connection_info, after.connection_info);
    assert_eq!(greeting_at(&after.connection_info).as_deref(), Some("two"));
    assert_eq!(after.flags, ["FLAG{two}"]);
    assert_eq!(manager.list().await.unwrap()[0].generation, 2);
}

async fn update_launches_a_missing_instance(backend: impl Backend) {
    let outputs = backend.manager().relaunch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"));
}

async fn older_requests_change_nothing(backend: impl Backend) {
    let manager = backend.manager();
    let (id, identity) = (challenge("a challenge"), Identity::from_bits(1));
    let outputs = manager.launch(&launch(1, 5, &backend.plan("one"))).await.unwrap();
    let placement = launch(1, 5, &backend.plan("one")).reserve(&*manager).await.unwrap();
    let fenced = |error: Error| matches!(error, Error::Fenced(_));
    let older = launch(1, 4, &backend.plan("two"));
    assert!(fenced(older.reserve(&*manager).await.unwrap_err()));
    assert!(fenced(manager.down(&id, &identity, 4).await.unwrap_err()));
    assert!(fenced(manager.update(&older.request(placement.clone())).await.unwrap_err()));
    assert!(fenced(manager.up(&older.request(placement.clone())).await.unwrap_err()));
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"));
    // Nor do they recreate an instance that a later request removed, even if it never existed.
    manager.down(&id, &identity, 6).await.unwrap();
    manager.down(&id, &Identity::from_bits(2), 6).await.unwrap();
    for identity in [1, 2] {
        let older = launch(identity, 5, &backend.plan("one"));
        assert!(fenced(older.reserve(&*manager).await.unwrap_err()));
        assert!(fenced(manager.up(&older.request(placement.clone())).await.unwrap_err()));
    }
    assert_eq!(manager.list().await.unwrap(), []);
    manager.launch(&launch(1, 6, &backend.plan("one"))).await.unwrap();
}

async fn identity_keeps_its_ports(backend: impl Backend) {
    let (one, other) = (launch(1, 1, &backend.plan("one")), launch(2, 1, &backend.plan("two")));
    let ports = one.reserve(&*backend.manager()).await.unwrap().ports;
    assert_eq!(ports.len(), 1);
    // Another manager and a later request get the same ports.
    assert_eq!(one.reserve(&*backend.manager()).await.unwrap().ports, ports);
    let later = launch(1, 2, &backend.plan("one"));
    let placement = later.reserve(&*backend.manager()).await.unwrap();
    assert_eq!(placement.ports, ports);
    assert_ne!(other.reserve(&*backend.manager()).await.unwrap().ports, ports);
    let outputs = backend.manager().up(&later.request(placement)).await.unwrap();
    assert_eq!(later.reserve(&*backend.manager()).await.unwrap().ports, ports);
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"), "the instance must keep running");
}

async fn crash_after_reserve_can_be_finished_or_undone(backend: impl Backend) {
    let one = launch(1, 1, &backend.plan("one"));
    let ports = one.reserve(&*backend.manager()).await.unwrap().ports;
    let manager = backend.manager();
    assert_eq!(manager.list().await.unwrap().len(), 1, "the reserved instance must be listed");
    // A process that starts elsewhere in these tests has a copy of the lock until it calls exec.
    eventually("the instance is listed as stopped", async || !manager.list().await.unwrap()[0].alive).await;
    let placement = one.reserve(&*manager).await.unwrap();
    assert_eq!(placement.ports, ports);
    let outputs = manager.up(&one.request(placement)).await.unwrap();
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"));

    let undone = launch(2, 1, &backend.plan("two"));
    undone.reserve(&*backend.manager()).await.unwrap();
    backend.manager().down(&undone.challenge, &undone.identity, 1).await.unwrap();
    let found = manager.list().await.unwrap();
    assert_eq!(found.iter().map(|found| &found.identity).collect::<Vec<_>>(), [&one.identity]);
}

async fn failed_launch_returns_an_error_and_can_be_removed(backend: impl Backend) {
    let manager = backend.manager();
    let error = manager.launch(&launch(1, 1, &backend.broken())).await.unwrap_err();
    assert!(matches!(error, Error::Provision { .. }), "{error}");
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
    assert_eq!(manager.list().await.unwrap(), []);
    manager.launch(&launch(1, 1, &backend.plan("one"))).await.unwrap();
}

async fn cancelled_call_can_be_repeated_or_undone(backend: impl Backend) {
    let plan = backend.plan("one");
    for polls in 0..40 {
        let (manager, launch) = (backend.manager(), launch(polls, 1, &plan));
        {
            let mut up = manager.launch(&launch);
            for _ in 0..polls {
                // The call is dropped after this many polls.
                if futures::poll!(&mut up).is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        let manager = backend.manager();
        if polls % 2 == 0 {
            let outputs = manager.launch(&launch).await.unwrap();
            assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("one"));
        }
        manager.down(&launch.challenge, &launch.identity, 1).await.unwrap();
        assert_eq!(manager.list().await.unwrap(), []);
    }
}

async fn any_challenge_id_works(backend: impl Backend) {
    let manager = backend.manager();
    for (at, id) in ["../../../../tmp/x", "/etc/passwd", ".", "a/../b", "\u{202e}💥 ' \" $(id)"].into_iter().enumerate()
    {
        let mut launch = launch(at as u64, 1, &backend.plan("one"));
        launch.challenge = challenge(id);
        manager.launch(&launch).await.unwrap();
        assert_eq!(manager.list().await.unwrap()[0].challenge, launch.challenge);
        manager.down(&launch.challenge, &launch.identity, 1).await.unwrap();
    }
}

macro_rules! contract {
    ($name:ident, $backend:expr, [$($test:ident),* $(,)?]) => {
        mod $name {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test($backend).await;
                }
            )*
        }
    };
    ($name:ident, $backend:expr) => {
        contract!($name, $backend, [
            up_returns_the_outputs_of_the_instance,
            second_up_keeps_the_instance,
            concurrent_ups_launch_one_instance,
            instances_are_independent,
            down_removes_the_instance_and_may_be_repeated,
            update_keeps_the_address_and_changes_the_program,
            update_launches_a_missing_instance,
            older_requests_change_nothing,
            identity_keeps_its_ports,
            crash_after_reserve_can_be_finished_or_undone,
            failed_launch_returns_an_error_and_can_be_removed,
            cancelled_call_can_be_repeated_or_undone,
            any_challenge_id_works,
        ]);
    };
}

contract!(process, super::Fixture::new());
contract!(process_without_isolation, super::Fixture::on_host());
contract!(process_without_cgroups, super::Fixture::without_cgroups());
