//! The ring of requests, between two threads and against a peer with false positions.

use super::*;
use crate::segment::{attach_words, create_words};

fn ring() -> (Poster, Taker) {
    let (ours, fd) = create_words("test", RING_LEN).unwrap();
    let poster = Poster::new(ours);
    (poster, Taker::new(attach_words(&fd, RING_LEN).unwrap()))
}

fn take(taker: &Taker) -> Option<(u32, u64, Vec<u8>)> {
    let entry = taker.peek().unwrap()?;
    taker.advance();
    Some((entry.index, entry.generation, entry.key().to_vec()))
}

#[test]
fn requests_come_out_as_they_went_in() {
    let (poster, taker) = ring();
    assert_eq!(take(&taker), None);
    let long = vec![b'k'; KEY_ROOM];
    for round in 0..3 * ENTRIES {
        let key = &long[..(round as usize * 7) % (KEY_ROOM + 1)];
        assert_eq!(poster.post(round as u32, 1 << 50 | round, true, key), Some(round));
        assert!(!poster.was_taken(round));
        assert!(taker.has_entries());
        assert_eq!(take(&taker), Some((round as u32, 1 << 50 | round, key.to_vec())));
        assert!(poster.was_taken(round) && !taker.has_entries());
    }
    assert_eq!(poster.post(u32::MAX, u64::MAX, true, &long), Some(3 * ENTRIES));
    assert_eq!(take(&taker), Some((u32::MAX, u64::MAX, long)));
}

#[test]
fn what_does_not_fit_is_not_posted() {
    let (poster, taker) = ring();
    assert_eq!(poster.post(0, 1, true, &[b'k'; KEY_ROOM + 1]), None);
    assert!(!taker.has_entries());
    for number in 0..ENTRIES {
        assert_eq!(poster.post(0, 1, true, b"key"), Some(number));
    }
    assert_eq!(poster.post(0, 1, true, b"key"), None, "full");
    assert!(take(&taker).is_some());
    assert_eq!(poster.post(0, 1, true, b"key"), Some(ENTRIES));
    assert_eq!(poster.post(0, 1, true, b"key"), None, "full again");
}

#[test]
fn one_knock_until_the_bell_is_raised_again() {
    let (poster, taker) = ring();
    let need_wakeup = || match poster.follow(poster.post(0, 1, true, b"").unwrap(), true) {
        Posted::MustWake(need_wakeup) => Some(need_wakeup),
        posted => {
            assert_eq!(posted, Posted::Awaiting);
            None
        }
    };
    let wakeups = || need_wakeup().map(|need_wakeup| poster.lower(need_wakeup)).is_some();
    assert!(need_wakeup().is_some(), "no worker polls a new ring");
    assert!(wakeups(), "the wakeup before failed");
    assert!(!wakeups() && !wakeups());
    assert!(taker.arm(), "there is something to take");
    while take(&taker).is_some() {}
    taker.disarm();
    assert!(!wakeups());
    assert!(take(&taker).is_some());
    assert!(!taker.arm());
    let late = need_wakeup().unwrap();
    assert!(taker.arm());
    poster.lower(late);
    assert!(wakeups(), "a need_wakeup raised later is not lowered by an earlier wakeup");
    assert!(!wakeups());
}

#[test]
fn a_ring_that_lies_is_told() {
    let (poster, taker) = ring();
    poster.ring[POSTED].store(ENTRIES + 1, Relaxed);
    assert_eq!(taker.peek(), Err(PeerFault::ImpossibleRing { posted: ENTRIES + 1, taken: 0 }));
    poster.ring[POSTED].store(1, Relaxed);
    poster.ring[FIRST_ENTRY + 1].store((KEY_ROOM as u64 + 1) << 32, Relaxed);
    assert_eq!(taker.peek(), Err(PeerFault::MalformedMessage { len: KEY_ROOM + 1 }));
    poster.ring[FIRST_ENTRY + 1].store(0, Relaxed);
    assert!(take(&taker).is_some());
    poster.ring[POSTED].store(0, Relaxed);
    assert_eq!(taker.peek(), Err(PeerFault::ImpossibleRing { posted: 0, taken: 1 }));
    // The same of a server.
    poster.ring[TAKEN].store(u64::MAX, Relaxed);
    assert_eq!(poster.post(0, 1, true, b""), Some(0), "one too many taken: room for one");
    poster.ring[TAKEN].store(u64::MAX / 2, Relaxed);
    assert_eq!(poster.post(0, 1, true, b""), None);
}
