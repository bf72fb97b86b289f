//! A gate that holds clients back at quiet moments.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::record::lock;

/// Open at first.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    inside: u64,
}

impl Gate {
    /// Lets nobody in, and waits until all are out; whether they are.
    pub fn hold_back(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut state = lock(&self.state);
        state.closed = true;
        while state.inside > 0 && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.inside == 0
    }

    pub fn let_in(&self) {
        lock(&self.state).closed = false;
        self.changed.notify_all();
    }

    /// Does something when the gate is open.
    pub fn inside<T>(&self, exchange: impl FnOnce() -> T) -> T {
        let mut state = lock(&self.state);
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        drop(state);
        let result = exchange();
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
        result
    }
}
