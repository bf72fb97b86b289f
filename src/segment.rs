//! Segments of shared memory: their backings, and the view that each side has of them.

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
pub(crate) use pool::{Again, Ended, PooledSegment, SegmentGuard};
pub use pool::{Lease, Leasing, PoolStats, SegmentPool, SegmentPoolBuilder};
pub(crate) use writer::SlotWriter;

#[cfg(target_os = "linux")]
pub use memfd::Memfd;
#[cfg(target_os = "linux")]
pub(crate) use {
    header::LAYOUT_VERSION,
    mapping::Words,
    memfd::{
        allocate_blocks, attach as attach_memfd, attach_words, check as check_memfd, create_words,
        empty_memfd,
    },
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
    /// True while a [`SlotWriter`] exists. It is private memory, so the peer cannot change it.
    is_claimed: AtomicBool,
    /// The process that mapped it. A child of `fork` may read the memory it inherits, but not write
    /// it.
    origin: Origin,
    view: PhantomData<fn() -> View>,
}

impl<View> Segment<View> {
    pub(crate) fn new(id: SegmentId, mapping: Mapping) -> Segment<View> {
        let is_claimed = AtomicBool::new(false);
        Segment { id, mapping, is_claimed, origin: Origin::here(), view: PhantomData }
    }

    /// The segment's pool and its number in it.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// How it is divided into slots.
    pub fn geometry(&self) -> Geometry {
        self.mapping.geometry()
    }

    pub(crate) fn header(&self) -> &Header {
        self.mapping.header()
    }

    /// The process that mapped it: the only one that may write to it through this mapping.
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

// Each side poisons only the semaphore that it waits on itself. The other side learns of the
// hang-up from its own watcher.
impl Poison for Segment<ReadSlots> {
    fn poison(&self) {
        self.header().filled.poison();
    }

    fn has_news(&self) -> bool {
        self.header().filled.is_settled()
    }
}

impl Poison for Segment<WriteSlots> {
    fn poison(&self) {
        self.header().free.poison();
    }

    fn has_news(&self) -> bool {
        self.header().free.is_settled()
    }
}

impl<View> fmt::Debug for Segment<View> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("id", &self.id).field("geometry", &self.geometry()).finish()
    }
}

/// The memory that segments are made of, and how it reaches the peer.
///
/// A pool has its backing as a type parameter, and so have requests: a queue takes only requests
/// whose backing it can pass on. The trait is sealed: each backing needs rules and tests of its
/// own.
pub trait Backing: sealed::Backing + Send + Sync + 'static {}

pub(crate) mod sealed {
    use super::*;

    /// The functions of every backing. The value keeps one segment's memory reachable for peers.
    pub trait Backing: Sized {
        /// A resource that the pool owns for its whole life; dropped after its segments.
        type Ownership: Send + Sync;

        /// Makes the ownership value, before the pool's first segment.
        fn own(pool: PoolId) -> Result<Self::Ownership>;

        /// Bytes that new segments can still take; `None` where the system does not tell.
        fn available() -> Option<u64>;

        /// Allocates the memory with all its pages present (rule L2), and initialises the header.
        fn create(
            own: &Self::Ownership,
            id: SegmentId,
            geometry: Geometry,
        ) -> Result<(Segment<ReadSlots>, Self)>;

        /// Maps the segment a second time, writable: for a sender in the same process.
        fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>>;
    }
}

/// Bytes of memory that the system can still give; `None` where it does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}
