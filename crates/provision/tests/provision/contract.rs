//! What every backend of the port must do. A backend joins by implementing [`Backend`] and one line at the end.

use std::sync::Arc;

use crate::support::{Rig, challenge, order, said};
use gauntlet_domain::{Error, Identity, Plan, Provisioner};

/// What the suite needs of a backend.
trait Backend {
    /// A manager; each call another one on the same resources.
    fn manager(&self) -> Arc<dyn Provisioner>;
    /// A plan whose instance says the greeting to whoever connects, and has the flag `FLAG{greeting}`.
    fn plan(&self, greeting: &str) -> Arc<dyn Plan>;
    /// A plan whose instance never becomes ready.
    fn broken(&self) -> Arc<dyn Plan>;
}

impl Backend for Rig {
    fn manager(&self) -> Arc<dyn Provisioner> {
        Arc::new(Rig::manager(self))
    }

    fn plan(&self, greeting: &str) -> Arc<dyn Plan> {
        self.greeter().greeting(greeting).arc()
    }

    fn broken(&self) -> Arc<dyn Plan> {
        self.script("echo no such luck; exit 3").arc()
    }
}

async fn up_answers_what_runs(backend: impl Backend) {
    let manager = backend.manager();
    let outputs = manager.up(&order(1, 1, &backend.plan("one"))).await.unwrap();
    assert_eq!(said(&outputs.connection_info).as_deref(), Some("one"));
    assert_eq!(outputs.flags, ["FLAG{one}"]);
    let found = manager.list().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].challenge, challenge("a challenge"));
    assert_eq!(found[0].identity, Identity::from_bits(1));
    assert_eq!(found[0].generation, 1);
}

async fn up_twice_is_one(backend: impl Backend) {
    let first = backend.manager().up(&order(1, 1, &backend.plan("one"))).await.unwrap();
    // By another manager, later, and with another plan: what is up is kept.
    let again = backend.manager().up(&order(1, 2, &backend.plan("two"))).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(backend.manager().list().await.unwrap().len(), 1);
}

async fn up_at_once_is_one(backend: impl Backend) {
    let (one, two, plan) = (backend.manager(), backend.manager(), backend.plan("one"));
    let order = order(1, 1, &plan);
    let (a, b) = futures::join!(one.up(&order), two.up(&order));
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(one.list().await.unwrap().len(), 1);
}

async fn instances_are_apart(backend: impl Backend) {
    let manager = backend.manager();
    let one = manager.up(&order(1, 1, &backend.plan("one"))).await.unwrap();
    let two = manager.up(&order(2, 1, &backend.plan("two"))).await.unwrap();
    assert_ne!(one.connection_info, two.connection_info);
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
    assert_eq!(said(&one.connection_info), None);
    assert_eq!(said(&two.connection_info).as_deref(), Some("two"));
}

async fn down_ends_it_and_may_be_repeated(backend: impl Backend) {
    let manager = backend.manager();
    let outputs = manager.up(&order(1, 1, &backend.plan("one"))).await.unwrap();
    for _ in 0..2 {
        manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
        assert_eq!(said(&outputs.connection_info), None);
        assert_eq!(manager.list().await.unwrap(), []);
    }
    manager.down(&challenge("never was"), &Identity::from_bits(9), 1).await.unwrap();
    assert_eq!(manager.list().await.unwrap(), []);
}

async fn update_keeps_where_and_changes_what(backend: impl Backend) {
    let manager = backend.manager();
    let before = manager.up(&order(1, 1, &backend.plan("one"))).await.unwrap();
    let after = manager.update(&order(1, 2, &backend.plan("two"))).await.unwrap();
    assert_eq!(before.connection_info, after.connection_info);
    assert_eq!(said(&after.connection_info).as_deref(), Some("two"));
    assert_eq!(after.flags, ["FLAG{two}"]);
    assert_eq!(manager.list().await.unwrap()[0].generation, 2);
}

