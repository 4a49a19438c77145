//! An HTTP server on loopback that keeps what is posted to it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long a client may take to send its request.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// What was posted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// The request's path, from its slash on.
    pub path: String,
    /// The body.
    pub body: Value,
}

/// A webhook on a free port of loopback. It answers 200 to every request until the test's process ends.
#[derive(Debug)]
pub struct WebhookSink {
    url: String,
    received: mpsc::Receiver<Notification>,
}

impl WebhookSink {
    /// Starts listening.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (send, received) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A request that ends early or is not JSON is not a notification: the sender notices, and the test by its timeout.
                if read(stream).is_some_and(|notification| send.send(notification).is_err()) {
                    return;
                }
            }
        });
        Self { url, received }
    }

    /// `http://127.0.0.1:port`, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Drops every notification received so far.
    pub fn clear(&self) {
        while self.received.try_recv().is_ok() {}
    }

    /// Takes notifications in the order they came until `select` returns something, and returns that. Those before it are dropped.
    ///
    /// # Panics
    /// When none does within `timeout`; the message names `what` and how many others came.
    #[track_caller]
    pub fn wait_for<T>(&self, timeout: Duration, what: &str, mut select: impl FnMut(&Notification) -> Option<T>) -> T {
        let deadline = Instant::now() + timeout;
        let mut others = 0;
        loop {
            match self.received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(notification) => match select(&notification) {
                    Some(selected) => return selected,
                    None => others += 1,
                },
                Err(_) => panic!("not within {timeout:?}: {what} ({others} other notifications)"),
            }
        }
    }
}

fn read(stream: TcpStream) -> Option<Notification> {
    let (path, body) = receive(stream, "application/json")?;
    Some(Notification { path, body: serde_json::from_slice(&body).ok()? })
}

/// Reads one request and answers 200 with an empty body of that content type. Returns the path and the body of the request; `None` if it ends
/// early, or is not complete within five seconds of silence.
pub fn receive(mut stream: TcpStream, content_type: &str) -> Option<(String, Vec<u8>)> {
    stream.set_read_timeout(Some(READ_TIMEOUT)).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.trim().parse().ok()?,
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    Some((path, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(sink: &WebhookSink, path: &str, body: &str) {
        let mut stream = TcpStream::connect(sink.url().trim_start_matches("http://")).unwrap();
        write!(stream, "POST {path} HTTP/1.1\r\ncontent-LENGTH: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn notifications_are_taken_in_order() {
        let sink = WebhookSink::start();
        post(&sink, "/old", "0");
        sink.clear();
        for body in ["1", "2", "3"] {
            post(&sink, "/page", body);
        }
        let two = |notification: &Notification| (notification.body == 2).then(|| notification.path.clone());
        assert_eq!(sink.wait_for(Duration::from_secs(10), "the second", two), "/page");
        assert_eq!(sink.wait_for(Duration::from_secs(10), "the third", |it| Some(it.body.clone())), 3);
    }

    #[test]
    #[should_panic(expected = "not within 1ms: a page (0 other notifications)")]
    fn a_missing_notification_is_named() {
        WebhookSink::start().wait_for(Duration::from_millis(1), "a page", |_| Some(()));
    }
}
