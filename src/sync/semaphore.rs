//! The counting semaphore in shared memory, between two processes.
//!
//! # Orderings
//! They are argued here, once, as pairs.
//!
//! 1. *What a permit hands over.* `post` publishes all that its thread wrote; the `wait` that takes
//!    the permit sees it: `fetch_add(Release)` / successful compare-exchange `(Acquire)`. `poison`
//!    publishes in the same way, and a thread that finds the word poisoned has read it with
//!    `Acquire`.
//! 2. *No lost wake-up.* `sleepers` publishes nothing; it only has to be seen. Poster: change the
//!    word, `fence(SeqCst)`, read `sleepers`. Sleeper: raise `sleepers`, `fence(SeqCst)`, let the
//!    kernel compare the word. The fences are totally ordered: either the poster's comes first, and
//!    then the kernel sees the changed word and does not sleep, or the sleeper's does, and then the
//!    poster sees `sleepers` and wakes. Everything else about `sleepers` is `Relaxed`.

use std::io;

use super::atomic::{Acquire, AtomicU32, Relaxed, Release, SeqCst, fence};
use super::{Deadline, Parker};

#[cfg(test)]
mod for_tests;
#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;

/// Set in the word when the wait is over for good; the bits below count permits.
const POISON: u32 = 1 << 31;

/// The right to touch one slot. Only a wait makes one, and only a post consumes it: after a
/// [`Semaphore::reset`] to `k` permits there are never more than `k`.
#[must_use = "a permit that is not posted is a slot lost to the transfer"]
#[derive(Debug)]
pub(crate) struct Permit(());

/// Why a wait ended without a permit.
#[derive(Debug)]
pub(crate) enum Interrupted {
    /// The deadline passed.
    TimedOut,
    /// Poisoned, and no permit left to drain.
    Poisoned,
    /// The system call to sleep failed.
    Os(io::Error),
}

/// A counting semaphore that two processes share; no system call unless a thread has to sleep.
///
/// A thread that dies in its sleep leaves `sleepers` too high. Each post then makes a needless
/// system call until the next [`reset`](Self::reset); nothing else follows.
#[cfg_attr(loom, derive(Default))]
#[repr(C, align(128))]
pub(crate) struct Semaphore {
    /// Permits, and [`POISON`]. The futex word.
    word: AtomicU32,
    /// Threads that sleep, or are about to.
    sleepers: AtomicU32,
    parker: Parker,
}

impl Semaphore {
    /// Whether a semaphore can be used again after a process that used it has died.
    pub(crate) const SURVIVES_KILL: bool = Parker::SURVIVES_KILL;

    /// Initialises the parker, once, in its final place. Called by the owner, before another
    /// process maps the segment.
    pub(crate) fn initialise(&self) {
        self.parker.initialise();
    }

    /// Whether the parker works. If not, sleepers fall back to polling.
    pub(crate) fn is_sound(&self) -> bool {
        self.parker.is_sound()
    }

    /// Sets the count to `permits`. Only while no other thread uses the semaphore: for an owner
    /// whose segment no sender has (rule P6). The parker is left alone: a late sender may still be
    /// inside its last wake, which can cause a spurious wake-up and nothing worse.
    pub(crate) fn reset(&self, permits: u32) {
        self.sleepers.store(0, Relaxed);
        self.word.store(permits, Relaxed);
    }

    /// Whether it was poisoned, whether or not permits are left.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.word.load(Acquire) & POISON != 0
    }

    /// The number of permits at this moment: a hint.
    pub(crate) fn permits(&self) -> u32 {
        self.word.load(Relaxed) & !POISON
    }

    /// Whether a wait would end now, with a permit or without.
    pub(crate) fn is_settled(&self) -> bool {
        self.word.load(Acquire) != 0
    }

    /// Takes a permit if there is one. Fails with `Poisoned` only when none is left (rule P7: what
    /// was filled stays readable), otherwise with `TimedOut`.
    pub(crate) fn try_wait(&self) -> Result<Permit, Interrupted> {
        let mut seen = self.word.load(Acquire);
        loop {
            if seen & !POISON == 0 {
                let is_over = seen == POISON;
                return Err(if is_over { Interrupted::Poisoned } else { Interrupted::TimedOut });
            }
            match self.word.compare_exchange_weak(seen, seen - 1, Acquire, Acquire) {
                Ok(_) => return Ok(Permit(())),
                Err(now) => seen = now,
            }
        }
    }

    /// Takes a permit, sleeping until there is one, or poison, or the deadline.
    pub(crate) fn wait(&self, deadline: Deadline) -> Result<Permit, Interrupted> {
        loop {
            match self.try_wait() {
                Err(Interrupted::TimedOut) if deadline.has_passed() => {
                    return Err(Interrupted::TimedOut);
                }
                Err(Interrupted::TimedOut) => {}
                settled => return settled,
            }
            self.sleepers.fetch_add(1, Relaxed);
            fence(SeqCst); // pair 2
            let slept = self.parker.park(&self.word, 0, deadline);
            self.sleepers.fetch_sub(1, Relaxed);
            slept.map_err(Interrupted::Os)?;
        }
    }

    /// Hands a permit over: from here on it can be taken. Does not wake a sleeper: the caller must
    /// call [`wake`](Self::wake) before it sleeps itself.
    pub(crate) fn add(&self, Permit(()): Permit) {
        self.word.fetch_add(1, Release); // pair 1
    }

    /// Ends every wait, now and later, once the permits left are drained.
    pub(crate) fn poison(&self) {
        self.set_poison();
        // Ignores `sleepers`: the peer can write to that word, and poison must always end the
        // waits.
        self.parker.unpark_all(&self.word);
    }

    /// The first half of [`poison`](Self::poison).
    pub(crate) fn set_poison(&self) {
        self.word.fetch_or(POISON, Release); // pair 1
    }

    /// Wakes the threads that sleep until a permit is added, or poison. Writes nothing to shared
    /// memory except the parker's own state.
    pub(crate) fn wake(&self) {
        fence(SeqCst); // pair 2
        if self.sleepers.load(Relaxed) != 0 {
            self.parker.unpark_all(&self.word);
        }
    }
}
