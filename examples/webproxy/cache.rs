//! Asking the cache: a segment, a request, and what came back through it.

use std::io;
use std::time::Duration;

use shmferry::channel::Requester;
use shmferry::error::Awaited;
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, SegmentPool};
use shmferry::{Deadline, Error, Refusal, Result, Size};
use tracing::{debug, warn};

use super::client::{Body, Found};
use super::proxy::Miss;
use super::spool::{Spooler, Unspooled};

/// How many of those ahead in line may stall, each for a whole time-out, before a request for a
/// segment gives up.
const TURNS: u32 = 4;

/// A pool of segments, and the queue to the cache that fills them.
pub struct Cache {
    way: Box<dyn Way>,
    timeout: Duration,
    /// Somebody else can be asked when the cache fails.
    has_stand_in: bool,
}

impl Cache {
    /// Asks over `queue`, waiting up to `timeout` for each step of the cache.
    pub fn new<B: Backing>(
        pool: SegmentPool<B>,
        queue: impl Requester<B> + 'static,
        timeout: Duration,
        has_stand_in: bool,
    ) -> Cache {
        Cache { way: Box::new((pool, queue)), timeout, has_stand_in }
    }

    /// Asks for a path. A stream is spooled.
    pub fn find(&self, path: &[u8], spool: &Spooler<'_>) -> Result<Found, Miss> {
        self.try_find(path, spool).unwrap_or_else(|error| {
            if self.has_stand_in {
                debug!("the cache failed for {}: {error}", path.escape_ascii());
            } else {
                warn!("the cache failed for {}: {error}{}", path.escape_ascii(), hint(&error));
            }
            Err(Miss::Failed)
        })
    }

    /// Segments replaced so far, because a late cache might still have written to them.
    pub fn retired(&self) -> u64 {
        self.way.retired()
    }

    fn try_find(&self, path: &[u8], spool: &Spooler<'_>) -> Result<Result<Found, Miss>> {
        let turns = if self.has_stand_in { 1 } else { TURNS };
        let lease_timeout = self.timeout.saturating_mul(turns);
        let mut body = match self.way.ask(path, lease_timeout, self.timeout)? {
            Reply::Found(body) => body,
            Reply::Refused(Refusal::NotFound | Refusal::Invalid) => return Ok(Err(Miss::NotFound)),
            Reply::Refused(_) => return Ok(Err(Miss::Failed)),
        };
        body.set_timeout(self.timeout);
        match body.size() {
            Size::Known(len) => Ok(Ok(Found { len, body: Body::Segment(Box::new(body)) })),
            Size::Unknown => match spool.fill(body) {
                Ok(found) => Ok(Ok(found)),
                Err(Unspooled::ClientLeft) => Ok(Err(Miss::ClientLeft)),
                Err(Unspooled::Io(error)) => Err(Error::Source(error)),
                Err(too_long) => Err(Error::Source(io::Error::other(too_long.to_string()))),
            },
        }
    }
}

/// What the user can do about an error.
fn hint(error: &Error) -> &'static str {
    match error {
        Error::Timeout(Awaited::Lease) => {
            ": slow clients hold all of them, and their bodies do not fit into --spool-limit, or its disk \
             (more segments: -n)"
        }
        _ => "",
    }
}

/// A pool and its queue, whatever the segments are made of.
trait Way: Send + Sync {
    /// Asks for a path, waiting for a segment, for the queue and for the reply.
    fn ask(&self, path: &[u8], lease_timeout: Duration, timeout: Duration) -> Result<Reply>;

    fn retired(&self) -> u64;
}

impl<B: Backing, Q: Requester<B>> Way for (SegmentPool<B>, Q) {
    fn ask(&self, path: &[u8], lease_timeout: Duration, timeout: Duration) -> Result<Reply> {
        let (pool, queue) = self;
        let lease = pool.lease(Deadline::after(lease_timeout))?;
        queue.ask(lease, path, Deadline::after(timeout))
    }

    fn retired(&self) -> u64 {
        self.0.stats().retired
    }
}
