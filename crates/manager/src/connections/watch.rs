//! What is known about one connection: whether it has said anything, what is under way on it, and what waits for its reader.

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
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::Instant,
};

/// As long as the preface of HTTP/2: whoever sends as much has said which HTTP it speaks.
const PREFACE: u64 = 24;
/// Stands for the socket among what waits for the reader; calls are counted from above it.
const SOCKET: u64 = 0;

/// Shared by the socket, the calls and the answers of one connection.
#[derive(Clone, Default)]
pub(super) struct Watch(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Bytes read so far, and when the last call began or ended.
    read: u64,
    read_by_calls: u64,
    begun: u64,
    calls: usize,
    /// HTTP/2: what is written may be of any call.
    multiplexed: bool,
    /// What has been given and not been taken, since when: a frame of an answer, or what is to be written to the socket.
    unread: BTreeMap<u64, Instant>,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing here panics half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream, watched.
    pub(super) fn stream(&self, stream: TcpStream) -> Stream {
        Stream { inner: stream, watch: self.clone() }
    }

    /// A call begins; it ends when the guard, or the answer made with it, is dropped.
    pub(super) fn begin(&self, version: Version) -> Call {
        let mut state = self.state();
        state.multiplexed = version == Version::HTTP_2;
        state.begun += 1;
        state.calls += 1;
        state.read_by_calls = state.read;
        Call { id: state.begun, watch: self.clone() }
    }

    /// Whether the client has sent a request, or enough to tell which HTTP it speaks.
    pub(super) fn has_spoken(&self) -> bool {
        let state = self.state();
        state.begun > 0 || state.read >= PREFACE
    }

    /// Whether something was sent since the last call.
    pub(super) fn in_head(&self) -> bool {
        let state = self.state();
        state.read > state.read_by_calls
    }

    /// How many calls are under way.
    pub(super) fn calls(&self) -> usize {
        self.state().calls
    }

    /// Whether anything has waited for its reader for `limit`.
    pub(super) fn stalled(&self, limit: Duration) -> bool {
        self.state().unread.values().any(|since| since.elapsed() >= limit)
    }

    fn given(&self, what: u64) {
        self.state().unread.entry(what).or_insert_with(Instant::now);
    }

    fn taken(&self, what: u64) {
        self.state().unread.remove(&what);
    }

    /// The socket took something.
    fn written(&self) {
        let mut state = self.state();
        state.unread.remove(&SOCKET);
        if !state.multiplexed {
            // It was of the one answer there is: a large one is read at the reader's pace.
            let now = Instant::now();
            state.unread.values_mut().for_each(|since| *since = now);
        }
    }
}

/// A call under way.
pub(super) struct Call {
    id: u64,
    watch: Watch,
}

impl Call {
    /// Its answer, which holds the permit until it has been read.
    pub(super) fn answer(self, body: Body, permit: Option<OwnedSemaphorePermit>) -> Answer {
        Answer { body, call: self, _permit: permit }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.watch.state();
        state.calls -= 1;
        state.unread.remove(&self.id);
        state.read_by_calls = state.read;
    }
}

/// The body of an answer. It is polled for a frame when the one before has been taken.
pub(super) struct Answer {
    body: Body,
    call: Call,
    _permit: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.call.watch.taken(self.call.id);
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(_))) = &polled {
            self.call.watch.given(self.call.id);
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

/// A socket whose reads are counted, and whose writes are watched.
pub(super) struct Stream {
    inner: TcpStream,
    watch: Watch,
}

impl Stream {
    fn written<T>(&self, polled: Poll<T>) -> Poll<T> {
        match polled {
            Poll::Pending => self.watch.given(SOCKET),
            Poll::Ready(_) => self.watch.written(),
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
            self.watch.state().read += more as u64;
        }
        polled
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.written(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bytes);
        self.written(polled)
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
