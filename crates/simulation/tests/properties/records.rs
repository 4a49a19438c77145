//! On every replica, the store behaves like one challenge and a map from keys to instances. Its indexes match the map, and only the owner
//! changes an instance. One file, because commands, model and comparison only make sense together.

use std::{collections::BTreeMap, sync::Arc};

use futures::TryStreamExt as _;
use gauntlet_coordination::Coordination;
use gauntlet_domain::{
    Additional, Assignment, Challenge, ChallengeId, Error, Failure, Identity, Instance, InstanceKey, Intent, LockGuard,
    LockKind, LockOptions, Operation, Outcome, Phase, PhaseName, Pinned, PoolBounds, Result, SourceId, Store as _,
    Stored, Target, Unfinished,
};
use jiff::Timestamp;
use proptest::{prelude::*, sample::Index, strategy::Strategy};

use super::{Direct, Unanswered, histories, run, settle};

const REPLICAS: usize = 2;
/// The first `SOURCES` of the keys belong to sources, the others to the pool.
const KEYS: usize = 4;
const SOURCES: usize = 2;
/// The time of the comparison, in seconds.
const NOW: i64 = 150;

#[derive(Debug, Clone)]
enum Command {
    /// Uses the current challenge, or the one in the replica cache.
    Create {
        index: usize,
        cached: bool,
        then: Then,
    },
    Delete {
        index: usize,
        then: Then,
    },
    Update {
        index: usize,
        then: Then,
    },
    Recover {
        index: usize,
        then: Then,
    },
    Renew {
        index: usize,
        second: i64,
    },
    /// If the claim has `values` of its own, the instance must be updated.
    Claim {
        pool: usize,
        index: usize,
        values: bool,
        then: Then,
    },
    /// Finishes kept work, optionally losing the response.
    End {
        kept: Index,
        then: Then,
        unanswered: Option<bool>,
    },
    Change,
    /// Removes the challenge if it has no instance, and creates it again.
    Remove,
    LoseLease,
}

/// What happens to a guard.
#[derive(Debug, Clone, Copy)]
enum Then {
    Ready,
    Fail {
        retry: i64,
    },
    Gone,
    /// Dropped without a commit.
    Drop,
    Keep,
}

fn then() -> impl Strategy<Value = Then> {
    prop_oneof![
        4 => Just(Then::Ready),
        1 => (100..200i64).prop_map(|retry| Then::Fail { retry }),
        2 => Just(Then::Gone),
        2 => Just(Then::Drop),
        2 => Just(Then::Keep),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    let index = 0..KEYS;
    prop_oneof![
        8 => (index.clone(), any::<bool>(), then())
            .prop_map(|(index, cached, then)| Command::Create { index, cached, then }),
        3 => (index.clone(), then()).prop_map(|(index, then)| Command::Delete { index, then }),
        3 => (index.clone(), then()).prop_map(|(index, then)| Command::Update { index, then }),
        2 => (index, then()).prop_map(|(index, then)| Command::Recover { index, then }),
        2 => (0..SOURCES, 100..200i64).prop_map(|(index, second)| Command::Renew { index, second }),
        3 => (SOURCES..KEYS, 0..SOURCES, any::<bool>(), then())
            .prop_map(|(pool, index, values, then)| Command::Claim { pool, index, values, then }),
        3 => (any::<Index>(), then(), any::<Option<bool>>())
            .prop_map(|(kept, then, unanswered)| Command::End { kept, then, unanswered }),
        1 => Just(Command::Change),
        1 => Just(Command::Remove),
        1 => Just(Command::LoseLease),
    ]
}

/// An instance in the model.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    phase: PhaseName,
    identity: Identity,
    target: Option<Identity>,
    until: Option<i64>,
    retry: Option<i64>,
}

