use std::time::Duration;

use gauntlet_api::v1::challenge::challenge_store_client::ChallengeStoreClient;
use gauntlet_telemetry::{
    Instruments,
    layers::{GrpcClient, GrpcClientLayer, ObserveService},
};
use tonic::transport::{ClientTlsConfig, Endpoint};
use tower::Layer as _;

use crate::{ServerAddress, with_causes};

/// A connection that is opened by the first call and opened again by the next call after it broke. Each call has a CLIENT span, its
/// metrics and W3C trace context. Cheap to clone.
pub type Channel = ObserveService<tonic::transport::Channel, GrpcClient>;

/// The largest message a client accepts, in bytes. A challenge comes with all its instances in one message.
pub const MAX_MESSAGE_SIZE: usize = 64 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The system's root certificates cannot be used, so that no `https` connection can be made to any server.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS to {server}: {reason}")]
pub struct TlsError {
    server: String,
    reason: String,
}

impl ServerAddress {
    /// Returns a channel to the server. Nothing is sent yet: a server that cannot be reached fails the first call with `UNAVAILABLE`.
    /// `user_agent` identifies the caller to the server, as in `gauntlet-janitor/0.1.0`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// For `https`, when the system's certificates cannot be read.
    pub fn channel(&self, user_agent: &str, instruments: &Instruments) -> Result<Channel, TlsError> {
        let fail = |error: tonic::transport::Error| TlsError { server: self.to_string(), reason: with_causes(&error) };
        let mut endpoint =
            Endpoint::from(self.0.clone()).connect_timeout(CONNECT_TIMEOUT).user_agent(user_agent).map_err(fail)?;
        if self.0.scheme_str() == Some("https") {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(fail)?;
        }
        Ok(GrpcClientLayer::new(instruments, &self.0).layer(endpoint.connect_lazy()))
    }
}

/// Returns a client of the challenges that accepts messages up to [`MAX_MESSAGE_SIZE`].
pub fn challenge_store(channel: Channel) -> ChallengeStoreClient<Channel> {
    ChallengeStoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE_SIZE)
}
