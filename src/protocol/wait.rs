//! How each side of a transfer waits for the permits of the other (rules P7 to P9).

use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use crate::error::{Awaited, Error};
use crate::sync::atomic::{AtomicU32, Relaxed};
use crate::sync::modelled::yield_now;
use crate::sync::{
    Deadline, Interrupted, Permit, Presence, Semaphore, Spinner, blocking, current_cpu,
};

use super::DEFAULT_TIMEOUT;
#[cfg(loom)]
use super::model::recheck;

/// One side's way to wait, over a whole transfer.
pub(super) struct Waiter {
    spinner: Spinner,
    presence: Presence,
    /// How long the calls that take no deadline wait without progress.
    pub(super) timeout: Duration,
}

/// One wait: for a permit of a semaphore, which the peer posts.
pub(super) struct Wait<'h, F> {
    pub(super) semaphore: &'h Semaphore,
    /// Where this side says which processor it runs on.
    pub(super) our_cpu: &'h AtomicU32,
    /// Where the peer says that.
    pub(super) peer_cpu: &'h AtomicU32,
    pub(super) deadline: Deadline,
    /// Whether the link to the peer has ended.
    pub(super) is_severed: F,
}

impl Waiter {
    /// One of those that `all` counts.
    pub(super) fn among(all: &'static AtomicUsize) -> Waiter {
        let presence = Presence::among(all);
        Waiter { spinner: Spinner::new(), presence, timeout: DEFAULT_TIMEOUT }
    }

    /// Takes a permit: at once, after a short spin where that can pay (rule P8), or after a sleep,
    /// while another worker of this process may have our place.
    pub(super) fn wait(
        &mut self,
        wait: Wait<'_, impl Fn() -> bool>,
    ) -> Result<Permit, Interrupted> {
        let Wait { semaphore, our_cpu, peer_cpu, deadline, is_severed } = wait;
        let cpu = publish_cpu(our_cpu);
        let can_pay = cpu != peer_cpu.load(Relaxed) && !self.presence.is_crowded();
        match self.spinner.try_wait(semaphore, can_pay) {
            Err(Interrupted::TimedOut) => {}
            settled => return settled,
        }
        let start = Instant::now();
        let outcome = blocking(|| {
            loop {
                match semaphore.wait(deadline.min(recheck())) {
                    // What was filled before the end is still ours, if it came since we looked.
                    Err(Interrupted::TimedOut) if is_severed() => {
                        return semaphore.try_wait().map_err(|_| Interrupted::Poisoned);
                    }
                    Err(Interrupted::TimedOut) if !deadline.has_passed() => yield_now(),
                    settled => return settled,
                }
            }
        });
        self.spinner.slept(start.elapsed());
        outcome
    }

    /// Whether this side, which has just posted, may wake its peer later, for several slots at
    /// once. Where others wait for a processor, a peer that is woken for each slot runs dry and
    /// sleeps again, slot by slot.
    ///
    /// No wake-up is lost: at least half of the slots are in `ours`, which only we take from. So we
    /// do not sleep before we have posted again; and a transfer's end, of whatever kind, wakes in
    /// any case.
    pub(super) fn can_put_off(&self, ours: &Semaphore, slots: u32) -> bool {
        self.presence.is_crowded() && ours.permits() >= slots.div_ceil(2)
    }
}

/// Why a wait for `awaited` brought no permit.
#[cold]
pub(super) fn why_interrupted(
    interrupted: Interrupted,
    awaited: Awaited,
    why_poisoned: impl FnOnce() -> Error,
) -> Error {
    match interrupted {
        Interrupted::TimedOut => Error::Timeout(awaited),
        Interrupted::Poisoned => why_poisoned(),
        Interrupted::Os(source) => Error::os("futex")(source),
    }
}

/// Tells the peer which processor this side runs on (rule P8). A hint: nothing rests on it.
pub(super) fn publish_cpu(ours: &AtomicU32) -> u32 {
    let cpu = current_cpu();
    if ours.load(Relaxed) != cpu {
        ours.store(cpu, Relaxed);
    }
    cpu
}

/// A sleeper looks whether its link was severed once a second. A hang-up is pushed, by poison; but
/// a peer that hangs up and lives on can remove the poison, and cannot change what is in this
/// process only.
#[cfg(not(loom))]
fn recheck() -> Deadline {
    Deadline::after(Duration::from_secs(1))
}

/// How long one side has waited for the other without progress (rule P9): any byte that it took
/// counts. Looked at several times within the timeout, so that a side that stops is cut soon after
/// it.
pub(super) struct Idle<P> {
    timeout: Duration,
    pub(super) seen: P,
    /// When progress was last seen.
    since: Instant,
}

impl<P: PartialEq> Idle<P> {
    pub(super) fn new(timeout: Duration, seen: P) -> Idle<P> {
        Idle { timeout, seen, since: Instant::now() }
    }

    /// When to look for progress next.
    pub(super) fn look_again(&self) -> Deadline {
        const LOOKS: u32 = 16;
        let end = self.since.checked_add(self.timeout).map_or(Deadline::NEVER, Deadline::at);
        end.min(Deadline::after((self.timeout / LOOKS).max(Duration::from_millis(1))))
    }

    /// Whether the timeout has passed, with what is to be seen now.
    pub(super) fn is_over(&mut self, now: P) -> bool {
        if now != self.seen {
            self.seen = now;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.timeout
    }
}