impl Known {
    fn of(instance: &Instance) -> Self {
        let retry =
            if let Phase::Failed(failure) = &instance.phase { Some(failure.retry_at.as_second()) } else { None };
        Self {
            phase: PhaseName::from(&instance.phase),
            identity: instance.identity.clone(),
            target: instance.target.as_ref().map(|target| target.identity.clone()),
            until: instance.until.map(Timestamp::as_second),
            retry,
        }
    }
}

/// A guard that is kept for a later command.
struct Kept {
    replica: usize,
    held: LockGuard,
    instance: Instance,
    /// Whether its lease was lost.
    lost: bool,
}

type Replica = (Direct, Arc<Coordination<Direct>>);

struct History {
    replicas: Vec<Replica>,
    id: ChallengeId,
    revision: u64,
    model: BTreeMap<InstanceKey, Known>,
    kept: Vec<Kept>,
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// Does not wait for owners.
fn no_wait() -> LockOptions {
    LockOptions::default()
}

fn pinned() -> Pinned {
    Pinned { reference: "r".to_owned(), digest: "d".to_owned() }
}

impl History {
    async fn run(commands: Vec<(usize, Command)>) {
        let etcd = Direct::new();
        let replicas = (0..REPLICAS).map(|n| etcd.replica(&format!("r{n}"))).collect();
        let id = ChallengeId::new("c").unwrap();
        let mut history = Self { replicas, id, revision: 1, model: BTreeMap::new(), kept: Vec::new() };
        history.insert(0).await.unwrap();
        let length = commands.len();
        for (number, (replica, command)) in commands.into_iter().enumerate() {
            history.step(number, replica, command).await;
            // By then dropped guards have been released.
            settle().await;
        }
        history.compare(length % REPLICAS).await;
    }

    async fn insert(&self, replica: usize) -> Result<()> {
        let challenge = Challenge {
            id: self.id.clone(),
            scenario: pinned(),
            timeout: None,
            until: None,
            additional: Additional::new(),
            bounds: PoolBounds::default(),
            revision: self.revision,
            content_revision: 1,
            rollout: None,
            deleting: false,
            traceparent: None,
        };
        self.replicas[replica].1.insert_challenge(&challenge).await
    }

    fn key(&self, index: usize) -> InstanceKey {
        let assignment = match index {
            0..SOURCES => Assignment::Source(SourceId::new(format!("s{index}")).unwrap()),
            _ => Assignment::Pool(Identity::from_bits(index as u64)),
        };
        InstanceKey { challenge: self.id.clone(), assignment }
    }

    fn fresh(&self, index: usize, number: usize) -> Instance {
        let key = self.key(index);
        let identity = match &key.assignment {
            Assignment::Pool(identity) => identity.clone(),
            Assignment::Source(_) => Identity::from_bits(100 + number as u64),
        };
        let until = (!key.assignment.is_pooled()).then(|| at(120));
        Instance {
            key,
            identity,
            phase: Phase::Provisioning,
            since: at(1),
            last_renew: at(1),
            until,
            scenario: pinned(),
            applied_revision: 1,
            additional: Additional::new(),
            connection_info: String::new(),
            flags: Vec::new(),
            flag_key: None,
            target: None,
            traceparent: None,
        }
    }

    fn owned(&self, key: &InstanceKey) -> bool {
        self.kept.iter().any(|kept| kept.instance.key == *key && !kept.lost)
    }

