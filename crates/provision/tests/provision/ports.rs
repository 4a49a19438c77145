//! Reservation of ports.

use std::{collections::BTreeSet, time::Duration};

use gauntlet_domain::{Error, PortSpec, Protocol, Provisioner as _};

use crate::support::{Fixture, LaunchExt as _, greeting_at, launch, provision_error, remove};

#[tokio::test]
async fn update_reserves_and_releases_ports() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let named = |names: &[&str]| {
        let mut plan = fixture.greeter();
        plan.ports = names.iter().map(|name| PortSpec { name: (*name).to_owned(), protocol: Protocol::Tcp }).collect();
        // The plan differs with the ports, so that the update restarts the program.
        plan.greeting = names.join(",");
        plan
    };
    let first = manager.launch(&launch(1, 1, &named(&["main"]))).await.unwrap();
    let two = manager.relaunch(&launch(1, 1, &named(&["extra", "main"]))).await.unwrap();
    assert_eq!(first.connection_info, two.connection_info);
    assert_eq!(fixture.ports().len(), 2);
    manager.relaunch(&launch(1, 1, &named(&["main"]))).await.unwrap();
    assert_eq!(fixture.ports().len(), 1);
    // A port that was reserved for an update that never happened is released too.
    launch(1, 1, &named(&["extra", "main"])).reserve(&manager).await.unwrap();
    assert_eq!(fixture.ports().len(), 2);
    assert_eq!(greeting_at(&first.connection_info).as_deref(), Some("main"), "the instance must keep running");
    remove(&manager, 1).await;
    assert_eq!(fixture.ports().len(), 0);
}

#[tokio::test]
async fn reservation_holds_its_ports_until_it_is_dropped_and_keeps_them_until_down() {
    let fixture = Fixture::new();
    let launch = launch(1, 1, &fixture.greeter());
    let placement = launch.reserve(&fixture.manager()).await.unwrap();
    let address = (fixture.config.bind, placement.ports["main"]);
    assert!(std::net::TcpListener::bind(address).is_err(), "the reservation must hold its port");
    let again = launch.reserve(&fixture.manager()).await.unwrap();
    assert_ne!(again.ports, placement.ports, "a port that another manager holds must not be reserved");
    drop((placement, again));
    std::net::TcpListener::bind(address).unwrap();
    // As after a crash, only the record of the reservation is left.
    assert_eq!(fixture.ports().len(), 1);
    remove(&fixture.manager(), 1).await;
    assert_eq!(fixture.ports(), [0; 0]);
}

#[tokio::test]
async fn released_reservation_is_not_launched() {
    let fixture = Fixture::new();
    let manager = fixture.manager();
    let launch = launch(1, 1, &fixture.greeter());
    let request = launch.request(launch.reserve(&manager).await.unwrap());
    remove(&manager, 1).await;
    let request = gauntlet_domain::LaunchRequest { generation: u64::MAX, ..request };
    let error = manager.up(&request).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { port, .. } if port == request.placement.ports["main"]), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_that_share_a_directory_share_its_ports() {
    let fixture = Fixture::new();
    let (managers, plan) = ([fixture.manager(), fixture.manager()], fixture.greeter());
    let launches: Vec<_> = (0..20).map(|identity| launch(identity, 1, &plan)).collect();
    let up = launches.iter().enumerate().map(|(at, launch)| managers[at % 2].launch(launch));
    let outputs = futures::future::try_join_all(up).await.unwrap();
    let places: BTreeSet<_> = outputs.iter().map(|outputs| &outputs.connection_info).collect();
    assert_eq!(places.len(), 20);
    assert_eq!(managers[0].list().await.unwrap().len(), 20);
    let down = launches.iter().map(|launch| managers[0].down(&launch.challenge, &launch.identity, 1));
    futures::future::try_join_all(down).await.unwrap();
    assert!(places.iter().all(|place| greeting_at(place).is_none()));
    assert_eq!(fixture.ports(), [0; 0]);
}

#[tokio::test]
async fn port_in_use_is_not_reserved() {
    let mut fixture = Fixture::new();
    let first = *fixture.config.ports.start();
    fixture.config.ports = first..=first + 1;
    let taken = std::net::TcpListener::bind((fixture.config.bind, first)).unwrap();
    let manager = fixture.manager();
    let outputs = manager.launch(&launch(1, 1, &fixture.greeter())).await.unwrap();
    assert_eq!(outputs.connection_info, format!("127.0.0.1:{}", first + 1));
    let error = manager.launch(&launch(2, 1, &fixture.greeter())).await.unwrap_err();
    assert!(provision_error(error).contains("no free port"));
    // A port whose instance no longer exists is reserved again.
    drop(taken);
    std::os::unix::fs::symlink("../instances/none", fixture.config.dir.join(format!("ports/{first}"))).unwrap();
    manager.launch(&launch(2, 1, &fixture.greeter())).await.unwrap();
}

#[tokio::test]
async fn port_taken_while_the_program_starts_is_replaced() {
    let fixture = Fixture::on_host();
    let manager = fixture.manager();
    // On its first run, the program starts only once another socket is bound to its port.
    let script = "echo $PORT >> ports; while [ ! -e taken ]; do sleep 0.01; done; exec $GREETER";
    let plan = fixture.script(script);
    let launch = launch(1, 1, &plan);
    let taker = async {
        loop {
            let port = fixture
                .instance_dirs()
                .first()
                .and_then(|dir| fixture.file(dir, "ports").lines().next()?.parse::<u16>().ok());
            // Bound but not listening, so that the readiness probe doesn't succeed on this socket.
            if let Some(port) = port {
                let socket =
                    rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
                let socket = socket.unwrap();
                // Connections of an earlier test may still be closing.
                rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
                rustix::net::bind(&socket, &std::net::SocketAddr::new(fixture.config.bind, port)).unwrap();
                rustix::net::sockopt::set_socket_reuseaddr(&socket, false).unwrap();
                std::fs::write(fixture.instance_dir().join("work/taken"), "").unwrap();
                return (port, socket);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (outputs, (taken, _socket)) = futures::join!(manager.launch(&launch), taker);
    let outputs = outputs.unwrap();
    assert_ne!(outputs.connection_info, format!("127.0.0.1:{taken}"));
    assert_eq!(greeting_at(&outputs.connection_info).as_deref(), Some("hello"));
    assert_eq!(fixture.ports().len(), 1, "the taken port must be released");
}

#[tokio::test]
async fn port_is_held_until_the_program_starts() {
    let fixture = Fixture::new();
    // The shell lists its open descriptors right before it becomes the program.
    fixture
        .manager()
        .launch(&launch(1, 1, &fixture.script("ls -l /proc/self/fd > open; exec $GREETER")))
        .await
        .unwrap();
    let open = fixture.file(&fixture.instance_dir(), "open");
    assert!(!open.contains("socket"), "the program must not inherit the sockets that hold ports: {open}");
    assert!(open.contains("/dev/null"), "{open}");
}
