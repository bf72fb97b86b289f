//! A counting semaphore within one process that serves strictly in the order of arrival.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Deadline;
use super::modelled::{Condvar, Mutex, lock};

#[cfg(all(test, not(loom)))]
mod tests;

/// Counts what is to be had, and hands it out first come, first served: a release goes straight to
/// whoever has waited longest, so that nobody who comes later can slip in.
#[derive(Debug)]
pub(crate) struct FairSemaphore {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    permits: usize,
    /// Those who wait, in order. Empty whenever `permits` is not zero.
    queue: VecDeque<Arc<Waiter>>,
}

/// Its address tells waiters apart; `called` changes only under the lock.
#[derive(Debug, Default)]
struct Waiter {
    called: Condvar,
}

impl FairSemaphore {
    pub(crate) fn new(permits: usize) -> FairSemaphore {
        FairSemaphore { state: Mutex::new(State { permits, queue: VecDeque::new() }) }
    }

    /// Takes one if nobody has to wait for it.
    pub(crate) fn try_enter(&self) -> bool {
        let mut state = lock(&self.state);
        let free = state.permits > 0;
        state.permits -= usize::from(free);
        free
    }

    /// Takes one, waiting in line for it; `false` when the deadline came first.
    pub(crate) fn enter(&self, deadline: Deadline) -> bool {
        let mut state = lock(&self.state);
        if state.permits > 0 {
            state.permits -= 1;
            return true;
        }
        let me = Arc::new(Waiter::default());
        state.queue.push_back(Arc::clone(&me));
        loop {
            state = match deadline.remaining() {
                None => me.called.wait(state).unwrap_or_else(|e| e.into_inner()),
                Some(left) => {
                    me.called.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0
                }
            };
            // Whoever is no longer in line has been called, even if the deadline passed meanwhile.
            let place = state.queue.iter().position(|waiter| Arc::ptr_eq(waiter, &me));
            match place {
                None => return true,
                Some(place) if deadline.has_passed() => {
                    state.queue.remove(place);
                    return false;
                }
                Some(_) => {}
            }
        }
    }

    /// Gives one back, to the first in line if there is a line.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.state);
        match state.queue.pop_front() {
            Some(first) => {
                drop(state); // which `first` needs first of all
                first.called.notify_one();
            }
            None => state.permits += 1,
        }
    }

    /// Runs `inside` having entered, and leaves, whatever ends it; `None` when the deadline came
    /// first. With one permit, this is a lock that can be waited for with a deadline.
    pub(crate) fn within<T>(&self, deadline: Deadline, inside: impl FnOnce() -> T) -> Option<T> {
        struct Inside<'t>(&'t FairSemaphore);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        self.enter(deadline).then(|| {
            let _inside = Inside(self);
            inside()
        })
    }

    /// How many wait in line.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.state).queue.len()
    }
}
