//! A scripted registry that records requests: for answers that a real registry doesn't give.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use crate::support::{DOCUMENT, digest};

/// A request that the registry received.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
}

/// The answer to a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Status, headers and body; HOST in a header stands for the address of the server.
    With(u16, Vec<(String, String)>, Vec<u8>),
    /// The connection stays open without an answer.
    Never,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self::With(status, Vec::new(), Vec::new())
    }

    pub(crate) fn header(status: u16, name: &str, value: impl Into<String>) -> Self {
        Self::With(status, vec![(name.to_owned(), value.into())], Vec::new())
    }

    pub(crate) fn body(body: impl Into<Vec<u8>>) -> Self {
        Self::With(200, Vec::new(), body.into())
    }
}

/// Listens on a free port of 127.0.0.1 until it is dropped.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    accepting: AbortHandle,
}

impl Fake {
    /// Starts a server that answers with `answer`.
    pub(crate) async fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::<Mutex<Vec<Request>>>::default();
        let (answer, recorded) = (Arc::new(answer), seen.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, recorded) = (answer.clone(), recorded.clone());
                tokio::spawn(async move { serve(stream, &*answer, &recorded).await });
            }
        });
        Self { address, seen, accepting: accepting.abort_handle() }
    }

    /// Starts a registry that holds one scenario, as `web`, and answers with `first` where that gives an answer.
    pub(crate) async fn holding_web(first: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Self {
        Self::start(move |request| first(request).unwrap_or_else(|| web(request))).await
    }

    pub(crate) fn reference(&self) -> String {
        format!("{}/web:v1", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the credentials that the server received.
    pub(crate) fn authorizations(&self) -> Vec<String> {
        self.seen().into_iter().filter_map(|request| request.authorization).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// The manifest and the digest of its only layer, [`DOCUMENT`].
pub(crate) fn manifest() -> (String, String) {
    let layer = digest(DOCUMENT.as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.ctfer-io.scenario",
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2 },
        "layers": [{
            "mediaType": "application/vnd.ctfer-io.file", "digest": layer, "size": DOCUMENT.len(),
            "annotations": { "org.opencontainers.image.title": "scenario.yaml" }
        }]
    });
    (manifest.to_string(), layer)
}

/// Answers as a registry that holds the scenario.
pub(crate) fn web(request: &Request) -> Reply {
    let (manifest, layer) = manifest();
    if request.path.contains("/manifests/") {
        let headers = vec![
            ("content-type".to_owned(), "application/vnd.oci.image.manifest.v1+json".to_owned()),
            ("docker-content-digest".to_owned(), digest(manifest.as_bytes())),
        ];
        Reply::With(200, headers, manifest.into_bytes())
    } else if request.path.ends_with(&format!("/blobs/{layer}")) {
        Reply::body(DOCUMENT)
    } else {
        Reply::status(404)
    }
}

async fn serve(mut stream: TcpStream, answer: &(dyn Fn(&Request) -> Reply + Send + Sync), seen: &Mutex<Vec<Request>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let authorization = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("authorization"))
        .map(|(_, value)| value.to_owned());
    let request = Request { method, path, authorization };
    seen.lock().unwrap().push(request.clone());
    match answer(&request) {
        Reply::With(status, headers, body) => {
            let here = stream.local_addr().map(|address| address.to_string()).unwrap_or_default();
            let mut text = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
            headers.iter().for_each(|(name, value)| text += &format!("{name}: {}\r\n", value.replace("HOST", &here)));
            let mut bytes = format!("{text}\r\n").into_bytes();
            if request.method != "HEAD" {
                bytes.extend(body);
            }
            let _ = stream.write_all(&bytes).await;
        }
        Reply::Never => std::future::pending().await,
    }
}
