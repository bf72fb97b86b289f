//! The thread that answers clients after a queue's `close`, until the queue is dropped: each is told to
//! ask the successor.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

use super::poller::Poller;

/// The thread. Dropping it ends it.
pub(super) struct Leaving {
    poller: Arc<Poller>,
    thread: Option<JoinHandle<()>>,
}

impl Leaving {
    /// Runs `round` again and again, until it fails: as it does once its poller is closed. The poller is
    /// one of its own, since that of the workers wakes each of them to tell that it is closed.
    ///
    /// # Errors
    /// [`Error::Os`] without a thread for it.
    pub(super) fn start(
        poller: Poller,
        mut round: impl FnMut(&Poller) -> Result<()> + Send + 'static,
    ) -> Result<Leaving> {
        let poller = Arc::new(poller);
        let ours = Arc::clone(&poller);
        let thread = thread::Builder::new()
            .name("shmferry-leaving".to_owned())
            .spawn(move || while round(&ours).is_ok() {})
            .map_err(Error::os("starting a thread"))?;
        Ok(Leaving { poller, thread: Some(thread) })
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if !self.poller.origin().is_here() {
            return; // a child of `fork` has no such thread
        }
        self.poller.close();
        if let Some(thread) = self.thread.take() {
            // It panics only by a defect, which the panic hook has told.
            let _ = thread.join();
        }
    }
}
