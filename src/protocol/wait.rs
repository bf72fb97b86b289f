//! How each side of a transfer waits for the other's permits (rules P7 to P9).

use std::sync::atomic::AtomicUsize;
use std::task::Poll;
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

/// One side's waiting state over a whole transfer: its spinning history and its timeout.
pub(super) struct Waiter {
    spinner: Spinner,
    presence: Presence,
    /// The timeout in nanoseconds. A `Duration` is twice as large, and transfers are moved by
    /// value: up to 128 bytes in registers.
    timeout: u64,
}

/// One wait: for a permit of a semaphore, which the peer posts.
pub(super) struct Wait<'h, F> {
    pub(super) semaphore: &'h Semaphore,
    /// Where this side publishes the processor it runs on.
    pub(super) our_cpu: &'h AtomicU32,
    /// Where the peer publishes its processor.
    pub(super) peer_cpu: &'h AtomicU32,
    pub(super) deadline: Deadline,
    /// Whether the link to the peer has ended.
    pub(super) is_severed: F,
}

impl Waiter {
    /// A waiter that is counted in `all`.
    pub(super) fn among(all: &'static AtomicUsize) -> Waiter {
        let presence = Presence::among(all);
        let mut waiter = Waiter { spinner: Spinner::new(), presence, timeout: 0 };
        waiter.set_timeout(DEFAULT_TIMEOUT);
        waiter
    }

    /// How long the calls that take no deadline wait without progress.
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_nanos(self.timeout)
    }

    /// Sets the timeout; 584 years at most.
    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
    }

    /// Takes a permit: at once, after a short spin where that can pay (rule P8), or after a sleep.
    /// The sleep is [`blocking`]; its place at work is free meanwhile.
    #[inline(always)] // short where nothing is waited for
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
                    // A slot filled before the end, since the last check, is still received.
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
    /// once. When processors are short, a peer woken for each slot finds only that one, and sleeps
    /// again: one context switch per slot.
    ///
    /// No wake-up is lost: at least half of the slots are in `ours`, from which only this side
    /// takes. So this side does not sleep before it has posted again; and the end of a transfer, of
    /// any kind, always wakes.
    pub(super) fn can_put_off(&self, ours: &Semaphore, slots: u32) -> bool {
        self.presence.is_crowded() && ours.permits() >= slots.div_ceil(2)
    }
}

/// Takes a permit if there is one, without waiting. If there is none, `wake_later` is to have the
/// task woken, if there is a task; then this tries once more.
pub(super) fn poll_permit(
    semaphore: &Semaphore,
    is_severed: impl Fn() -> bool,
    wake_later: Option<impl FnOnce()>,
) -> Result<Permit, Interrupted> {
    let settled = semaphore.try_wait();
    let (Err(Interrupted::TimedOut), Some(wake_later)) = (&settled, wake_later) else {
        return settled;
    };
    wake_later();
    match semaphore.try_wait() {
        // A peer that hangs up and lives on can remove the poison.
        Err(Interrupted::TimedOut) if is_severed() => {
            semaphore.try_wait().map_err(|_| Interrupted::Poisoned)
        }
        settled => settled,
    }
}

/// The side of a transfer that a task waits for, as far as that wait needs it.
#[cfg(feature = "tokio")]
pub(crate) trait Awaiting {
    /// Whether the peer can signal this process; otherwise the task has to try from time to time.
    fn is_woken(&self) -> bool;

    /// Whether to try for a moment before sleeping, where that can pay (rule P8).
    fn begin_tries(&mut self) -> bool;

    /// Whether the peer came within that moment.
    fn end_tries(&mut self, in_time: bool);
}

#[cfg(feature = "tokio")]
impl Waiter {
    /// As [`Awaiting::begin_tries`], given where the peer last ran.
    pub(super) fn begin_tries(&mut self, peer_cpu: &AtomicU32) -> bool {
        let is_elsewhere = current_cpu() != peer_cpu.load(Relaxed);
        is_elsewhere && !self.presence.is_crowded() && self.spinner.begin()
    }

    pub(super) fn end_tries(&mut self, in_time: bool) {
        self.spinner.end(in_time);
    }
}

/// The error for a wait for `awaited` that took no permit.
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

/// A step that did not wait: pending where a wait would have timed out.
pub(crate) fn or_pending<T>(step: Result<T, Error>) -> Poll<Result<T, Error>> {
    match step {
        Err(Error::Timeout(_)) => Poll::Pending,
        settled => Poll::Ready(settled),
    }
}

/// Tells the peer which processor this side runs on (rule P8). A hint: correctness does not depend
/// on it.
pub(super) fn publish_cpu(ours: &AtomicU32) -> u32 {
    let cpu = current_cpu();
    if ours.load(Relaxed) != cpu {
        ours.store(cpu, Relaxed);
    }
    cpu
}

/// How often a sleeper checks whether its link was severed: once a second. A hang-up wakes it by
/// poison, but a peer that hangs up and lives on can remove the poison. It cannot change the link,
/// which is private to this process.
#[cfg(not(loom))]
fn recheck() -> Deadline {
    Deadline::after(Duration::from_secs(1))
}

/// How long one side has waited for the other without progress (rule P9); any byte taken is
/// progress. Checked several times within the timeout, so that a stopped side is given up soon
/// after it.
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

    /// When to check for progress next.
    pub(super) fn look_again(&self) -> Deadline {
        const LOOKS: u32 = 16;
        let end = self.since.checked_add(self.timeout).map_or(Deadline::NEVER, Deadline::at);
        end.min(Deadline::after((self.timeout / LOOKS).max(Duration::from_millis(1))))
    }

    /// Whether the timeout has passed, given the progress counter `now`.
    pub(super) fn is_over(&mut self, now: P) -> bool {
        if now != self.seen {
            self.seen = now;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.timeout
    }
}
