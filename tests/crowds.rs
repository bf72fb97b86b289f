//! Many clients of one socket server: more than any constant in the code, each answered every time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use shmferry::{Deadline, Error, Memfd, Refusal, Reply, RequestQueue, Requester, SegmentPool, Seqpacket};
use watchdog::watchdog;

mod watchdog;

/// How long each crowd asks.
const ASKING: Duration = Duration::from_secs(4);

/// Far longer than any request takes on a busy machine. One that takes longer is lost.
const LOST: Duration = Duration::from_secs(20);

/// So many clients, each with a connection of its own, ask one server of so many workers, and pause
/// for so long between their requests. Returns how many were answered and lost.
fn crowd(clients: usize, workers: usize, pause: Duration) -> (u64, u64) {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let address = Seqpacket::new(dir.path().join("queue.sock"));
    let queue = Arc::new(address.clone().bind().unwrap());
    let (answered, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..workers {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                while let Ok(transfer) = queue.recv(Deadline::NEVER) {
                    let _ = transfer.refuse(Refusal::NotFound); // its client may have given up
                }
            });
        }
        let asking: Vec<_> = (0..clients)
            .map(|_| {
                let (address, answered, lost) = (address.clone(), &answered, &lost);
                scope.spawn(move || {
                    let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1);
                    let pool = pool.create().unwrap();
                    let requester = address.requester(&pool).unwrap();
                    let start = Instant::now();
                    while start.elapsed() < ASKING {
                        let deadline = Deadline::after(LOST);
                        let (request, transfer) = pool.lease(deadline).unwrap().request("key").unwrap();
                        requester.send(request, deadline).unwrap();
                        match transfer.reply(deadline) {
                            Ok(Reply::Refused(Refusal::NotFound)) => answered.fetch_add(1, Relaxed),
                            Err(Error::Timeout(_)) => lost.fetch_add(1, Relaxed),
                            other => panic!("{other:?}"),
                        };
                        thread::sleep(pause); // as clients do that have something else to do
                    }
                })
            })
            .collect();
        asking.into_iter().for_each(|client| client.join().unwrap());
        queue.close();
    });
    (answered.into_inner(), lost.into_inner())
}

#[test]
fn more_clients_than_rings_that_are_looked_at_are_all_answered() {
    for (clients, workers) in [(24, 8), (64, 1), (40, 2), (100, 8)] {
        let (answered, lost) = crowd(clients, workers, Duration::from_micros(100));
        println!("{clients} clients, {workers} workers: {answered} answered, {lost} lost");
        assert_eq!(lost, 0, "{clients} clients, {workers} workers, {answered} answered");
    }
}
