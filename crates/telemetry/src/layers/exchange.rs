//! Follows one request and its response to the end, for every layer of this module.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response, response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};
use tracing::Instrument;
use tracing::instrument::Instrumented;

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The response was complete.
    Complete,
    /// The service or the body returned an error.
    Failed,
    /// The response was dropped before its end: the caller went away.
    Cancelled,
}

/// One request and its response.
pub trait Exchange {
    /// Called with the head of the response. Returns whether the exchange is complete without a body.
    fn on_head(&mut self, head: &response::Parts) -> bool;
    /// Called with the trailers of the response.
    fn on_trailers(&mut self, trailers: &HeaderMap);
    /// Called exactly once, at the end.
    fn on_end(&mut self, end: End);
    /// The span of the exchange.
    fn span(&self) -> &tracing::Span;
}

/// Starts an [`Exchange`] for each request.
pub trait Observer {
    /// The exchange that it starts.
    type Exchange: Exchange;
    /// Returns `None` for requests that are not observed.
    fn start<B>(&self, request: &mut Request<B>) -> Option<Self::Exchange>;
}

/// A layer that observes every exchange of a service.
#[derive(Clone, Debug)]
pub struct ObserveLayer<O>(pub(super) O);

impl<S, O: Clone> Layer<S> for ObserveLayer<O> {
    type Service = ObserveService<S, O>;

    fn layer(&self, inner: S) -> Self::Service {
        ObserveService { inner, observer: self.0.clone() }
    }
}

/// A service whose exchanges are observed.
#[derive(Clone, Debug)]
pub struct ObserveService<S, O> {
    inner: S,
    observer: O,
}

impl<S, O, ReqBody, ResBody> Service<Request<ReqBody>> for ObserveService<S, O>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    O: Observer,
    ResBody: Body,
{
    type Response = Response<ObservedBody<ResBody, O::Exchange>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, O::Exchange>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let exchange = self.observer.start(&mut request);
        let span = exchange.as_ref().map_or_else(tracing::Span::none, |exchange| exchange.span().clone());
        let future = span.in_scope(|| self.inner.call(request)).instrument(span);
        ResponseFuture { future, guard: Guard(exchange) }
    }
}

/// Ends its exchange as cancelled when dropped before the end.
struct Guard<X: Exchange>(Option<X>);

impl<X: Exchange> Guard<X> {
    fn end(&mut self, end: End) {
        if let Some(mut exchange) = self.0.take() {
            exchange.on_end(end);
        }
    }
}

impl<X: Exchange> Drop for Guard<X> {
    fn drop(&mut self) {
        self.end(End::Cancelled);
    }
}

pin_project! {
    /// The future of an observed response.
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
                if guard.0.as_mut().is_some_and(|exchange| exchange.on_head(&head)) || body.is_end_stream() {
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
    /// An observed response body.
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
        // A streamed body does its work while it is polled, so that work belongs to the span too.
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
                        exchange.on_trailers(trailers);
                    }
                    this.guard.end(End::Complete);
                } else if this.body.is_end_stream() {
                    // hyper does not poll a body again once it reports its end.
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
