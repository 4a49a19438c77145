//! A server of the v1 API, and of its extension when told so, on loopback; it does as it is told.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests; each uses a part of it"
)]

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use gauntlet_api::{
    error,
    extension::{
        DeleteExpiredRequest, DeleteExpiredResponse, ExpiredInstance, ListExpiredRequest,
        sweeper_server::{Sweeper, SweeperServer},
    },
    v1::challenge as pbc,
    v1::instance as pbi,
};
use gauntlet_telemetry::layers::GrpcServerLayer;
use jiff::Timestamp;
use pbc::challenge_store_server::{ChallengeStore, ChallengeStoreServer};
use pbi::instance_manager_server::{InstanceManager, InstanceManagerServer};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, async_trait, transport::Server};

/// What becomes of a deletion.
#[derive(Clone, Copy, Debug)]
pub enum Deletion {
    Fails(Code),
    NotFound,
    Hangs,
    /// Answers once `Fake::release` is notified.
    Waits,
}

/// What the server has and does.
#[derive(Default)]
pub struct State {
    pub challenges: Vec<pbc::Challenge>,
    /// By source.
    pub deletions: HashMap<String, Deletion>,
    /// After how many challenges a query fails, and after how many instances a list does.
    pub breaks_after: Option<usize>,
    /// With what; INTERNAL unless said.
    pub breaks_with: Option<Code>,
    pub query_hangs: bool,
    pub queries: u32,
    /// Whether `gauntlet.v1` is served.
    pub extended: bool,
    /// Without `DeleteExpired`, as in the first version of it.
    pub only_lists: bool,
    /// Calls of `ListExpired`, refused ones too.
    pub lists: u32,
    pub deleted: Vec<String>,
    pub traceparents: Vec<String>,
    pub timeouts: Vec<String>,
    pub under_way: usize,
    pub most_under_way: usize,
}

impl State {
    fn breaks(&self) -> Option<(usize, Status)> {
        let broken = Status::new(self.breaks_with.unwrap_or(Code::Internal), "broke");
        self.breaks_after.map(|after| (after, broken))
    }
}

#[derive(Clone, Default)]
pub struct Fake {
    pub state: Arc<Mutex<State>>,
    pub release: Arc<Notify>,
}

/// Ends with the test.
pub struct Running {
    pub url: String,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// So many seconds from now.
pub fn at(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() + seconds, nanos: 0 })
}

/// When instances began, unless a test says otherwise.
pub const BEGAN: Option<prost_types::Timestamp> = Some(prost_types::Timestamp { seconds: 1, nanos: 2 });

/// A challenge with an instance for each source and its end.
pub fn challenge(
    id: &str,
    until: Option<prost_types::Timestamp>,
    sources: &[(&str, Option<prost_types::Timestamp>)],
) -> pbc::Challenge {
    let instances = sources.iter().map(|(source, until)| pbi::Instance {
        challenge_id: id.into(),
        source_id: (*source).into(),
        since: BEGAN,
        until: *until,
        ..Default::default()
    });
    pbc::Challenge { id: id.into(), until, instances: instances.collect(), ..Default::default() }
}

impl Fake {
    pub fn new(challenges: Vec<pbc::Challenge>) -> Self {
        let fake = Self::default();
        fake.with(|state| state.challenges = challenges);
        fake
    }

    /// Serves `gauntlet.v1` too.
    pub fn extended(self) -> Self {
        self.with(|state| state.extended = true);
        self
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    pub fn deletion(self, source: &str, deletion: Deletion) -> Self {
        self.with(|state| state.deletions.insert(source.into(), deletion));
        self
    }

    pub fn deleted(&self) -> Vec<String> {
        let mut deleted = self.with(|state| state.deleted.clone());
        deleted.sort();
        deleted
    }

    pub async fn serve(&self) -> Running {
        let mut server = Server::builder();
        self.listen(|fake, incoming| {
            server
                .add_service(ChallengeStoreServer::new(fake.clone()))
                .add_service(InstanceManagerServer::new(fake.clone()))
                .add_service(SweeperServer::new(fake))
                .serve_with_incoming(incoming)
        })
        .await
    }

    /// As `serve`, with a span for each call.
    pub async fn serve_observed(&self, layer: GrpcServerLayer) -> Running {
        let mut server = Server::builder().layer(layer);
        self.listen(|fake, incoming| {
            server
                .add_service(ChallengeStoreServer::new(fake.clone()))
                .add_service(InstanceManagerServer::new(fake.clone()))
                .add_service(SweeperServer::new(fake))
                .serve_with_incoming(incoming)
        })
        .await
    }

    async fn listen<F>(&self, serve: impl FnOnce(Self, TcpListenerStream) -> F) -> Running
    where
        F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = serve(self.clone(), TcpListenerStream::new(listener));
        let task = tokio::spawn(async move {
            let _ = serving.await;
        });
        Running { url, task }
    }