    async fn step(&mut self, number: usize, replica: usize, command: Command) {
        let store = self.replicas[replica].1.clone();
        let now = store.challenge(&self.id).await.unwrap().unwrap();
        match command {
            Command::Create { index, cached, then } => {
                let intent = self.fresh(index, number);
                let cached = intent.key.assignment.source().filter(|_| cached);
                // The cache of the other replica may be older than the challenge that this replica has just read.
                let other = &self.replicas[(replica + 1) % REPLICAS].1;
                let (store, snapshot) = match cached {
                    Some(source) => (other.clone(), other.cached_snapshot(&self.id, source)),
                    None => (store, None),
                };
                let challenge = snapshot.and_then(|snapshot| snapshot.challenge).unwrap_or(now.clone());
                let free = challenge.version == now.version && !self.model.contains_key(&intent.key);
                let replica = if cached.is_some() { (replica + 1) % REPLICAS } else { replica };
                match store.begin_create(&challenge, &intent, None, &no_wait()).await {
                    Err(Error::Conflict) => assert!(!free),
                    Err(error) => panic!("{error}"),
                    Ok(held) => {
                        assert!(free);
                        self.owns(replica, held, intent, then).await;
                    }
                }
            }
            Command::Delete { index, then } => self.begin(replica, index, Intent::Delete, then).await,
            Command::Update { index, then } => {
                let target = Target {
                    identity: Identity::from_bits(1000 + number as u64),
                    scenario: pinned(),
                    revision: 1,
                    strategy: gauntlet_domain::Strategy::BlueGreen,
                };
                self.begin(replica, index, Intent::Update(target), then).await;
            }
            Command::Recover { index, then } => self.begin(replica, index, Intent::Recover, then).await,
            Command::Renew { index, second } => {
                let key = self.key(index);
                let Some(read) = store.instance(&key).await.unwrap() else {
                    assert!(!self.model.contains_key(&key));
                    return;
                };
                let renewed = Instance { until: Some(at(second)), ..read.value.clone() };
                match store.rewrite(&read, &renewed, &no_wait()).await {
                    Err(Error::Busy { .. }) => assert!(self.owned(&key)),
                    renewal => {
                        assert_eq!((renewal, self.owned(&key)), (Ok(()), false));
                        // The first read is stale now.
                        assert_eq!(store.rewrite(&read, &renewed, &no_wait()).await, Err(Error::Conflict));
                        self.model.get_mut(&key).unwrap().until = Some(second);
                    }
                }
            }
            Command::Claim { pool, index, values, then } => {
                let (from, to) = (self.key(pool), self.fresh(index, number));
                let pooled = store.instance(&from).await.unwrap();
                let Some(pooled) = pooled.filter(|read| read.value.phase == Phase::Ready) else {
                    assert!(self.model.get(&from).is_none_or(|known| known.phase != PhaseName::Ready));
                    return;
                };
                self.claim(replica, &now, &pooled, to, values, then).await;
            }
            Command::End { kept, then, unanswered } => {
                if self.kept.is_empty() {
                    return;
                }
                let kept = self.kept.swap_remove(kept.index(self.kept.len()));
                if let Some(done) = unanswered {
                    let fault = if done { Unanswered::Done } else { Unanswered::NotDone };
                    self.replicas[kept.replica].0.own().faults.push_back(fault);
                }
                self.end(kept, then).await;
                self.replicas.iter().for_each(|(client, _)| client.own().faults.clear());
            }
            Command::Change => {
                assert_eq!(self.insert(replica).await, Err(Error::ChallengeExists(self.id.clone())));
                let held = store.lock(LockKind::Challenge, &self.id, &no_wait()).await.unwrap();
                self.revision += 1;
                let changed = Challenge { revision: self.revision, ..now.value.clone() };
                held.update_challenge(&changed).await.unwrap();
                // A create with the old challenge conflicts.
                let refused = store.begin_create(&now, &self.fresh(0, number), None, &no_wait()).await;
                assert_eq!(refused.err(), Some(Error::Conflict));
            }
            Command::Remove => {
                let held = store.lock(LockKind::Challenge, &self.id, &no_wait()).await.unwrap();
                let removed = held.remove_challenge().await;
                assert_eq!(removed, if self.model.is_empty() { Ok(()) } else { Err(Error::Conflict) });
                if removed.is_ok() {
                    assert_eq!(store.challenge(&self.id).await.unwrap(), None);
                    self.revision = 1;
                    self.insert(replica).await.unwrap();
                }
            }
            Command::LoseLease => {
                self.replicas[replica].0.lose_lease();
                self.kept.iter_mut().filter(|kept| kept.replica == replica).for_each(|kept| kept.lost = true);
            }
        }
    }

