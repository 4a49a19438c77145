//! What every layer has in common: one request and one response, followed to their end.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response, response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::Service;
use tracing::Instrument;
use tracing::instrument::Instrumented;

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The response was given whole.
    Complete,
    /// The service, or the body, gave an error.
    Failed,
    /// Whoever waited for it went away.
    Cancelled,
}

/// Watches one exchange.
pub trait Exchange {
    /// The head of the response is known. Answers whether the exchange is over with it.
    fn head(&mut self, head: &response::Parts) -> bool;
    /// The trailers are known.
    fn trailers(&mut self, trailers: &HeaderMap);
    /// The exchange is over; called once.
    fn end(&mut self, end: End);
    /// The span of the exchange.
    fn span(&self) -> &tracing::Span;
}

/// Begins to watch exchanges.
pub trait Watch {
    /// What watches one exchange.
    type Exchange: Exchange;
    /// `None` for requests that are not observed.
    fn begin<B>(&self, request: &mut Request<B>) -> Option<Self::Exchange>;
}

/// Ends its exchange when it is dropped, if nothing did before.
struct Guard<X: Exchange>(Option<X>);

impl<X: Exchange> Guard<X> {
    fn end(&mut self, end: End) {
        if let Some(mut exchange) = self.0.take() {
            exchange.end(end);
        }
    }
}

impl<X: Exchange> Drop for Guard<X> {
    fn drop(&mut self) {
        self.end(End::Cancelled);
    }
}

/// A service whose exchanges are observed. Made by the layers of this module.
#[derive(Clone, Debug)]
pub struct Observe<S, W> {
    pub(crate) inner: S,
    pub(crate) watch: W,
}

impl<S, W, ReqBody, ResBody> Service<Request<ReqBody>> for Observe<S, W>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    W: Watch,
    ResBody: Body,
{
    type Response = Response<ObservedBody<ResBody, W::Exchange>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, W::Exchange>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let exchange = self.watch.begin(&mut request);
        let span = exchange.as_ref().map_or_else(tracing::Span::none, |exchange| exchange.span().clone());
        let future = span.in_scope(|| self.inner.call(request)).instrument(span);
        ResponseFuture { future, guard: Guard(exchange) }
    }
}

pin_project! {
    /// The response to come, followed.
    pub struct ResponseFuture<F, X: Exchange> {
        #[pin]
        future: Instrumented<F>,
        guard: Guard<X>,
    }
}

impl<F, X, B, E> Future for ResponseFuture<F, X>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
    X: Exchange,
{
    type Output = Result<Response<ObservedBody<B, X>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match ready!(this.future.poll(cx)) {
            Ok(response) => {
                let (head, body) = response.into_parts();
                let mut guard = Guard(this.guard.0.take());
                if guard.0.as_mut().is_some_and(|exchange| exchange.head(&head)) || body.is_end_stream() {
                    guard.end(End::Complete);
                }
                Poll::Ready(Ok(Response::from_parts(head, ObservedBody { body, guard })))
            }
            Err(error) => {
                this.guard.end(End::Failed);
                Poll::Ready(Err(error))
            }
        }
    }
}

pin_project! {
    /// A response body, followed to its end.
    pub struct ObservedBody<B, X: Exchange> {
        #[pin]
        body: B,
        guard: Guard<X>,
    }
}

impl<B: Body, X: Exchange> Body for ObservedBody<B, X> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        // A streamed answer is produced while it is polled: its work belongs to the same span.
        let span = this.guard.0.as_ref().map(|exchange| exchange.span().clone());
        let polled = match &span {
            Some(span) => span.in_scope(|| this.body.as_mut().poll_frame(cx)),
            None => return this.body.poll_frame(cx),
        };
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => this.guard.end(End::Complete),
            Poll::Ready(Some(Err(_))) => this.guard.end(End::Failed),
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    if let Some(exchange) = this.guard.0.as_mut() {
                        exchange.trailers(trailers);
                    }
                    this.guard.end(End::Complete);
                } else if this.body.is_end_stream() {
                    // Whoever sends it may not poll again.
                    this.guard.end(End::Complete);
                }
            }
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

impl<B: Default, X: Exchange> Default for ObservedBody<B, X> {
    fn default() -> Self {
        Self { body: B::default(), guard: Guard(None) }
    }
}
