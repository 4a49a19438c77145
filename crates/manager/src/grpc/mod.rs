//! The v1 API and its extension over gRPC: messages in, an operation, messages out. REST calls the same handlers in process.

mod challenge;
mod convert;
mod instance;
mod sweep;

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use gauntlet_domain::Result;
use tonic::Status;

use crate::operations::Operations;

/// A stream of answers; ends after the first error.
pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

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

/// How many answers of a stream may wait for a slow client.
const STREAM_BUFFER: usize = 16;

/// Turns a borrowed stream of the operations into an owned one: a task reads ahead by a bounded number, and ends when the client goes.
fn answers<T, F>(operations: &Operations, read: F) -> Answers<T>
where
    T: Send + 'static,
    F: for<'a> FnOnce(&'a Operations) -> gauntlet_domain::Stream<'a, T> + Send + 'static,
{
    let (sender, mut receiver) = tokio::sync::mpsc::channel(STREAM_BUFFER);
    let owned = operations.clone();
    operations.detached(async move {
        let mut items = read(&owned);
        while let Some(item) = items.next().await {
            let item = item.map_err(|error| crate::status::status(&error));
            let last = item.is_err();
            if sender.send(item).await.is_err() || last {
                break;
            }
        }
    });
    Box::pin(futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)))
}