    async fn begin(&mut self, replica: usize, index: usize, begin: Intent, then: Then) {
        let key = self.key(index);
        let known = self.model.get(&key).cloned();
        let owned = self.owned(&key);
        let phase = known.as_ref().map(|known| known.phase);
        let allowed = match &begin {
            Intent::Recover => phase.is_some_and(|phase| phase != PhaseName::Ready),
            Intent::Update(_) => phase.is_some_and(|phase| phase != PhaseName::Deleting),
            Intent::Delete => phase.is_some(),
        };
        match self.replicas[replica].1.begin(&key, begin.clone(), &no_wait()).await {
            Err(Error::Busy { .. }) => assert!(owned),
            Err(Error::Conflict) => assert!(!allowed || (owned && begin == Intent::Recover), "{begin:?} {known:?}"),
            Err(error) => panic!("{error}"),
            Ok((held, begun)) => {
                assert!(allowed && !owned);
                let known = known.unwrap();
                let expected = match &begin {
                    Intent::Recover => known,
                    Intent::Delete => Known { phase: PhaseName::Deleting, retry: None, ..known },
                    Intent::Update(target) => Known {
                        phase: PhaseName::Updating,
                        target: Some(target.identity.clone()),
                        retry: None,
                        ..known
                    },
                };
                assert_eq!(Known::of(&begun), expected);
                self.owns(replica, held, begun, then).await;
            }
        }
    }

    async fn claim(
        &mut self,
        replica: usize,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        to: Instance,
        values: bool,
        then: Then,
    ) {
        let (from, identity) = (&pooled.value.key, pooled.value.identity.clone());
        let target = Target {
            identity: identity.clone(),
            scenario: pinned(),
            revision: 1,
            strategy: gauntlet_domain::Strategy::UpdateInPlace,
        };
        let phase = if values { Phase::Updating } else { Phase::Ready };
        let claimed = Instance { identity, phase, target: values.then_some(target), ..to };
        match self.replicas[replica].1.claim(challenge, pooled, &claimed, &no_wait()).await {
            Err(Error::Conflict) => assert!(self.model.contains_key(&claimed.key)),
            Err(error) => panic!("{error}"),
            Ok(held) => {
                assert!(self.model.remove(from).is_some() && !self.model.contains_key(&claimed.key));
                self.model.insert(claimed.key.clone(), Known::of(&claimed));
                assert_eq!(held.is_some(), values);
                if let Some(held) = held {
                    self.owns(replica, held, claimed, then).await;
                }
            }
        }
    }

    /// Records an acquired guard, then keeps, finishes or drops it.
    async fn owns(&mut self, replica: usize, held: LockGuard, instance: Instance, then: Then) {
        self.model.insert(instance.key.clone(), Known::of(&instance));
        let kept = Kept { replica, held, instance, lost: false };
        match then {
            Then::Keep => self.kept.push(kept),
            then => self.end(kept, then).await,
        }
    }

    /// Finishes the work of a guard.
    async fn end(&mut self, kept: Kept, then: Then) {
        let Kept { held, mut instance, lost, .. } = kept;
        let key = instance.key.clone();
        let commit = match then {
            // Kept work cannot be kept a second time.
            Then::Drop | Then::Keep => return drop(held),
            Then::Gone => Outcome::Remove,
            Then::Ready => {
                instance.phase = Phase::Ready;
                if let Some(target) = instance.target.take() {
                    instance.identity = target.identity;
                }
                Outcome::Put(Box::new(instance.clone()))
            }
            Then::Fail { retry } => {
                let (during, reason) = (Operation::Update, String::new());
                let (since, attempts, retry_at) = (at(1), 1, at(retry));
                instance.phase = Phase::Failed(Failure { during, reason, since, attempts, retry_at });
                Outcome::Put(Box::new(instance.clone()))
            }
        };
        match held.commit(commit).await {
            Err(Error::Fenced(_)) => assert!(lost),
            committed => {
                assert_eq!((committed, lost), (Ok(()), false));
                match then {
                    Then::Gone => self.model.remove(&key),
                    _ => self.model.insert(key, Known::of(&instance)),
                };
            }
        }
    }

