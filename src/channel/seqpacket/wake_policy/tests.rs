//! Which worker polls and which sleep, with fake rings.

use super::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// A ring of a client that posts from another processor.
#[derive(Default)]
struct Fake {
    work: AtomicU32,
    armed: AtomicBool,
    busy: AtomicBool,
    over: AtomicBool,
    is_here: bool,
}

impl Watched for Fake {
    fn has_work(&self) -> bool {
        self.work.load(Relaxed) > 0
    }

    fn arm(&self) -> bool {
        self.armed.store(true, Relaxed);
        self.has_work()
    }

    fn disarm(&self) {
        self.armed.store(false, Relaxed);
    }

    fn is_at_rest(&self) -> bool {
        !self.busy.load(Relaxed)
    }

    fn client_cpu(&self) -> u32 {
        if self.is_here { current_cpu() } else { u32::MAX - 1 }
    }

    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    fn begin_rest(&self) {}

    fn end_rest(&self) -> bool {
        false
    }
}

fn ring() -> Arc<Fake> {
    Arc::new(Fake { armed: AtomicBool::new(true), ..Default::default() })
}

fn looking_at(rings: &[Arc<Fake>]) -> WakePolicy<Fake> {
    let wake_policy = WakePolicy::new();
    rings.iter().for_each(|ring| wake_policy.activate(ring));
    wake_policy
}

#[test]
fn rings_with_work_take_turns() {
    let rings = [(); 4].map(|()| ring());
    let wake_policy = looking_at(&rings);
    assert!(wake_policy.find().is_none());
    [0, 1, 3].iter().for_each(|n: &usize| rings[*n].work.store(1, Relaxed));
    let found: Vec<_> = (0..6).map(|_| wake_policy.find().unwrap()).collect();
    let order: Vec<_> = found
        .iter()
        .map(|found| rings.iter().position(|ring| Arc::ptr_eq(ring, found)).unwrap())
        .collect();
    assert_eq!(order, [0, 1, 3, 0, 1, 3]);
    wake_policy.forget(&rings[1]);
    assert!(!Arc::ptr_eq(&wake_policy.find().unwrap(), &rings[1]));
}

#[test]
fn whoever_sleeps_arms_the_rings_and_stays_awake_for_work() {
    let rings = [ring(), ring()];
    let wake_policy = looking_at(&rings);
    rings.iter().for_each(|ring| ring.armed.store(false, Relaxed));
    assert!(wake_policy.prepare_sleep());
    assert!(rings.iter().all(|ring| ring.armed.load(Relaxed)));
    rings[1].work.store(1, Relaxed);
    assert!(!wake_policy.prepare_sleep());
    // One sleeps: it is woken for the work there is.
    assert!(wake_policy.leave());
    rings[1].work.store(0, Relaxed);
    assert!(!wake_policy.leave());
    // None sleeps: a worker that returns checks the rings.
    wake_policy.rise();
    rings[1].work.store(1, Relaxed);
    rings[0].armed.store(false, Relaxed);
    assert!(!wake_policy.leave() && !rings[0].armed.load(Relaxed));
}

#[test]
fn one_goes_on_looking_where_that_can_pay() {
    let ring = ring();
    let wake_policy = looking_at(std::slice::from_ref(&ring));
    // A request that comes during polling is found.
    let looks = Cell::new(0);
    let found = wake_policy.look(|| {
        assert!(!ring.armed.load(Relaxed), "clients need not wakeup meanwhile");
        // While one polls, another that sleeps or leaves does not arm the ring.
        assert!(wake_policy.prepare_sleep() && !wake_policy.leave() && !ring.armed.load(Relaxed));
        wake_policy.rise();
        assert!(wake_policy.look(|| unreachable!("two look")).is_none());
        looks.set(looks.get() + 1);
        ring.work.store(u32::from(looks.get() == 3), Relaxed);
        false
    });
    assert!(found.is_some() && looks.get() == 3, "{looks:?}");
    ring.work.store(0, Relaxed);
    // Ended early by `over`.
    looks.set(0);
    assert!(wake_policy.look(|| looks.replace(looks.get() + 1) == 1).is_none());
    assert_eq!(looks.get(), 2);
    // A client with a transfer under way is no reason to poll.
    ring.busy.store(true, Relaxed);
    assert!(wake_policy.look(|| unreachable!("it looks")).is_none());
    // Nor is one on this processor: a single check.
    let here = Arc::new(Fake { is_here: true, ..Default::default() });
    let wake_policy = looking_at(&[here]);
    looks.set(0);
    if wake_policy.look(|| looks.replace(looks.get() + 1) > 1000).is_none() {
        assert!(looks.get() <= 1001, "it may have moved to another processor");
    }
}

#[test]
fn the_ring_that_was_used_longest_ago_is_put_aside_armed() {
    let rings: Vec<_> = (0..MOST_ACTIVE).map(|_| ring()).collect();
    let wake_policy = looking_at(&rings);
    rings.iter().for_each(|ring| ring.armed.store(false, Relaxed));
    rings[0].work.store(1, Relaxed);
    wake_policy.activate(&ring());
    // The first has work, and stays active.
    assert!(wake_policy.find().is_some_and(|found| Arc::ptr_eq(&found, &rings[0])));
    wake_policy.activate(&ring());
    assert!(rings[1].armed.load(Relaxed) && !rings[5].armed.load(Relaxed));
    wake_policy.activate(&rings[5]);
    assert_eq!(lock(&wake_policy.state).active.len(), MOST_ACTIVE, "none twice");
}
