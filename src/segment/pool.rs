//! The pool of segments: its builder, its leases, its statistics.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::error::{Awaited, Error, Result};
use crate::id::PoolId;
#[cfg(target_os = "linux")]
use crate::process::Origin;
use crate::random::random;
use crate::sync::modelled::lock;
use crate::sync::{Deadline, blocking};

use super::geometry::check_range;
use super::{Backing, Geometry};

mod lease;
mod leasing;
#[cfg(all(test, loom))]
mod model;
mod quarantine;
mod shared;
#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests;

pub use lease::Lease;
pub(crate) use lease::{Again, SegmentGuard};
pub use leasing::Leasing;
pub(crate) use quarantine::{Ended, PooledSegment};
use shared::Shared;

/// How long a lease waits for a late sender to leave a segment before it replaces that segment.
/// A sender that runs leaves at its next slot, microseconds later; one that does not is stopped.
const GRACE: Duration = Duration::from_millis(20);

/// A fixed number of segments of one geometry, owned by the receiving process.
///
/// Cheap to clone; all clones are the same pool. Its memory is allocated when the pool is made and
/// reused from then on; a transfer needs one segment, whatever the size of what it moves.
///
/// ```
/// use shmferry::segment::{Memfd, SegmentPool};
/// use shmferry::Deadline;
/// use std::time::Duration;
///
/// let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(64 << 10).slots(4).create()?;
/// let deadline = Deadline::after(Duration::from_millis(10));
/// let first = pool.lease(deadline)?;
/// let _second = pool.lease(deadline)?;
/// assert!(pool.lease(deadline).is_err()); // timed out: both are taken
/// drop(first);
/// assert!(pool.lease(deadline).is_ok());
/// # Ok::<(), shmferry::Error>(())
/// ```
pub struct SegmentPool<B: Backing> {
    shared: Arc<Shared<B>>,
}

/// The size of a new [`SegmentPool`]: segments, slots and bytes.
#[derive(Clone, Debug)]
#[must_use]
pub struct SegmentPoolBuilder<B> {
    segments: u32,
    segment_len: u64,
    slots: u32,
    grace: Duration,
    backing: PhantomData<fn() -> B>,
}

/// A pool's counters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Segments in the pool. Never changes.
    pub segments: usize,
    /// Segments that can be leased at once.
    pub idle: usize,
    /// Segments returned while their sender may still write to them. Each is leased again once the
    /// sender has left it, or is replaced.
    pub quarantined: usize,
    /// Segments replaced so far, because a late sender might still have written to them (rule P6).
    pub retired: u64,
}

impl<B: Backing> SegmentPool<B> {
    /// A builder with the defaults: 8 segments of 2 MiB, in 8 slots each. `docs/design.md`,
    /// *Speed*, gives the measurements behind them.
    pub fn builder() -> SegmentPoolBuilder<B> {
        SegmentPoolBuilder {
            segments: 8,
            segment_len: 2 << 20,
            slots: 8,
            grace: GRACE,
            backing: PhantomData,
        }
    }

    /// Takes a segment, waiting for one until the deadline. Waiting callers are served in the order
    /// of their arrival. If a late sender may still write to the only segment left, the lease waits
    /// 20 ms more for it, beyond the deadline if need be, and then replaces the segment.
    ///
    /// # Errors
    /// [`Error::Timeout`] when none came free in time; [`Error::Os`] when no segment left is usable
    /// and none can be replaced; [`Error::NameTaken`] when the name for a new one is in use;
    /// [`Error::Misuse`] in a child of `fork`: the pool belongs to its parent.
    pub fn lease(&self, deadline: Deadline) -> Result<Lease<B>> {
        let pool = &self.shared;
        pool.origin.check()?;
        if !pool.available.try_enter() && !blocking(|| pool.available.enter(deadline)) {
            return Err(Error::Timeout(Awaited::Lease));
        }
        Ok(Lease::new(pool.take(pool.grace)?, Arc::clone(pool)))
    }

    /// As [`lease`](Self::lease), if a segment is free now.
    ///
    /// # Errors
    /// Those of [`lease`](Self::lease), but for [`Error::Timeout`].
    pub fn try_lease(&self) -> Poll<Result<Lease<B>>> {
        let pool = &self.shared;
        pool.origin.check()?;
        if !pool.available.try_enter() {
            return Poll::Pending;
        }
        Poll::Ready(pool.take(Duration::ZERO).map(|taken| Lease::new(taken, Arc::clone(pool))))
    }

