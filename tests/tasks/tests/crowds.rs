//! Crowds of tasks: many more than segments and threads, with pauses at random between any two
//! steps of either side. All are answered, and rightly.
//!
//! `CROWD_SECONDS=60 cargo test -p shmferry-tasks --test crowds -- --nocapture` has each crowd ask
//! for a minute, and tells how many were answered.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shmferry::channel::InProcess;
use shmferry::tokio::{Client, Outgoing, Server, Serving};
use shmferry::{Error, Size};
use shmferry_tasks::{Spot, asked, back, key, noise, on_threads, until};
use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{Dice, wait_until};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;

/// How long each crowd asks.
fn asking() -> Duration {
    let millis = env::var("CROWD_SECONDS").map_or(700, |seconds| {
        let seconds: u64 = seconds.parse().expect("CROWD_SECONDS is a number");
        seconds * 1000
    });
    Duration::from_millis(millis)
}

/// A watchdog, unless a crowd is to ask for longer than it waits.
fn watched() -> Option<shmferry_test_support::watchdog::Watchdog> {
    env::var_os("CROWD_SECONDS").is_none().then(watchdog)
}

/// 0 to 200 microseconds, most often none.
async fn pause(dice: &mut Dice) {
    match dice.roll(400) {
        micros @ 0..200 => tokio::time::sleep(Duration::from_micros(micros as u64)).await,
        200..300 => tokio::task::yield_now().await,
        _ => {}
    }
}

/// The same, for a thread.
fn pause_thread(dice: &mut Dice) {
    match dice.roll(400) {
        micros @ 0..200 => std::thread::sleep(Duration::from_micros(micros as u64)),
        200..300 => std::thread::yield_now(),
        _ => {}
    }
}

/// Answers keys with noise, in pieces, with pauses.
fn serve_in_tasks(server: Server) -> Serving {
    let seeds = AtomicUsize::new(0);
    let serving = server.serve(move |request| {
        let mut dice = Dice::new(seeds.fetch_add(1, SeqCst));
        async move {
            let bytes = asked(request.key()).unwrap();
            pause(&mut dice).await;
            let size = if dice.roll(2) == 0 { Size::Unknown } else { (bytes.len() as u64).into() };
            let mut outgoing: Outgoing = request.accept(size)?;
            for piece in bytes.chunks(1 + dice.roll(9000)) {
                outgoing.send(piece).await?;
                if dice.roll(2) == 0 {
                    tokio::io::AsyncWriteExt::flush(&mut outgoing).await?;
                }
                pause(&mut dice).await;
            }
            outgoing.finish().await.map(drop)
        }
    });
    serving.unwrap()
}

fn serve_in_threads(server: shmferry::Server, threads: usize) -> shmferry::Serving {
    let seeds = AtomicUsize::new(0);
    let serving = server.serve(threads, move |request| {
        let mut dice = Dice::new(seeds.fetch_add(1, SeqCst));
        let bytes = asked(request.key()).unwrap();
        pause_thread(&mut dice);
        let size = if dice.roll(2) == 0 { Size::Unknown } else { (bytes.len() as u64).into() };
        let mut outgoing = request.accept(size)?;
        for piece in bytes.chunks(1 + dice.roll(9000)) {
            std::io::Write::write_all(&mut outgoing, piece)?;
            if dice.roll(2) == 0 {
                std::io::Write::flush(&mut outgoing)?;
            }
            pause_thread(&mut dice);
        }
        outgoing.finish()
    });
    serving.unwrap()
}

/// Asks once, and reads in steps, with pauses.
async fn ask(client: &Client, seed: usize, dice: &mut Dice) {
    let len = match dice.roll(4) {
        0 => dice.roll(100),
        1 => dice.roll(5_000),
        _ => dice.roll(30_000),
    };
    pause(dice).await;
    let mut body = client.get(key(seed, len)).await.unwrap();
    let mut read = Vec::with_capacity(len);
    let mut buffer = vec![0; 1 + dice.roll(9000)];
    loop {
        pause(dice).await;
        match body.read(&mut buffer).await.unwrap() {
            0 => break,
            len => read.extend_from_slice(&buffer[..len]),
        }
    }
    drop(body);
    assert!(read == noise(seed, len), "other bytes");
}

