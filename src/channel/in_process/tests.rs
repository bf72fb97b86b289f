//! The queue within one process: guarantees that only it gives.

use super::*;
use crate::error::Misuse;
use crate::protocol::{Reply, Size};
use crate::segment::{Memfd, SegmentPool};
use std::thread;
use std::time::Duration;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn pool() -> SegmentPool<Memfd> {
    SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1).create().unwrap()
}

#[test]
fn a_full_queue_hands_the_request_back_as_it_was() {
    let (pool, queue) = (pool(), InProcess::bounded(1));
    let (first, _first) = pool.lease(soon()).unwrap().request("first").unwrap();
    queue.send(first, soon()).unwrap();
    let (second, transfer) = pool.lease(soon()).unwrap().request("second").unwrap();
    let back = queue.send(second, Deadline::after(Duration::from_millis(1))).unwrap_err();
    assert!(matches!(back.error, Error::Timeout(Awaited::QueueRoom)));
    assert_eq!(back.request.key(), b"second");

    // Neither withdrawn nor aborted: it can be sent again, and answered.
    assert_eq!(queue.recv(soon()).unwrap().key(), b"first");
    queue.send(back.request, soon()).unwrap();
    queue.recv(soon()).unwrap().accept(0).unwrap().finish().unwrap();
    let Reply::Found(body) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    assert_eq!(body.size(), Size::Known(0));
}

#[test]
fn closing_ends_a_send_that_waits_for_room() {
    let (pool, queue) = (pool(), InProcess::bounded(0));
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    let sender = {
        let queue = queue.clone();
        thread::spawn(move || queue.send(request, Deadline::NEVER).unwrap_err())
    };
    // It may be in its wait by then, or still on its way there.
    thread::sleep(Duration::from_millis(20));
    queue.close();
    let back = sender.join().unwrap();
    assert!(matches!(back.error, Error::Closed));
    drop(back);
    assert!(matches!(transfer.reply(soon()), Err(Error::Misuse(Misuse::NeverSent))));
    drop(pool.lease(soon()).unwrap());
    assert_eq!((pool.stats().idle, pool.stats().retired), (2, 0));
}
