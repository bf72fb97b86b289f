//! Requests through the ring beside a socket connection, and those that do not fit it: none is lost, none
//! waits behind a worker that is held up, and nobody is kept out.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use shmferry::channel::{KEY_LIMIT, RequestQueue, Requester, Seqpacket, SeqpacketQueue};
use shmferry::protocol::Reply;
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error, Refusal};
use shmferry_test_support::watchdog::watchdog;

/// What fits an entry of the ring, in bytes; longer keys go over the connection.
const KEY_ROOM: usize = 240;
/// How many requests a ring holds; more of them go over the connection.
const ENTRIES: u32 = 64;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn pool(segments: u32) -> SegmentPool<Memfd> {
    SegmentPool::builder().segments(segments).segment_len(8192).slots(2).create().unwrap()
}

/// A server of so many workers, which answer keys with themselves until the queue is closed.
fn with_echoes(workers: usize, run: impl FnOnce(&Seqpacket)) {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock"));
    let queue = address.clone().bind().unwrap();
    thread::scope(|scope| {
        struct Closing<'q>(&'q SeqpacketQueue);
        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let _closing = Closing(&queue);
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    match queue.recv(Deadline::NEVER) {
                        Ok(transfer) => {
                            let key = transfer.key().to_vec();
                            let mut sending = transfer.accept(key.len() as u64).unwrap();
                            sending.write_all(&key).unwrap();
                            sending.finish().unwrap();
                        }
                        Err(Error::Closed) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        run(&address);
    });
}

/// Asks for a key, and compares what comes.
fn echoes(requester: &impl Requester<Memfd>, pool: &SegmentPool<Memfd>, key: &[u8]) {
    let (request, transfer) = pool.lease(soon()).unwrap().request(key).unwrap();
    requester.send(request, soon()).unwrap();
    let Reply::Found(mut body) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).unwrap();
    assert!(bytes == key, "{} bytes for {}", bytes.len(), key.len());
}

#[test]
fn keys_of_every_length_arrive_whether_they_fit_the_ring_or_not() {
    with_echoes(1, |address| {
        let pool = pool(1);
        let requester = address.clone().requester(&pool).unwrap();
        let key: Vec<u8> = (0..KEY_LIMIT).map(|i| (i % 251) as u8).collect();
        for len in (0..=KEY_ROOM + 9).chain([KEY_LIMIT - 1, KEY_LIMIT]) {
            echoes(&requester, &pool, &key[KEY_LIMIT - len..]);
        }
    });
}

#[test]
fn more_requests_than_a_ring_holds_are_all_served() {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock"));
    let queue = address.clone().bind().unwrap();
    let many = 3 * ENTRIES;
    let pool = pool(many);
    let requester = address.requester(&pool).unwrap();
    // The first one comes with the segments, which somebody has to read.
    thread::scope(|scope| {
        scope.spawn(|| queue.recv(soon()).unwrap().refuse(Refusal::NotFound).unwrap());
        let (request, transfer) = pool.lease(soon()).unwrap().request("first").unwrap();
        requester.send(request, soon()).unwrap();
        assert!(matches!(transfer.reply(soon()).unwrap(), Reply::Refused(Refusal::NotFound)));
    });
    // Nobody takes any before all are sent.
    let transfers: Vec<_> = (0..many)
        .map(|n| {
            let (request, transfer) = pool.lease(soon()).unwrap().request(n.to_string()).unwrap();
            requester.send(request, soon()).unwrap();
            transfer
        })
        .collect();
    let mut taken = BTreeSet::new();
    for _ in 0..many {
        let transfer = queue.recv(soon()).unwrap();
        let key = String::from_utf8(transfer.key().to_vec()).unwrap();
        assert!(taken.insert(key.clone()), "taken twice");
        transfer.refuse(Refusal::other(key.parse().unwrap())).unwrap();
    }
    for (n, transfer) in transfers.into_iter().enumerate() {
        let Reply::Refused(Refusal::Other { code, .. }) = transfer.reply(soon()).unwrap() else {
            panic!("{n}")
        };
        assert_eq!(usize::from(code), n);
    }
    assert!(matches!(queue.recv(Deadline::after(Duration::ZERO)), Err(Error::Timeout(_))));
}

