//! Segments: their geometry and identity, what backs them, and the views that each side has.

use std::fmt;
use std::marker::PhantomData;

use crate::error::{LayoutMismatch, Misuse, Result};
pub use crate::id::{PoolId, SegmentId};
use crate::peer::Poison;
use crate::process::Origin;
use crate::sync::atomic::{Acquire, AtomicBool, Release};

mod header;
// loom watches memory of its own, not a mapping.
#[cfg_attr(loom, path = "segment/mapping_model.rs")]
mod mapping;
#[cfg(target_os = "linux")]
mod memfd;
mod named;
mod pool;

#[cfg(target_os = "linux")]
pub(crate) use header::LAYOUT_VERSION;
#[cfg(all(test, not(loom)))]
pub(crate) use header::Turn;
pub(crate) use header::{ChunkLen, HEADER_LEN, Header, MAX_METADATA, Phase};
pub(crate) use mapping::Mapping;
#[cfg(target_os = "linux")]
pub(crate) use mapping::Words;
#[cfg(target_os = "linux")]
pub(crate) use memfd::{attach as attach_memfd, attach_words, create_words};
#[cfg(target_os = "linux")]
pub(crate) use named::{Owner, attach as attach_named, sweep, sweep_aside};
pub(crate) use pool::{NO_GENERATION, PooledSegment, SegmentGuard};

#[cfg(not(loom))]
pub use mapping::SharedByte;
#[cfg(target_os = "linux")]
pub use memfd::Memfd;
pub use named::Named;
pub use pool::{Lease, PoolStats, SegmentPool, SegmentPoolBuilder};

/// How a segment is cut: so many slots of so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    slot_count: u32,
    slot_len: u32,
}

/// Slots begin on page boundaries, whatever their length.
const PAGE: usize = 4096;

impl Geometry {
    /// The most slots a segment has.
    pub const MAX_SLOTS: u32 = header::MAX_SLOTS;
    /// The longest slot, in bytes: 1 GiB.
    pub const MAX_SLOT_LEN: u32 = 1 << 30;

    pub(crate) fn new(slot_count: u32, slot_len: u32) -> Result<Geometry, LayoutMismatch> {
        let geometry = Geometry { slot_count, slot_len };
        let mapped = (slot_count as usize).checked_mul(geometry.slot_stride());
        let fits = mapped.is_some_and(|len| len <= isize::MAX as usize - HEADER_LEN as usize);
        if (1..=Self::MAX_SLOTS).contains(&slot_count)
            && (1..=Self::MAX_SLOT_LEN).contains(&slot_len)
            && fits
        {
            Ok(geometry)
        } else {
            Err(LayoutMismatch::Geometry { slot_count, slot_len })
        }
    }

    /// The geometry that divides `segment_len` bytes among `slots`, rounding down.
    pub(crate) fn divide(segment_len: u64, slots: u32) -> Result<Geometry, Misuse> {
        let range = |what, given, least, most| Err(Misuse::OutOfRange { what, given, least, most });
        if !(1..=Self::MAX_SLOTS).contains(&slots) {
            return range("the number of slots", slots.into(), 1, Self::MAX_SLOTS.into());
        }
        let (least, most) = (u64::from(slots), u64::from(slots) * u64::from(Self::MAX_SLOT_LEN));
        let slot_len = u32::try_from(segment_len / least).unwrap_or(u32::MAX);
        Geometry::new(slots, slot_len)
            .or_else(|_| range("the segment's length in bytes", segment_len, least, most))
    }

    /// Slots a segment.
    pub fn slot_count(self) -> u32 {
        self.slot_count
    }

    /// Bytes a slot holds.
    pub fn slot_len(self) -> u32 {
        self.slot_len
    }

    /// Bytes from one slot to the next.
    pub(crate) fn slot_stride(self) -> usize {
        (self.slot_len as usize).next_multiple_of(PAGE)
    }

    /// Bytes of memory a segment takes: its header and its slots, each rounded up to pages.
    pub fn mapped_len(self) -> usize {
        HEADER_LEN as usize + self.slot_count as usize * self.slot_stride()
    }
}

/// A view on slots that can only read them: the receiver's (rule L4).
#[derive(Debug)]
pub enum ReadSlots {}

/// A view on slots that can write them: the sender's.
#[derive(Debug)]
pub enum WriteSlots {}

/// A segment as one side has it mapped.
pub struct Segment<View> {
    id: SegmentId,
    mapping: Mapping,
    /// A sender of this process is on it. Not in shared memory, where the peer could take it down.
    is_claimed: AtomicBool,
    /// The process that mapped it. A child of `fork` may read what it inherits, and no more.
    origin: Origin,
    view: PhantomData<fn() -> View>,
}

impl<View> Segment<View> {
    pub(crate) fn new(id: SegmentId, mapping: Mapping) -> Segment<View> {
        let (is_claimed, origin) = (AtomicBool::new(false), Origin::here());
        Segment { id, mapping, is_claimed, origin, view: PhantomData }
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

impl Segment<WriteSlots> {
    /// Takes the segment for one sender of this process; `false` while another is on it.
    ///
    /// The pair `Acquire` and `Release` orders one sender's writes to the slots before the next one's,
    /// whatever the peer does to the turn word.
    pub(crate) fn claim(&self) -> bool {
        !self.is_claimed.swap(true, Acquire)
    }

    /// Lets the next sender take it.
    pub(crate) fn disclaim(&self) {
        self.is_claimed.store(false, Release);
    }

    /// The memory, for writing its slots.
    pub(crate) fn writable(&self) -> &Mapping {
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
    use super::{Geometry, PoolId, ReadSlots, Result, Segment, SegmentId, WriteSlots};

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
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}
