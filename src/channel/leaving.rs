//! The thread that tells clients to ask the successor, from a queue's `close` until its drop.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::process::Origin;
use crate::sync::lock;

/// The running thread. Dropping this ends it.
pub(super) struct Leaving {
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
    origin: Origin,
}

#[derive(Default)]
struct End {
    has_come: Mutex<bool>,
    changed: Condvar,
}

impl Leaving {
    /// Calls `round` repeatedly; it returns how long to wait before the next call. Needs no
    /// descriptor, since a server that closes may have none left.
    ///
    /// # Errors
    /// [`Error::Os`] when the thread cannot be started.
    pub(super) fn start(mut round: impl FnMut() -> Duration + Send + 'static) -> Result<Leaving> {
        let end = Arc::new(End::default());
        let shared = Arc::clone(&end);
        let answer = move || {
            loop {
                let pause = round();
                let has_come = lock(&shared.has_come);
                if *has_come {
                    return;
                }
                let waited = shared.changed.wait_timeout(has_come, pause);
                if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("shmferry-leaving".to_owned())
            .spawn(answer)
            .map_err(Error::os("starting a thread"))?;
        Ok(Leaving { end, thread: Some(thread), origin: Origin::here() })
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.origin.is_here() {
            // A child of `fork` does not have this thread: the handle may name one of the child's
            // own.
            std::mem::forget(thread);
            return;
        }
        *lock(&self.end.has_come) = true;
        self.end.changed.notify_all();
        // The queue may be dropped on this very thread, by the application's callback for a
        // rejected client.
        if thread.thread().id() != thread::current().id() {
            // It panics only by a defect, which the panic hook has reported.
            let _ = thread.join();
        }
    }
}
