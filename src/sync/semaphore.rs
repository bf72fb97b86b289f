//! The counting semaphore that lives in shared memory, between two processes.
//!
//! # Orderings
//! They are argued here, once, as pairs.
//!
//! 1. *What a permit hands over.* `post` publishes all that its thread wrote; the `wait` that takes
//!    the permit sees it: `fetch_add(Release)` / successful compare-exchange `(Acquire)`. `poison`
//!    publishes in the same way, and whoever finds the word poisoned has read it with `Acquire`.
//! 2. *No lost wake-up.* `sleepers` publishes nothing, it must only be seen. Poster: change the
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

/// The right to touch one slot, which only a wait makes and only a post takes: with `k` permits put
/// in by [`Semaphore::reset`], there are never more than `k` in the world.
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
    /// The system would not let us sleep.
    Os(io::Error),
}

/// A counting semaphore that two processes share; no system call unless someone has to sleep.
///
/// A thread that dies in its sleep leaves `sleepers` raised, which costs the posts that follow a
/// needless system call until the next [`reset`](Self::reset), and nothing else.
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

    /// Makes what sleepers need, once, where the semaphore will stay. For the owner, before anyone
    /// else maps the segment.
    pub(crate) fn initialise(&self) {
        self.parker.initialise();
    }

    /// Whether it wakes sleepers as it should; if not, they notice later.
    pub(crate) fn is_sound(&self) -> bool {
        self.parker.is_sound()
    }

    /// Starts afresh with `permits`. Only while nobody else uses the semaphore: for an owner whose
    /// segment no sender holds (rule P6). The parker is left alone: a late sender may be inside its
    /// last wake, which never harms more than to wake somebody for nothing.
    pub(crate) fn reset(&self, permits: u32) {
        self.sleepers.store(0, Relaxed);
        self.word.store(permits, Relaxed);
    }

    /// Whether [`poison`](Self::poison) came, permits left or not.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.word.load(Acquire) & POISON != 0
    }

    /// How many permits there are to take, at this moment: a hint.
    pub(crate) fn permits(&self) -> u32 {
        self.word.load(Relaxed) & !POISON
    }

    /// Takes a permit if there is one. Fails with `Poisoned` only when none is left (rule P7: what
    /// was filled stays readable), with `TimedOut` when there is nothing yet.
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

    /// Hands a permit over: from here on it can be taken. Whoever sleeps for it learns of it by
    /// [`wake`](Self::wake), which is the caller's to call before it sleeps itself.
    pub(crate) fn add(&self, Permit(()): Permit) {
        self.word.fetch_add(1, Release); // pair 1
    }

    /// Ends every wait, now and later, once the permits in hand are drained.
    pub(crate) fn poison(&self) {
        self.set_poison();
        // Whatever `sleepers` says: the peer can write that word, and this is what ends its waits.
        self.parker.unpark_all(&self.word);
    }

    /// The first half of [`poison`](Self::poison).
    pub(crate) fn set_poison(&self) {
        self.word.fetch_or(POISON, Release); // pair 1
    }

    /// Wakes whoever sleeps for what has been added, or poisoned. Writes nothing to shared memory, but
    /// what the parker keeps there for itself.
    pub(crate) fn wake(&self) {
        fence(SeqCst); // pair 2
        if self.sleepers.load(Relaxed) != 0 {
            self.parker.unpark_all(&self.word);
        }
    }
}
