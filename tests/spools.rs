//! Setting bodies aside, by the library alone: who is cut, and whom it must not touch.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use shmferry::channel::{InProcess, RequestQueue, Requester};
use shmferry::error::Awaited;
use shmferry::protocol::{Receiver, Receiving, Reply, ShmTransfer, Spool};
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error};
use shmferry_test_support::watchdog::watchdog;

/// More than a socket's buffers take.
const LEN: usize = 4 << 20;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn pool(segments: u32) -> SegmentPool<Memfd> {
    SegmentPool::builder().segments(segments).segment_len(1 << 20).slots(16).create().unwrap()
}

fn ask(
    pool: &SegmentPool<Memfd>,
    queue: &InProcess,
    key: &[u8],
) -> ShmTransfer<Receiver, Receiving> {
    let Ok(Reply::Found(body)) = queue.ask(pool.lease(soon()).unwrap(), key, soon()) else {
        panic!("refused")
    };
    body
}

/// Those that wait in line must not keep it from its time-out: each look at the line used to begin it
/// anew.
#[test]
fn a_client_that_stops_is_cut_though_others_wait_and_the_spool_has_no_room() {
    let _watchdog = watchdog();
    let (pool, queue, spool) = (pool(1), InProcess::bounded(1), Spool::new(0));
    let serving = queue.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut sending = serving.recv(soon()).unwrap().accept(LEN as u64).unwrap();
            let _ = sending.write_all(&vec![7; LEN]); // cancelled in the midst
        });
        let mut stopped = ask(&pool, &queue, b"key");
        stopped.set_timeout(Duration::from_secs(1));
        let (_silent, socket) = UnixStream::pair().unwrap();
        let cut = scope.spawn(|| stopped.copy_to_or_spool(socket, &spool));
        // Only when it is cut is there a segment.
        drop(pool.lease(soon()).unwrap());
        assert!(matches!(cut.join().unwrap(), Err(Error::Timeout(Awaited::Sink))));
    });
    assert_eq!(spool.bodies(), 0);
}

/// A body whose sender is slow is not worth it: its segment would not be free before its end. Its client
/// gets what there is, and the right to set aside goes to another.
#[test]
fn a_slow_sender_keeps_neither_the_spool_nor_its_own_client_waiting() {
    let _watchdog = watchdog();
    let (pool, queue, spool) = (pool(2), InProcess::bounded(2), Spool::new(1 << 30));
    const BEGINNING: usize = 900 << 10; // less than its segment holds
    let (go_on, told) = mpsc::channel::<()>();
    let serving = queue.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut slow = serving.recv(soon()).unwrap().accept(LEN as u64).unwrap();
            slow.write_all(&vec![1; BEGINNING]).unwrap();
            slow.flush().unwrap();
            let mut fast = serving.recv(soon()).unwrap().accept(LEN as u64).unwrap();
            fast.write_all(&vec![2; LEN]).unwrap();
            told.recv().unwrap();
            slow.write_all(&vec![1; LEN - BEGINNING]).unwrap();
        });
        let (slow, fast) = (ask(&pool, &queue, b"slow"), ask(&pool, &queue, b"fast"));
        let (mut eager, slow_socket) = UnixStream::pair().unwrap();
        let (mut stopped, fast_socket) = UnixStream::pair().unwrap();
        let sent = scope.spawn(|| slow.copy_to_or_spool(slow_socket, &spool));
        let line = scope.spawn(|| pool.lease(soon()).map(drop));
        let aside = scope.spawn(|| fast.copy_to_or_spool(fast_socket, &spool));
        // The stopped client's segment is free, whatever the slow sender does.
        line.join().unwrap().unwrap();
        // All that the slow one has sent reaches its client, though it sends no more for now.
        let mut bytes = vec![0; LEN];
        eager.read_exact(&mut bytes[..BEGINNING]).unwrap();
        go_on.send(()).unwrap();
        eager.read_exact(&mut bytes[BEGINNING..]).unwrap();
        assert!(bytes == vec![1; LEN]);
        assert_eq!(sent.join().unwrap().unwrap(), LEN as u64);
        stopped.read_exact(&mut bytes).unwrap();
        assert!(bytes == vec![2; LEN]);
        assert_eq!(aside.join().unwrap().unwrap(), LEN as u64);
    });
    assert_eq!((spool.bodies(), spool.in_use()), (1, 0));
}

/// Two clients that have stopped, and room for what is left of one of them.
#[test]
fn no_more_is_set_aside_than_the_limit_allows() {
    let _watchdog = watchdog();
    let (pool, queue) = (pool(2), InProcess::bounded(2));
    let spool = Spool::new(LEN as u64 + LEN as u64 / 2);
    let serving = queue.clone();
    thread::scope(|scope| {
        for _ in 0..2 {
            let serving = serving.clone();
            scope.spawn(move || {
                let mut sending = serving.recv(soon()).unwrap().accept(LEN as u64).unwrap();
                let _ = sending.write_all(&vec![7; LEN]); // cancelled in the midst, one of them
            });
        }
        let (mut first, socket) = UnixStream::pair().unwrap();
        let (second, other) = UnixStream::pair().unwrap();
        let (one, two) = (ask(&pool, &queue, b"one"), ask(&pool, &queue, b"two"));
        let spool = &spool;
        scope.spawn(move || one.copy_to_or_spool(socket, spool));
        scope.spawn(move || two.copy_to_or_spool(other, spool));
        let lease = pool.lease(soon()).unwrap();
        // Ten looks at the line, and more.
        let none = pool.lease(Deadline::after(Duration::from_millis(1500)));
        assert!(matches!(none, Err(Error::Timeout(Awaited::Lease))));
        assert_eq!(spool.bodies(), 1);
        drop((lease, second));
        let _ = first.read_to_end(&mut Vec::new());
    });
    assert_eq!(spool.in_use(), 0);
}
