//! A manager, its store and its machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::TryStreamExt as _;
use gauntlet_coordination::{
    Coordination, Embedded,
    kv::{Condition, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{
    Additional, Assignment, Call, ChallengeId, Clock, Entropy, Error, Fact, Facts, Gauntlet, Identity, Instance,
    InstanceKey, LaunchPlan, LaunchRequest, LockGuard, LockKind, LockOptions, NewChallenge, Outputs, Pinned, Placement,
    PortSpec, PreparedScenario, ProvisionedInstance, Provisioner, Result, Scenarios, Settings, SourceId, Store as _,
};
use jiff::Timestamp;
use tempfile::TempDir;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};

pub const ALICE: &str = "alice";
pub const BOB: &str = "bob";

/// What takes longer has stopped for good.
const LONG: Duration = Duration::from_secs(60);
/// How long a call waits for others: longer than anything may take here.
pub const PATIENCE: Duration = Duration::from_secs(70);
/// How long an instance lives, in seconds.
pub const TIMEOUT: i64 = 1000;

/// Waits as long as it may take.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("{what} takes longer than {LONG:?}"))
}

/// The next one that comes to a point waits there until it may go on.
#[derive(Debug, Default)]
struct Gates(Mutex<Vec<Gate>>);

type Gate = (&'static str, oneshot::Sender<()>, oneshot::Receiver<()>);

/// Somebody who waits at a gate, or will.
pub struct Hold {
    reached: oneshot::Receiver<()>,
    open: oneshot::Sender<()>,
}

impl Hold {
    /// Somebody has come.
    pub async fn reached(&mut self) {
        within("coming to a gate", &mut self.reached).await.unwrap();
    }

    pub fn open(self) {
        // Nobody may have come.
        let _ = self.open.send(());
    }
}

impl Gates {
    fn close(&self, point: &'static str) -> Hold {
        let ((came, reached), (open, opened)) = (oneshot::channel(), oneshot::channel());
        self.0.lock().unwrap().push((point, came, opened));
        Hold { reached, open }
    }

    async fn pass(&self, point: &str) {
        let gate = {
            let mut gates = self.0.lock().unwrap();
            gates.iter().position(|(of, ..)| *of == point).map(|at| gates.remove(at))
        };
        if let Some((_, came, opened)) = gate {
            let _ = came.send(());
            let _ = opened.await;
        }
    }
}

/// Where instances would run.
#[derive(Debug, Default)]
pub struct Machine {
    /// What is there: the digest of its scenario, and whether it runs.
    there: Mutex<BTreeMap<Identity, (ChallengeId, String, bool)>>,
    refused: Mutex<BTreeSet<&'static str>>,
    /// How many of the next launches find their port taken.
    ports_to_take: AtomicU64,
    /// How many reservations there were.
    reservations: AtomicU64,
    gates: Gates,
}

impl Machine {
    /// From now on these operations are refused, and no others.
    pub fn refuse(&self, operations: impl IntoIterator<Item = &'static str>) {
        *self.refused.lock().unwrap() = operations.into_iter().collect();
    }

    /// The next of these operations waits.
    pub fn hold(&self, operation: &'static str) -> Hold {
        self.gates.close(operation)
    }

    /// Other programs take the ports of the next launches.
    pub fn take_ports(&self, launches: u64) {
        self.ports_to_take.store(launches, Ordering::Relaxed);
    }

    /// How many reservations there were since this was last asked.
    pub fn reservations(&self) -> u64 {
        self.reservations.swap(0, Ordering::Relaxed)
    }

    fn listen(&self) -> Result<()> {
        let left = self.ports_to_take.load(Ordering::Relaxed);
        self.ports_to_take.store(left.saturating_sub(1), Ordering::Relaxed);
        match left {
            0 => Ok(()),
            _ => Err(Error::PortTaken { port: 20_000, detail: "address in use".to_owned() }),
        }
    }

    async fn ask(&self, operation: &'static str) -> Result<()> {
        self.gates.pass(operation).await;
        match self.refused.lock().unwrap().contains(operation) {
            true => Err(Error::Unavailable { what: "machine", detail: format!("{operation} is refused") }),
            false => Ok(()),
        }
    }

    /// An instance ends by itself.
    pub fn end(&self, identity: &Identity) {
        self.there.lock().unwrap().get_mut(identity).unwrap().2 = false;
    }

    /// What runs, and the digest of its scenario.
    pub fn running(&self) -> Vec<(Identity, String)> {
        let there = self.there.lock().unwrap();
        there.iter().filter(|(_, (.., runs))| *runs).map(|(i, (_, digest, _))| (i.clone(), digest.clone())).collect()
    }

    fn start(&self, request: &LaunchRequest) -> Outputs {
        let running = (request.challenge.clone(), request.digest.clone(), true);
        self.there.lock().unwrap().insert(request.identity.clone(), running);
        Outputs { connection_info: format!("http://{}.test", request.identity), flags: vec!["flag".to_owned()] }
    }
}

#[async_trait]
impl Provisioner for Machine {
    fn name(&self) -> &'static str {
        "machine"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        self.ask("reserve").await?;
        self.reservations.fetch_add(1, Ordering::Relaxed);
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.ask("up").await?;
        self.listen()?;
        let kept = self.there.lock().unwrap().get(&request.identity).filter(|(.., runs)| *runs).cloned();
        Ok(self.start(&LaunchRequest {
            digest: kept.map_or(request.digest.clone(), |(_, digest, _)| digest),
            ..request.clone()
        }))
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.ask("update").await?;
        self.listen()?;
        Ok(self.start(request))
    }

    async fn down(&self, _: &ChallengeId, identity: &Identity, _: u64) -> Result<()> {
        self.ask("down").await?;
        self.there.lock().unwrap().remove(identity);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        let there = self.there.lock().unwrap();
        let found =
            |(identity, (challenge, _, alive)): (&Identity, &(ChallengeId, String, bool))| ProvisionedInstance {
                challenge: challenge.clone(),
                identity: identity.clone(),
                generation: 1,
                alive: *alive,
            };
        Ok(there.iter().map(found).collect())
    }
}