/// Has so many tasks ask, until the time is over and each has had an answer; returns how many they
/// had in all.
async fn crowd(clients: &[Client], tasks: usize) -> u64 {
    let answered = Arc::new(AtomicU64::new(0));
    let (start, mut all) = (Instant::now(), JoinSet::new());
    for task in 0..tasks {
        let (client, answered) = (clients[task % clients.len()].clone(), Arc::clone(&answered));
        all.spawn(async move {
            let mut dice = Dice::new(task);
            for round in 0.. {
                ask(&client, task * 1_000_000 + round, &mut dice).await;
                answered.fetch_add(1, SeqCst);
                if start.elapsed() > asking() {
                    break;
                }
            }
        });
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
    answered.load(SeqCst)
}

/// With small slots, so that each transfer takes many steps.
fn builder(segments: u32) -> shmferry::ClientBuilder {
    let builder = shmferry::Client::builder().segments(segments).slots(4);
    // A task that waits for one of 8 segments behind a thousand waits long on a busy machine.
    builder.segment_len(16 << 10).lease_timeout(Duration::from_secs(3600))
}

async fn all_back(clients: &[Client]) {
    for client in clients {
        until("all segments are back", || back(client.stats()) == client.stats().segments).await;
    }
}

#[test]
fn crowds_of_tasks_are_answered_by_tasks() {
    for (tasks, segments) in [(256, 8), (256, 256), (1000, 8), (1000, 256)] {
        let _watchdog = watched();
        on_threads(2, async {
            let spot = Spot::new();
            let _serving = serve_in_tasks(Server::bind(spot.address.as_path()).unwrap());
            let client = [builder(segments).connect_tokio(spot.address.as_path()).unwrap()];
            let answered = crowd(&client, tasks).await;
            println!("{tasks} tasks, {segments} segments, by tasks: {answered} answered");
            all_back(&client).await;
        });
    }
}

#[test]
fn crowds_of_tasks_are_answered_by_tasks_within_a_process() {
    for (tasks, segments) in [(256, 8), (1000, 256)] {
        let _watchdog = watched();
        on_threads(2, async {
            let queue = InProcess::bounded(16);
            let _serving = serve_in_tasks(Server::in_process(queue.clone()));
            let client = [builder(segments).in_process_tokio(&queue).unwrap()];
            let answered = crowd(&client, tasks).await;
            println!("{tasks} tasks, {segments} segments, within: {answered} answered");
            all_back(&client).await;
        });
    }
}

#[test]
fn crowds_of_tasks_are_answered_by_threads() {
    for (tasks, segments) in [(256, 8), (256, 256), (1000, 8), (1000, 256)] {
        let _watchdog = watched();
        on_threads(2, async {
            let spot = Spot::new();
            let server = shmferry::Server::bind(spot.address.as_path()).unwrap();
            let _serving = serve_in_threads(server, 8);
            let client = [builder(segments).connect_tokio(spot.address.as_path()).unwrap()];
            let answered = crowd(&client, tasks).await;
            println!("{tasks} tasks, {segments} segments, by threads: {answered} answered");
            all_back(&client).await;
        });
    }
}

#[test]
fn tasks_and_threads_of_many_clients_are_answered_by_one_server() {
    let _watchdog = watched();
    on_threads(2, async {
        let spot = Spot::new();
        let _serving = serve_in_tasks(Server::bind(spot.address.as_path()).unwrap());
        let connect = |_| builder(4).connect_tokio(spot.address.as_path()).unwrap();
        let clients: Vec<_> = (0..8).map(connect).collect();
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let address = spot.address.clone();
                std::thread::spawn(move || {
                    let client = builder(2).connect(address.as_path()).unwrap();
                    let (start, mut dice, mut answered) = (Instant::now(), Dice::new(thread), 0);
                    while start.elapsed() < asking() {
                        let (seed, len) = (thread * 1_000_000 + answered, dice.roll(40_000));
                        let body = client.get(key(seed, len)).unwrap();
                        pause_thread(&mut dice);
                        assert!(body.read_all().unwrap() == noise(seed, len));
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        let by_tasks = crowd(&clients, 256).await;
        let by_threads: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        println!("8 clients of tasks: {by_tasks} answered, 8 of threads: {by_threads}");
        all_back(&clients).await;
    });
}

// ---------------------------------------------------------------- 10,000 idle clients

const CLIENTS: u64 = 10_000;
/// A connection, and what watches it; segments, ring and epoll of the client.
const DESCRIPTORS: u64 = 10;
/// Each has its own limit of descriptors.
const PROCESSES: u64 = 10;

const ROLE: &str = "SHMFERRY_CROWD_ROLE";
const ADDRESS: &str = "SHMFERRY_CROWD_ADDRESS";

/// Raises the limit of descriptors; whether there are as many as this.
fn may_open(most: u64) -> bool {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    maximum.is_none_or(|maximum| maximum >= most)
}

fn process(role: &str, address: &Path) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_process", "--nocapture"])
        .env(ROLE, role)
        .env(ADDRESS, address)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.trim_end().ends_with("ready") {
        line.clear();
        assert!(says.read_line(&mut line).unwrap() > 0, "it ended, and was not ready");
    }
    (child, says)
}

#[test]
fn a_process() {
    // Without a role this is the test run itself, in which there is nothing to do.
    let Ok(role) = env::var(ROLE) else { return };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]); // its end
        std::process::exit(0);
    });
    let spot = env::var(ADDRESS).unwrap();
    let address = Path::new(&spot);
    assert!(may_open(0));
    on_threads(1, async {
        let mut clients = Vec::new();
        let mut serving = None;
        if role == "serve" {
            let server = shmferry::Server::builder().max_clients(2 * CLIENTS as u32);
            serving = Some(shmferry_tasks::serve_tasks(server.bind_tokio(address).unwrap()));
        } else {
            for seed in 0..(CLIENTS / PROCESSES) as usize {
                let builder = shmferry::Client::builder().segments(1).segment_len(4096).slots(1);
                let client = builder.connect_tokio(address).unwrap();
                let body = client.get(key(seed, 100)).await.unwrap();
                assert!(body.read_all().await.unwrap() == noise(seed, 100));
                clients.push(client);
            }
        }
        println!("ready");
        std::future::pending::<()>().await;
        drop(serving);
    });
}

