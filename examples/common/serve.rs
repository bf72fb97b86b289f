//! The cache at work: answers requests from a store, and counts how it went.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use shmferry::workers::blocking;
use shmferry::{Error, Fault, Incoming, Refusal, ServeError, Server, Serving};
use tracing::{debug, warn};

use super::program::Pace;
use super::store::Store;

/// What is served, and how.
pub struct Service {
    store: Store,
    delay: Duration,
    pace: Pace,
    tally: Tally,
}

/// How it went so far.
#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

impl Service {
    /// Serves a store, waiting `delay` before each look-up.
    pub fn new(store: Store, delay: Duration) -> Arc<Service> {
        let (pace, tally) = (Pace::default(), Tally::default());
        Arc::new(Service { store, delay, pace, tally })
    }

    /// Starts workers, which wait up to `timeout` for a client that takes nothing.
    pub fn start(
        self: &Arc<Self>,
        server: Server,
        workers: usize,
        timeout: Duration,
    ) -> Result<Serving, String> {
        let (service, witness) = (Arc::clone(self), Arc::clone(self));
        let server = server.timeout(timeout).on_error(move |error| witness.report(error));
        let serving = server.serve(workers, move |request| service.answer(request));
        serving.map_err(|error| format!("cannot start a worker: {error}"))
    }

    fn answer(&self, request: Incoming) -> shmferry::Result<()> {
        self.tally.requests.fetch_add(1, Relaxed);
        if !self.delay.is_zero() {
            blocking(|| thread::sleep(self.delay));
        }
        match self.store.look_up(request.key()) {
            Ok(Some((file, size))) => {
                self.tally.hits.fetch_add(1, Relaxed);
                self.tally.bytes.fetch_add(request.accept(size)?.send_file(&file)?, Relaxed);
                Ok(())
            }
            Ok(None) => {
                self.tally.misses.fetch_add(1, Relaxed);
                request.refuse(Refusal::NotFound)
            }
            Err(error) => {
                request.refuse(Refusal::Failed)?;
                Err(Error::Source(error))
            }
        }
    }

    fn report(&self, error: &ServeError) {
        match error {
            ServeError::Queue(_) => self.pace.warn(error),
            ServeError::Rejected { .. } => warn!("{error}"),
            // A client that has left or stalls: that is for its own log.
            _ if matches!(error.fault(), Fault::Peer | Fault::Time) => debug!("{error}"),
            _ => {
                self.tally.errors.fetch_add(1, Relaxed);
                warn!("{error}");
            }
        }
    }

    /// How it went, in one line.
    pub fn summary(&self) -> String {
        let Tally { requests, hits, misses, errors, bytes: sent } = &self.tally;
        format!(
            "requests={requests:?} hits={hits:?} misses={misses:?} errors={errors:?} bytes={sent:?}"
        )
    }
}
