//! The keys of an OpenID Connect issuer, fetched from its server.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use gauntlet_access::{JwtPolicy, JwtVerifier, Keys};
use reqwest::{Certificate, Client, Url, redirect::Policy};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often the keys are fetched. Issuers publish a key before they use it.
const REFRESH_INTERVAL: Duration = Duration::from_secs(300);
/// The shortest time between two requests, also after a failure or for unknown keys: anybody can name one.
const MIN_INTERVAL: Duration = Duration::from_secs(10);
/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum length of a response, in bytes.
const MAX_LENGTH: usize = 1 << 20;

/// Keys that one task keeps fresh. If the server cannot be reached, those that were fetched before stay.
pub(super) struct RemoteKeys {
    url: Url,
    client: Client,
    policy: Arc<JwtPolicy>,
    /// The keys, and the text that they were made of.
    current: Mutex<Option<(String, Arc<JwtVerifier>)>>,
    wanted: Notify,
    min_interval: Duration,
}

impl RemoteKeys {
    /// Fetches nothing yet.
    ///
    /// # Errors
    /// The URL or the CA certificate cannot be used; the text names the flag.
    pub(super) fn new(url: &str, ca: Option<&Path>, policy: Arc<JwtPolicy>) -> anyhow::Result<Self> {
        // Fails only when the process has a provider already; that one is then used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder().https_only(true).redirect(Policy::none()).timeout(TIMEOUT);
        if let Some(path) = ca {
            let name = || format!("cannot use --oidc-ca {}", path.display());
            let pem = std::fs::read(path).with_context(name)?;
            client = client.tls_certs_only(Certificate::from_pem_bundle(&pem).with_context(name)?);
        }
        Ok(Self {
            url: url.parse().with_context(|| format!("cannot use --oidc-jwks {url:?}: not a URL"))?,
            client: client.build().context("cannot set up TLS for --oidc-jwks")?,
            policy,
            current: Mutex::default(),
            wanted: Notify::new(),
            min_interval: MIN_INTERVAL,
        })
    }