    /// Polls until `reached`; fails after ten seconds.
    pub async fn until(&self, mut reached: impl FnMut(&State) -> bool) {
        tokio::time::timeout(Duration::from_secs(10), async {
            while !self.with(|state| reached(state)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("it never came to that");
    }

    fn note<T>(&self, request: &Request<T>) {
        let read = |name| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        self.with(|state| {
            state.traceparents.extend(read("traceparent"));
            state.timeouts.extend(read("grpc-timeout"));
        });
    }

    async fn delete(&self, source: &str) -> Result<(), Status> {
        let deletion = self.with(|state| state.deletions.get(source).copied());
        match deletion {
            Some(Deletion::Fails(code)) => return Err(Status::new(code, "as told")),
            Some(Deletion::NotFound) => return Err(error::instance_not_found("c", source)),
            Some(Deletion::Hangs) => std::future::pending().await,
            Some(Deletion::Waits) => self.release.notified().await,
            None => tokio::task::yield_now().await,
        }
        Ok(())
    }
}

struct UnderWay<'a>(&'a Fake);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.with(|state| state.under_way -= 1);
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl ChallengeStore for Fake {
    async fn create_challenge(
        &self,
        _: Request<pbc::CreateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    async fn retrieve_challenge(
        &self,
        _: Request<pbc::RetrieveChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    type QueryChallengeStream = Answers<pbc::Challenge>;

    async fn query_challenge(&self, request: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        self.note(&request);
        let (challenges, breaks, hangs) = self.with(|state| {
            state.queries += 1;
            (state.challenges.clone(), state.breaks(), state.query_hangs)
        });
        let answers = stream::iter(challenges).map(Ok);
        Ok(Response::new(match breaks {
            Some((after, broken)) => answers.take(after).chain(stream::iter([Err(broken)])).boxed(),
            None if hangs => answers.chain(stream::pending()).boxed(),
            None => answers.boxed(),
        }))
    }

    async fn update_challenge(
        &self,
        _: Request<pbc::UpdateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    async fn delete_challenge(&self, _: Request<pbc::DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }
}

#[async_trait]
impl Sweeper for Fake {
    type ListExpiredStream = Answers<ExpiredInstance>;

    async fn list_expired(
        &self,
        request: Request<ListExpiredRequest>,
    ) -> Result<Response<Self::ListExpiredStream>, Status> {
        self.note(&request);
        let (expired, breaks, hangs) = self.with(|state| {
            state.lists += 1;
            if !state.extended {
                return Err(Status::unimplemented("as a server that lacks it"));
            }
            let now = Timestamp::now().as_second();
            let mut expired: Vec<ExpiredInstance> = Vec::new();
            for challenge in &state.challenges {
                let ended = |instance: &&pbi::Instance| instance.until.is_some_and(|until| until.seconds <= now);
                expired.extend(challenge.instances.iter().filter(ended).map(|instance| ExpiredInstance {
                    challenge_id: instance.challenge_id.clone(),
                    source_id: instance.source_id.clone(),
                    until: instance.until,
                    since: instance.since,
                }));
            }
            Ok((expired, state.breaks(), state.query_hangs))
        })?;
        let answers = stream::iter(expired).map(Ok);
        Ok(Response::new(match breaks {
            Some((after, broken)) => answers.take(after).chain(stream::iter([Err(broken)])).boxed(),
            None if hangs => answers.chain(stream::pending()).boxed(),
            None => answers.boxed(),
        }))
    }

    async fn delete_expired(
        &self,
        request: Request<DeleteExpiredRequest>,
    ) -> Result<Response<DeleteExpiredResponse>, Status> {
        self.note(&request);
        let DeleteExpiredRequest { challenge_id, source_id, since } = request.into_inner();
        if !self.with(|state| state.extended && !state.only_lists) {
            return Err(Status::unimplemented("as a server that lacks it"));
        }
        let now = Timestamp::now().as_second();
        let found = self.instance(&source_id).ok_or_else(|| error::instance_not_found(&challenge_id, &source_id))?;
        let deleted = found.since == since && found.until.is_some_and(|until| until.seconds <= now);
        if deleted {
            self.take_down(source_id).await?;
        }
        Ok(Response::new(DeleteExpiredResponse { deleted }))
    }
}

impl Fake {
    fn instance(&self, source: &str) -> Option<pbi::Instance> {
        self.with(|state| {
            let mut all = state.challenges.iter().flat_map(|challenge| &challenge.instances);
            all.find(|one| one.source_id == source).cloned()
        })
    }
}

#[async_trait]
impl InstanceManager for Fake {
    async fn create_instance(&self, _: Request<pbi::CreateInstanceRequest>) -> Result<Response<pbi::Instance>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    async fn retrieve_instance(
        &self,
        request: Request<pbi::RetrieveInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let pbi::RetrieveInstanceRequest { challenge_id, source_id } = request.into_inner();
        let found = self.instance(&source_id);
        found.map(Response::new).ok_or_else(|| error::instance_not_found(&challenge_id, &source_id))
    }

    type QueryInstanceStream = Answers<pbi::Instance>;

    async fn query_instance(
        &self,
        _: Request<pbi::QueryInstanceRequest>,
    ) -> Result<Response<Self::QueryInstanceStream>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    async fn renew_instance(&self, _: Request<pbi::RenewInstanceRequest>) -> Result<Response<pbi::Instance>, Status> {
        Err(Status::unimplemented("not of the janitor"))
    }

    async fn delete_instance(&self, request: Request<pbi::DeleteInstanceRequest>) -> Result<Response<()>, Status> {
        self.note(&request);
        self.take_down(request.into_inner().source_id).await?;
        Ok(Response::new(()))
    }
}

impl Fake {
    async fn take_down(&self, source: String) -> Result<(), Status> {
        self.with(|state| {
            state.under_way += 1;
            state.most_under_way = state.most_under_way.max(state.under_way);
        });
        let _under_way = UnderWay(self);
        self.delete(&source).await?;
        self.with(|state| {
            for challenge in &mut state.challenges {
                challenge.instances.retain(|instance| instance.source_id != source);
            }
            state.deleted.push(source);
        });
        Ok(())
    }
}
