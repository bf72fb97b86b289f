//! Segments: what backs them, and the views that each side has.

use std::fmt;
use std::marker::PhantomData;

use crate::error::Result;
pub use crate::id::{PoolId, SegmentId};
use crate::peer::Poison;
use crate::process::Origin;
use crate::sync::atomic::AtomicBool;

mod geometry;
mod header;
// loom watches memory of its own, not a mapping.
#[cfg_attr(loom, path = "segment/mapping_model.rs")]
mod mapping;
#[cfg(target_os = "linux")]
mod memfd;
mod pool;
#[cfg(test)]
mod tests;
mod writer;

pub use geometry::Geometry;
pub(crate) use header::{ChunkLen, Header, MAX_METADATA, Phase};
#[cfg(feature = "posix-mq")]
pub(crate) use mapping::Mapped;
pub(crate) use mapping::Mapping;
#[cfg(not(loom))]
pub use mapping::SharedByte;
pub(crate) use pool::{Ended, PooledSegment, SegmentGuard};
pub use pool::{Lease, PoolStats, SegmentPool, SegmentPoolBuilder};
pub(crate) use writer::SlotWriter;

#[cfg(target_os = "linux")]
pub use memfd::Memfd;
#[cfg(target_os = "linux")]
pub(crate) use {
    header::LAYOUT_VERSION,
    mapping::Words,
    memfd::{attach as attach_memfd, attach_words, create_words},
};

/// A view on slots that can only read them: the receiver's (rule L4).
#[derive(Debug)]
pub enum ReadSlots {}

/// A view on slots that can write them: the sender's, by a `SlotWriter`.
#[derive(Debug)]
pub enum WriteSlots {}

/// A segment as one side has it mapped.
pub struct Segment<View> {
    id: SegmentId,
    mapping: Mapping,
    /// There is a [`SlotWriter`]. Not in shared memory, where the peer could change it.
    is_claimed: AtomicBool,
    /// The process that mapped it. A child of `fork` may read what it inherits, and no more.
    origin: Origin,
    view: PhantomData<fn() -> View>,
}

impl<View> Segment<View> {
    pub(crate) fn new(id: SegmentId, mapping: Mapping) -> Segment<View> {
        let is_claimed = AtomicBool::new(false);
        Segment { id, mapping, is_claimed, origin: Origin::here(), view: PhantomData }
    }

    /// Which segment this is.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// How it is cut.
    pub fn geometry(&self) -> Geometry {
        self.mapping.geometry()
    }

    pub(crate) fn header(&self) -> &Header {
        self.mapping.header()
    }

    /// The process that mapped it, and that alone may change anything in it.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

impl Segment<ReadSlots> {
    /// The memory, for reading its slots.
    pub(crate) fn readable(&self) -> &Mapping {
        &self.mapping
    }
}

// Each side ends its own waits only: the other learns of the hang-up from its own watcher.
impl Poison for Segment<ReadSlots> {
    fn poison(&self) {
        self.header().filled.poison();
    }
}

impl Poison for Segment<WriteSlots> {
    fn poison(&self) {
        self.header().free.poison();
    }
}

impl<View> fmt::Debug for Segment<View> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("id", &self.id).field("geometry", &self.geometry()).finish()
    }
}

/// What segments are made of, and how they reach the peer.
///
/// A pool is typed by its backing, and so are requests: a queue that cannot carry what a pool's
/// segments need does not take them. Sealed: a new backing comes with its rules and its tests.
pub trait Backing: sealed::Backing + Send + Sync + 'static {}

pub(crate) mod sealed {
    use super::*;

    /// What every backing does. The value is what keeps a segment's memory reachable for peers.
    pub trait Backing: Sized {
        /// What a pool holds as long as it lives; dropped after its segments.
        type Ownership: Send + Sync;

        /// Makes that, before the pool's first segment.
        fn own(pool: PoolId) -> Result<Self::Ownership>;

        /// Bytes that segments can still take, where the system says so.
        fn available() -> Option<u64>;

        /// Makes the memory, really present (rule L2), with an initialised header.
        fn create(
            own: &Self::Ownership,
            id: SegmentId,
            geometry: Geometry,
        ) -> Result<(Segment<ReadSlots>, Self)>;

        /// Maps it once more, as a sender of this same process does.
        fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>>;
    }
}

/// Bytes of memory that the system can still give, where it says so.
#[cfg(target_os = "linux")]
pub(crate) fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}
