//! When to spin before sleeping (rule P8): only when the peer can be running now, and answers fast.

use std::hint;
use std::time::{Duration, Instant};

use super::{Interrupted, Permit, Semaphore};

/// About what a wake-up across idle virtual cores costs; a longer spin could not win anything.
const BUDGET: Duration = Duration::from_micros(50);
/// Spin rounds between two looks at the clock.
const ROUNDS: u32 = 64;
/// How many answers in time are remembered.
const MOST_CREDIT: u8 = 8;
/// What a spin in vain costs, in answers in time.
const PENALTY: u8 = 2;

/// One side's memory of how fast the other answers. Lives outside shared memory.
#[derive(Debug)]
pub(crate) struct Spinner {
    credit: u8,
}

impl Spinner {
    /// Trusts a new peer with one spin.
    pub(crate) fn new() -> Spinner {
        Spinner { credit: PENALTY }
    }

    /// Tries for a permit, spinning for a while if that can pay. `TimedOut` means: sleep now.
    ///
    /// Spinning is in vain when the peer last ran on our own processor, where it cannot go on while
    /// we are there, and when it has lately been slower than the budget.
    pub(crate) fn try_wait(
        &mut self,
        semaphore: &Semaphore,
        our_cpu: u32,
        peer_cpu: u32,
    ) -> Result<Permit, Interrupted> {
        match semaphore.try_wait() {
            Err(Interrupted::TimedOut) if self.credit > 0 && our_cpu != peer_cpu => {}
            settled => return settled,
        }
        let start = Instant::now();
        loop {
            for _ in 0..ROUNDS {
                hint::spin_loop();
                match semaphore.try_wait() {
                    Err(Interrupted::TimedOut) => {}
                    settled => {
                        self.credit = MOST_CREDIT.min(self.credit + 1);
                        return settled;
                    }
                }
            }
            if start.elapsed() >= BUDGET {
                self.credit = self.credit.saturating_sub(PENALTY);
                return Err(Interrupted::TimedOut);
            }
        }
    }

    /// Learns from a sleep: one that was shorter than the budget would have been a good spin.
    pub(crate) fn slept(&mut self, took: Duration) {
        if took < BUDGET {
            self.credit = MOST_CREDIT.min(self.credit + 1);
        }
    }
}
