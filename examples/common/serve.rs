//! The cache at work: answers requests from a store, and counts how it went.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use shmferry::loan::{LoanStats, LoanStore};
use shmferry::workers::blocking;
use shmferry::{Error, Fault, Incoming, Refusal, ServeError, Server, Serving};
use tracing::{debug, warn};

use super::asked::{self, Stamp};
use super::program::Pace;
use super::store::Store;

/// What is served, and how.
pub struct Service {
    store: Store,
    loans: LoanStore,
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
}

impl Service {
    /// Serves a store, waiting `delay` before each look-up; lends what is asked for again.
    pub fn new(store: Store, loans: LoanStore, delay: Duration) -> Arc<Service> {
        Arc::new(Service { store, loans, delay, pace: Pace::default(), tally: Tally::default() })
    }

    /// Starts workers.
    pub fn start(self: &Arc<Self>, server: Server, workers: usize) -> Result<Serving, String> {
        let (service, witness) = (Arc::clone(self), Arc::clone(self));
        let server = server.on_error(move |error| witness.report(error));
        let serving = server.serve(workers, move |request| service.answer(request));
        serving.map_err(|error| format!("cannot start a worker: {error}"))
    }

    fn answer(&self, request: Incoming) -> shmferry::Result<()> {
        self.tally.requests.fetch_add(1, Relaxed);
        if !self.delay.is_zero() {
            blocking(|| thread::sleep(self.delay));
        }
        let key = request.key().to_vec();
        let (path, asked) = asked::split(&key);
        if asked == Some(asked::LIST) {
            // One list at a time: a long one takes its time, and the workers are for files.
            static LISTS: Mutex<()> = Mutex::new(());
            let list = blocking(|| {
                let _alone = LISTS.lock().unwrap_or_else(PoisonError::into_inner);
                self.store.list(path)
            });
            return match list {
                Ok(Some(list)) => request.send_bytes(&list),
                Ok(None) => request.refuse(Refusal::NotFound),
                Err(error) => {
                    request.refuse(Refusal::Failed)?;
                    Err(Error::Source(error))
                }
            };
        }
        match self.store.look_up(path) {
            Ok(Some(file)) => {
                self.tally.hits.fetch_add(1, Relaxed);
                self.send(request, &file, asked)
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

    fn send(&self, request: Incoming, file: &File, asked: Option<&str>) -> shmferry::Result<()> {
        let stamp = Stamp::of(file).map_err(Error::Source)?;
        match asked {
            Some(asked::HEAD) => request.accept_with(0, &stamp)?.finish(),
            Some(asked) if stamp.len < u64::MAX => match stamp.part(asked) {
                Some(part) => {
                    let stamp = Stamp { start: part.start, ..stamp };
                    self.loans.send_file_range_with(request, file, part, &stamp)
                }
                None => request.refuse(Refusal::other(asked::NO_SUCH_PART).with(&stamp)),
            },
            _ => self.loans.send_file_with(request, file, &stamp),
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
        let Tally { requests, hits, misses, errors } = &self.tally;
        let LoanStats { lent, streamed, bytes, filled, .. } = self.loans.stats();
        format!(
            "requests={requests:?} hits={hits:?} misses={misses:?} errors={errors:?} \
             lent={lent} streamed={streamed} copied={filled} bytes={bytes}"
        )
    }
}
