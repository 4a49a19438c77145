use std::time::Duration;

use gauntlet_api::v1::challenge::challenge_store_client::ChallengeStoreClient;
use gauntlet_telemetry::{
    Instruments,
    layers::{GrpcClient, GrpcClientLayer, ObserveService},
};
use tonic::transport::Endpoint;
use tower::Layer as _;

use crate::{Authenticated, Credentials, CredentialsError, ServerAddress, with_causes};

/// A connection that is opened by the first call and opened again by the next call after it broke. Each call has the bearer token, a CLIENT span,
/// its metrics and W3C trace context. Cheap to clone.
pub type Channel = ObserveService<Authenticated<tonic::transport::Channel>, GrpcClient>;

/// The largest message a client accepts, in bytes. A challenge comes with all its instances in one message.
pub const MAX_MESSAGE_SIZE: usize = 64 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// No connection can be made, whether the server answers or not.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The system's root certificates, or the given ones, cannot be used.
    #[error("cannot set up TLS to {server}: {reason}")]
    Tls {
        /// The server.
        server: String,
        /// Why.
        reason: String,
    },
    /// The credentials cannot be used, or not with this server.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

impl ServerAddress {
    /// Returns a channel to the server. Nothing is sent yet: a server that cannot be reached fails the first call with `UNAVAILABLE`.
    /// `user_agent` identifies the caller to the server, as in `gauntlet-janitor/0.1.0`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The credentials cannot be used or may not be sent to this server; for `https`, the certificates cannot be used.
    pub fn channel(
        &self,
        credentials: &Credentials,
        user_agent: &str,
        instruments: &Instruments,
    ) -> Result<Channel, ChannelError> {
        let fail = |error: tonic::transport::Error| ChannelError::Tls {
            server: self.to_string(),
            reason: with_causes(&error),
        };
        let (bearer, tls) = (credentials.bearer(self)?, credentials.tls(self)?);
        let mut endpoint =
            Endpoint::from(self.0.clone()).connect_timeout(CONNECT_TIMEOUT).user_agent(user_agent).map_err(fail)?;
        if let Some(tls) = tls {
            endpoint = endpoint.tls_config(tls).map_err(fail)?;
        }
        let channel = Authenticated::new(endpoint.connect_lazy(), bearer);
        Ok(GrpcClientLayer::new(instruments, &self.0).layer(channel))
    }
}

/// Returns a client of the challenges that accepts messages up to [`MAX_MESSAGE_SIZE`].
pub fn challenge_store(channel: Channel) -> ChallengeStoreClient<Channel> {
    ChallengeStoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE_SIZE)
}
