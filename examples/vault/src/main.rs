//! An example challenge: two ports, two flags.
//!
//! `--status` serves a page about a vault. Its diagnostics leak the door's code and the first flag (`FLAG_STATUS`). `--door` is the vault's
//! door, with a line protocol: the right code opens it and reveals the second flag (`FLAG_VAULT`).

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// The input limit of a connection, in bytes.
const MAX_INPUT_BYTES: u64 = 8 * 1024;
/// The connection limit of each port; further connections are closed.
const MAX_CONNECTIONS: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(30);

struct Vault {
    flag_status: String,
    flag_vault: String,
    /// Random, different at every start.
    code: String,
    wrong_codes: AtomicU64,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let options: BTreeMap<&str, &str> = args
        .chunks(2)
        .filter_map(|pair| match pair {
            [option, value] => Some((option.as_str(), value.as_str())),
            _ => None,
        })
        .collect();
    let (Some(door), Some(status), 4) = (options.get("--door"), options.get("--status"), args.len()) else {
        eprintln!("usage: FLAG_STATUS=... FLAG_VAULT=... example-vault --door ADDRESS:PORT --status ADDRESS:PORT");
        return ExitCode::from(64);
    };
    let (Ok(flag_status), Ok(flag_vault)) = (std::env::var("FLAG_STATUS"), std::env::var("FLAG_VAULT")) else {
        eprintln!("example-vault: FLAG_STATUS or FLAG_VAULT is not set; set both");
        return ExitCode::from(64);
    };
    let code = format!("{:06}", RandomState::new().hash_one("code") % 1_000_000);
    let vault = Arc::new(Vault { flag_status, flag_vault, code, wrong_codes: AtomicU64::new(0) });
    match open(vault, door, status) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("example-vault: {door}, {status}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn open(vault: Arc<Vault>, door: &str, status: &str) -> io::Result<()> {
    let (door, status) = (TcpListener::bind(door)?, TcpListener::bind(status)?);
    println!("listening: door on {}, status on {}", door.local_addr()?, status.local_addr()?);
    let shared = Arc::clone(&vault);
    std::thread::spawn(move || serve(&shared, &status, Vault::report));
    serve(&vault, &door, Vault::guard)
}

fn serve(
    vault: &Arc<Vault>,
    listener: &TcpListener,
    answer: fn(&Vault, &TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        // The client has already closed the connection.
        let Ok((visitor, _)) = listener.accept() else { continue };
        if connections.fetch_add(1, Ordering::AcqRel) < MAX_CONNECTIONS {
            let (vault, connections) = (Arc::clone(vault), Arc::clone(&connections));
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || {
                let _ = answer(&vault, &visitor);
                connections.fetch_sub(1, Ordering::AcqRel);
            })?;
        } else {
            connections.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn reader(visitor: &TcpStream) -> io::Result<impl io::BufRead + '_> {
    visitor.set_read_timeout(Some(TIMEOUT))?;
    visitor.set_write_timeout(Some(TIMEOUT))?;
    Ok(BufReader::new(visitor.take(MAX_INPUT_BYTES)))
}

impl Vault {
    /// Serves the door: one response per line.
    fn guard(&self, mut visitor: &TcpStream) -> io::Result<()> {
        let input = reader(visitor)?;
        writeln!(visitor, "vault: say OPEN and the code, or QUIT")?;
        for line in input.lines() {
            let line = line?;
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("OPEN", code) if code.trim() == self.code => {
                    return writeln!(visitor, "open: {}", self.flag_vault);
                }
                ("OPEN", _) => {
                    self.wrong_codes.fetch_add(1, Ordering::Relaxed);
                    writeln!(visitor, "wrong")?;
                }
                ("QUIT", _) => return writeln!(visitor, "bye"),
                _ => writeln!(visitor, "what?")?,
            }
        }
        Ok(())
    }

    /// Serves the status page.
    fn report(&self, mut visitor: &TcpStream) -> io::Result<()> {
        let mut input = reader(visitor)?;
        let mut request = String::new();
        input.read_line(&mut request)?;
        let mut line = String::new();
        while input.read_line(&mut line)? > 2 {
            line.clear();
        }
        let wrong = self.wrong_codes.load(Ordering::Relaxed);
        let mut words = request.split_ascii_whitespace();
        let (status, body) = match (words.next(), words.next()) {
            (Some("GET"), Some("/")) => {
                ("200 OK", format!("vault: closed\nwrong codes: {wrong}\nmore: /diagnostics\n"))
            }
            (Some("GET"), Some("/diagnostics")) => {
                ("200 OK", format!("wrong: {wrong}\nexpected: {}\nnote: {}\n", self.code, self.flag_status))
            }
            (Some("GET"), Some(_)) => ("404 Not Found", "There is nothing here.\n".to_owned()),
            (Some(_), Some(_)) => ("405 Method Not Allowed", "Just look.\n".to_owned()),
            _ => ("400 Bad Request", String::new()),
        };
        write!(
            visitor,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )
    }
}
