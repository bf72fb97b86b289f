//! Tasks beside threads: one transfer at a time, many at once, and many that ask for nothing.
//!
//! `cargo bench --manifest-path benches/peers/Cargo.toml --bench tasks`; with `-- --rounds COUNT`,
//! so many rounds. The server is another process. Ways are interleaved, round by round, and the
//! ratios are medians over the rounds. What is asked for is a file, and each byte is copied once
//! into a buffer.

use std::env;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};

#[path = "../../processor.rs"]
mod processor;

const SIZES: [(&str, usize); 3] = [("1 KiB", 1 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)];
/// Who asks whom.
const WAYS: [(&str, bool, bool); 4] = [
    ("threads ask threads", false, false),
    ("tasks ask threads", true, false),
    ("threads ask tasks", false, true),
    ("tasks ask tasks", true, true),
];
const BUFFER: usize = 256 << 10;
/// How long a way is measured in a round.
const SPAN: Duration = Duration::from_millis(300);
/// The pause before each fetch that is to find both sides asleep.
const NAP: Duration = Duration::from_millis(1);

fn main() {
    let args: Vec<String> = env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--serve") {
        return serve(&args[at + 1], &args[at + 2], args[at + 3] == "tasks");
    }
    let rounds = args.iter().position(|arg| arg == "--rounds");
    let rounds = rounds.map_or(7, |at| args[at + 1].parse().expect("a number of rounds"));
    println!("{}, {rounds} rounds\n", processor_name());

    let dir = tempfile::tempdir().unwrap();
    for (name, len) in SIZES {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 7 % 251) as u8).collect();
        std::fs::write(dir.path().join(name.replace(' ', "")), bytes).unwrap();
    }
    let servers = [false, true].map(|tasks| Peer::start(dir.path(), tasks));
    one_at_a_time(&servers, rounds);
    many_at_once(&servers, rounds);
    idle(&servers[1]);
}

/// A server process.
struct Peer {
    process: Child,
    address: PathBuf,
}

impl Peer {
    fn start(dir: &Path, tasks: bool) -> Peer {
        let address = dir.join(if tasks { "tasks.sock" } else { "threads.sock" });
        let mut process = Command::new(env::current_exe().unwrap())
            .arg("--serve")
            .args([&address, dir])
            .arg(if tasks { "tasks" } else { "threads" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ready");
        Peer { process, address }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

/// Serves the files until standard input ends.
fn serve(address: &str, dir: &str, tasks: bool) {
    let dir = PathBuf::from(dir);
    let open = move |key: &[u8]| File::open(dir.join(str::from_utf8(key).unwrap()));
    let wait = || {
        println!("ready");
        let mut rest = Vec::new();
        io::stdin().read_to_end(&mut rest).unwrap();
    };
    let builder = shmferry::Server::builder().max_clients(20_000).max_segments(256);
    if tasks {
        let runtime = runtime();
        let _inside = runtime.enter();
        let open = Arc::new(open);
        let server = builder.bind_tokio(Path::new(address)).unwrap();
        let serving = server.serve(move |request| {
            let open = Arc::clone(&open);
            async move {
                let file = open(request.key()).unwrap();
                request.send_file(&file).await
            }
        });
        let serving = serving.unwrap();
        wait();
        serving.stop();
    } else {
        let server = builder.bind(Path::new(address)).unwrap();
        let serving = server.serve(8, move |request| {
            let file = open(request.key()).unwrap();
            request.send_file(&file)
        });
        let serving = serving.unwrap();
        wait();
        serving.stop();
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn key(size: usize) -> String {
    SIZES[size].0.replace(' ', "")
}

/// The latencies of one way in a round, in microseconds.
fn latencies(peer: &Peer, tasks: bool, size: usize, asleep: bool) -> Vec<f64> {
    let (key, len) = (key(size), SIZES[size].1);
    let mut all = Vec::new();
    let end = Instant::now() + SPAN;
    if tasks {
        runtime().block_on(async {
            let client = shmferry::tokio::Client::connect(peer.address.as_path()).unwrap();
            // On a worker of the runtime, as in a server, and not on the thread that made it.
            let measured = tokio::spawn(async move {
                let mut buffer = vec![0; BUFFER];
                while Instant::now() < end {
                    if asleep {
                        tokio::time::sleep(NAP).await;
                    }
                    let start = Instant::now();
                    let mut body = client.get(&key).await.unwrap();
                    let mut read = 0;
                    loop {
                        match body.read(&mut buffer).await.unwrap() {
                            0 => break,
                            some => read += some,
                        }
                    }
                    drop(body);
                    all.push(start.elapsed().as_secs_f64() * 1e6);
                    assert_eq!(read, len);
                }
                all
            });
            measured.await.unwrap()
        })
    } else {
        let client = shmferry::Client::connect(peer.address.as_path()).unwrap();
        let mut buffer = vec![0; BUFFER];
        while Instant::now() < end {
            if asleep {
                thread::sleep(NAP);
            }
            let start = Instant::now();
            let mut body = client.get(&key).unwrap();
            let mut read = 0;
            loop {
                match body.read(&mut buffer).unwrap() {
                    0 => break,
                    some => read += some,
                }
            }
            drop(body);
            all.push(start.elapsed().as_secs_f64() * 1e6);
            assert_eq!(read, len);
        }
        all
    }
}

fn one_at_a_time(servers: &[Peer; 2], rounds: usize) {
    for asleep in [true, false] {
        let state = if asleep { "both asleep before" } else { "one after the other" };
        println!("One at a time, {state}: p50 in us (x threads ask threads)");
        println!("| who | {} |", SIZES.map(|(name, _)| name).join(" | "));
        println!("| --- |{}", " ---: |".repeat(SIZES.len()));
        let mut cells = vec![vec![(Vec::new(), Vec::new()); SIZES.len()]; WAYS.len()];
        for round in 0..rounds {
            for size in 0..SIZES.len() {
                let mut of_round = [0.0; WAYS.len()];
                for turn in 0..WAYS.len() {
                    let way = (turn + round) % WAYS.len();
                    let (_, asks, answers) = WAYS[way];
                    let all = latencies(&servers[usize::from(answers)], asks, size, asleep);
                    of_round[way] = median(all);
                }
                for way in 0..WAYS.len() {
                    cells[way][size].0.push(of_round[way]);
                    cells[way][size].1.push(of_round[way] / of_round[0]);
                }
            }
        }
        for ((name, ..), row) in WAYS.iter().zip(cells) {
            let row: Vec<String> = row
                .into_iter()
                .map(|(times, ratios)| format!("{:.1} ({:.2})", median(times), median(ratios)))
                .collect();
            println!("| {name} | {} |", row.join(" | "));
        }
        println!();
    }
}

/// Bytes a second of so many transfers at once, of 1 MiB each, through segments of 64 KiB.
fn throughput(peer: &Peer, tasks: bool, at_once: u32) -> f64 {
    let builder = || shmferry::Client::builder().segments(at_once).segment_len(64 << 10).slots(4);
    let (key, bytes) = (key(2), Arc::new(AtomicU64::new(0)));
    let start = Instant::now();
    let end = start + 2 * SPAN;
    if tasks {
        let runtime = runtime();
        runtime.block_on(async {
            let client = builder().connect_tokio(peer.address.as_path()).unwrap();
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..at_once {
                let (client, key, bytes) = (client.clone(), key.clone(), Arc::clone(&bytes));
                all.spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    while Instant::now() < end {
                        let mut body = client.get(&key).await.unwrap();
                        loop {
                            match body.read(&mut buffer).await.unwrap() {
                                0 => break,
                                some => _ = bytes.fetch_add(some as u64, Relaxed),
                            }
                        }
                    }
                });
            }
            while let Some(done) = all.join_next().await {
                done.unwrap();
            }
        });
    } else {
        let client = builder().connect(peer.address.as_path()).unwrap();
        thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    let mut buffer = vec![0; 64 << 10];
                    while Instant::now() < end {
                        let mut body = client.get(&key).unwrap();
                        loop {
                            match body.read(&mut buffer).unwrap() {
                                0 => break,
                                some => _ = bytes.fetch_add(some as u64, Relaxed),
                            }
                        }
                    }
                });
            }
        });
    }
    bytes.load(Relaxed) as f64 / start.elapsed().as_secs_f64()
}