/// Scenarios named by a digit, which their digest repeats.
#[derive(Debug)]
struct Library;

pub fn reference(version: u8) -> String {
    format!("registry.test/web:{version}")
}

pub fn digest(version: u8) -> String {
    format!("sha256:{}", version.to_string().repeat(64))
}

#[async_trait]
impl Scenarios for Library {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        let version = reference.as_bytes().last().unwrap() - b'0';
        Ok(Pinned { reference: reference.to_owned(), digest: digest(version) })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, _: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        Ok(LaunchPlan::default())
    }
}

/// What was noted.
#[derive(Default)]
pub struct Noted(Mutex<Vec<Fact>>);

impl Noted {
    /// What was noted since this was last called.
    pub fn take(&self) -> Vec<Fact> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Facts for Noted {
    fn record(&self, fact: Fact) {
        self.0.lock().unwrap().push(fact);
    }
}

#[derive(Default)]
struct Counter(AtomicU64);

impl Entropy for Counter {
    fn next_u64(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Time passes when somebody sleeps, or when the test says so.
#[derive(Debug, Default)]
pub struct Time {
    elapsed: Mutex<Duration>,
    pauses: Mutex<Vec<Duration>>,
}

impl Time {
    pub fn pass(&self, duration: Duration) {
        *self.elapsed.lock().unwrap() += duration;
    }

    /// What was slept since this was last asked.
    pub fn pauses(&self) -> Vec<Duration> {
        std::mem::take(&mut self.pauses.lock().unwrap())
    }
}

#[async_trait]
impl Clock for Time {
    fn elapsed(&self) -> Duration {
        *self.elapsed.lock().unwrap()
    }

    async fn sleep(&self, pause: Duration) {
        self.pauses.lock().unwrap().push(pause);
        self.pass(pause);
        tokio::task::yield_now().await;
    }
}

/// An embedded store that can be made to wait before it removes a challenge, or writes an instance that must not have changed; and in which
/// somebody else can always be first.
#[derive(Debug)]
pub struct Store {
    inner: Embedded,
    gates: Arc<Gates>,
    /// Whether reads of a challenge alone are refused.
    hides_challenges: Arc<AtomicBool>,
    rival: Arc<AtomicBool>,
}

impl Kv for Store {
    type Snapshot = <Embedded as Kv>::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let removes = |op: &Op| matches!(op, Op::Delete(keys) if keys.start.contains("/challenges "));
        if txn.success.iter().any(removes) {
            self.gates.pass("remove a challenge").await;
        }
        if txn.compare.iter().any(|compare| matches!(compare.condition, Condition::ModRevisionAtMost(_))) {
            self.gates.pass("rewrite an instance").await;
        }
        let of_challenges = |op: &Op| matches!(op, Op::Get(get) if get.range.start.contains("/challenges "));
        if self.hides_challenges.load(Ordering::Relaxed) && txn.success.iter().all(of_challenges) {
            return Err(KvError::Unavailable("reading a challenge is refused".to_owned()));
        }
        if self.rival.load(Ordering::Relaxed) {
            for read in txn.compare.iter().filter(|compare| {
                matches!(compare.condition, Condition::ModRevision(_) | Condition::ModRevisionAtMost(_))
            }) {
                // What was read is written again, as it is.
                let get = Get { range: read.range.clone(), limit: 0, keys_only: false };
                let page = self.inner.page(get, None).await?;
                let success = page.kvs.into_iter().map(|kv| Op::put(kv.key, kv.value)).collect();
                self.inner.txn(Txn { success, ..Txn::default() }).await?;
            }
        }
        self.inner.txn(txn).await
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        self.inner.page(get, at).await
    }

    async fn count(&self, keys: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        self.inner.count(keys, at).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        self.inner.list_and_watch(range).await
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.revoke(lease).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

pub struct World {
    pub gauntlet: Gauntlet,
    pub store: Arc<Coordination<Store>>,
    pub machine: Arc<Machine>,
    pub call: Call,
    pub web: ChallengeId,
    pub facts: Arc<Noted>,
    pub time: Arc<Time>,
    rival: Arc<AtomicBool>,
    gates: Arc<Gates>,
    hides_challenges: Arc<AtomicBool>,
    _dir: TempDir,
}

impl World {
    /// A challenge whose pool is kept at `min`; its instances are worked on one after the other.
    pub async fn with_a_challenge(min: i64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let gates = Arc::new(Gates::default());
        let inner = Embedded::open(&dir.path().join("store")).unwrap();
        let rival = Arc::new(AtomicBool::new(false));
        let hides_challenges = Arc::new(AtomicBool::new(false));
        let kv =
            Store { inner, gates: gates.clone(), hides_challenges: hides_challenges.clone(), rival: rival.clone() };
        let store = Arc::new(Coordination::new(kv, "test/", LONG, "a".to_owned()));
        let machine = Arc::new(Machine::default());
        let (scenarios, facts) = (Arc::new(Library), Arc::new(Noted::default()));
        let settings = Settings { concurrency: 1, lock_timeout: PATIENCE, ..Settings::default() };
        let gauntlet = Gauntlet::new(store.clone(), machine.clone(), scenarios, facts.clone(), settings);
        let time = Arc::new(Time::default());
        let call = Call {
            now: Timestamp::from_second(1000).unwrap(),
            traceparent: None,
            entropy: Arc::new(Counter::default()),
            clock: time.clone(),
        };
        let web = ChallengeId::new("web").unwrap();
        let world =
            Self { gauntlet, store, machine, call, web, facts, time, rival, gates, hides_challenges, _dir: dir };
        world.create_challenge(min).await;
        world
    }

    /// A challenge, and an instance of it for one source.
    pub async fn with_an_instance() -> Self {
        let world = Self::with_a_challenge(0).await;
        world.create(ALICE).await;
        world
    }

    pub async fn create_challenge(&self, min: i64) {
        let challenge = NewChallenge {
            id: self.web.clone(),
            scenario: reference(1),
            timeout: Some(Duration::from_secs(TIMEOUT.unsigned_abs())),
            until: None,
            additional: Additional::new(),
            min,
            max: 0,
        };
        self.gauntlet.create_challenge(&self.call, challenge).await.unwrap();
    }

    pub async fn try_create(&self, source: &str) -> Result<Instance> {
        let (source, own) = (SourceId::new(source).unwrap(), Additional::new());
        self.gauntlet.create_instance(&self.call, &self.web, &source, own).await
    }

    pub async fn create(&self, source: &str) -> Instance {
        self.try_create(source).await.unwrap()
    }

    pub async fn delete(&self, source: &str) -> Result<()> {
        self.gauntlet.delete_instance(&self.call, &self.web, &SourceId::new(source).unwrap()).await
    }

    /// A call at another time.
    pub fn at(&self, second: i64) -> Call {
        Call { now: Timestamp::from_second(second).unwrap(), ..self.call.clone() }
    }

    pub async fn stored(&self, source: &str) -> Option<Instance> {
        let seat = Assignment::Source(SourceId::new(source).unwrap());
        let key = InstanceKey { challenge: self.web.clone(), assignment: seat };
        self.store.instance(&key).await.unwrap().map(|stored| stored.value)
    }

    pub async fn pooled(&self) -> Vec<Instance> {
        let all: Vec<_> = self.store.instances_of(&self.web).try_collect().await.unwrap();
        all.into_iter().map(|stored| stored.value).filter(|instance| instance.key.assignment.is_pooled()).collect()
    }

    /// Runs a use case beside the test.
    pub fn beside<T, F>(&self, work: impl FnOnce(Gauntlet, Call, ChallengeId) -> F) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        tokio::spawn(work(self.gauntlet.clone(), self.call.clone(), self.web.clone()))
    }

    /// Takes a lock of the challenge, beside the test: it may have to wait.
    pub fn lock(&self, kind: LockKind) -> JoinHandle<LockGuard> {
        let (store, web) = (self.store.clone(), self.web.clone());
        tokio::spawn(async move {
            store.lock(kind, &web, &LockOptions { timeout: LONG, ..LockOptions::default() }).await.unwrap()
        })
    }

    /// Waits until so many hold a lock of the challenge or wait for it.
    pub async fn queued(&self, kind: LockKind, count: usize) {
        let queued = async {
            while self.store.queue(kind, &self.web).await.unwrap().len() != count {
                sleep(Duration::from_millis(2)).await;
            }
        };
        within("queueing for a lock", queued).await;
    }

    /// From now on whatever a write compares by version was changed just before.
    pub fn rival(&self, always: bool) {
        self.rival.store(always, Ordering::Relaxed);
    }

    /// Whoever removes a challenge next waits.
    pub fn hold_removal(&self) -> Hold {
        self.gates.close("remove a challenge")
    }

    /// Whoever writes next what must not have changed waits.
    pub fn hold_rewrite(&self) -> Hold {
        self.gates.close("rewrite an instance")
    }

    /// From now on no challenge can be read.
    pub fn hide_challenges(&self) {
        self.hides_challenges.store(true, Ordering::Relaxed);
    }
}
