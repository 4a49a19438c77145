//! Where the time of a cold start goes: the raw start of the greeter until it answers, and the same through the process backend. Give the
//! number of starts, how many others are to run beside, and `nocgroup` to go without control groups.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a measurement, not the product")]

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::{Ipv4Addr, TcpStream},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use gauntlet_domain::{
    ChallengeId, Identity, Limits, Order, Place, Plan, PortSpec, Probe, Protocol, Provisioner as _, Readiness, Result,
    Workload,
};
use gauntlet_provision::process::{Config, Process};

#[derive(Debug)]
struct Greeter(PathBuf, Vec<PortSpec>);

impl Plan for Greeter {
    fn ports(&self) -> &[PortSpec] {
        &self.1
    }

    fn render(&self, place: &Place) -> Result<Workload> {
        let port = place.ports["main"];
        Ok(Workload {
            files: "/".into(),
            command: vec![self.0.display().to_string()],
            env: BTreeMap::from([("LISTEN".to_owned(), format!("127.0.0.1:{port}"))]),
            readiness: Readiness {
                probe: Probe::Tcp { port: "main".to_owned() },
                interval: Duration::from_millis(100),
                timeout: Duration::from_secs(20),
            },
            limits: Limits::default(),
            connection_info: format!("127.0.0.1:{port}"),
            flags: Vec::new(),
        })
    }
}

fn answered(address: &str) {
    loop {
        if let Ok(mut stream) = TcpStream::connect(address) {
            let _ = stream.read_to_end(&mut Vec::new());
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn median(name: &str, mut took: Vec<Duration>) {
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
        answered(&address);
        raw.push(began.elapsed());
        child.kill().unwrap();
        child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    median("raw", raw);
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::new(dir.path());
    config.shim = Some(me.parent().unwrap().with_file_name("gauntlet-shim"));
    config.bind = Ipv4Addr::LOCALHOST.into();
    config.cgroups = !std::env::args().any(|arg| arg == "nocgroup");
    let process = Process::new(config).unwrap();
    let spec = PortSpec { name: "main".to_owned(), protocol: Protocol::Tcp };
    let plan: Arc<dyn Plan> = Arc::new(Greeter(greeter, vec![spec]));
    let order = |n| Order {
        challenge: ChallengeId::new("c").unwrap(),
        identity: Identity::from_bits(n),
        generation: 1,
        digest: String::new(),
        plan: plan.clone(),
    };
    for n in 0..others {
        process.up(&order(1_000_000 + n)).await.unwrap();
    }
    let (mut ups, mut downs) = (Vec::new(), Vec::new());
    for n in 0..count {
        let order = order(n);
        let began = Instant::now();
        let outputs = process.up(&order).await.unwrap();
        answered(&outputs.connection_info);
        ups.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        process.down(&order.challenge, &order.identity, 1).await.unwrap();
        downs.push(began.elapsed());
    }
    median(&format!("up beside {others}"), ups);
    median(&format!("down beside {others}"), downs);
    let began = Instant::now();
    let halted = process.halt().await.unwrap();
    println!("halt of {halted}: {:?}", began.elapsed());
}
