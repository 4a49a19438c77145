//! A server of the v1 API on loopback that keeps its state in memory and fails on request.
//!
//! It stands in for a manager in tests of clients: it serves the challenges that a test gives it, records what was called, and breaks, hangs
//! or waits where the test says so. It provisions nothing: calls that create or update return what the state already has.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::{Stream, StreamExt as _, stream};
use gauntlet_api::{
    error,
    extension::{
        DeleteExpiredRequest, DeleteExpiredResponse, ExpiredInstance, ListExpiredRequest,
        sweeper_server::{Sweeper, SweeperServer},
    },
    json,
    v1::challenge as pbc,
    v1::instance as pbi,
};
use jiff::Timestamp;
use pbc::challenge_store_server::{ChallengeStore, ChallengeStoreServer};
use pbi::instance_manager_server::{InstanceManager, InstanceManagerServer};
use prost::{Message, Name};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, async_trait, service::Routes, transport::Server};

use crate::eventually;

/// When the instances of [`challenge`] were created.
pub const CREATED: Option<prost_types::Timestamp> = Some(prost_types::Timestamp { seconds: 1, nanos: 2 });

/// Returns the time `seconds` from now.
pub fn from_now(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() + seconds, nanos: 0 })
}

/// Returns a challenge with one instance for each pair of source and end.
pub fn challenge(
    id: &str,
    until: Option<prost_types::Timestamp>,
    instances: &[(&str, Option<prost_types::Timestamp>)],
) -> pbc::Challenge {
    let instances = instances.iter().map(|(source, until)| pbi::Instance {
        challenge_id: id.into(),
        source_id: (*source).into(),
        since: CREATED,
        until: *until,
        ..Default::default()
    });
    pbc::Challenge { id: id.into(), until, instances: instances.collect(), ..Default::default() }
}

/// How the deletion of a source's instance goes, other than well.
#[derive(Clone, Copy, Debug)]
pub enum Deletion {
    /// It fails with this code.
    Fails(Code),
    /// It fails as if the instance had been deleted before.
    NotFound,
    /// It never returns.
    Hangs,
    /// It returns once [`FakeApi::release`] is notified.
    Waits,
}

/// What the server has, how it behaves, and what it was called with.
#[derive(Debug, Default)]
pub struct State {
    /// The challenges, each with its instances.
    pub challenges: Vec<pbc::Challenge>,
    /// How deletions go, by source.
    pub deletions: HashMap<String, Deletion>,
    /// The number of messages after which every stream fails.
    pub breaks_after: Option<usize>,
    /// The code with which streams fail; INTERNAL by default.
    pub breaks_with: Option<Code>,
    /// Whether streams stay open after their last message.
    pub streams_hang: bool,
    /// Whether `gauntlet.v1` is served.
    pub extended: bool,
    /// Whether `gauntlet.v1` lacks `DeleteExpired`, as in its first version.
    pub only_lists: bool,

    /// Calls of `QueryChallenge`.
    pub queries: u32,
    /// Calls of `ListExpired`, refused ones included.
    pub lists: u32,
    /// Every other request, as the message's name and its JSON.
    pub requests: Vec<String>,
    /// The sources whose instances were deleted, in order.
    pub deleted: Vec<String>,
    /// The traceparents that calls carried.
    pub traceparents: Vec<String>,
    /// The deadlines that calls carried, as in `grpc-timeout`.
    pub timeouts: Vec<String>,
    /// The deletions under way.
    pub in_flight: usize,
    /// The most deletions that were under way at once.
    pub peak_in_flight: usize,
}

impl State {
    fn challenge(&self, id: &str) -> Result<pbc::Challenge, Status> {
        let found = self.challenges.iter().find(|challenge| challenge.id == id);
        found.cloned().ok_or_else(|| error::challenge_not_found(id))
    }

    fn instance(&self, challenge: &str, source: &str) -> Result<pbi::Instance, Status> {
        let found =
            self.instances().find(|instance| instance.challenge_id == challenge && instance.source_id == source);
        found.cloned().ok_or_else(|| error::instance_not_found(challenge, source))
    }

    fn instances(&self) -> impl Iterator<Item = &pbi::Instance> {
        self.challenges.iter().flat_map(|challenge| &challenge.instances)
    }

