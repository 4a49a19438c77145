//! The v1 API and its extension over gRPC: converts a message, runs an operation, and converts the result. REST calls the same handlers in process.

mod challenge;
mod convert;
mod instance;
mod sweep;

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use gauntlet_domain::Error;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use crate::{
    caller::Denial,
    operations::Operations,
    report::StreamFailure,
    status::{denied, status},
};

/// The messages of a stream; it ends after the first error.
pub(crate) type Messages<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// Why a handler has no response.
enum Failure {
    Denied(Denial),
    Failed(Error),
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// `api.v1.challenge.ChallengeStore`, `api.v1.instance.InstanceManager` and `gauntlet.v1.Sweeper`.
#[derive(Clone)]
pub(crate) struct Handlers {
    operations: Operations,
}

impl Handlers {
    pub(crate) fn new(operations: Operations) -> Self {
        Self { operations }
    }
}

/// How many messages of a stream are read ahead of a slow client.
const STREAM_BUFFER: usize = 16;

/// Runs a handler. Its error becomes the status of the call.
async fn respond<M>(call: impl Future<Output = Result<Response<M>, Failure>>) -> Result<Response<M>, Status> {
    call.await.map_err(|failure| match failure {
        Failure::Denied(denial) => denied(denial),
        Failure::Failed(error) => status(error),
    })
}

/// Makes a response of a stream that borrows the operations. A task reads the stream, up to [`STREAM_BUFFER`] messages ahead; it ends when the
/// client disconnects.
fn stream<T, M, F>(operations: &Operations, message: fn(T) -> M, read: F) -> Response<Messages<M>>
where
    T: Send + 'static,
    M: Send + 'static,
    F: for<'a> FnOnce(&'a Operations) -> gauntlet_domain::Stream<'a, T> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
    let failure = StreamFailure::default();
    let (owned, failed) = (operations.clone(), failure.clone());
    operations.spawn_read(async move {
        let mut items = read(&owned);
        while let Some(item) = items.next().await {
            let item = item.map(message).map_err(status);
            if let Err(status) = &item {
                failed.set(status);
            }
            let last = item.is_err();
            if sender.send(item).await.is_err() || last {
                break;
            }
        }
    });
    let mut response = Response::new(ReceiverStream::new(receiver).boxed());
    response.extensions_mut().insert(failure);
    response
}