/// Processor time of a process so far, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// A line of `/proc/PID/status`, without its name.
fn status(pid: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().to_owned()
}

#[test]
fn ten_thousand_idle_clients_cost_a_server_no_time() {
    let _watchdog = watchdog();
    if !may_open(0)
        || getrlimit(Resource::Nofile).maximum.is_some_and(|most| {
            most < DESCRIPTORS / 5 * CLIENTS || most < DESCRIPTORS * CLIENTS / PROCESSES
        })
    {
        println!("skipped: the limit of descriptors (ulimit -Hn) is too low for {CLIENTS} clients");
        return;
    }
    let spot = Spot::new();
    let (mut server, _says) = process("serve", &spot.address);
    let pid = server.id();
    let before = status(pid, "VmRSS:");
    let mut clients: Vec<_> =
        (0..PROCESSES).map(|_| process("ask", &spot.address)).map(|(child, _)| child).collect();
    // What it does for the last of them may take it a moment more: polled until a whole second
    // costs it nothing. One tick is what the kernel may count for a timer of the machine's own.
    let mut idle = 0;
    wait_until("a second in which the server does nothing", || {
        let at = ticks(pid);
        std::thread::sleep(Duration::from_secs(1));
        idle = ticks(pid) - at;
        idle <= 1
    });
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    println!(
        "{CLIENTS} idle clients: {idle} ticks of 10 ms in a second, {descriptors} descriptors, {} \
         threads, resident {} (without clients {before})",
        status(pid, "Threads:"),
        status(pid, "VmRSS:"),
    );
    // It still serves.
    on_threads(1, async {
        let client = Client::connect(spot.address.as_path()).unwrap();
        let body = client.get(key(1, 9)).await.unwrap();
        assert_eq!(body.read_all().await.unwrap(), noise(1, 9));
        Ok::<(), Error>(())
    })
    .unwrap();
    for child in clients.iter_mut().chain([&mut server]) {
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
