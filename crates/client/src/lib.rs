//! The client of the API: the server's address, credentials, a channel to it, and calls with a deadline.
//!
//! Every call has a CLIENT span and its metrics, and carries the caller's trace context. Nothing is retried here: which calls are safe to
//! repeat is for the caller to know.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use gauntlet_api::v1::challenge::RetrieveChallengeRequest;
//! use gauntlet_client::{Credentials, ServerAddress, call_with_deadline, challenge_store};
//!
//! let server: ServerAddress = "localhost:8080".parse()?;
//! let channel = server.channel(&Credentials::default(), "example/1.0", &gauntlet_telemetry::Instruments::noop())?;
//! let mut challenges = challenge_store(channel);
//! let request = RetrieveChallengeRequest { id: "web".into() };
//! let found =
//!     call_with_deadline(Duration::from_secs(5), request, async |request| challenges.retrieve_challenge(request).await);
//! println!("{:?}", found.await?);
//! # Ok(())
//! # }
//! ```

mod address;
mod call;
mod channel;
mod credentials;

pub use address::{InvalidAddress, ServerAddress};
pub use call::call_with_deadline;
pub use channel::{Channel, ChannelError, MAX_MESSAGE_SIZE, challenge_store};
pub use credentials::{Authenticated, Credentials, CredentialsError};

/// An error and its causes, without those that repeat the one before.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
