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