    /// As [`lease`](Self::lease), for a task: a future, which any runtime can wait for. It waits as
    /// long as it takes, in turn with threads that wait, and gives its turn up when it is dropped.
    /// A segment that a late sender may still write to is replaced at once.
    ///
    /// # Errors
    /// Those of [`lease`](Self::lease), but for [`Error::Timeout`].
    pub fn lease_soon(&self) -> Leasing<B> {
        Leasing::new(Arc::clone(&self.shared))
    }

    /// The pool's random identifier.
    pub fn id(&self) -> PoolId {
        self.shared.id
    }

    /// How each of its segments is divided into slots.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// The pool's counters at this moment. All zero in a child of `fork`, to which no segment
    /// belongs.
    pub fn stats(&self) -> PoolStats {
        if !self.shared.origin.is_here() {
            return PoolStats { segments: 0, idle: 0, quarantined: 0, retired: 0 };
        }
        let state = lock(&self.shared.state);
        PoolStats {
            segments: state.live.len(),
            idle: state.idle.len(),
            quarantined: state.quarantined.len(),
            retired: state.version,
        }
    }

    /// The process that owns it.
    #[cfg(target_os = "linux")]
    pub(crate) fn origin(&self) -> Origin {
        self.shared.origin
    }

    /// Changes whenever a segment is replaced.
    pub(crate) fn version(&self) -> u64 {
        lock(&self.shared.state).version
    }

    /// The current segments, and the version of that set.
    pub(crate) fn live(&self) -> (u64, Vec<Arc<PooledSegment<B>>>) {
        let state = lock(&self.shared.state);
        (state.version, state.live.values().cloned().collect())
    }
}

impl<B: Backing> Clone for SegmentPool<B> {
    fn clone(&self) -> Self {
        SegmentPool { shared: Arc::clone(&self.shared) }
    }
}

impl<B: Backing> fmt::Debug for SegmentPool<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { id, geometry, .. } = &*self.shared;
        f.debug_struct("SegmentPool")
            .field("id", id)
            .field("geometry", geometry)
            .field("stats", &self.stats())
            .finish()
    }
}

impl<B: Backing> SegmentPoolBuilder<B> {
    /// How many segments, and so how many concurrent transfers: 1 to 65,536.
    pub fn segments(mut self, count: u32) -> Self {
        self.segments = count;
        self
    }

    /// Bytes of payload in a segment, all slots together. Rounded down to a multiple of the slot
    /// count.
    pub fn segment_len(mut self, bytes: u64) -> Self {
        self.segment_len = bytes;
        self
    }

    /// Slots in a segment. With 1 the sides take strict turns; with more, both work at the same
    /// time.
    pub fn slots(mut self, count: u32) -> Self {
        self.slots = count;
        self
    }

    /// Makes the pool, and allocates all its memory.
    ///
    /// # Errors
    /// [`Error::Misuse`] for numbers outside their limits, [`Error::Memory`] when the system has
    /// less memory than the pool needs, [`Error::Os`] when a system call fails otherwise.
    pub fn create(self) -> Result<SegmentPool<B>> {
        check_range("the number of segments", self.segments.into(), 1..=1 << 16)?;
        let geometry = Geometry::divide(self.segment_len, self.slots)?;
        let asked = geometry.mapped_len() as u64 * u64::from(self.segments);
        // Checked before allocating: for more memory than there is, the kernel kills this process
        // instead of returning an error.
        if let Some(available) = B::available().filter(|available| *available < asked) {
            let lack = format!("only {available} bytes are available");
            let source = io::Error::new(io::ErrorKind::OutOfMemory, lack);
            return Err(Error::Memory { asked, source });
        }

        let id = PoolId(random().map_err(Error::os("getrandom"))?);
        let shared = Shared::new(id, geometry, self.grace, self.segments, B::own(id)?);
        for _ in 0..self.segments {
            shared.add().map_err(|error| match error {
                Error::Os { source, .. }
                    if matches!(
                        source.kind(),
                        io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull
                    ) =>
                {
                    Error::Memory { asked, source }
                }
                other => other,
            })?;
        }
        Ok(SegmentPool { shared: Arc::new(shared) })
    }
}