fn many_at_once(servers: &[Peer; 2], rounds: usize) {
    println!("Many at once, 1 MiB each, segments of 64 KiB: GB/s in all (x 64 threads ask threads)");
    println!("| who | at once | GB/s |\n| --- | ---: | ---: |");
    let ways = [
        ("threads ask threads", false, false, 64),
        ("tasks ask threads", true, false, 64),
        ("tasks ask threads", true, false, 256),
        ("tasks ask tasks", true, true, 64),
        ("tasks ask tasks", true, true, 256),
    ];
    let mut all = [const { (Vec::new(), Vec::new()) }; 5];
    for round in 0..rounds {
        let mut of_round = [0.0; 5];
        for turn in 0..ways.len() {
            let way = (turn + round) % ways.len();
            let (_, asks, answers, at_once) = ways[way];
            of_round[way] = throughput(&servers[usize::from(answers)], asks, at_once);
        }
        for (way, all) in all.iter_mut().enumerate() {
            all.0.push(of_round[way] / 1e9);
            all.1.push(of_round[way] / of_round[0]);
        }
    }
    for ((name, _, _, at_once), (rates, ratios)) in ways.into_iter().zip(all) {
        println!("| {name} | {at_once} | {:.2} ({:.2}) |", median(rates), median(ratios));
    }
    println!();
}

/// What clients cost a server of tasks that ask for nothing.
fn idle(server: &Peer) {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: most.maximum, ..most };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let (before, start) = (resident(server), Instant::now());
    let runtime = runtime();
    let clients: Vec<_> = runtime.block_on(async {
        let mut clients = Vec::new();
        // Each takes a few descriptors.
        let fit = most.maximum.map_or(10_000, |most| most / 8).min(2_000);
        for _ in 0..fit {
            let builder = shmferry::Client::builder().segments(1).segment_len(4096).slots(1);
            let client = builder.connect_tokio(server.address.as_path()).unwrap();
            client.get(key(0)).await.unwrap().read_all().await.unwrap();
            clients.push(client);
        }
        clients
    });
    println!("{} idle clients, connected in {:.1?}", clients.len(), start.elapsed());
    let pid = server.process.id();
    let times = [processor::seconds(pid), processor::seconds(std::process::id())];
    thread::sleep(Duration::from_secs(2));
    let spent = processor::seconds(pid) - times[0];
    let ours = processor::seconds(std::process::id()) - times[1];
    let memory = (resident(server) - before) as f64 / clients.len() as f64 / 1024.0;
    println!("in 2 s: server {:.2} ms, clients {:.2} ms of processor time", spent * 1e3, ours * 1e3);
    println!("server: {memory:.1} KiB of memory a client, segments included");
}

/// Resident memory, in bytes.
fn resident(server: &Peer) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", server.process.id())).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    name.trim_start_matches(['\t', ' ', ':']).to_owned()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}
