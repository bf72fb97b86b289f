//! A segment outside its pool: as a lease, and then as part of a transfer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::segment::{Backing, ReadSlots, Segment};

use super::quarantine::{Ended, PooledSegment, Quarantined};
use super::shared::Shared;

/// A segment taken from its pool; dropping the lease returns it.
///
/// [`request`](Self::request) turns it into a transfer.
pub struct Lease<B: Backing> {
    pooled: Arc<PooledSegment<B>>,
    pool: Arc<Shared<B>>,
    /// True once it has become a transfer, which returns the segment instead.
    is_transfer: bool,
}

impl<B: Backing> Lease<B> {
    pub(super) fn new(pooled: Arc<PooledSegment<B>>, pool: Arc<Shared<B>>) -> Lease<B> {
        Lease { pooled, pool, is_transfer: false }
    }

    /// The segment that was leased.
    pub fn segment(&self) -> &Segment<ReadSlots> {
        &self.pooled.segment
    }

    /// To lease the same segment again, once its transfer has ended.
    pub(crate) fn again(&self) -> Again<B> {
        Again { pooled: Arc::clone(&self.pooled), pool: Arc::clone(&self.pool) }
    }

    /// Splits the lease into the request's part and the transfer's part.
    pub(crate) fn into_parts(mut self) -> (Arc<PooledSegment<B>>, SegmentGuard) {
        self.is_transfer = true;
        let segment = Arc::clone(&self.pooled.segment);
        let guard = SegmentGuard { segment, pool: Arc::clone(&self.pool) as _ };
        (Arc::clone(&self.pooled), guard)
    }
}

/// The segment of a transfer, to be leased again.
pub(crate) struct Again<B: Backing> {
    pooled: Arc<PooledSegment<B>>,
    pool: Arc<Shared<B>>,
}

impl<B: Backing> Again<B> {
    /// Leases the segment again, or its replacement, once its transfer has ended: without queueing
    /// behind callers that wait for a segment.
    pub(crate) fn lease(self, ended: Ended, may_wait: bool) -> Result<Lease<B>> {
        let Again { pooled, pool } = self;
        let grace = if may_wait { pool.grace } else { Duration::ZERO };
        match pool.recover(Quarantined { pooled, ended }, grace) {
            Ok(pooled) => Ok(Lease::new(pooled, pool)),
            Err((quarantined, error)) => {
                pool.put_quarantined(quarantined);
                Err(error)
            }
        }
    }
}

impl<B: Backing> Drop for Lease<B> {
    fn drop(&mut self) {
        if !self.is_transfer && self.pool.origin.is_here() {
            self.pool.put_idle(Arc::clone(&self.pooled));
        }
    }
}

impl<B: Backing> fmt::Debug for Lease<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("segment", self.segment()).finish()
    }
}

/// A transfer's segment, with any backing.
pub(crate) struct SegmentGuard {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pool: Arc<dyn TakeBack>,
}

impl SegmentGuard {
    /// Returns the segment: to the idle ones if the sender has left it, to the quarantined ones
    /// otherwise (rule P6).
    pub(crate) fn give_back(&self, ended: Ended) {
        self.pool.take_back(&self.segment, ended);
    }

    /// Whether other callers wait for a segment of the pool.
    pub(crate) fn is_wanted(&self) -> bool {
        self.pool.is_waited_for()
    }
}

/// A pool with any backing.
pub(super) trait TakeBack: Send + Sync {
    fn is_waited_for(&self) -> bool;
    fn take_back(&self, segment: &Segment<ReadSlots>, ended: Ended);
}
