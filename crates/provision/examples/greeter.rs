//! A program for tests: prints a line, then sends `GREETING` to each client that connects to `LISTEN`, as HTTP if `HTTP` is set.

use std::{io::Write as _, net::TcpListener};

fn main() -> std::io::Result<()> {
    let text = std::env::var("GREETING").unwrap_or_default();
    let listener = TcpListener::bind(std::env::var("LISTEN").unwrap_or_default())?;
    println!("listening");
    for stream in listener.incoming() {
        let mut stream = stream?;
        if std::env::var_os("HTTP").is_some() {
            let _ = std::io::Read::read(&mut stream, &mut [0; 1024]);
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        } else {
            let _ = stream.write_all(text.as_bytes());
        }
    }
    Ok(())
}
