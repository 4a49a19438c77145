//! An example challenge: two ports, two flags.
//!
//! `--status` is a page about a vault; its diagnostics say more than they should, and hold the first flag (`FLAG_STATUS`). `--door` is the
//! vault's door, which speaks lines; whoever knows the code gets the second (`FLAG_VAULT`).

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

/// The most that one visitor may say.
const WORDS: u64 = 8 * 1024;
/// How many are served at once on each port; whoever comes on top is turned away.
const AT_ONCE: usize = 64;
const PATIENCE: Duration = Duration::from_secs(30);

struct Vault {
    flag_status: String,
    flag_vault: String,
    /// Made up at every start.
    code: String,
    wrong: AtomicU64,
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
        eprintln!("example-vault: FLAG_STATUS or FLAG_VAULT is not set: give both flags in the environment");
        return ExitCode::from(64);
    };
    let code = format!("{:06}", RandomState::new().hash_one("code") % 1_000_000);
    let vault = Arc::new(Vault { flag_status, flag_vault, code, wrong: AtomicU64::new(0) });
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
    let watched = Arc::clone(&vault);
    std::thread::spawn(move || serve(&watched, &status, Vault::report));
    serve(&vault, &door, Vault::guard)
}

fn serve(
    vault: &Arc<Vault>,
    listener: &TcpListener,
    answer: fn(&Vault, &TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    let inside = Arc::new(AtomicUsize::new(0));
    loop {
        // A visitor that left before being let in is no reason to close.
        let Ok((visitor, _)) = listener.accept() else { continue };
        if inside.fetch_add(1, Ordering::AcqRel) < AT_ONCE {
            let (vault, inside) = (Arc::clone(vault), Arc::clone(&inside));
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || {
                let _ = answer(&vault, &visitor);
                inside.fetch_sub(1, Ordering::AcqRel);
            })?;
        } else {
            inside.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn listen(visitor: &TcpStream) -> io::Result<impl io::BufRead + '_> {
    visitor.set_read_timeout(Some(PATIENCE))?;
    visitor.set_write_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(visitor.take(WORDS)))
}

impl Vault {
    /// The door: a line in, a line out.
    fn guard(&self, mut visitor: &TcpStream) -> io::Result<()> {
        let heard = listen(visitor)?;
        writeln!(visitor, "vault: say OPEN and the code, or QUIT")?;
        for line in heard.lines() {
            let line = line?;
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("OPEN", code) if code.trim() == self.code => {
                    return writeln!(visitor, "open: {}", self.flag_vault);
                }
                ("OPEN", _) => {
                    self.wrong.fetch_add(1, Ordering::Relaxed);
                    writeln!(visitor, "wrong")?;
                }
                ("QUIT", _) => return writeln!(visitor, "bye"),
                _ => writeln!(visitor, "what?")?,
            }
        }
        Ok(())
    }

    /// The page.
    fn report(&self, mut visitor: &TcpStream) -> io::Result<()> {
        let mut heard = listen(visitor)?;
        let mut request = String::new();
        heard.read_line(&mut request)?;
        let mut line = String::new();
        while heard.read_line(&mut line)? > 2 {
            line.clear();
        }
        let wrong = self.wrong.load(Ordering::Relaxed);
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
