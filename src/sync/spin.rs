//! Decides when to spin before sleeping (rule P8): if the peer can be running, and answers fast.

use std::hint;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::process::Counted;

use super::{Interrupted, Permit, Semaphore};

#[cfg(all(test, not(loom)))]
mod tests;

/// About the cost of a wake-up across idle virtual cores; a longer spin cannot win anything. loom
/// has no clock.
pub(crate) const BUDGET: Duration =
    if cfg!(loom) { Duration::MAX } else { Duration::from_micros(50) };
/// Spin rounds between two readings of the clock.
const ROUNDS: u32 = 64;
/// The most answers in time that are remembered.
const MOST_CREDIT: u8 = 8;
/// The cost of an unsuccessful spin, in answers in time.
const PENALTY: u8 = 2;

/// After this many waits without a spin, one is tried.
const PROBE: u8 = 16;

/// One side's record of how fast the other answers. In private memory.
#[derive(Debug)]
pub(crate) struct Spinner {
    credit: u8,
    /// Waits without a spin since the last spin.
    unspun: u8,
}

impl Spinner {
    /// Starts with credit for one spin.
    pub(crate) fn new() -> Spinner {
        Spinner { credit: PENALTY, unspun: 0 }
    }

    /// Tries to take a permit, spinning for a while if that can pay. `TimedOut` means: sleep now.
    pub(crate) fn try_wait(
        &mut self,
        semaphore: &Semaphore,
        can_pay: bool,
    ) -> Result<Permit, Interrupted> {
        let attempt = || match semaphore.try_wait() {
            Err(Interrupted::TimedOut) => None,
            settled => Some(settled),
        };
        self.spin(can_pay, BUDGET, attempt).unwrap_or(Err(Interrupted::TimedOut))
    }

    /// Tries once, and then repeatedly within the budget, if that can pay.
    ///
    /// Spinning is useless when the peer last ran on this processor, where it cannot run while we
    /// spin, and when other threads wait for a processor; the caller knows both. It is also useless
    /// when the peer has lately been slower than the budget.
    pub(crate) fn spin<T>(
        &mut self,
        can_pay: bool,
        budget: Duration,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let settled = attempt();
        if settled.is_some() || !can_pay {
            return settled;
        }
        self.spin_on(budget, attempt)
    }

    #[inline(never)] // keeps what need not spin short
    fn spin_on<T>(
        &mut self,
        budget: Duration,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if !self.begin() {
            return None;
        }
        let start = Instant::now();
        loop {
            for _ in 0..ROUNDS {
                hint::spin_loop();
                if let Some(settled) = attempt() {
                    self.end(true);
                    return Some(settled);
                }
            }
            if start.elapsed() >= budget {
                self.end(false);
                return None;
            }
        }
    }

    /// Whether to spin now, as far as this record tells.
    pub(crate) fn begin(&mut self) -> bool {
        let has_credit = self.credit > 0 || self.unspun >= PROBE;
        self.unspun = if has_credit { 0 } else { self.unspun + 1 };
        has_credit
    }

    /// Learns from a spin: whether the answer came in time.
    pub(crate) fn end(&mut self, in_time: bool) {
        self.credit = if in_time {
            MOST_CREDIT.min(self.credit + 1)
        } else {
            self.credit.saturating_sub(PENALTY)
        };
    }

    /// Learns from a sleep: after one shorter than the budget, a spin would have succeeded.
    pub(crate) fn slept(&mut self, took: Duration) {
        if took < BUDGET {
            self.credit = MOST_CREDIT.min(self.credit + 1);
        }
    }
}

/// Counts one transfer side of this process that may wait for a peer, while it lives: an estimate
/// of how busy the processors are.
#[derive(Debug)]
pub(crate) struct Presence(Counted);

impl Presence {
    pub(crate) fn among(all: &'static AtomicUsize) -> Presence {
        Presence(Counted::among(all))
    }

    /// Whether they and their peers outnumber the processors: spinning would then take a processor
    /// from a thread that has work.
    pub(crate) fn is_crowded(&self) -> bool {
        // Zero until it is known.
        static PAIRS: AtomicUsize = AtomicUsize::new(0);
        if cfg!(loom) {
            return true; // so that the models cover this case; they never spin
        }
        let mut pairs = PAIRS.load(Relaxed);
        if pairs == 0 {
            pairs = available_parallelism().map_or(1, |n| n.get().div_ceil(2));
            PAIRS.store(pairs, Relaxed);
        }
        self.0.all() > pairs
    }
}

/// The processor that this thread runs on now: a hint.
pub(crate) fn current_cpu() -> u32 {
    #[cfg(all(target_os = "linux", not(loom)))]
    return u32::try_from(rustix::thread::sched_getcpu()).unwrap_or(u32::MAX);
    #[cfg(not(all(target_os = "linux", not(loom))))]
    return 0; // the same as the peer's: no side spins
}
