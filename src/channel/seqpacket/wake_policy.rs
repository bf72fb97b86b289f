//! Decides which worker polls the rings and which sleep; prevents lost and redundant wake-ups.
//!
//! A worker without work checks the *active* rings: those that were posted to lately. If they are
//! empty, one worker at a time polls them for a moment, where that can pay; clients send no wakeups
//! meanwhile. Then it sleeps. A ring that is not polled is *armed*: its `NEED_WAKEUP` is raised,
//! and its client sends a wakeup over the connection.
//!
//! The invariant: if a ring has a request, then a worker is awake and will check the ring before it
//! sleeps, or a wakeup is under way. So a worker that stops polling while others sleep, to sleep as
//! well or to serve a request, arms the active rings first. If one has a request by then, it stays
//! awake, or wakes another worker.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Awaited, Error, PeerFault, Result};
use crate::peer::Link;
use crate::sync::atomic::{SeqCst, fence};
use crate::sync::modelled::{Mutex, lock};
use crate::sync::{BUDGET, Deadline, Spinner, current_cpu};

use super::ring::{Entry, Taker};

/// How many events without a request a task handles in a row.
const MOST_EVENTS: usize = 64;

/// The most active rings, unless more have requests.
const MOST_ACTIVE: usize = if cfg!(loom) { 1 } else { 16 };

/// A ring, as the policy needs it.
pub(super) trait Watched {
    /// Whether there is something to take.
    fn has_work(&self) -> bool;
    /// Requests a wakeup for its client's next post; `true` if there is something to take already.
    fn arm(&self) -> bool;
    /// Lets its client post without a wakeup.
    fn disarm(&self);
    /// Whether its client has no request under way, so that the next one may come at any moment.
    fn is_at_rest(&self) -> bool;
    /// The processor that its client last posted from.
    fn client_cpu(&self) -> u32;
    /// Whether the server has hung up on its client: no more requests are taken from it.
    fn is_over(&self) -> bool;
    /// Begins a rest: no requests are taken from the ring until it ends.
    fn begin_rest(&self);
    /// Ends a rest, which a client with too many requests under way has; `true` if there was one.
    fn end_rest(&self) -> bool;
}

/// Begins a rest if the client has `bound` or more requests under way; returns whether it does. The
/// rest ends with [`WakePolicy::resume`], once there are fewer.
pub(super) fn rest_at_limit(ring: &impl Watched, link: &Link, bound: usize) -> bool {
    let is_at_limit = !link.is_below(bound);
    if is_at_limit {
        ring.begin_rest();
    }
    is_at_limit
}

/// The oldest request in a ring. `None` once the server has hung up: the client may send what was
/// not taken by then to another server. To be called under the lock under which the server hangs
/// up.
pub(super) fn next_entry(ring: &impl Watched, taker: &Taker) -> Result<Option<Entry>, PeerFault> {
    if ring.is_over() { Ok(None) } else { taker.peek() }
}

/// Where workers get requests and events: the queue in the product, a stand-in in the loom model.
/// The policy, which decides when to wake a worker, is the same code in both.
pub(super) trait WorkSource {
    /// A ring that requests are taken from.
    type Ring: Watched;
    /// What a worker sleeps for.
    type Event;
    /// A request.
    type Request;

    /// Takes a request from a ring; `None` when another worker was quicker.
    fn take(&self, ring: &Arc<Self::Ring>) -> Result<Option<Self::Request>>;
    /// Sleeps until an event comes; `None` at the deadline. When woken by
    /// [`wake_one`](Self::wake_one), an event that brings nothing; or `None`, before the deadline.
    fn sleep(&self, deadline: Deadline) -> Result<Option<Self::Event>>;
    /// Handles an event: reads a client's messages, or accepts a client.
    fn attend(&self, event: Self::Event) -> Result<Attended<Self::Ring, Self::Request>>;
    /// Wakes one worker that sleeps, or the next that goes to sleep.
    fn wake_one(&self);
    /// Whether the connections are to be checked now, even if rings have requests.
    fn is_look_due(&self) -> bool;
    /// Fails once no more requests are to be taken.
    fn check_open(&self) -> Result<()>;
}

/// The result of handling an event.
pub(super) struct Attended<R, T> {
    /// The ring of the client that was heard from, if it has one.
    pub(super) ring: Option<Arc<R>>,
    /// A request that came as a message.
    pub(super) request: Option<T>,
}

impl<R, T> Attended<R, T> {
    /// Neither a ring nor a request.
    pub(super) fn nothing() -> Self {
        Attended { ring: None, request: None }
    }
}

/// The state that the workers of one queue share to decide who polls and who sleeps.
pub(super) struct WakePolicy<R> {
    state: Mutex<State<R>>,
}

struct State<R> {
    /// Rings that workers check, the least recently checked first. All others are armed.
    active: VecDeque<Arc<R>>,
    /// Taken by the one worker that polls, while it does.
    spinner: Option<Spinner>,
    /// Workers that sleep, or are about to.
    asleep: usize,
}

impl<R: Watched> WakePolicy<R> {
    pub(super) fn new() -> WakePolicy<R> {
        let state = State { active: VecDeque::new(), spinner: Some(Spinner::new()), asleep: 0 };
        WakePolicy { state: Mutex::new(state) }
    }

