//! The semaphore in every interleaving and reordering, by `ci/loom.sh`.

use super::*;
use loom::sync::Arc;
use loom::thread;

struct Shared {
    filled: Semaphore,
    free: Semaphore,
    slot: AtomicU32,
    phase: AtomicU32,
}

fn shared(filled: u32, free: u32) -> Arc<Shared> {
    Arc::new(Shared {
        filled: Semaphore::with(filled),
        free: Semaphore::with(free),
        slot: AtomicU32::new(0),
        phase: AtomicU32::new(0),
    })
}

#[test]
fn a_permit_hands_over_what_was_written_before_it() {
    loom::model(|| {
        let ours = shared(0, 1);
        let theirs = Arc::clone(&ours);
        let sender = thread::spawn(move || {
            let permit = theirs.free.wait(Deadline::NEVER).unwrap();
            theirs.slot.store(7, Relaxed);
            theirs.filled.post(permit);
        });
        let permit = ours.filled.wait(Deadline::NEVER).unwrap();
        assert_eq!(ours.slot.load(Relaxed), 7);
        ours.free.post(permit);
        sender.join().unwrap();
    });
}

#[test]
fn strict_turns_lose_no_wake() {
    loom::model(|| {
        let ours = shared(0, 1);
        let theirs = Arc::clone(&ours);
        let sender = thread::spawn(move || {
            for n in 1..=2 {
                let permit = theirs.free.wait(Deadline::NEVER).unwrap();
                theirs.slot.store(n, Relaxed);
                theirs.filled.post(permit);
            }
        });
        for n in 1..=2 {
            let permit = ours.filled.wait(Deadline::NEVER).unwrap();
            assert_eq!(ours.slot.load(Relaxed), n, "a slot of another turn");
            ours.free.post(permit);
        }
        sender.join().unwrap();
    });
}

#[test]
fn poison_ends_a_wait_and_publishes_its_cause() {
    loom::model(|| {
        let ours = shared(0, 0);
        let theirs = Arc::clone(&ours);
        let other = thread::spawn(move || {
            theirs.phase.store(1, Relaxed);
            theirs.filled.poison();
        });
        assert!(matches!(ours.filled.wait(Deadline::NEVER), Err(Interrupted::Poisoned)));
        assert_eq!(ours.phase.load(Relaxed), 1);
        other.join().unwrap();
    });
}

#[test]
fn permits_are_drained_before_poison_is_told() {
    loom::model(|| {
        let ours = shared(0, 1);
        let theirs = Arc::clone(&ours);
        let sender = thread::spawn(move || {
            let permit = theirs.free.try_wait().unwrap();
            theirs.filled.post(permit);
            theirs.filled.poison();
        });
        assert!(ours.filled.wait(Deadline::NEVER).is_ok());
        assert!(matches!(ours.filled.wait(Deadline::NEVER), Err(Interrupted::Poisoned)));
        sender.join().unwrap();
    });
}

#[test]
fn a_split_post_wakes_after_the_last_write() {
    loom::model(|| {
        let ours = shared(0, 1);
        let theirs = Arc::clone(&ours);
        let sender = thread::spawn(move || {
            let permit = theirs.free.try_wait().unwrap();
            theirs.slot.store(7, Relaxed);
            theirs.filled.add(permit);
            theirs.phase.store(1, Relaxed);
            theirs.filled.wake();
        });
        assert!(ours.filled.wait(Deadline::NEVER).is_ok());
        assert_eq!(ours.slot.load(Relaxed), 7);
        sender.join().unwrap();
    });
}

#[test]
fn two_sleepers_are_both_woken() {
    loom::model(|| {
        let ours = shared(0, 2);
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let theirs = Arc::clone(&ours);
                thread::spawn(move || theirs.filled.wait(Deadline::NEVER).map(drop).unwrap())
            })
            .collect();
        for _ in 0..2 {
            ours.filled.post(ours.free.try_wait().unwrap());
        }
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    });
}
