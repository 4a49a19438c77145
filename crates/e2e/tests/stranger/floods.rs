//! Many connections, and connections that never end.

use std::io::Write as _;
use std::net::TcpStream;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Target, as_holder, read_to_close};
use crate::harness::eventually;

/// The connections of one attack, where the limit on open files allows them.
const CONNECTIONS: usize = 10_000;
/// Resets in one connection; HTTP/2 servers that serve each request have fallen over fewer.
const RESETS: u32 = 100_000;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[test]
fn slow_headers_are_cut_off() {
    let target = Target::start();
    target.under_attack(|| {
        let mut slow: Vec<TcpStream> = (0..100).map(|_| target.connect()).collect();
        for stream in &mut slow {
            let _ = stream.write_all(b"GET /api/v1/challenge HTTP/1.1\r\nhost: localhost\r\nx-slow: ");
        }
        // Some connections may have been refused at once. All of them are closed, whatever was sent.
        for mut stream in slow {
            let received = read_to_close(&mut stream);
            assert!(!received.starts_with(b"HTTP/1.1 200"), "served without its headers");
        }
    });
}

#[test]
fn slow_bodies_hold_up_nobody() {
    let target = Target::start();
    target.under_attack(|| {
        let mut slow: Vec<TcpStream> = (0..100).map(|_| target.connect()).collect();
        for stream in &mut slow {
            let head = format!(
                "POST /api/v1/instance HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: 100000\r\n\r\n{{",
                target.token
            );
            let _ = stream.write_all(head.as_bytes());
        }
    });
}

/// The stranger keeps its ends open. The manager closes what is over its limit at once, and what is idle after the header timeout.
#[test]
fn ten_thousand_connections_keep_nobody_out() {
    let target = Target::start();
    let limit = raise_limit();
    let wanted = CONNECTIONS.min(limit / 2);
    assert!(wanted >= 400, "this test needs more open files than {limit}");
    let open: Vec<TcpStream> = (0..wanted).filter_map(|_| target.try_connect().ok()).collect();
    assert!(open.len() > wanted / 2, "{} of {wanted} connections were opened", open.len());
    eventually("the honest caller is served", || {
        let answer = as_holder(&target.manager.url, &target.token, "GET", "/api/v1/challenge", "")?;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    });
    target.under_attack(|| drop(open));
}

#[test]
fn rapid_reset_ends_the_connection() {
    let target = Target::start();
    target.under_attack(|| {
        let mut stream = target.connect();
        stream.write_all(PREFACE).unwrap();
        stream.write_all(&frame(4, 0, 0, &[])).unwrap();
        for number in 0..RESETS {
            let id = number * 2 + 1;
            // GET / of localhost, in HPACK's static table; then RST_STREAM with CANCEL.
            let headers = frame(1, 5, id, &[&[0x82, 0x86, 0x84, 0x41, 9], b"localhost" as &[u8]].concat());
            let reset = frame(3, 0, id, &[0, 0, 0, 8]);
            if stream.write_all(&[headers, reset].concat()).is_err() {
                break;
            }
        }
        // ENHANCE_YOUR_CALM, and the end.
        read_to_close(&mut stream);
    });
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Raises the limit on open files of this process as far as it may, and returns it.
fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap())
}
