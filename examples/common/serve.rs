//! The cache at work: takes transfers from a request queue and answers them from a store.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use shmferry::channel::RequestQueue;
use shmferry::protocol::{Sender, ShmTransfer, Starting};
use shmferry::workers::{WorkerPool, blocking};
use shmferry::{Deadline, Error, Fault, Refusal, Result};
use tracing::{debug, warn};

use super::program::{Counter, Pace};
use super::store::Store;

/// How long to leave a failing system alone before the next try.
const PAUSE: Duration = Duration::from_millis(100);

/// What is served, and how.
pub struct Service {
    store: Store,
    delay: Duration,
    timeout: Duration,
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
    /// Serves a store, waiting `delay` before each look-up, and up to `timeout` for a receiver
    /// that makes no progress.
    pub fn new(store: Store, delay: Duration, timeout: Duration) -> Service {
        Service { store, delay, timeout, tally: Tally::default() }
    }

    /// Starts workers on a queue, until it is closed or dropped. They do not keep it alive.
    pub fn start<Q>(self: &Arc<Self>, queue: &Arc<Q>, workers: usize) -> io::Result<WorkerPool>
    where
        Q: RequestQueue + ?Sized + 'static,
    {
        let (service, queue) = (Arc::clone(self), Arc::downgrade(queue));
        let pace = Pace::default();
        let next = move || loop {
            match queue.upgrade()?.recv(Deadline::NEVER) {
                Ok(transfer) => return Some(transfer),
                Err(Error::Closed) => return None,
                Err(error) => {
                    if let Some(held_back) = pace.admit() {
                        warn!("cannot take requests: {error}{held_back}");
                    }
                }
            }
            thread::sleep(PAUSE);
        };
        WorkerPool::start("cache", workers, next, move |transfer| service.answer(transfer))
    }

    fn answer(&self, transfer: ShmTransfer<Sender, Starting>) {
        let key = transfer.key().to_vec();
        self.tally.requests.add(1);
        match self.try_answer(transfer) {
            Ok(sent) => self.tally.bytes.add(sent),
            // Nobody wants it any more, or nobody can take it: that is for them to report.
            Err(error) if matches!(error.fault(), Fault::Peer | Fault::Time) => {
                debug!("{}: {error}", key.escape_ascii());
            }
            Err(error) => {
                self.tally.errors.add(1);
                warn!("{}: {error}", key.escape_ascii());
            }
        }
    }

    fn try_answer(&self, transfer: ShmTransfer<Sender, Starting>) -> Result<u64> {
        if !self.delay.is_zero() {
            blocking(|| thread::sleep(self.delay));
        }
        match self.store.look_up(transfer.key()) {
            Ok(Some((file, size))) => {
                self.tally.hits.add(1);
                let mut sending = transfer.accept(size)?;
                sending.set_timeout(self.timeout);
                sending.send_file(&file)
            }
            Ok(None) => {
                self.tally.misses.add(1);
                transfer.refuse(Refusal::NotFound)?;
                Ok(0)
            }
            Err(error) => {
                transfer.refuse(Refusal::Failed)?;
                Err(Error::Source(error))
            }
        }
    }

    /// How it went, in one line.
    pub fn summary(&self) -> String {
        let Tally { requests, hits, misses, errors, bytes } = &self.tally;
        format!("requests={requests} hits={hits} misses={misses} errors={errors} bytes={bytes}")
    }
}
