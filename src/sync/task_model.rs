//! A task for models: a thread that sleeps until its waker is called.

use std::sync::Arc;
use std::task::{Poll, Wake, Waker};

use super::modelled::{Condvar, Mutex, lock};

/// A task's sleep: ends once its waker has been called.
#[derive(Default)]
struct Sleep {
    is_woken: Mutex<bool>,
    ends: Condvar,
}

impl Wake for Sleep {
    fn wake(self: Arc<Self>) {
        *lock(&self.is_woken) = true;
        self.ends.notify_one();
    }
}

/// Runs a task to its end, as a runtime does: it tries again whenever it has been woken.
pub(crate) fn run<T>(mut step: impl FnMut(&Waker) -> Poll<T>) -> T {
    let sleep = Arc::new(Sleep::default());
    let waker = Waker::from(Arc::clone(&sleep));
    loop {
        if let Poll::Ready(done) = step(&waker) {
            return done;
        }
        let mut is_woken = lock(&sleep.is_woken);
        while !*is_woken {
            is_woken = sleep.ends.wait(is_woken).unwrap();
        }
        *is_woken = false;
    }
}
