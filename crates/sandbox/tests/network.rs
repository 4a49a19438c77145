//! The forwarder between the host's network and a namespace of its own, as root or in a user namespace.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::{
    env, io,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::net::UnixStream,
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

use gauntlet_sandbox::forward::{Forwarder, Limits, Protocol, Published, Setup, prepare_network};
use gauntlet_testing::eventually_blocking;
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};
use rustix::net::{AddressFamily, SocketType, bind, connect, getsockname, listen, socket, sockopt};

const WAIT: Duration = Duration::from_secs(20);

/// Gives the calling thread a network of its own. Without the right to, runs the test again as root of a user namespace, and returns false.
fn own_network(test: &str) -> bool {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {
            prepare_network().unwrap();
            true
        }
        Err(Errno::EPERM) => {
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-root-user"]).arg(env::current_exe().unwrap());
            let status = command.args(["--exact", test, "--nocapture"]).status().unwrap();
            assert!(status.success(), "{test} in a user namespace: {status}");
            false
        }
        Err(error) => panic!("no network of its own: {error}"),
    }
}

fn bound(kind: SocketType, address: SocketAddr) -> io::Result<(std::os::fd::OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, kind, None)?;
    bind(&socket, &address)?;
    let address = getsockname(&socket)?.try_into()?;
    Ok((socket, address))
}

#[test]
fn program_in_its_own_network_is_reached_and_sees_the_clients_address() {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let (tcp, tcp_address) = bound(SocketType::STREAM, any).unwrap();
    let (udp, udp_address) = bound(SocketType::DGRAM, any).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    let (send, programs) = mpsc::channel();
    let forwarder = thread::spawn(move || {
        if !own_network("program_in_its_own_network_is_reached_and_sees_the_clients_address") {
            return;
        }
        let published = |outer, protocol| Published { outer, inner: 80, protocol };
        let setup = Setup {
            ports: vec![published(tcp, Protocol::Tcp), published(udp, Protocol::Udp)],
            limits: Limits::default(),
            client_addresses: true,
            counters: Default::default(),
            stop: stopped.into(),
        };
        let forwarder = Forwarder::new(setup).unwrap();
        // The programs' sockets belong to this thread's network.
        let programs = (TcpListener::bind("0.0.0.0:80").unwrap(), UdpSocket::bind("0.0.0.0:80").unwrap());
        send.send(programs).unwrap();
        forwarder.run().unwrap();
    });
    let Ok((tcp_program, udp_program)) = programs.recv() else { return forwarder.join().unwrap() };

    let source = SocketAddr::from(([127, 5, 6, 7], 0));
    let mut client = eventually_blocking("a connection", || {
        let (client, _) = bound(SocketType::STREAM, source)?;
        connect(&client, &SocketAddr::from((Ipv4Addr::LOCALHOST, tcp_address.port())))?;
        io::Result::Ok(TcpStream::from(client))
    });
    let (mut server, peer) = tcp_program.accept().unwrap();
    assert_eq!(peer.ip(), source.ip());
    client.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    server.read_exact(&mut bytes).unwrap();
    server.write_all(&bytes).unwrap();
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");

    let client = UdpSocket::bind(source).unwrap();
    client.set_read_timeout(Some(WAIT)).unwrap();
    udp_program.set_read_timeout(Some(WAIT)).unwrap();
    client.connect((Ipv4Addr::LOCALHOST, udp_address.port())).unwrap();
    client.send(b"ping").unwrap();
    let (_, peer) = udp_program.recv_from(&mut bytes).unwrap();
    assert_eq!(peer.ip(), source.ip());
    udp_program.send_to(b"pong", peer).unwrap();
    client.recv(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");

    drop(stop);
    forwarder.join().unwrap();
}

#[test]
fn every_address_leads_to_the_namespace_itself_and_can_be_a_source() {
    let checked = thread::spawn(|| {
        if !own_network("every_address_leads_to_the_namespace_itself_and_can_be_a_source") {
            return;
        }
        let pairs: [(IpAddr, IpAddr, IpAddr); 2] = [
            (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(192, 0, 2, 55).into()),
            (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into(), "2001:db8::55".parse().unwrap()),
        ];
        for (any, localhost, client) in pairs {
            let Ok((program, address)) = bound(SocketType::STREAM, (any, 0).into()) else { continue };
            listen(&program, 8).unwrap();
            let program = TcpListener::from(program);
            for target in [localhost, client] {
                let family = if client.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let source = socket(family, SocketType::STREAM, None).unwrap();
                if client.is_ipv6() {
                    sockopt::set_ipv6_freebind(&source, true).unwrap();
                }
                bind(&source, &SocketAddr::new(client, 0)).unwrap();
                connect(&source, &SocketAddr::new(target, address.port())).unwrap();
                assert_eq!(program.accept().unwrap().1.ip(), client, "to {target}");
            }
        }
    });
    checked.join().unwrap();
}

#[test]
fn metadata_and_host_are_not_reached_from_the_namespace() {
    let host = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let checked = thread::spawn(move || {
        if !own_network("metadata_and_host_are_not_reached_from_the_namespace") {
            return;
        }
        for address in [[127, 0, 0, 1], [169, 254, 169, 254], [10, 0, 0, 1]] {
            let error = TcpStream::connect(SocketAddr::from((address, port))).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address:?}");
        }
    });
    checked.join().unwrap();
}
