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

use crate::error::{Awaited, Error, PeerFault, Result};
use crate::peer::Link;
use crate::sync::atomic::{SeqCst, fence};
use crate::sync::modelled::{Mutex, lock};
use crate::sync::{BUDGET, Deadline, Spinner, current_cpu};

use super::ring::{Entry, Taker};

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
    /// Whether the server has hung up on its client: nothing is taken from it any more.
    fn is_over(&self) -> bool;
    /// Begins a rest: nothing is taken from it until it ends.
    fn begin_rest(&self);
    /// Ends a rest, during which nothing is taken because too many requests of its client are under
    /// way; `true` if there was one.
    fn end_rest(&self) -> bool;
}

/// Rests a ring whose client has `bound` or more requests under way; says whether it does. Its rest ends
/// with [`WakePolicy::resume`], once there are fewer.
pub(super) fn rest_at_limit(ring: &impl Watched, link: &Link, bound: usize) -> bool {
    let is_at_limit = !link.is_below(bound);
    if is_at_limit {
        ring.begin_rest();
    }
    is_at_limit
}

/// The oldest request in a ring. None once the server has hung up: its client may ask another server for
/// what was not taken by then. To be called under the lock under which that is said.
pub(super) fn next_entry(ring: &impl Watched, taker: &Taker) -> Result<Option<Entry>, PeerFault> {
    if ring.is_over() { Ok(None) } else { taker.peek() }
}

/// What workers do beside deciding who looks: the queue in the product, a stand-in in the model. The
/// steps between these calls, and so every decision who is woken, are the same code in both.
pub(super) trait Door {
    /// What requests stand in.
    type Ring: Watched;
    /// What a worker sleeps for.
    type Event;
    /// What a worker is after.
    type Request;

    /// Takes a request from a ring; `None` when another worker was quicker.
    fn take(&self, ring: &Arc<Self::Ring>) -> Result<Option<Self::Request>>;
    /// Sleeps until an event comes; `None` at the deadline, and when woken by [`wake_one`](Self::wake_one).
    fn sleep(&self, deadline: Deadline) -> Result<Option<Self::Event>>;
    /// Does what an event asks for: reads a client's messages, or lets a client in.
    fn attend(&self, event: Self::Event) -> Result<Attended<Self::Ring, Self::Request>>;
    /// Wakes one worker that sleeps, or the next that goes to sleep.
    fn wake_one(&self);
    /// Whether it is the turn of the connections, although rings may have requests.
    fn is_look_due(&self) -> bool;
    /// Fails once no more requests are to be taken.
    fn check_open(&self) -> Result<()>;
}

/// What came of an event.
pub(super) struct Attended<R, T> {
    /// The ring of the client that was heard from, if it has one.
    pub(super) ring: Option<Arc<R>>,
    /// A request that came as a message.
    pub(super) request: Option<T>,
}

impl<R, T> Attended<R, T> {
    /// Nothing came of it.
    pub(super) fn nothing() -> Self {
        Attended { ring: None, request: None }
    }
}

/// What the workers of one queue know of each other.
pub(super) struct WakePolicy<R> {
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

impl<R: Watched> WakePolicy<R> {
    pub(super) fn new() -> WakePolicy<R> {
        let state = State { active: VecDeque::new(), spinner: Some(Spinner::new()), asleep: 0 };
        WakePolicy { state: Mutex::new(state) }
    }

    /// Takes the next request, waiting for one until the deadline. What every worker runs.
    pub(super) fn recv<D: Door<Ring = R>>(
        &self,
        door: &D,
        deadline: Deadline,
    ) -> Result<D::Request> {
        let taken = loop {
            match self.step(door, deadline) {
                Ok(Some(request)) => break Ok(request),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
        };
        if self.leave() {
            door.wake_one();
        }
        taken
    }

    /// A request from a ring or a connection; `None` when there may be one now.
    fn step<D: Door<Ring = R>>(&self, door: &D, deadline: Deadline) -> Result<Option<D::Request>> {
        door.check_open()?;
        let must_look = door.is_look_due();
        if !must_look {
            let is_over = || deadline.has_passed() || door.check_open().is_err();
            if let Some(ring) = self.find().or_else(|| self.look(is_over)) {
                return door.take(&ring);
            }
        }
        let event = if must_look {
            door.sleep(Deadline::after(std::time::Duration::ZERO))?
        } else if self.prepare_sleep() {
            let woken = door.sleep(deadline);
            self.rise();
            woken?
        } else {
            return Ok(None);
        };
        match event {
            Some(event) => {
                let heard = door.attend(event)?;
                // Always, even if the ring is empty by now. Its client has lowered the bell, and so
                // relies on a worker that looks. The request may be gone already: to a worker that
                // found the ring earlier, was preempted, and takes what came later.
                if let Some(ring) = &heard.ring {
                    self.activate(ring);
                }
                Ok(heard.request)
            }
            None if !must_look && deadline.has_passed() => Err(Error::Timeout(Awaited::Request)),
            None => Ok(None),
        }
    }

    /// Ends a client's rest: it may have fewer requests under way than the limit. Workers look at its
    /// ring again; one that sleeps is woken for what stands there.
    pub(super) fn resume(&self, ring: &Arc<R>, wake_one: impl FnOnce()) {
        if !ring.end_rest() {
            return;
        }
        // The rest ends, fence, look for work. A worker that goes to sleep: arm, fence, look whether
        // the ring rests. One of the two sees the request; see the orderings of the ring, pair 3.
        fence(SeqCst);
        if ring.has_work() {
            self.activate(ring);
            wake_one();
        }
    }

    /// Has workers look at a ring, unless the server has hung up on its client.
    fn activate(&self, ring: &Arc<R>) {
        self.add(ring);
        // The one that hangs up says so first, and has the ring forgotten afterwards.
        if ring.is_over() {
            self.forget(ring);
        }
    }

    fn add(&self, ring: &Arc<R>) {
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
    fn find(&self) -> Option<Arc<R>> {
        lock(&self.state).find()
    }

    /// As [`find`](Self::find), but goes on looking for a moment, where that can pay and nobody else
    /// does it; `over` ends it before its time.
    fn look(&self, over: impl Fn() -> bool) -> Option<Arc<R>> {
        let (mut spinner, is_elsewhere) = {
            let mut state = lock(&self.state);
            let cpu = current_cpu();
            let is_elsewhere = state.active.iter().any(|ring| ring.client_cpu() != cpu);
            // While transfers are under way, there is better use for a processor.
            let can_pay =
                !state.active.is_empty() && state.active.iter().all(|ring| ring.is_at_rest());
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
    fn prepare_sleep(&self) -> bool {
        let mut state = lock(&self.state);
        state.asleep += 1;
        let must_stay = state.arm();
        if must_stay {
            state.asleep -= 1;
        }
        !must_stay
    }

    /// Says that this worker is awake again.
    fn rise(&self) {
        lock(&self.state).asleep -= 1;
    }

    /// Says that this worker goes to serve a request; `true` if it has to wake another first.
    fn leave(&self) -> bool {
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
mod tests;
