//! Compares a cold start of the greeter through the process backend, with and without isolation, with a raw start of the same program.
//!
//! Arguments: the number of starts, the number of other running instances, and `nocgroup` for no control groups.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a measurement, not the product")]

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::{Ipv4Addr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use gauntlet_domain::{
    ChallengeId, Identity, LaunchPlan, LaunchRequest, Outputs, PortSpec, Probe, Protocol, Provisioner as _, Readiness,
};
use gauntlet_provision::process::{Config, Level, Process};

/// Reserves, renders and launches, as the use cases do.
async fn launch(process: &Process, identity: u64) -> Outputs {
    let (challenge, identity) = (ChallengeId::new("c").unwrap(), Identity::from_bits(identity));
    let ports = vec![PortSpec { name: "main".to_owned(), protocol: Protocol::Tcp }];
    let placement = process.reserve(&challenge, &identity, 1, &ports).await.unwrap();
    let address = format!("127.0.0.1:{}", placement.ports["main"]);
    let plan = LaunchPlan {
        ports,
        files: std::env::temp_dir(),
        command: vec!["greeter".to_owned()],
        env: BTreeMap::from([("LISTEN".to_owned(), address.clone())]),
        readiness: Readiness {
            probe: Probe::Tcp { port: "main".to_owned() },
            interval: Duration::from_millis(100),
            timeout: Duration::from_secs(20),
        },
        connection_info: address,
        ..LaunchPlan::default()
    };
    let request = LaunchRequest { challenge, identity, generation: 1, digest: String::new(), placement, plan };
    process.up(&request).await.unwrap()
}

fn wait_for_answer(address: &str) {
    loop {
        if let Ok(mut stream) = TcpStream::connect(address) {
            let _ = stream.read_to_end(&mut Vec::new());
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn print_median(name: &str, mut took: Vec<Duration>) {
    took.sort();
    println!("{name}: median {:?}, p90 {:?}", took[took.len() / 2], took[took.len() * 9 / 10]);
}

#[tokio::main]
async fn main() {
    let argument = |at| std::env::args().nth(at).and_then(|text| text.parse::<u64>().ok());
    let (count, others) = (argument(1).unwrap_or(50), argument(2).unwrap_or(0));
    let me = std::env::current_exe().unwrap();
    let greeter = me.with_file_name("greeter");
    let mut raw = Vec::new();
    for n in 0..count {
        let address = format!("127.0.0.1:{}", 19000 + n);
        let began = Instant::now();
        let mut child =
            Command::new(&greeter).env("LISTEN", &address).stdout(std::process::Stdio::null()).spawn().unwrap();
        wait_for_answer(&address);
        raw.push(began.elapsed());
        child.kill().unwrap();
        child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    print_median("raw", raw);
    let dir = tempfile::tempdir().unwrap();
    let backend = |name: &str, level| {
        let mut config = Config::new(dir.path().join(name));
        config.supervisor = Some(me.parent().unwrap().with_file_name("gauntlet-shim"));
        config.bind = Ipv4Addr::LOCALHOST.into();
        config.path.insert(0, me.parent().unwrap().to_owned());
        config.cgroups = !std::env::args().any(|arg| arg == "nocgroup");
        config.isolation = level;
        // The second of a pair gets other ports.
        config.ports = if level.is_some() { 20_000..=24_999 } else { 25_000..=29_999 };
        Process::new(config).unwrap()
    };
    let pair = [backend("host", Some(Level::None)), backend("isolated", None)];
    for n in 0..others {
        for process in &pair {
            launch(process, 1_000_000 + n).await;
        }
    }
    let mut took = [const { (Vec::new(), Vec::new()) }; 2];
    // Alternately, so that whatever else the machine does affects both.
    for n in 0..count {
        for (process, (ups, downs)) in pair.iter().zip(&mut took) {
            let began = Instant::now();
            let outputs = launch(process, n).await;
            wait_for_answer(&outputs.connection_info);
            ups.push(began.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
            let began = Instant::now();
            process.down(&ChallengeId::new("c").unwrap(), &Identity::from_bits(n), 1).await.unwrap();
            downs.push(began.elapsed());
        }
    }
    for (process, (ups, downs)) in pair.iter().zip(took) {
        let level = process.isolation().level;
        print_median(&format!("up with isolation {level} beside {others}"), ups);
        print_median(&format!("down with isolation {level} beside {others}"), downs);
        let began = Instant::now();
        let halted = process.halt().await.unwrap();
        println!("halt of {halted}: {:?}", began.elapsed());
    }
}
