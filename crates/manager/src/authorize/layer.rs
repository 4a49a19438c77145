//! The layer in front of the gRPC services and the REST router.

use std::{
    future::{Ready, ready},
    task::{Context, Poll},
};

use futures::future::Either;
use http::{Request, Response};
use tonic::Status;
use tower::{Layer, Service};

use super::Authorizer;
use crate::status::denied;

/// Lets calls through that the [`Authorizer`] permits, with their [`Caller`](crate::caller::Caller) as an extension. Must be inside the layer that makes the
/// span of the call, and for REST added with `Router::layer`, where the matched route is known.
pub(crate) struct AuthorizeLayer<B> {
    authorizer: Authorizer,
    refuse: fn(Status) -> Response<B>,
}

impl<B> AuthorizeLayer<B> {
    /// `refuse` makes the response to a denied call in the caller's protocol.
    pub(crate) fn new(authorizer: Authorizer, refuse: fn(Status) -> Response<B>) -> Self {
        Self { authorizer, refuse }
    }
}

impl<S, B> Layer<S> for AuthorizeLayer<B> {
    type Service = Authorize<S, B>;

    fn layer(&self, inner: S) -> Authorize<S, B> {
        Authorize { inner, authorizer: self.authorizer.clone(), refuse: self.refuse }
    }
}

// Not derived: the body need not be cloned.
impl<B> Clone for AuthorizeLayer<B> {
    fn clone(&self) -> Self {
        Self::new(self.authorizer.clone(), self.refuse)
    }
}

/// A service behind an [`AuthorizeLayer`].
pub(crate) struct Authorize<S, B> {
    inner: S,
    authorizer: Authorizer,
    refuse: fn(Status) -> Response<B>,
}

impl<S: Clone, B> Clone for Authorize<S, B> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), authorizer: self.authorizer.clone(), refuse: self.refuse }
    }
}

impl<S, Q, B> Service<Request<Q>> for Authorize<S, B>
where
    S: Service<Request<Q>, Response = Response<B>>,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Response<B>, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Q>) -> Self::Future {
        match self.authorizer.decide(&request) {
            Ok(caller) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                Either::Right(self.inner.call(request))
            }
            Err(denial) => Either::Left(ready(Ok((self.refuse)(denied(denial))))),
        }
    }
}

/// Whether a request is gRPC or gRPC-web.
pub(crate) fn is_grpc<B>(request: &Request<B>) -> bool {
    let content_type = request.headers().get(http::header::CONTENT_TYPE);
    content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}
