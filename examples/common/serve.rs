//! The cache at work: answers requests from a store, and counts how it went.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use shmferry::workers::blocking;
use shmferry::{Error, Fault, Incoming, Refusal, Result, ServeError, Server, Serving};
use tracing::{debug, warn};

use super::program::{Counter, Pace};
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
    requests: Counter,
    hits: Counter,
    misses: Counter,
    errors: Counter,
    bytes: Counter,
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
    ) -> Result<Serving> {
        let (service, witness) = (Arc::clone(self), Arc::clone(self));
        let server = server.timeout(timeout).on_error(move |error| witness.report(error));
        server.serve(workers, move |request| service.answer(request))
    }

    fn answer(&self, request: Incoming) -> Result<()> {
        self.tally.requests.add(1);
        if !self.delay.is_zero() {
            blocking(|| thread::sleep(self.delay));
        }
        match self.store.look_up(request.key()) {
            Ok(Some((file, size))) => {
                self.tally.hits.add(1);
                self.tally.bytes.add(request.accept(size)?.send_file(&file)?);
                Ok(())
            }
            Ok(None) => {
                self.tally.misses.add(1);
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
                self.tally.errors.add(1);
                warn!("{error}");
            }
        }
    }

    /// How it went, in one line.
    pub fn summary(&self) -> String {
        let Tally { requests, hits, misses, errors, bytes } = &self.tally;
        format!("requests={requests} hits={hits} misses={misses} errors={errors} bytes={bytes}")
    }
}
