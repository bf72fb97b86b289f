//! Asking the cache: what its answer means for the client, and who is told when it fails.

use std::fmt;

use shmferry::error::Awaited;
use shmferry::{Error, Refusal, Size};
use tracing::{debug, warn};

use super::client::{Body, Found};
use super::proxy::Miss;
use super::spool::Spooler;

/// The cache that is asked first.
pub struct Cache {
    pub client: shmferry::Client,
    /// Somebody else can be asked when the cache fails.
    pub has_stand_in: bool,
}

impl Cache {
    /// Asks for a path. A stream is spooled.
    pub fn find(&self, path: &[u8], spool: &Spooler<'_>) -> Result<Found, Miss> {
        match self.client.get(path) {
            Ok(body) => match body.size() {
                Size::Known(len) => Ok(Found { len, body: Body::Segment(Box::new(body)) }),
                Size::Unknown => spool.fill(body, |error| self.failed(path, error, "")),
            },
            Err(Error::Refused(Refusal::NotFound | Refusal::Invalid)) => Err(Miss::NotFound),
            Err(Error::Refused(_)) => Err(Miss::Failed),
            Err(error @ Error::Timeout(Awaited::Lease)) => Err(self.failed(path, &error, HINT)),
            Err(error) => Err(self.failed(path, &error, "")),
        }
    }

    /// Segments replaced so far, because a late cache might still have written to them.
    pub fn retired(&self) -> u64 {
        self.client.stats().retired
    }

    fn failed(&self, path: &[u8], error: &dyn fmt::Display, hint: &str) -> Miss {
        let path = path.escape_ascii();
        if self.has_stand_in {
            debug!("the cache failed for {path}: {error}");
        } else {
            warn!("the cache failed for {path}: {error}{hint}");
        }
        Miss::Failed
    }
}

/// What the user can do when there is no segment to be had.
const HINT: &str = ": slow clients hold all of them, and their bodies do not fit into \
                    --spool-limit, or its disk (more segments: -n)";
