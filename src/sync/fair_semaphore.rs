//! A counting semaphore within one process that serves waiters strictly in the order of arrival.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use super::Deadline;
use super::modelled::{Condvar, Mutex, lock};

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;

/// Counts permits. A released permit goes straight to the longest waiter, so that a later caller
/// cannot take it first: this prevents starvation.
#[derive(Debug)]
pub(crate) struct FairSemaphore {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    permits: usize,
    /// The waiters, in order of arrival. Empty whenever `permits` is not zero.
    queue: VecDeque<Arc<Waiter>>,
}

/// Its address tells waiters apart; `called` changes only under the lock.
#[derive(Debug, Default)]
struct Waiter {
    called: Condvar,
    /// Of a task, which waits instead of a thread.
    task: Mutex<Option<Waker>>,
}

/// A task's place in the queue; none before it has to wait.
#[derive(Debug, Default)]
pub(crate) struct Place(Option<Arc<Waiter>>);

impl FairSemaphore {
    pub(crate) fn new(permits: usize) -> FairSemaphore {
        FairSemaphore { state: Mutex::new(State { permits, queue: VecDeque::new() }) }
    }

    /// Takes a permit if one is free.
    pub(crate) fn try_enter(&self) -> bool {
        let mut state = lock(&self.state);
        let free = state.permits > 0;
        state.permits -= usize::from(free);
        free
    }

    /// Takes a permit, waiting behind earlier waiters; `false` when the deadline came first.
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
            // A waiter that is no longer queued has been given a permit, even if the deadline has
            // passed.
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

    /// Takes a permit if this task is the next to have one; otherwise has it woken when it is. Who
    /// does not come back [gives up](Self::give_up).
    pub(crate) fn poll_enter(&self, place: &mut Place, task: &Waker) -> bool {
        let mut state = lock(&self.state);
        match &place.0 {
            None if state.permits > 0 => {
                state.permits -= 1;
                return true;
            }
            None => {
                let me = Arc::new(Waiter::default());
                *lock(&me.task) = Some(task.clone());
                state.queue.push_back(Arc::clone(&me));
                place.0 = Some(me);
            }
            Some(me) if state.queue.iter().any(|waiter| Arc::ptr_eq(waiter, me)) => {
                *lock(&me.task) = Some(task.clone());
            }
            Some(_) => {
                place.0 = None; // it has been given a permit
                return true;
            }
        }
        false
    }

    /// Gives a place up, and a permit that was given to it.
    pub(crate) fn give_up(&self, place: &mut Place) {
        let Some(me) = place.0.take() else { return };
        let mut state = lock(&self.state);
        let at = state.queue.iter().position(|waiter| Arc::ptr_eq(waiter, &me));
        match at {
            Some(at) => _ = state.queue.remove(at),
            None => {
                drop(state);
                self.leave();
            }
        }
    }

    /// Releases a permit: to the first waiter, if there is one.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.state);
        match state.queue.pop_front() {
            Some(first) => {
                drop(state); // `first` locks it as soon as it wakes
                first.called.notify_one();
                let task = lock(&first.task).take();
                task.into_iter().for_each(Waker::wake);
            }
            None => state.permits += 1,
        }
    }

    /// Runs `inside` with a permit, and releases it afterwards, also on a panic; `None` when the
    /// deadline came first. With one permit, this is a lock with a deadline.
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

    /// The number of waiters.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.state).queue.len()
    }
}
