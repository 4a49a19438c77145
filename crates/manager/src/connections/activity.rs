//! The activity of one connection: what it has received, which calls are running on it, and what the client has not read yet.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes};
use http::Version;
use http_body::{Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, OwnedSemaphorePermit},
    time::Instant,
};

use crate::listen::socket::Duplex;

/// The length of HTTP/2's preface: after this many bytes the version of HTTP is known.
const PREFACE_LEN: u64 = 24;
/// How many calls of a connection the client may cancel before their response begins, in [`CANCEL_WINDOW`]. Each may have begun work that continues
/// without its client. A platform that gives up on all of its calls at once stays below.
const MAX_CANCELLED: usize = 1000;
const CANCEL_WINDOW: Duration = Duration::from_secs(10);
/// The key of the socket in [`State::unread`]. Calls are numbered from 1.
const SOCKET: u64 = 0;

/// Shared by the socket, the calls and the responses of one connection.
#[derive(Clone, Default)]
pub(super) struct Activity(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Notified when the client has cancelled too many calls.
    abused: Notify,
}

#[derive(Default)]
struct State {
    /// Bytes received.
    received: u64,
    /// The value of `received` when the last call began or ended: bytes after it are the headers of the next request.
    received_by_calls: u64,
    /// Calls begun; the number of the latest.
    begun: u64,
    /// Calls running.
    calls: usize,
    /// Calls that the client cancelled since `cancelled_since`.
    cancelled: usize,
    cancelled_since: Option<Instant>,
    /// Whether the connection speaks HTTP/2, so that written bytes may belong to any call.
    multiplexed: bool,
    /// What waits for the client to read, and since when: a frame of a call's response, or bytes for the [`SOCKET`].
    unread: BTreeMap<u64, Instant>,
}

impl State {
    /// Counts a cancelled call. Returns whether there are too many.
    fn count_cancelled(&mut self, now: Instant) -> bool {
        if self.cancelled_since.is_none_or(|since| now.saturating_duration_since(since) >= CANCEL_WINDOW) {
            (self.cancelled, self.cancelled_since) = (0, Some(now));
        }
        self.cancelled += 1;
        self.cancelled > MAX_CANCELLED
    }
}

impl Activity {
    fn state(&self) -> MutexGuard<'_, State> {
        // Poisoning does no harm: no update is left half done.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wraps the stream to the client, so that its reads and writes are recorded.
    pub(super) fn stream(&self, stream: Box<dyn Duplex>) -> Stream {
        Stream { inner: stream, activity: self.clone() }
    }

    /// Records that a call begins. It ends when the returned guard, or the response made with it, is dropped.
    pub(super) fn begin_call(&self, version: Version) -> Call {
        let mut state = self.state();
        state.multiplexed = version == Version::HTTP_2;
        state.begun += 1;
        state.calls += 1;
        state.received_by_calls = state.received;
        Call { id: state.begun, activity: self.clone(), answered: false }
    }

    /// Whether the client has sent a request, or enough bytes to tell the version of HTTP.
    pub(super) fn has_sent_preface(&self) -> bool {
        let state = self.state();
        state.begun > 0 || state.received >= PREFACE_LEN
    }

    /// Whether the client has sent part of a request's headers.
    pub(super) fn is_reading_headers(&self) -> bool {
        let state = self.state();
        state.received > state.received_by_calls
    }

    /// How many calls are running.
    pub(super) fn calls(&self) -> usize {
        self.state().calls
    }

    /// Whether the client has left anything unread for `limit`.
    pub(super) fn is_stalled(&self, limit: Duration) -> bool {
        self.state().unread.values().any(|since| since.elapsed() >= limit)
    }

    /// Resolves when the client has cancelled more calls than it may.
    pub(super) async fn abused(&self) {
        self.0.abused.notified().await;
    }

    fn record_unread(&self, key: u64) {
        self.state().unread.entry(key).or_insert_with(Instant::now);
    }

    fn record_read(&self, key: u64) {
        self.state().unread.remove(&key);
    }

    /// Records that the socket accepted bytes.
    fn record_write(&self) {
        let mut state = self.state();
        state.unread.remove(&SOCKET);
        if !state.multiplexed {
            // They belong to the only response there is: a slow client that keeps reading a large frame has not stalled.
            let now = Instant::now();
            state.unread.values_mut().for_each(|since| *since = now);
        }
    }
}

/// A running call.
pub(super) struct Call {
    id: u64,
    activity: Activity,
    /// Whether the response has begun.
    answered: bool,
}

impl Call {
    /// Wraps the body of the call's response. The call ends, and the permit is released, when the body has been read or dropped.
    pub(super) fn response(mut self, body: Body, permit: Option<OwnedSemaphorePermit>) -> ResponseBody {
        self.answered = true;
        ResponseBody { body, call: self, _permit: permit }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.calls -= 1;
        state.unread.remove(&self.id);
        state.received_by_calls = state.received;
        if !self.answered && state.count_cancelled(Instant::now()) {
            self.activity.0.abused.notify_one();
        }
    }
}

/// The body of a response. hyper polls it for the next frame once the client has read the one before.
pub(super) struct ResponseBody {
    body: Body,
    call: Call,
    _permit: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.call.activity.record_read(self.call.id);
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(_))) = &polled {
            self.call.activity.record_unread(self.call.id);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket whose reads and writes are recorded.
pub(super) struct Stream {
    inner: Box<dyn Duplex>,
    activity: Activity,
}

impl Stream {
    fn record_write<T>(&self, polled: Poll<T>) -> Poll<T> {
        match polled {
            Poll::Pending => self.activity.record_unread(SOCKET),
            Poll::Ready(_) => self.activity.record_write(),
        }
        polled
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        let more = buffer.filled().len().saturating_sub(before);
        if more > 0 {
            self.activity.state().received += more as u64;
        }
        polled
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.record_write(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bytes);
        self.record_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
