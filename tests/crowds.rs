//! Many clients of one socket server, as threads and as processes: more than any constant in the
//! code, and each is answered every time.
//!
//! `CROWD_SECONDS=60 cargo test --test crowds -- --nocapture` tells how many were answered in a minute.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

use std::time::{Duration, Instant};

use shmferry::channel::{RequestQueue, Requester, Seqpacket};
use shmferry::protocol::Reply;
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error, Refusal};

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

/// One client, with a connection of its own. Says when it has had its first answer, and goes on
/// until `is_over`: the first to come must not keep the last from being heard.
fn ask(address: Seqpacket, answered: impl Fn(), is_over: impl Fn() -> bool) -> Count {
    let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1);
    let pool = pool.create().unwrap();
    let requester = address.requester(&pool).unwrap();
    let mut count = Count::default();
    let start = Instant::now();
    while start.elapsed() < asking() || !is_over() {
        let deadline = Deadline::after(LOST);
        let (request, transfer) = pool.lease(deadline).unwrap().request("key").unwrap();
        requester.send(request, deadline).unwrap();
        match transfer.reply(deadline) {
            Ok(Reply::Refused(Refusal::NotFound)) => count.answered += 1,
            Err(Error::Timeout(_)) => count.lost += 1,
            other => panic!("{other:?}"),
        }
        if count.answered + count.lost == 1 {
            answered();
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
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Has them go on until each has had its first answer; returns what they have counted.
fn processes(clients: u32, address: &Seqpacket) -> Count {
    let mut children: Vec<_> = (0..clients).map(|_| process(address)).collect();
    let told = |lines: &mut dyn BufRead, word: &str| {
        let line = lines.lines().map(Result::unwrap).find(|line| line.contains(word));
        line.expect(word).split_once(word).unwrap().1.to_owned()
    };
    let mut outputs: Vec<_> = children
        .iter_mut()
        .map(|child| {
            let mut output = BufReader::new(child.stdout.take().unwrap());
            told(&mut output, "answered");
            output
        })
        .collect();
    children.iter_mut().for_each(|child| drop(child.stdin.take()));
    let counts = outputs.iter_mut().map(|output| {
        let line = told(output, "counted ");
        let (answered, lost) = line.split_once(' ').unwrap();
        Count { answered: answered.parse().unwrap(), lost: lost.parse().unwrap() }
    });
    let sum = counts.sum();
    children.into_iter().for_each(|mut child| assert!(child.wait().unwrap().success()));
    sum
}

#[test]
fn a_client() {
    // Without an address this is the test run itself, in which there is nothing to ask.
    let Ok(path) = env::var(ADDRESS) else { return };
    let is_over = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&is_over);
    thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]); // its end
        told.store(1, Relaxed);
    });
    let address = Seqpacket::new(path);
    let count = ask(address, || println!("answered"), || is_over.load(Relaxed) > 0);
    println!("counted {} {}", count.answered, count.lost);
}

fn crowd(clients: u32, workers: usize, are_processes: bool) -> Count {
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock")).max_clients(clients);
    let queue = Arc::new(address.clone().bind().unwrap());
    let served = AtomicU32::new(0);
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
            processes(clients, &address)
        } else {
            let asking: Vec<_> = (0..clients)
                .map(|_| {
                    let (address, served) = (address.clone(), &served);
                    let answered = || _ = served.fetch_add(1, Relaxed);
                    scope.spawn(move || ask(address, answered, || served.load(Relaxed) == clients))
                })
                .collect();
            asking.into_iter().map(|client| client.join().unwrap()).sum()
        };
        queue.close();
        count
    })
}

#[test]
fn more_clients_than_rings_that_are_looked_at_are_all_answered() {
    for (kind, are_processes) in [("threads", false), ("processes", true)] {
        for clients in [24, 64, 256, 600] {
            for workers in [1, 2, 8] {
                if clients == 600 && (workers > 1 || !are_processes) {
                    continue; // this process has no descriptors for so many clients
                }
                let Count { answered, lost } = crowd(clients, workers, are_processes);
                println!("{clients} {kind}, {workers} workers: {answered} answered, {lost} lost");
                assert_eq!(lost, 0, "{clients} {kind}, {workers} workers, {answered} answered");
            }
        }
    }
}
