//! When a sender puts off waking its receiver.

use std::time::Duration;

use super::*;
use crate::channel::{InProcess, RequestQueue, Requester};
use crate::segment::{Memfd, SegmentPool};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// Both sides of a transfer of unknown size, with more waiters than processors.
fn crowded(in_batches: bool) -> (ShmTransfer<Sender, Sending>, impl Sized) {
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(8).slots(8).create().unwrap();
    let queue = InProcess::bounded(1);
    let (request, asking) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    let mut sending = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
    sending.state.in_batches = in_batches;
    let crowd: Vec<_> = (0..4096).map(|_| Waiter::among(&SENDERS)).collect();
    (sending, (asking, crowd))
}

/// Sends a chunk; says whether the receiver's wake-up was put off.
fn puts_off(sending: &mut ShmTransfer<Sender, Sending>) -> bool {
    let _ = sending.next_slot(soon()).unwrap();
    let is_put_off = sending.state.in_batches && sending.side.puts_off_wake_up();
    sending.next_slot(soon()).unwrap().send(b"x").unwrap();
    is_put_off
}

#[test]
fn a_wake_up_is_put_off_for_a_batch_of_a_fast_source() {
    let (mut sending, _others) = crowded(true);
    assert!(!puts_off(&mut sending), "the first chunk announces");
    // More than one try: this thread may be preempted in the middle of one.
    assert!((0..3).any(|_| puts_off(&mut sending)));
    while sending.side.header().free.permits() > 4 {
        puts_off(&mut sending);
    }
    assert!(!puts_off(&mut sending), "more than half is filled");
}

#[test]
fn no_chunk_of_a_slow_source_waits_for_the_next_one() {
    let (mut sending, _others) = crowded(true);
    for _ in 0..7 {
        std::thread::sleep(2 * BUDGET); // makes the source slow
        assert!(!puts_off(&mut sending));
    }
}

#[test]
fn whoever_may_take_its_time_puts_no_wake_up_off() {
    let (mut sending, _others) = crowded(false);
    assert!((0..8).all(|_| !puts_off(&mut sending)));
}
