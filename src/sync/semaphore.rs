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

    #[cfg(test)]
    fn with(permits: u32) -> Semaphore {
        let (word, sleepers) = (AtomicU32::new(permits), AtomicU32::new(0));
        Semaphore { word, sleepers, parker: Default::default() }
    }

    #[cfg(test)]
    #[allow(dead_code, reason = "for the tests of those parkers that can break")]
    pub(super) fn parker(&self) -> &Parker {
        &self.parker
    }

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
                return Err(if seen == POISON {
                    Interrupted::Poisoned
                } else {
                    Interrupted::TimedOut
                });
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

    /// Hands a permit over, and wakes whoever sleeps for one.
    #[cfg(test)]
    pub(crate) fn post(&self, permit: Permit) {
        self.add(permit);
        self.wake();
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

#[cfg(all(test, loom))]
mod model {
    //! Every interleaving and every reordering that the memory model allows, by `ci/loom.sh`.

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
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    fn placed(permits: u32) -> Arc<Semaphore> {
        let semaphore = Arc::new(Semaphore::with(permits));
        semaphore.initialise();
        semaphore
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(30))
    }

    fn has_sleeper(semaphore: &Semaphore) -> bool {
        let limit = soon();
        while semaphore.sleepers.load(Relaxed) == 0 {
            assert!(!limit.has_passed(), "nobody went to sleep");
            thread::yield_now();
        }
        true
    }

    #[test]
    fn permits_are_counted() {
        let s = placed(2);
        let first = s.try_wait().unwrap();
        let _second = s.try_wait().unwrap();
        assert!(matches!(s.try_wait(), Err(Interrupted::TimedOut)));
        s.post(first);
        assert!(s.try_wait().is_ok());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_not_before() {
        let s = placed(0);
        let start = Instant::now();
        let timeout = Duration::from_millis(50);
        assert!(matches!(s.wait(Deadline::after(timeout)), Err(Interrupted::TimedOut)));
        assert!(start.elapsed() >= timeout);
        assert_eq!(s.sleepers.load(Relaxed), 0);
    }

    #[test]
    fn poison_wakes_a_sleeper_and_lets_permits_drain_first() {
        let s = placed(1);
        let drained = {
            let s = Arc::clone(&s);
            thread::spawn(move || {
                let _permit = s.wait(soon()).unwrap();
                s.wait(Deadline::NEVER)
            })
        };
        assert!(has_sleeper(&s));
        s.poison();
        assert!(matches!(drained.join().unwrap(), Err(Interrupted::Poisoned)));

        let s = placed(1);
        s.poison();
        assert!(s.wait(soon()).is_ok());
        assert!(matches!(s.wait(soon()), Err(Interrupted::Poisoned)));
        s.reset(1);
        assert!(s.wait(soon()).is_ok());
    }

    #[test]
    fn a_post_wakes_a_sleeper() {
        let s = placed(1);
        let permit = s.try_wait().unwrap();
        let sleeper = {
            let s = Arc::clone(&s);
            thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
        };
        assert!(has_sleeper(&s));
        s.post(permit);
        sleeper.join().unwrap().unwrap();
    }

    #[test]
    fn poison_wakes_a_sleeper_that_the_peer_has_denied() {
        let s = placed(0);
        let sleeper = {
            let s = Arc::clone(&s);
            thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
        };
        assert!(has_sleeper(&s));
        s.sleepers.store(0, Relaxed);
        s.poison();
        assert!(matches!(sleeper.join().unwrap(), Err(Interrupted::Poisoned)));
    }

    #[test]
    fn two_threads_ping_pong_without_losing_a_wake() {
        let pair = Arc::new((placed(1), placed(0)));
        let other = {
            let pair = Arc::clone(&pair);
            thread::spawn(move || {
                for _ in 0..20_000 {
                    pair.0.post(pair.1.wait(soon()).unwrap());
                }
            })
        };
        for _ in 0..20_000 {
            pair.1.post(pair.0.wait(soon()).unwrap());
        }
        other.join().unwrap();
    }

    #[test]
    fn two_sleepers_both_get_a_permit() {
        let s = placed(2);
        let permits = [s.try_wait().unwrap(), s.try_wait().unwrap()];
        let sleepers = [(); 2].map(|()| {
            let s = Arc::clone(&s);
            thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
        });
        assert!(has_sleeper(&s));
        permits.into_iter().for_each(|permit| s.post(permit));
        sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap().unwrap());
    }
}