async fn update_brings_up_what_is_not_there(backend: impl Backend) {
    let outputs = backend.manager().update(&order(1, 1, &backend.plan("one"))).await.unwrap();
    assert_eq!(said(&outputs.connection_info).as_deref(), Some("one"));
}

async fn older_orders_change_nothing(backend: impl Backend) {
    let manager = backend.manager();
    let (id, identity) = (challenge("a challenge"), Identity::from_bits(1));
    let outputs = manager.up(&order(1, 5, &backend.plan("one"))).await.unwrap();
    let fenced = |error: Error| matches!(error, Error::Fenced(_));
    assert!(fenced(manager.down(&id, &identity, 4).await.unwrap_err()));
    assert!(fenced(manager.update(&order(1, 4, &backend.plan("two"))).await.unwrap_err()));
    assert!(fenced(manager.up(&order(1, 4, &backend.plan("two"))).await.unwrap_err()));
    assert_eq!(said(&outputs.connection_info).as_deref(), Some("one"));
    // Nor do they bring back what a later one took down, even if it never was.
    manager.down(&id, &identity, 6).await.unwrap();
    manager.down(&id, &Identity::from_bits(2), 6).await.unwrap();
    assert!(fenced(manager.up(&order(1, 5, &backend.plan("one"))).await.unwrap_err()));
    assert!(fenced(manager.up(&order(2, 5, &backend.plan("one"))).await.unwrap_err()));
    assert_eq!(manager.list().await.unwrap(), []);
    manager.up(&order(1, 6, &backend.plan("one"))).await.unwrap();
}

async fn what_does_not_come_up_says_so_and_can_be_taken_down(backend: impl Backend) {
    let manager = backend.manager();
    let error = manager.up(&order(1, 1, &backend.broken())).await.unwrap_err();
    assert!(matches!(error, Error::Provision { .. }), "{error}");
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), 1).await.unwrap();
    assert_eq!(manager.list().await.unwrap(), []);
    manager.up(&order(1, 1, &backend.plan("one"))).await.unwrap();
}

async fn a_call_that_is_dropped_can_be_repeated_or_undone(backend: impl Backend) {
    let plan = backend.plan("one");
    for polls in 0..40 {
        let (manager, order) = (backend.manager(), order(polls, 1, &plan));
        {
            let mut up = manager.up(&order);
            for _ in 0..polls {
                // Dropped after each number of steps.
                if futures::poll!(&mut up).is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        let manager = backend.manager();
        if polls % 2 == 0 {
            let outputs = manager.up(&order).await.unwrap();
            assert_eq!(said(&outputs.connection_info).as_deref(), Some("one"));
        }
        manager.down(&order.challenge, &order.identity, 1).await.unwrap();
        assert_eq!(manager.list().await.unwrap(), []);
    }
}

async fn any_challenge_id_will_do(backend: impl Backend) {
    let manager = backend.manager();
    for (at, id) in ["../../../../tmp/x", "/etc/passwd", ".", "a/../b", "\u{202e}💥 ' \" $(id)"].into_iter().enumerate()
    {
        let mut order = order(at as u64, 1, &backend.plan("one"));
        order.challenge = challenge(id);
        manager.up(&order).await.unwrap();
        assert_eq!(manager.list().await.unwrap()[0].challenge, order.challenge);
        manager.down(&order.challenge, &order.identity, 1).await.unwrap();
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
            up_answers_what_runs,
            up_twice_is_one,
            up_at_once_is_one,
            instances_are_apart,
            down_ends_it_and_may_be_repeated,
            update_keeps_where_and_changes_what,
            update_brings_up_what_is_not_there,
            older_orders_change_nothing,
            what_does_not_come_up_says_so_and_can_be_taken_down,
            a_call_that_is_dropped_can_be_repeated_or_undone,
            any_challenge_id_will_do,
        ]);
    };
}

contract!(process, super::Rig::new());
contract!(process_without_cgroups, super::Rig::without_cgroups());