#[test]
fn a_worker_that_is_held_up_holds_up_nobody_else() {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock"));
    let queue = address.clone().bind().unwrap();
    let pool = pool(8);
    let requester = address.requester(&pool).unwrap();
    let ask = || {
        let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        requester.send(request, soon()).unwrap();
        transfer
    };
    // Each worker takes one request, and keeps it: whatever the ring held when it was woken, and however
    // the others slept or looked by then, the next request must find the next worker.
    for _ in 0..200 {
        thread::scope(|scope| {
            let (taken, taking) = mpsc::channel();
            for _ in 0..4 {
                let (taken, queue) = (taken.clone(), &queue);
                scope.spawn(move || taken.send(queue.recv(soon()).unwrap()).unwrap());
            }
            let first = ask();
            let held = taking.recv().unwrap();
            let others = [ask(), ask(), ask()];
            let rest: Vec<_> = (0..3).map(|_| taking.recv().unwrap()).collect();
            for transfer in rest.into_iter().chain([held]) {
                transfer.refuse(Refusal::NotFound).unwrap();
            }
            for transfer in others.into_iter().chain([first]) {
                assert!(matches!(
                    transfer.reply(soon()).unwrap(),
                    Reply::Refused(Refusal::NotFound)
                ));
            }
        });
    }
}

#[test]
fn busy_rings_keep_no_newcomer_out() {
    with_echoes(1, |address| {
        let (over, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let pool = pool(2);
                    let requester = address.clone().requester(&pool).unwrap();
                    while !over.load(SeqCst) {
                        echoes(&requester, &pool, b"busy");
                        asked.fetch_add(1, SeqCst);
                    }
                });
            }
            for _ in 0..20 {
                let before = asked.load(SeqCst);
                let limit = soon();
                while asked.load(SeqCst) < before + 50 {
                    assert!(!limit.has_passed(), "the others are not served");
                    thread::yield_now();
                }
                let pool = pool(1);
                let requester = address.clone().requester(&pool).unwrap();
                echoes(&requester, &pool, b"new");
                echoes(&requester, &pool, &[b'k'; KEY_LIMIT]);
            }
            over.store(true, SeqCst);
        });
    });
}

#[test]
fn more_clients_than_are_looked_at_at_a_time_are_all_served() {
    with_echoes(2, |address| {
        thread::scope(|scope| {
            for client in 0..40u32 {
                scope.spawn(move || {
                    let pool = pool(1);
                    let requester = address.clone().requester(&pool).unwrap();
                    for n in 0..100u32 {
                        echoes(&requester, &pool, format!("{client} {n}").as_bytes());
                    }
                });
            }
        });
    });
}

#[test]
fn a_client_at_its_limit_is_served_again_once_its_old_requests_end() {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock"));
    let queue = Arc::new(address.clone().bind().unwrap());
    let pool = pool(1);
    let requester = address.requester(&pool).unwrap();
    for round in 0..3 {
        let ask = || {
            let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
            requester.send(request, soon()).unwrap();
            transfer
        };
        // As many as may be under way, each withdrawn and asked anew while a worker holds it.
        let mut held = Vec::new();
        for _ in 0..2 * pool.stats().segments + 8 {
            let withdrawn = ask();
            held.push(queue.recv(soon()).unwrap());
            drop(withdrawn);
        }
        let transfer = ask();
        let early = queue.recv(Deadline::after(Duration::from_millis(20))).map(drop);
        assert!(matches!(early, Err(Error::Timeout(_))), "one too many: {early:?}");

        // Once with a worker that comes later, once with one that sleeps and is to be woken.
        let (told, said) = mpsc::channel();
        let worker = thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                told.send(rustix::thread::gettid()).unwrap();
                queue.recv(soon())
            }
        });
        let stat = format!("/proc/self/task/{}/stat", said.recv().unwrap().as_raw_nonzero());
        let sleeps = || std::fs::read_to_string(&stat).unwrap().contains(") S ");
        while round > 0 && !sleeps() {
            thread::yield_now();
        }
        drop(held);
        worker.join().unwrap().unwrap().refuse(Refusal::NotFound).unwrap();
        assert!(matches!(transfer.reply(soon()), Ok(Reply::Refused(Refusal::NotFound))));
    }
}
