//! The forwarder between sockets of one machine: the program's port is another one than the published port.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use gauntlet_sandbox::forward::{Counters, Counts, Forwarder, Limits, Protocol, Published, Setup};
use gauntlet_testing::eventually_blocking;
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};

/// A forwarder that ends with the test.
struct Running {
    address: SocketAddr,
    counters: Arc<Counters>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    fn start(protocol: Protocol, inner: u16, limits: Limits) -> Self {
        let (kind, localhost) = match protocol {
            Protocol::Tcp => (SocketType::STREAM, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            Protocol::Udp => (SocketType::DGRAM, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        };
        let outer: OwnedFd = socket(AddressFamily::INET, kind, None).unwrap();
        bind(&outer, &localhost).unwrap();
        let address = getsockname(&outer).unwrap().try_into().unwrap();
        let counters = Arc::new(Counters::default());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let setup = Setup {
            ports: vec![Published { outer, inner, protocol }],
            limits,
            client_addresses: false,
            counters: counters.clone(),
            stop: stopped.into(),
        };
        let forwarder = Forwarder::new(setup).unwrap();
        let thread = thread::spawn(move || forwarder.run());
        Self { address, counters, stop: Some(stop), thread: Some(thread) }
    }

    /// Connects once the published port listens.
    fn connect(&self) -> TcpStream {
        let stream = eventually_blocking("the published port listens", || TcpStream::connect(self.address));
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn counts(&self) -> Counts {
        self.counters.read()
    }

    fn stop(mut self) -> io::Result<()> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn program() -> (TcpListener, u16) {
    let program = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = program.local_addr().unwrap().port();
    (program, port)
}

fn accept(program: &TcpListener) -> TcpStream {
    let (stream, _) = program.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn read_all(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[test]
fn half_close_is_forwarded_both_ways() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    let mut client = running.connect();
    let mut server = accept(&program);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&server), b"question");
    server.write_all(b"answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&client), b"answer");
    eventually_blocking("the connection is closed", || running.counts().closed == 1);
    assert_eq!(running.counts(), Counts { opened: 1, closed: 1, refused: 0, received: 8, sent: 6 });
}

#[test]
fn published_port_refuses_until_the_program_listens() {
    let reserved = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&reserved, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let port = SocketAddr::try_from(getsockname(&reserved).unwrap()).unwrap().port();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    for _ in 0..20 {
        assert_eq!(TcpStream::connect(running.address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    rustix::net::listen(&reserved, 8).unwrap();
    let mut client = running.connect();
    let mut server = accept(&reserved.into());
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
}

#[test]
fn program_that_listens_on_ipv6_alone_is_reached() {
    let Ok(program) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else { return };
    let running = Running::start(Protocol::Tcp, program.local_addr().unwrap().port(), Limits::default());
    let mut client = running.connect();
    client.write_all(b"x").unwrap();
    accept(&program).read_exact(&mut [0]).unwrap();
    assert_eq!(running.counts().refused, 0);
}

#[test]
fn slow_reader_holds_up_its_sender_and_loses_nothing() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits { buffer: 4096, ..Limits::default() });
    let mut client = running.connect();
    let server = accept(&program);
    let sent = pattern(32 << 20);
    let (blocked, bytes) = (client.try_clone().unwrap(), sent.clone());
    let sender = thread::spawn(move || {
        client.write_all(&bytes).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
    });
    // The kernel's buffers are full once nothing moves any more; then the sender waits.
    let mut last = 0;
    eventually_blocking("the sender waits for the reader", || {
        let received = running.counts().received;
        let full = received > 0 && received == std::mem::replace(&mut last, received);
        full.then_some(()).ok_or("bytes still move")
    });
    assert!(last < sent.len() as u64, "everything was taken, although nothing was read");
    assert!(!sender.is_finished());
    assert_eq!(read_all(&server), sent);
    sender.join().unwrap();
    drop(blocked);
}

#[test]
fn reset_of_one_side_resets_the_other() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    for server_resets in [true, false] {
        let mut client = running.connect();
        let mut server = accept(&program);
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        let (closed, mut other) = if server_resets { (server, client) } else { (client, server) };
        sockopt::set_socket_linger(&closed, Some(Duration::ZERO)).unwrap();
        drop(closed);
        assert_eq!(other.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    eventually_blocking("both are closed", || running.counts().closed == 2);
}

#[test]
fn clients_of_a_program_that_stopped_listening_are_reset() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    drop(running.connect());
    drop(program);
    eventually_blocking("a client is reset", || {
        let mut client = running.connect();
        client.read(&mut [0]).err().map(|error| error.kind()) == Some(ErrorKind::ConnectionReset)
    });
    assert!(running.counts().refused >= 1);
}

#[test]
fn connections_beyond_the_clients_limit_are_reset_and_the_open_ones_stay() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits { per_client: 2, ..Limits::default() });
    let clients = [running.connect(), running.connect()];
    let servers = [accept(&program), accept(&program)];
    let mut refused = running.connect();
    assert_eq!(refused.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(running.counts().refused, 1);
    for (mut client, mut server) in clients.into_iter().zip(servers) {
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
    }
    eventually_blocking("a place is free again", || running.counts().closed == 2);
    let mut client = running.connect();
    client.write_all(b"x").unwrap();
    accept(&program).read_exact(&mut [0]).unwrap();
}

#[test]
fn idle_connections_are_reset() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits { idle: Duration::from_millis(50), ..Limits::default() });
    let mut client = running.connect();
    let _server = accept(&program);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    eventually_blocking("the connection is closed", || running.counts().closed == 1);
}

#[test]
fn many_connections_at_once_get_their_own_bytes() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    drop(running.connect());
    let echo = thread::spawn(move || {
        let servers: Vec<_> = (0..201).map(|_| accept(&program)).collect();
        for mut server in servers {
            let bytes = read_all(&server);
            let _ = server.write_all(&bytes);
        }
    });
    let mut clients: Vec<_> = (0..200).map(|_| running.connect()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        client.write_all(&pattern(1000 + at)).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (at, client) in clients.iter().enumerate() {
        assert_eq!(read_all(client), pattern(1000 + at));
    }
    echo.join().unwrap();
    eventually_blocking("all are closed", || running.counts().closed == 201);
}

#[test]
fn what_the_program_sent_before_its_end_is_delivered_after_the_stop() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    let client = running.connect();
    let mut server = accept(&program);
    let sent = pattern(200 << 10);
    server.write_all(&sent).unwrap();
    drop(server);
    running.stop().unwrap();
    assert_eq!(read_all(&client), sent);
}

#[test]
fn stop_refuses_new_clients_and_ends_open_connections() {
    let (program, port) = program();
    let running = Running::start(Protocol::Tcp, port, Limits::default());
    let (address, client) = (running.address, running.connect());
    let server = accept(&program);
    running.stop().unwrap();
    assert!(TcpStream::connect(address).is_err());
    assert_eq!((read_all(&client), read_all(&server)), (Vec::new(), Vec::new()));
}

fn udp_client(running: &Running) -> UdpSocket {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    client.connect(running.address).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client
}

/// Answers each datagram with its number of bytes and its text.
fn udp_program(address: impl Into<std::net::IpAddr>) -> io::Result<u16> {
    let program = UdpSocket::bind((address.into(), 0))?;
    let port = program.local_addr()?.port();
    thread::spawn(move || {
        let mut datagram = [0; 64 << 10];
        while let Ok((length, client)) = program.recv_from(&mut datagram) {
            let answer = [format!("{length}:").as_bytes(), &datagram[..length.min(8)]].concat();
            program.send_to(&answer, client).unwrap();
        }
    });
    Ok(port)
}

fn answer(client: &UdpSocket) -> String {
    let mut answer = [0; 64];
    let length = client.recv(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[test]
fn datagrams_find_the_program_and_answers_their_client() {
    let running = Running::start(Protocol::Udp, udp_program(Ipv4Addr::LOCALHOST).unwrap(), Limits::default());
    let clients = [udp_client(&running), udp_client(&running)];
    for (client, text) in clients.iter().zip(["one", "three"]) {
        client.send(text.as_bytes()).unwrap();
    }
    assert_eq!([answer(&clients[0]), answer(&clients[1])], ["3:one", "5:three"]);
    clients[0].send(b"").unwrap();
    assert_eq!(answer(&clients[0]), "0:");
    clients[0].send(&pattern(9000)).unwrap();
    assert!(answer(&clients[0]).starts_with("9000:"));
    assert_eq!(running.counts().opened, 2);
}

#[test]
fn udp_flows_are_bounded_and_forgotten_when_idle() {
    let limits = Limits { per_client: 1, udp_idle: Duration::from_millis(50), ..Limits::default() };
    let running = Running::start(Protocol::Udp, udp_program(Ipv4Addr::LOCALHOST).unwrap(), limits);
    let clients = [udp_client(&running), udp_client(&running)];
    clients[0].send(b"a").unwrap();
    assert_eq!(answer(&clients[0]), "1:a");
    eventually_blocking("the flow is forgotten", || running.counts().closed == 1);
    clients[1].send(b"b").unwrap();
    assert_eq!(answer(&clients[1]), "1:b");
}

#[test]
fn udp_program_on_ipv6_alone_is_reached() {
    let Ok(port) = udp_program(Ipv6Addr::LOCALHOST) else { return };
    let running = Running::start(Protocol::Udp, port, Limits::default());
    let client = udp_client(&running);
    client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // The first datagram finds out that the program doesn't receive IPv4.
    eventually_blocking("an answer", || {
        client.send(b"x").unwrap();
        client.recv(&mut [0; 64])
    });
}

#[test]
fn datagrams_to_a_program_that_is_not_bound_are_counted_as_refused() {
    let gone = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = gone.local_addr().unwrap().port();
    drop(gone);
    let running = Running::start(Protocol::Udp, port, Limits::default());
    let client = udp_client(&running);
    eventually_blocking("a datagram is refused", || {
        let _ = client.send(b"x");
        running.counts().refused > 0
    });
}

/// Writes all chunks and ends that direction; returns what the other side sent.
fn exchange(stream: TcpStream, chunks: Vec<Vec<u8>>) -> Vec<u8> {
    let writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        chunks.iter().for_each(|chunk| (&writer).write_all(chunk).unwrap());
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let received = read_all(&stream);
    writing.join().unwrap();
    received
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn bytes_arrive_unchanged_whatever_their_chunks_and_the_buffer(
        up in proptest::collection::vec(0usize..100_000, 0..12),
        down in proptest::collection::vec(0usize..100_000, 0..12),
        buffer in 64usize..20_000,
    ) {
        let chunks = |sizes: &[usize]| sizes.iter().map(|size| pattern(*size)).collect::<Vec<_>>();
        let (up, down) = (chunks(&up), chunks(&down));
        let (program, port) = program();
        let running = Running::start(Protocol::Tcp, port, Limits { buffer, ..Limits::default() });
        let client = running.connect();
        let (server, sent) = (accept(&program), down.clone());
        let serving = thread::spawn(move || exchange(server, sent));
        prop_assert_eq!(exchange(client, up.clone()), down.concat());
        prop_assert_eq!(serving.join().unwrap(), up.concat());
    }
}