    /// Checks that every read from a replica matches the model.
    async fn compare(&self, replica: usize) {
        let (store, id, model) = (&self.replicas[replica].1, &self.id, &self.model);
        let known = |all: Vec<Instance>| -> BTreeMap<InstanceKey, Known> {
            all.into_iter().map(|instance| (instance.key.clone(), Known::of(&instance))).collect()
        };
        let only = |wanted: &dyn Fn(&InstanceKey, &Known) -> bool| -> BTreeMap<InstanceKey, Known> {
            model.iter().filter(|(key, known)| wanted(key, known)).map(|(s, k)| (s.clone(), k.clone())).collect()
        };
        let all: Vec<Stored<Instance>> = store.instances_of(id).try_collect().await.unwrap();
        assert_eq!(known(all.into_iter().map(|stored| stored.value).collect()), *model);
        let mut challenges: Vec<_> = store.challenges().try_collect().await.unwrap();
        let (challenge, own) = challenges.pop().unwrap();
        assert_eq!((challenge.revision, known(own), challenges.len()), (self.revision, model.clone(), 0));

        let claimed = store.instances_by_source(None).try_collect().await.unwrap();
        assert_eq!(known(claimed), only(&|key, _| !key.assignment.is_pooled()));
        for index in 0..SOURCES {
            let key = self.key(index);
            let source = key.assignment.source().unwrap();
            let own = store.instances_by_source(Some(source)).try_collect().await.unwrap();
            assert_eq!(known(own), only(&|of, _| *of == key));
            let snapshot = store.snapshot(id, source).await.unwrap();
            assert_eq!(snapshot.challenge.unwrap().value.revision, self.revision);
            assert_eq!(snapshot.instance.map(|stored| Known::of(&stored.value)), model.get(&key).cloned());
            let pooled = snapshot.pooled.into_iter().map(|stored| stored.value).collect();
            assert_eq!(
                known(pooled),
                only(&|key, known| key.assignment.is_pooled() && known.phase == PhaseName::Ready)
            );
        }
        let overdue = only(&|key, known| !key.assignment.is_pooled() && known.until.is_some_and(|until| until <= NOW));
        let expired: Vec<Instance> = store.expired(at(NOW)).try_collect().await.unwrap();
        assert!(expired.is_sorted_by_key(|instance| instance.until));
        assert_eq!(known(expired), overdue);

        let unfinished = store.unfinished(at(NOW)).await.unwrap();
        let left = only(&|key, known| {
            known.phase != PhaseName::Ready && known.retry.is_none_or(|retry| retry <= NOW) && !self.owned(key)
        });
        assert_eq!(unfinished.len(), left.len());
        assert!(
            left.keys().all(|key| unfinished.contains(&Unfinished::Instance(key.clone()))),
            "{unfinished:?} {left:?}"
        );
        let pooled = model.keys().any(|key| key.assignment.is_pooled());
        assert_eq!(store.pools().await.unwrap(), if pooled { vec![id.clone()] } else { Vec::new() });

        let census = store.census(at(NOW)).await.unwrap();
        let mut counted = BTreeMap::new();
        for (key, known) in model {
            *counted.entry((id.clone(), known.phase, key.assignment.is_pooled())).or_insert(0) += 1;
        }
        assert_eq!((census.challenges, census.instances), (1, counted));
        assert_eq!(census.overdue, overdue.len() as u64);
    }
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn the_store_is_a_map(commands in proptest::collection::vec((0..REPLICAS, command()), 1..14)) {
        run(History::run(commands));
    }
}
