//! Many clients of one socket server, as threads and as processes: more than any constant in the
//! code, and each is answered every time.
//!
//! `CROWD_SECONDS=60 cargo test --test crowds -- --nocapture` tells how many were answered in a minute.

use std::env;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use std::time::{Duration, Instant};

use shmferry::{
    Deadline, Error, Memfd, Refusal, Reply, RequestQueue, Requester, SegmentPool, Seqpacket,
};

/// Far longer than any request takes on a busy machine. One that takes longer is lost.
const LOST: Duration = Duration::from_secs(20);

/// Between two requests of one client, as of clients that have something else to do.
const PAUSE: Duration = Duration::from_micros(100);

/// Names the socket to a process that asks.
const ADDRESS: &str = "SHMFERRY_CROWD_ADDRESS";

/// How long each crowd asks.
fn asking() -> Duration {
    let seconds = env::var("CROWD_SECONDS").map_or(2, |seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds)
}

#[derive(Clone, Copy, Default)]
struct Count {
    answered: u64,
    lost: u64,
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Count>>(counts: I) -> Count {
        counts.fold(Count::default(), |sum, count| Count {
            answered: sum.answered + count.answered,
            lost: sum.lost + count.lost,
        })
    }
}

/// One client, with a connection of its own.
fn ask(address: Seqpacket) -> Count {
    let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1);
    let pool = pool.create().unwrap();
    let requester = address.requester(&pool).unwrap();
    let mut count = Count::default();
    let start = Instant::now();
    while start.elapsed() < asking() {
        let deadline = Deadline::after(LOST);
        let (request, transfer) = pool.lease(deadline).unwrap().request("key").unwrap();
        requester.send(request, deadline).unwrap();
        match transfer.reply(deadline) {
            Ok(Reply::Refused(Refusal::NotFound)) => count.answered += 1,
            Err(Error::Timeout(_)) => count.lost += 1,
            other => panic!("{other:?}"),
        }
        thread::sleep(PAUSE);
    }
    count
}

/// A client in a process of its own: this executable, in the role of `a_client`.
fn process(address: &Seqpacket) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_client", "--nocapture"])
        .env(ADDRESS, address.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What such a process has counted.
fn told_by(child: Child) -> Count {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.split_once("counted ")).expect(&text).1;
    let (answered, lost) = line.split_once(' ').unwrap();
    Count { answered: answered.parse().unwrap(), lost: lost.parse().unwrap() }
}

#[test]
fn a_client() {
    // Without an address this is the test run itself, in which there is nothing to ask.
    if let Ok(path) = env::var(ADDRESS) {
        let Count { answered, lost } = ask(Seqpacket::new(path));
        println!("counted {answered} {lost}");
    }
}

fn crowd(clients: u32, workers: usize, are_processes: bool) -> Count {
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock")).max_clients(clients);
    let queue = Arc::new(address.clone().bind().unwrap());
    thread::scope(|scope| {
        for _ in 0..workers {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                while let Ok(transfer) = queue.recv(Deadline::NEVER) {
                    let _ = transfer.refuse(Refusal::NotFound); // its client may have given up
                }
            });
        }
        let count = if are_processes {
            let children: Vec<_> = (0..clients).map(|_| process(&address)).collect();
            children.into_iter().map(told_by).sum()
        } else {
            let clients: Vec<_> = (0..clients)
                .map(|_| {
                    let address = address.clone();
                    scope.spawn(|| ask(address))
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        };
        queue.close();
        count
    })
}

#[test]
fn more_clients_than_rings_that_are_looked_at_are_all_answered() {
    for (kind, are_processes) in [("threads", false), ("processes", true)] {
        for clients in [24, 64, 256] {
            for workers in [1, 2, 8] {
                let Count { answered, lost } = crowd(clients, workers, are_processes);
                println!("{clients} {kind}, {workers} workers: {answered} answered, {lost} lost");
                assert_eq!(lost, 0, "{clients} {kind}, {workers} workers, {answered} answered");
            }
        }
    }
}