    /// Takes the next request, waiting for one until the deadline. Every worker runs this.
    pub(super) fn recv<D: WorkSource<Ring = R>>(
        &self,
        source: &D,
        deadline: Deadline,
    ) -> Result<D::Request> {
        let taken = loop {
            match self.step(source, deadline, deadline) {
                Ok(Some(request)) => break Ok(request),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
        };
        if self.leave() {
            source.wake_one();
        }
        taken
    }

    /// As [`recv`](Self::recv), without sleeping: looks for a request until a deadline. Fails with
    /// [`Error::Timeout`] if there is none. So it does after many events that brought none, and has
    /// whoever waits told that there may be more: a client can make as many as it likes.
    pub(super) fn try_recv<D: WorkSource<Ring = R>>(
        &self,
        source: &D,
        look: Deadline,
    ) -> Result<D::Request> {
        let now = Deadline::after(Duration::ZERO);
        let mut taken = Err(Error::Timeout(Awaited::Request));
        let is_settled = (0..MOST_EVENTS).any(|_| match self.step(source, look, now) {
            Ok(None) => false,
            Ok(Some(request)) => {
                taken = Ok(request);
                true
            }
            Err(error) => {
                taken = Err(error);
                true
            }
        });
        if self.leave() || !is_settled {
            source.wake_one();
        }
        taken
    }

    /// A request from a ring or a connection; `None` when there may be one now.
    fn step<D: WorkSource<Ring = R>>(
        &self,
        source: &D,
        look: Deadline,
        deadline: Deadline,
    ) -> Result<Option<D::Request>> {
        source.check_open()?;
        let must_look = source.is_look_due();
        if !must_look {
            let is_over = || look.has_passed() || source.check_open().is_err();
            if let Some(ring) = self.find().or_else(|| self.look(is_over)) {
                return source.take(&ring);
            }
        }
        let event = if must_look {
            source.sleep(Deadline::after(Duration::ZERO))?
        } else if self.prepare_sleep() {
            let woken = source.sleep(deadline);
            self.rise();
            woken?
        } else {
            return Ok(None);
        };
        match event {
            Some(event) => {
                let heard = source.attend(event)?;
                // Always, even if the ring is empty by now. Its client has lowered `NEED_WAKEUP`,
                // and so relies on a worker that checks the ring. The request may already be taken,
                // by a worker that found the ring earlier and was preempted.
                if let Some(ring) = &heard.ring {
                    self.activate(ring);
                }
                Ok(heard.request)
            }
            None if !must_look && deadline.has_passed() => Err(Error::Timeout(Awaited::Request)),
            None => Ok(None),
        }
    }

    /// Ends a client's rest, once fewer requests than the limit are under way. If its ring has
    /// requests, it becomes active again and a worker is woken.
    pub(super) fn resume(&self, ring: &Arc<R>, wake_one: impl FnOnce()) {
        if !ring.end_rest() {
            return;
        }
        // Here: end the rest, fence, check for work. A worker that goes to sleep: arm, fence, check
        // whether the ring rests. One of the two sees the request; see the orderings of the ring,
        // pair 3.
        fence(SeqCst);
        if ring.has_work() {
            self.activate(ring);
            wake_one();
        }
    }

    /// Makes a ring active, unless the server has hung up on its client.
    fn activate(&self, ring: &Arc<R>) {
        self.add(ring);
        // A hang-up sets `is_over` first, and forgets the ring afterwards.
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
                state.active.push_back(oldest); // it has requests
            }
        }
    }

    /// Removes a ring from the active ones.
    pub(super) fn forget(&self, ring: &Arc<R>) {
        lock(&self.state).active.retain(|active| !Arc::ptr_eq(active, ring));
    }

    /// A ring with something to take, round-robin.
    fn find(&self) -> Option<Arc<R>> {
        lock(&self.state).find()
    }

    /// As [`find`](Self::find), but polls for a moment, where that can pay and no other worker
    /// does; `over` ends it early.
    fn look(&self, over: impl Fn() -> bool) -> Option<Arc<R>> {
        let (mut spinner, is_elsewhere) = {
            let mut state = lock(&self.state);
            let cpu = current_cpu();
            let is_elsewhere = state.active.iter().any(|ring| ring.client_cpu() != cpu);
            // While transfers are under way, the processor is better used for them.
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

    /// Counts this worker as asleep; `false` if it must not sleep, because there is something to
    /// take.
    fn prepare_sleep(&self) -> bool {
        let mut state = lock(&self.state);
        state.asleep += 1;
        let must_stay = state.arm();
        if must_stay {
            state.asleep -= 1;
        }
        !must_stay
    }

    /// Counts this worker as awake again.
    fn rise(&self) {
        lock(&self.state).asleep -= 1;
    }

    /// Called before this worker serves a request; `true` if it must wake another worker first.
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

    /// Arms the active rings, unless a worker polls; `true` if one of them has something to take.
    fn arm(&self) -> bool {
        // A worker that polls calls this itself when it stops, before it leaves or sleeps.
        self.spinner.is_some() && self.active.iter().any(|ring| ring.arm())
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
