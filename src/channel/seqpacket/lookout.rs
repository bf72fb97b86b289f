//! Which worker looks at the rings, and which sleep: so that no request waits for nobody, and no worker
//! is woken where one is awake.
//!
//! A worker without work looks at the *active* rings, those that have lately been posted to. If there is
//! nothing, one worker at a time goes on looking for a moment, while that can pay; clients need not knock
//! meanwhile. Then it sleeps. A ring that nobody looks at is armed: its client knocks, on its connection.
//!
//! What must hold, at any time: if a ring has a request, then a worker is awake and will look before
//! it sleeps, or a knock is on its way. So whoever stops looking while others sleep, be it to sleep as well or to
//! serve a request, arms the active rings first, and if one has a request by then, another worker is woken for it.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::sync::modelled::{Mutex, lock};
use crate::sync::{BUDGET, Spinner, current_cpu};

/// How many rings are active at most, unless more have requests.
const MOST_ACTIVE: usize = if cfg!(loom) { 1 } else { 16 };

/// A ring, as far as looking at it goes.
pub(super) trait Watched {
    /// Whether there is something to take.
    fn has_work(&self) -> bool;
    /// Has its client knock from now on; `true` if there is something to take already.
    fn arm(&self) -> bool;
    /// Lets its client post without a knock.
    fn disarm(&self);
    /// Whether its client waits for nothing now, so that its next request may come at any moment.
    fn is_at_rest(&self) -> bool;
    /// The processor that its client last posted from.
    fn client_cpu(&self) -> u32;
}

/// What the workers of one queue know of each other.
pub(super) struct Lookout<R> {
    state: Mutex<State<R>>,
}

struct State<R> {
    /// Rings that workers look at, the one that was looked at longest ago first. All others are armed.
    active: VecDeque<Arc<R>>,
    /// With the one worker that goes on looking, while there is one.
    spinner: Option<Spinner>,
    /// Workers that sleep, or are about to.
    asleep: usize,
}

impl<R: Watched> Lookout<R> {
    pub(super) fn new() -> Lookout<R> {
        let state = State { active: VecDeque::new(), spinner: Some(Spinner::new()), asleep: 0 };
        Lookout { state: Mutex::new(state) }
    }

    /// Has workers look at a ring. For one whose client knocked.
    pub(super) fn activate(&self, ring: &Arc<R>) {
        let mut state = lock(&self.state);
        if state.active.iter().any(|active| Arc::ptr_eq(active, ring)) {
            return;
        }
        state.active.push_back(Arc::clone(ring));
        for _ in MOST_ACTIVE..state.active.len() {
            let Some(oldest) = state.active.pop_front() else { return };
            if oldest.arm() {
                state.active.push_back(oldest); // it is in use
            }
        }
    }

    /// Forgets a ring.
    pub(super) fn forget(&self, ring: &Arc<R>) {
        lock(&self.state).active.retain(|active| !Arc::ptr_eq(active, ring));
    }

    /// A ring with something to take, each in its turn.
    pub(super) fn find(&self) -> Option<Arc<R>> {
        lock(&self.state).find()
    }

    /// As [`find`](Self::find), but goes on looking for a moment, where that can pay and nobody else
    /// does it; `over` ends it before its time.
    pub(super) fn look(&self, over: impl Fn() -> bool) -> Option<Arc<R>> {
        let (mut spinner, is_elsewhere) = {
            let mut state = lock(&self.state);
            let cpu = current_cpu();
            let is_elsewhere = state.active.iter().any(|ring| ring.client_cpu() != cpu);
            // While transfers are under way, there is better use for a processor.
            let can_pay = !state.active.is_empty() && state.active.iter().all(|ring| ring.is_at_rest());
            let spinner = if can_pay { state.spinner.take() } else { None }?;
            state.active.iter().for_each(|ring| ring.disarm());
            (spinner, is_elsewhere)
        };
        let attempt = || match self.find() {
            None if over() => Some(None),
            None => None,
            found => Some(found),
        };
        let found = spinner.spin(is_elsewhere, BUDGET, attempt).flatten();
        lock(&self.state).spinner = Some(spinner);
        found
    }

    /// Says that this worker sleeps from now on; `false` if it must not, for there is something to take.
    pub(super) fn lie_down(&self) -> bool {
        let mut state = lock(&self.state);
        state.asleep += 1;
        let must_stay = state.arm();
        if must_stay {
            state.asleep -= 1;
        }
        !must_stay
    }

    /// Says that this worker is awake again.
    pub(super) fn rise(&self) {
        lock(&self.state).asleep -= 1;
    }

    /// Says that this worker goes to serve a request; `true` if it has to wake another first.
    pub(super) fn leave(&self) -> bool {
        let state = lock(&self.state);
        state.asleep > 0 && state.arm()
    }
}

impl<R: Watched> State<R> {
    fn find(&mut self) -> Option<Arc<R>> {
        let place = self.active.iter().position(|ring| ring.has_work())?;
        self.active.rotate_left(place + 1);
        self.active.back().cloned()
    }