    fn stream<T: Send + 'static>(&self, messages: Vec<T>) -> Response<Streamed<T>> {
        let messages = stream::iter(messages).map(Ok);
        Response::new(match self.breaks_after {
            Some(after) => {
                let error = Status::new(self.breaks_with.unwrap_or(Code::Internal), "broke");
                messages.take(after).chain(stream::iter([Err(error)])).boxed()
            }
            None if self.streams_hang => messages.chain(stream::pending()).boxed(),
            None => messages.boxed(),
        })
    }
}

/// The server; clones share one state.
#[derive(Clone, Debug, Default)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    /// Lets deletions that wait ([`Deletion::Waits`]) return.
    pub release: Arc<Notify>,
}

/// A server that listens; dropping it stops it.
#[derive(Debug)]
pub struct Serving {
    /// `http://127.0.0.1:port`.
    pub url: String,
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeApi {
    /// A server with these challenges.
    pub fn new(challenges: Vec<pbc::Challenge>) -> Self {
        let fake = Self::default();
        fake.with(|state| state.challenges = challenges);
        fake
    }

    /// Serves `gauntlet.v1`, too.
    #[must_use]
    pub fn extended(self) -> Self {
        self.with(|state| state.extended = true);
        self
    }

    /// Decides how the deletion of a source's instance goes.
    #[must_use]
    pub fn deletion(self, source: &str, deletion: Deletion) -> Self {
        self.with(|state| state.deletions.insert(source.into(), deletion));
        self
    }

    /// Reads or changes the state.
    pub fn with<T>(&self, access: impl FnOnce(&mut State) -> T) -> T {
        access(&mut self.state.lock().unwrap())
    }

    /// The sources whose instances were deleted, sorted.
    pub fn deleted(&self) -> Vec<String> {
        let mut deleted = self.with(|state| state.deleted.clone());
        deleted.sort();
        deleted
    }

    /// Waits until the state is as wanted.
    ///
    /// # Panics
    /// As [`eventually`].
    pub async fn wait_until(&self, what: &str, mut reached: impl FnMut(&State) -> bool) {
        eventually(what, async || self.with(|state| reached(state))).await;
    }

    /// The services, for a server with layers of its own.
    pub fn routes(&self) -> Routes {
        Routes::new(ChallengeStoreServer::new(self.clone()))
            .add_service(InstanceManagerServer::new(self.clone()))
            .add_service(SweeperServer::new(self.clone()))
    }

    /// Serves on a free port of loopback. Must be called within a tokio runtime.
    pub async fn serve(&self) -> Serving {
        let routes = self.routes();
        Self::serve_with(|incoming| Server::builder().add_routes(routes).serve_with_incoming(incoming)).await
    }

    /// As [`FakeApi::serve`], with the server that `serve` builds on [`FakeApi::routes`].
    pub async fn serve_with<F>(serve: impl FnOnce(TcpListenerStream) -> F) -> Serving
    where
        F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = serve(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move {
            let _ = serving.await;
        });
        Serving { url, task }
    }

    fn record_metadata<T>(&self, request: &Request<T>) {
        let read = |name| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        self.with(|state| {
            state.traceparents.extend(read("traceparent"));
            state.timeouts.extend(read("grpc-timeout"));
        });
    }

    fn record<M: Message + Name>(&self, request: Request<M>) -> M {
        self.record_metadata(&request);
        let message = request.into_inner();
        let text = format!("{} {}", M::NAME, json::to_string(&message).unwrap());
        self.with(|state| state.requests.push(text));
        message
    }

    async fn delete(&self, challenge: &str, source: &str) -> Result<(), Status> {
        let deletion = self.with(|state| {
            state.in_flight += 1;
            state.peak_in_flight = state.peak_in_flight.max(state.in_flight);
            state.deletions.get(source).copied()
        });
        let _in_flight = InFlight(self);
        match deletion {
            Some(Deletion::Fails(code)) => return Err(Status::new(code, "injected")),
            Some(Deletion::NotFound) => return Err(error::instance_not_found(challenge, source)),
            Some(Deletion::Hangs) => std::future::pending().await,
            Some(Deletion::Waits) => self.release.notified().await,
            None => tokio::task::yield_now().await,
        }
        self.with(|state| {
            state.instance(challenge, source)?;
            for challenge in &mut state.challenges {
                challenge.instances.retain(|instance| instance.source_id != source);
            }
            state.deleted.push(source.to_owned());
            Ok(())
        })
    }
}

