//! The queue within one process, under workers that lend their places.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use shmferry::channel::{InProcess, RequestQueue, Requester};
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::workers::WorkerPool;
use shmferry::{Deadline, Error};
use shmferry_test_support::watchdog::watchdog;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// A crew whose jobs are closures.
fn workers(places: usize) -> (mpsc::Sender<Box<dyn FnOnce() + Send>>, WorkerPool) {
    let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
    let inbox = Mutex::new(inbox);
    let next = move || inbox.lock().unwrap().recv().ok();
    (jobs, WorkerPool::start("test", places, next, |job| job()).unwrap())
}

fn pool() -> SegmentPool<Memfd> {
    SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1).create().unwrap()
}

/// Both ends in one crew of one place: the send lends its place while it waits for the receiver.
#[test]
fn both_ends_in_a_crew_of_one_place_meet() {
    let _watchdog = watchdog();
    for room in [0, 1, 4] {
        let (pool, queue) = (pool(), InProcess::bounded(room));
        let (jobs, workers) = workers(1);
        let full = (0..room.min(1)).map(|_| {
            let (request, transfer) = pool.lease(soon()).unwrap().request("first").unwrap();
            queue.send(request, soon()).unwrap();
            transfer
        });
        let full: Vec<_> = full.collect();
        let (sending, receiving) = (queue.clone(), queue.clone());
        let results = Arc::new(Mutex::new(Vec::new()));
        let (sent, received) = (Arc::clone(&results), Arc::clone(&results));
        let requests = 1 + full.len();
        let (begins, has_begun) = mpsc::channel();
        jobs.send(Box::new(move || {
            let (request, transfer) = pool.lease(soon()).unwrap().request("second").unwrap();
            begins.send(()).unwrap();
            let outcome = sending.send(request, soon()).map_err(Error::from);
            sent.lock().unwrap().push(outcome.is_ok());
            drop(transfer);
        }))
        .unwrap();
        has_begun.recv().unwrap(); // it has the place
        jobs.send(Box::new(move || {
            for _ in 0..requests {
                let outcome = receiving.recv(soon());
                received.lock().unwrap().push(outcome.is_ok());
            }
        }))
        .unwrap();
        drop(jobs);
        assert!(workers.join(soon()), "room for {room}");
        assert_eq!(*results.lock().unwrap(), vec![true; 1 + requests]);
        drop(full);
    }
}

/// A sender that waits for room has lent its place. When there is room, its request is there for a
/// receiver at once, though the sender has no place yet to go on in.
#[test]
fn a_sender_that_waits_for_its_place_keeps_no_receiver_waiting() {
    let _watchdog = watchdog();
    for room in [0, 1] {
        let (pool, queue) = (pool(), InProcess::bounded(room));
        let (jobs, workers) = workers(1);
        let mut full = Vec::new();
        for _ in 0..room {
            let (first, transfer) = pool.lease(soon()).unwrap().request("first").unwrap();
            queue.send(first, soon()).unwrap();
            full.push(transfer);
        }
        let (release, gate) = mpsc::channel::<()>();
        let sending = queue.clone();
        let (begins, has_begun) = mpsc::channel();
        jobs.send(Box::new(move || {
            let (request, _transfer) = pool.lease(soon()).unwrap().request("second").unwrap();
            begins.send(()).unwrap();
            sending.send(request, soon()).unwrap();
        }))
        .unwrap();
        has_begun.recv().unwrap(); // it has the place
        // Has the place as soon as the sender, which finds no room, lends it; keeps it to the end.
        let (has_place, place_taken) = mpsc::channel();
        jobs.send(Box::new(move || {
            has_place.send(()).unwrap();
            gate.recv().unwrap();
        }))
        .unwrap();
        place_taken.recv().unwrap();
        for _ in 0..room {
            drop(queue.recv(soon()).unwrap());
        }
        assert_eq!(queue.recv(soon()).expect("the request is there").key(), b"second");
        release.send(()).unwrap();
        drop(jobs);
        assert!(workers.join(soon()));
    }
}