    /// Arms the rings, unless somebody looks; `true` if one of them has something to take.
    fn arm(&self) -> bool {
        // Whoever looks comes by here, or lies down, when it stops.
        self.spinner.is_some() && self.active.iter().any(|ring| ring.arm())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

    /// A ring of a client that posts from another processor.
    #[derive(Default)]
    struct Fake {
        work: AtomicU32,
        armed: AtomicBool,
        busy: AtomicBool,
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
    }

    fn ring() -> Arc<Fake> {
        Arc::new(Fake { armed: AtomicBool::new(true), ..Default::default() })
    }

    fn looking_at(rings: &[Arc<Fake>]) -> Lookout<Fake> {
        let lookout = Lookout::new();
        rings.iter().for_each(|ring| lookout.activate(ring));
        lookout
    }

    #[test]
    fn rings_with_work_take_turns() {
        let rings = [(); 4].map(|()| ring());
        let lookout = looking_at(&rings);
        assert!(lookout.find().is_none());
        [0, 1, 3].iter().for_each(|n: &usize| rings[*n].work.store(1, Relaxed));
        let found: Vec<_> = (0..6).map(|_| lookout.find().unwrap()).collect();
        let order: Vec<_> = found
            .iter()
            .map(|found| rings.iter().position(|ring| Arc::ptr_eq(ring, found)).unwrap())
            .collect();
        assert_eq!(order, [0, 1, 3, 0, 1, 3]);
        lookout.forget(&rings[1]);
        assert!(!Arc::ptr_eq(&lookout.find().unwrap(), &rings[1]));
    }

    #[test]
    fn whoever_sleeps_arms_the_rings_and_stays_awake_for_work() {
        let rings = [ring(), ring()];
        let lookout = looking_at(&rings);
        rings.iter().for_each(|ring| ring.armed.store(false, Relaxed));
        assert!(lookout.lie_down());
        assert!(rings.iter().all(|ring| ring.armed.load(Relaxed)));
        rings[1].work.store(1, Relaxed);
        assert!(!lookout.lie_down());
        // One sleeps: it is woken for what there is.
        assert!(lookout.leave());
        rings[1].work.store(0, Relaxed);
        assert!(!lookout.leave());
        // Nobody does: whoever comes back looks.
        lookout.rise();
        rings[1].work.store(1, Relaxed);
        rings[0].armed.store(false, Relaxed);
        assert!(!lookout.leave() && !rings[0].armed.load(Relaxed));
    }

    #[test]
    fn one_goes_on_looking_where_that_can_pay() {
        let ring = ring();
        let lookout = looking_at(std::slice::from_ref(&ring));
        // What comes while it looks is found.
        let looks = Cell::new(0);
        let found = lookout.look(|| {
            assert!(!ring.armed.load(Relaxed), "clients need not knock meanwhile");
            // Another one that sleeps now leaves the bell to whoever looks, and so does one that leaves.
            assert!(lookout.lie_down() && !lookout.leave() && !ring.armed.load(Relaxed));
            lookout.rise();
            assert!(lookout.look(|| unreachable!("two look")).is_none());
            looks.set(looks.get() + 1);
            ring.work.store(u32::from(looks.get() == 3), Relaxed);
            false
        });
        assert!(found.is_some() && looks.get() == 3, "{looks:?}");
        ring.work.store(0, Relaxed);
        // Told that it is over.
        looks.set(0);
        assert!(lookout.look(|| looks.replace(looks.get() + 1) == 1).is_none());
        assert_eq!(looks.get(), 2);
        // A client with a transfer under way is no reason to look.
        ring.busy.store(true, Relaxed);
        assert!(lookout.look(|| unreachable!("it looks")).is_none());
        // Nor is one on this processor: one look, and no more.
        let here = Arc::new(Fake { is_here: true, ..Default::default() });
        let lookout = looking_at(&[here]);
        looks.set(0);
        if lookout.look(|| looks.replace(looks.get() + 1) > 1000).is_none() {
            assert!(looks.get() <= 1001, "it may have moved to another processor");
        }
    }

    #[test]
    fn the_ring_that_was_used_longest_ago_is_put_aside_armed() {
        let rings: Vec<_> = (0..MOST_ACTIVE).map(|_| ring()).collect();
        let lookout = looking_at(&rings);
        rings.iter().for_each(|ring| ring.armed.store(false, Relaxed));
        rings[0].work.store(1, Relaxed);
        lookout.activate(&ring());
        // The first has work, and stays.
        assert!(lookout.find().is_some_and(|found| Arc::ptr_eq(&found, &rings[0])));
        lookout.activate(&ring());
        assert!(rings[1].armed.load(Relaxed) && !rings[5].armed.load(Relaxed));
        lookout.activate(&rings[5]);
        assert_eq!(lock(&lookout.state).active.len(), MOST_ACTIVE, "none twice");
    }
}
