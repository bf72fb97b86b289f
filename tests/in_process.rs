//! The queue within one process, under workers that lend their places.

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use shmferry::{Crew, Deadline, Error, InProcess, Memfd, RequestQueue, Requester, SegmentPool, lend};
use watchdog::watchdog;

mod watchdog;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// A crew whose jobs are closures.
fn crew(places: usize) -> (mpsc::Sender<Box<dyn FnOnce() + Send>>, Crew) {
    let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
    let inbox = Mutex::new(inbox);
    let next = move || inbox.lock().unwrap().recv().ok();
    (jobs, Crew::start("test", places, next, |job| job()).unwrap())
}

fn pool() -> SegmentPool<Memfd> {
    SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1).create().unwrap()
}

/// A request that is sent while all places of its worker's crew are taken is there for a receiver at
/// once: it does not wait for the worker's place.
#[test]
fn a_send_whose_worker_has_to_wait_for_its_place_keeps_no_receiver_waiting() {
    let _watchdog = watchdog();
    for room in [0, 1] {
        let (pool, queue) = (pool(), InProcess::bounded(room));
        let (jobs, crew) = crew(1);
        let (release, gate) = mpsc::channel::<()>();
        let (taken, place_taken) = mpsc::channel();
        let (asked, transfers) = mpsc::channel();
        let sending = queue.clone();
        jobs.send(Box::new(move || {
            let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
            // The other job has the only place when this one sends.
            lend(|| place_taken.recv().unwrap());
            sending.send(request, soon()).unwrap();
            asked.send(transfer).unwrap();
        }))
        .unwrap();
        // Keeps the place until the test has received: with the slot still reserved it never would.
        jobs.send(Box::new(move || {
            taken.send(()).unwrap();
            gate.recv().unwrap();
        }))
        .unwrap();
        // Without a loan around all of it, the first job would now wait for its place to send.
        release.send(()).unwrap();
        let transfer = queue.recv(soon()).unwrap();
        transfer.refuse(shmferry::Refusal::NotFound).unwrap();
        let asked = transfers.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(asked.reply(soon()), Ok(shmferry::Reply::Refused(_))));
        drop(jobs);
        assert!(crew.join(soon()));
    }
}

/// Both ends in one crew of one place: the send lends its place while it waits for the receiver.
#[test]
fn both_ends_in_a_crew_of_one_place_meet() {
    let _watchdog = watchdog();
    for room in [0, 1, 4] {
        let (pool, queue) = (pool(), InProcess::bounded(room));
        let (jobs, crew) = crew(1);
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
        jobs.send(Box::new(move || {
            let (request, transfer) = pool.lease(soon()).unwrap().request("second").unwrap();
            let outcome = sending.send(request, soon()).map_err(Error::from);
            sent.lock().unwrap().push(outcome.is_ok());
            drop(transfer);
        }))
        .unwrap();
        jobs.send(Box::new(move || {
            for _ in 0..requests {
                let outcome = receiving.recv(soon());
                received.lock().unwrap().push(outcome.is_ok());
            }
        }))
        .unwrap();
        drop(jobs);
        assert!(crew.join(soon()), "room for {room}");
        assert_eq!(*results.lock().unwrap(), vec![true; 1 + requests]);
        drop(full);
    }
}

/// A receiver's deadline holds whatever a sender does at that moment.
#[test]
fn a_receiver_meets_its_deadline_while_a_sender_waits_for_its_place() {
    let _watchdog = watchdog();
    let (pool, queue) = (pool(), InProcess::bounded(1));
    let (jobs, crew) = crew(1);
    let (first, _first) = pool.lease(soon()).unwrap().request("first").unwrap();
    queue.send(first, soon()).unwrap();
    let (release, gate) = mpsc::channel::<()>();
    let (waits, is_waiting) = mpsc::channel();
    let sending = queue.clone();
    jobs.send(Box::new(move || {
        let (request, _transfer) = pool.lease(soon()).unwrap().request("second").unwrap();
        waits.send(()).unwrap();
        sending.send(request, soon()).unwrap();
    }))
    .unwrap();
    is_waiting.recv().unwrap();
    // Takes the place as soon as the sender, which finds the queue full, lends it.
    let (has_place, place_taken) = mpsc::channel();
    jobs.send(Box::new(move || {
        has_place.send(()).unwrap();
        gate.recv().unwrap();
    }))
    .unwrap();
    place_taken.recv().unwrap();
    // Room: the sender may send now, but has no place to go on in.
    drop(queue.recv(soon()).unwrap());
    let received = thread::scope(|scope| {
        let receiving = scope.spawn(|| queue.recv(Deadline::after(Duration::from_secs(20))));
        receiving.join().unwrap()
    });
    assert_eq!(received.expect("the second request is there").key(), b"second");
    release.send(()).unwrap();
    drop(jobs);
    assert!(crew.join(soon()));
}
