use std::{error::Error as _, time::Duration};

use tonic::{Request, Status};

use crate::with_causes;

/// Makes a call that ends within `deadline`. The server learns the deadline (`grpc-timeout`), and when it passes the call fails here with
/// `DEADLINE_EXCEEDED`, whether the server answers or not. The deadline covers everything `call` awaits: reading a stream to its end, too.
///
/// # Errors
/// What the call returns. When the transport failed, the message lists the causes.
///
/// # Cancel safety
/// Dropping the future cancels the call; the server may have carried it out.
pub async fn call_with_deadline<M, T>(
    deadline: Duration,
    message: M,
    call: impl AsyncFnOnce(Request<M>) -> Result<T, Status>,
) -> Result<T, Status> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    let exceeded = || Status::deadline_exceeded(format!("no answer within {deadline:?}"));
    match tokio::time::timeout(deadline, call(request)).await {
        Ok(Ok(response)) => Ok(response),
        // The transport has a timer of the same length. When that fires first, the error is the same.
        Ok(Err(status)) if status.source().is_some_and(|source| source.is::<tonic::TimeoutExpired>()) => {
            Err(exceeded())
        }
        Ok(Err(status)) => Err(explain_transport_error(status)),
        Err(_) => Err(exceeded()),
    }
}

/// Replaces the message of a status that the transport produced by its causes.
fn explain_transport_error(status: Status) -> Status {
    match status.source() {
        Some(source) => Status::with_details(status.code(), with_causes(source), status.details().to_vec().into()),
        None => status,
    }
}
