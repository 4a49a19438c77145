//! An example challenge: one page, one port, one flag.
//!
//! A comment in the page names the cook's note, which is the flag. `FLAG` and `MOTD` come from the environment, the address from `--listen`.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// The size limit of a request's head, in bytes.
const MAX_HEAD_BYTES: u64 = 8 * 1024;
/// The connection limit; further connections are closed.
const MAX_CONNECTIONS: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);

struct Kitchen {
    flag: String,
    motd: String,
    guests: AtomicUsize,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [option, address] = args.as_slice() else { return usage() };
    if option != "--listen" {
        return usage();
    }
    let Ok(flag) = std::env::var("FLAG") else {
        eprintln!("example-web: FLAG is not set; set it to the flag");
        return ExitCode::from(64);
    };
    let motd = std::env::var("MOTD").unwrap_or_else(|_| "hello".to_owned());
    match serve(address, Kitchen { flag, motd, guests: AtomicUsize::new(0) }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("example-web: {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: FLAG=... [MOTD=...] example-web --listen ADDRESS:PORT");
    ExitCode::from(64)
}

fn serve(address: &str, kitchen: Kitchen) -> io::Result<()> {
    let kitchen = Arc::new(kitchen);
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        // The client has already closed the connection.
        let Ok((guest, _)) = listener.accept() else { continue };
        if kitchen.guests.fetch_add(1, Ordering::AcqRel) < MAX_CONNECTIONS {
            let shared = Arc::clone(&kitchen);
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || {
                let _ = shared.answer(&guest);
                shared.guests.fetch_sub(1, Ordering::AcqRel);
            })?;
        } else {
            kitchen.guests.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Kitchen {
    fn answer(&self, guest: &TcpStream) -> io::Result<()> {
        guest.set_read_timeout(Some(TIMEOUT))?;
        guest.set_write_timeout(Some(TIMEOUT))?;
        let mut head = BufReader::new(guest.take(MAX_HEAD_BYTES));
        let mut request = String::new();
        head.read_line(&mut request)?;
        let mut line = String::new();
        while head.read_line(&mut line)? > 2 {
            line.clear();
        }
        let mut words = request.split_ascii_whitespace();
        let (status, body) = match (words.next(), words.next()) {
            (Some("GET"), Some("/")) => ("200 OK", self.page()),
            (Some("GET"), Some("/note?for=cook")) => ("200 OK", format!("{}\n", self.flag)),
            (Some("GET"), Some(path)) if path == "/note" || path.starts_with("/note?") => {
                ("403 Forbidden", "This note is for somebody else.\n".to_owned())
            }
            (Some("GET"), Some(_)) => ("404 Not Found", "There is nothing here.\n".to_owned()),
            (Some(_), Some(_)) => ("405 Method Not Allowed", "Just look.\n".to_owned()),
            _ => ("400 Bad Request", String::new()),
        };
        let kind = if body.starts_with('<') { "html" } else { "plain" };
        let mut guest = guest;
        write!(
            guest,
            "HTTP/1.1 {status}\r\nContent-Type: text/{kind}; charset=utf-8\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )
    }

    fn page(&self) -> String {
        format!(
            "<!doctype html>\n<title>The kitchen</title>\n<h1>The kitchen is closed</h1>\n<p>{}</p>\n\
             <!-- cook: your note is where it always is, /note?for=cook -->\n",
            escape(&self.motd)
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