/// Counts a deletion as under way until it returns or is cancelled.
struct InFlight<'a>(&'a FakeApi);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.with(|state| state.in_flight -= 1);
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl ChallengeStore for FakeApi {
    async fn create_challenge(
        &self,
        request: Request<pbc::CreateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        match self.record(request) {
            request if request.min < 0 => Err(error::challenge_pooler_out_of_bounds(request.min, request.max, 1000)),
            request => self.with(|state| state.challenge(&request.id)).map(Response::new),
        }
    }

    async fn retrieve_challenge(
        &self,
        request: Request<pbc::RetrieveChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        let id = self.record(request).id;
        self.with(|state| state.challenge(&id)).map(Response::new)
    }

    type QueryChallengeStream = Streamed<pbc::Challenge>;

    async fn query_challenge(&self, request: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        self.record_metadata(&request);
        Ok(self.with(|state| {
            state.queries += 1;
            state.stream(state.challenges.clone())
        }))
    }

    async fn update_challenge(
        &self,
        request: Request<pbc::UpdateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        let id = self.record(request).id;
        self.with(|state| state.challenge(&id)).map(Response::new)
    }

    async fn delete_challenge(&self, request: Request<pbc::DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        let id = self.record(request).id;
        self.with(|state| state.challenge(&id)).map(|_| Response::new(()))
    }
}

#[async_trait]
impl InstanceManager for FakeApi {
    async fn create_instance(
        &self,
        request: Request<pbi::CreateInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.record(request);
        self.with(|state| state.instance(&request.challenge_id, &request.source_id)).map(Response::new)
    }

    async fn retrieve_instance(
        &self,
        request: Request<pbi::RetrieveInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.record(request);
        self.with(|state| state.instance(&request.challenge_id, &request.source_id)).map(Response::new)
    }

    type QueryInstanceStream = Streamed<pbi::Instance>;

    async fn query_instance(
        &self,
        request: Request<pbi::QueryInstanceRequest>,
    ) -> Result<Response<Self::QueryInstanceStream>, Status> {
        let source = self.record(request).source_id;
        Ok(self.with(|state| {
            let matching = state.instances().filter(|instance| source.is_empty() || instance.source_id == source);
            state.stream(matching.cloned().collect())
        }))
    }

    async fn renew_instance(
        &self,
        request: Request<pbi::RenewInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.record(request);
        self.with(|state| state.instance(&request.challenge_id, &request.source_id)).map(Response::new)
    }

    async fn delete_instance(&self, request: Request<pbi::DeleteInstanceRequest>) -> Result<Response<()>, Status> {
        let request = self.record(request);
        self.delete(&request.challenge_id, &request.source_id).await.map(Response::new)
    }
}

#[async_trait]
impl Sweeper for FakeApi {
    type ListExpiredStream = Streamed<ExpiredInstance>;

    async fn list_expired(
        &self,
        request: Request<ListExpiredRequest>,
    ) -> Result<Response<Self::ListExpiredStream>, Status> {
        self.record_metadata(&request);
        self.with(|state| {
            state.lists += 1;
            if !state.extended {
                return Err(Status::unimplemented("no gauntlet.v1 here"));
            }
            let expired = state.instances().filter(|instance| has_expired(instance)).map(|instance| ExpiredInstance {
                challenge_id: instance.challenge_id.clone(),
                source_id: instance.source_id.clone(),
                until: instance.until,
                since: instance.since,
            });
            Ok(state.stream(expired.collect()))
        })
    }

    async fn delete_expired(
        &self,
        request: Request<DeleteExpiredRequest>,
    ) -> Result<Response<DeleteExpiredResponse>, Status> {
        self.record_metadata(&request);
        let DeleteExpiredRequest { challenge_id, source_id, since } = request.into_inner();
        if !self.with(|state| state.extended && !state.only_lists) {
            return Err(Status::unimplemented("no DeleteExpired here"));
        }
        let found = self.with(|state| state.instance(&challenge_id, &source_id))?;
        let deleted = found.since == since && has_expired(&found);
        if deleted {
            self.delete(&challenge_id, &source_id).await?;
        }
        Ok(Response::new(DeleteExpiredResponse { deleted }))
    }
}

fn has_expired(instance: &pbi::Instance) -> bool {
    instance.until.is_some_and(|until| until.seconds <= Timestamp::now().as_second())
}