    /// The verifier with the keys that were fetched last.
    pub(super) fn current(&self) -> Option<Arc<JwtVerifier>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, verifier)| verifier.clone())
    }

    /// Asks for the keys to be fetched soon. Doesn't wait.
    pub(super) fn request_refresh(&self) {
        self.wanted.notify_one();
    }

    /// Fetches the keys, and again every five minutes and on request, until `stop` is cancelled.
    pub(super) async fn refresh(&self, stop: CancellationToken) {
        let refresh = async {
            loop {
                let fetched = self.fetch().await.and_then(|text| self.replace(text));
                if let Err(error) = &fetched {
                    tracing::warn!(url = %self.url, error = format!("{error:#}"), "cannot fetch the keys for JWTs; keeping what was fetched before");
                }
                tokio::time::sleep(self.min_interval).await;
                if fetched.is_ok() {
                    // Elapsed or notified: both mean that it is time.
                    let _ = tokio::time::timeout(REFRESH_INTERVAL, self.wanted.notified()).await;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = refresh => {}
        }
    }

    async fn fetch(&self) -> anyhow::Result<String> {
        let mut response = self.client.get(self.url.clone()).send().await?.error_for_status()?;
        if !response.status().is_success() {
            bail!("the server answered {}", response.status());
        }
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if text.len() + chunk.len() > MAX_LENGTH {
                bail!("the response is longer than {MAX_LENGTH} bytes");
            }
            text.extend_from_slice(&chunk);
        }
        String::from_utf8(text).map_err(|_| anyhow!("the response is not UTF-8"))
    }

    /// Uses the keys in `text`. The same keys change nothing, so that verified JWTs stay remembered.
    fn replace(&self, text: String) -> anyhow::Result<()> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|(before, _)| *before == text) {
            return Ok(());
        }
        let keys = Keys::parse(&text)?;
        *current = Some((text, Arc::new(JwtVerifier::new(self.policy.clone(), keys))));
        tracing::info!(url = %self.url, "the keys for JWTs have changed and are in use");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::atomic::{AtomicUsize, Ordering};

    use gauntlet_testing::eventually;
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use rustls::pki_types::PrivateKeyDer;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const KEYS: &str =
        r#"{"keys":[{"kty":"OKP","kid":"one","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    /// A server that answers every request with the current response.
    struct Server {
        url: String,
        ca: tempfile::NamedTempFile,
        response: Arc<Mutex<String>>,
        requests: Arc<AtomicUsize>,
    }

    impl Server {
        async fn start() -> Self {
            let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let ca = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(ca.path(), cert.pem()).unwrap();
            let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let config = config.unwrap().with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("https://localhost:{}/keys", listener.local_addr().unwrap().port());
            let (response, requests) = (Arc::new(Mutex::new(ok(KEYS))), Arc::new(AtomicUsize::new(0)));
            let (answer, count) = (response.clone(), requests.clone());
            // The task ends with the runtime of the test.
            drop(tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                    let _ = stream.read(&mut [0; 4096]).await;
                    count.fetch_add(1, Ordering::SeqCst);
                    let answer = answer.lock().unwrap().clone();
                    let _ = stream.write_all(answer.as_bytes()).await;
                    let _ = stream.shutdown().await;
                }
            }));
            Self { url, ca, response, requests }
        }

        fn keys(&self) -> RemoteKeys {
            let keys = RemoteKeys::new(&self.url, Some(self.ca.path()), policy()).unwrap();
            RemoteKeys { min_interval: Duration::from_millis(1), ..keys }
        }

        fn answer(&self, response: String) {
            *self.response.lock().unwrap() = response;
        }
    }

    fn ok(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn policy() -> Arc<JwtPolicy> {
        let text = |text: &str| text.to_owned();
        Arc::new(JwtPolicy {
            issuer: text("https://id.example"),
            audience: text("gauntlet"),
            scope_claim: text("scope"),
            challenges_claim: text("challenges"),
        })
    }

    #[tokio::test]
    async fn keys_are_fetched_again_on_request_and_kept_when_the_server_fails() {
        let server = Server::start().await;
        let keys = Arc::new(server.keys());
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let (keys, stop) = (keys.clone(), stop.clone());
            async move { keys.refresh(stop).await }
        });
        let first = eventually("keys", async || keys.current()).await;
        keys.request_refresh();
        eventually("a second request", async || (server.requests.load(Ordering::SeqCst) >= 2).then_some(())).await;
        assert!(Arc::ptr_eq(&first, &keys.current().unwrap()), "the same keys are not replaced");

        server.answer("HTTP/1.1 500 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned());
        keys.request_refresh();
        let seen = server.requests.load(Ordering::SeqCst);
        eventually("requests that fail", async || (server.requests.load(Ordering::SeqCst) > seen + 2).then_some(()))
            .await;
        assert!(Arc::ptr_eq(&first, &keys.current().unwrap()));

        server.answer(ok(&KEYS.replace("one", "two")));
        eventually("other keys", async || (!Arc::ptr_eq(&first, &keys.current().unwrap())).then_some(())).await;
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn unusable_responses_are_refused() {
        let server = Server::start().await;
        let keys = server.keys();
        let redirect =
            "HTTP/1.1 302 Found\r\nlocation: http://localhost/keys\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        for (response, part) in [
            (redirect.to_owned(), "302"),
            ("HTTP/1.1 404 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned(), "404"),
            (ok(&" ".repeat(MAX_LENGTH + 1)), "longer than"),
            (ok("<html>"), "not a JSON Web Key Set"),
            (ok(r#"{"keys":[]}"#), "no public RSA, EC or Ed25519 key"),
        ] {
            server.answer(response);
            let error = keys.fetch().await.and_then(|text| keys.replace(text)).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
        assert!(keys.current().is_none());
        server.answer(ok(KEYS));
        let other_ca = RemoteKeys::new(&server.url, None, policy()).unwrap();
        assert!(other_ca.fetch().await.is_err(), "its certificate is not the system's");
        let plain = RemoteKeys::new("http://localhost/keys", None, policy()).unwrap();
        assert!(plain.fetch().await.is_err());
    }
}
