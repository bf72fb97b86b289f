//! The first page of a segment: its layout (rules L), field by field, and the turn word.
//!
//! It holds only atomics, and the parker's cells, so that a reference to the header is sound while
//! another process writes to it. Groups written by different sides are 128 bytes apart, because
//! processors fetch cache lines in pairs: this avoids false sharing.

use crate::error::{LayoutMismatch, PeerFault};
use crate::id::{PoolId, SegmentId};
use crate::sync::atomic::{AcqRel, Acquire, AtomicU8, AtomicU32, AtomicU64, Relaxed, Release};
use crate::sync::{Parker, Semaphore};

use super::geometry::{Geometry, HEADER_LEN, MAX_SLOTS};

/// The most metadata an announcement carries, in bytes.
pub(crate) const MAX_METADATA: usize = if cfg!(loom) { 4 } else { 1024 };
/// Version of this layout and its rules. It includes the kind of parker: processes with different
/// parkers cannot wake each other.
pub(crate) const LAYOUT_VERSION: u32 = 3 | Parker::KIND << 16;

const MAGIC: u64 = u64::from_ne_bytes(*b"shmferry");

/// The header of a segment, as both processes map it.
#[cfg_attr(loom, derive(Default))]
#[repr(C)]
pub(crate) struct Header {
    geometry: GeometryGroup,
    pub(crate) turn: Turn,
    pub(crate) announcement: Announcement,
    /// Counts slots ready to read.
    pub(crate) filled: Semaphore,
    /// Counts slots ready to write.
    pub(crate) free: Semaphore,
    pub(crate) receiver: ReceiverGroup,
    /// Length of the chunk in each slot, written by the sender before it posts `filled`.
    pub(crate) chunks: [ChunkWord; MAX_SLOTS as usize],
}

/// Written by the owner before anyone else maps the segment, and never again.
#[cfg_attr(loom, derive(Default))]
#[repr(C, align(128))]
struct GeometryGroup {
    magic: AtomicU64,
    version: AtomicU32,
    header_len: AtomicU32,
    slot_count: AtomicU32,
    slot_len: AtomicU32,
    pool: AtomicU64,
    index: AtomicU32,
}

/// Written by the sender, between `Accepted` and its first post of `filled`.
#[cfg_attr(loom, derive(Default))]
#[repr(C, align(128))]
pub(crate) struct Announcement {
    /// Zero until the sender announces: `protocol::FOUND`, `protocol::LENT`, or the number of a
    /// refusal.
    pub(crate) status: AtomicU32,
    pub(crate) metadata_len: AtomicU32,
    /// Bytes to come, or [`u64::MAX`] for an unknown size (rule P4).
    pub(crate) size: AtomicU64,
    /// The sender's process.
    pub(crate) pid: AtomicU32,
    /// The processor that the sender last ran on (rule P8).
    pub(crate) cpu: AtomicU32,
    /// Of a lent answer, the loan's number. Of one that is streamed for want of room, the bytes of
    /// loans that the receiver would have to return for it to be lent next time.
    pub(crate) loan: AtomicU64,
    /// Of a lent answer, where in the loan it begins, in bytes.
    pub(crate) loan_start: AtomicU64,
    pub(crate) metadata: [AtomicU8; MAX_METADATA],
}

/// Written by the receiver.
#[cfg_attr(loom, derive(Default))]
#[repr(C, align(128))]
pub(crate) struct ReceiverGroup {
    /// Not zero once the receiver has cancelled.
    pub(crate) cancelled: AtomicU32,
    /// The receiver's process.
    pub(crate) pid: AtomicU32,
    /// The processor that the receiver last ran on (rule P8).
    pub(crate) cpu: AtomicU32,
    /// Changes whenever the receiver, or its sink, has taken bytes: a hint for a sender that waits
    /// for a slot (rule P9).
    pub(crate) progress: AtomicU32,
}

// loom's stand-ins for atomics have another size.
#[cfg(not(loom))]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<Header>() <= HEADER_LEN as usize);
    assert!(LAYOUT_VERSION == if Parker::KIND == 0 { 3 } else { 65_539 });
    assert!(offset_of!(Header, geometry) == 0);
    assert!(offset_of!(Header, turn) == 128);
    assert!(offset_of!(Header, announcement) == 256);
    assert!(offset_of!(Header, filled) == 1408);
    let (semaphore, free, receiver, chunks) = match Parker::KIND {
        0 => (128, 1536, 1664, 1792),
        _ => (256, 1664, 1920, 2048),
    };
    assert!(size_of::<Semaphore>() == semaphore);
    assert!(offset_of!(Header, free) == free);
    assert!(offset_of!(Header, receiver) == receiver);
    assert!(offset_of!(Header, chunks) == chunks);
    assert!(offset_of!(Announcement, loan) == 24);
    assert!(offset_of!(Announcement, metadata) == 40);
    assert!(offset_of!(ReceiverGroup, progress) == 12);
};

impl Header {
    /// Writes the geometry and the first turn, and initialises the semaphores. Called by the owner,
    /// before any other process maps the segment.
    pub(crate) fn initialise(&self, id: SegmentId, geometry: Geometry) {
        let group = &self.geometry;
        group.version.store(LAYOUT_VERSION, Relaxed);
        group.header_len.store(HEADER_LEN, Relaxed);
        group.slot_count.store(geometry.slot_count, Relaxed);
        group.slot_len.store(geometry.slot_len, Relaxed);
        group.pool.store(id.pool.0, Relaxed);
        group.index.store(id.index, Relaxed);
        self.turn.0.store(Turn::word(0, Phase::Idle), Relaxed);
        self.filled.initialise();
        self.free.initialise();
        // Last, and with `Release`: a process that reads the magic sees every other field.
        group.magic.store(MAGIC, Release);
    }

    /// Checks the header against what the peer announced (rule L1). Each field is read once.
    pub(crate) fn verify(&self, id: SegmentId, geometry: Geometry) -> Result<(), LayoutMismatch> {
        let group = &self.geometry;
        if group.magic.load(Acquire) != MAGIC {
            return Err(LayoutMismatch::NotASegment);
        }
        let version = group.version.load(Relaxed);
        if version != LAYOUT_VERSION {
            return Err(LayoutMismatch::Version { theirs: version, ours: LAYOUT_VERSION });
        }
        let slot_count = group.slot_count.load(Relaxed);
        let slot_len = group.slot_len.load(Relaxed);
        let header_len = group.header_len.load(Relaxed);
        if (header_len, slot_count, slot_len)
            != (HEADER_LEN, geometry.slot_count, geometry.slot_len)
        {
            return Err(LayoutMismatch::Geometry { slot_count, slot_len });
        }
        let found =
            SegmentId { pool: PoolId(group.pool.load(Relaxed)), index: group.index.load(Relaxed) };
        if found != id {
            return Err(LayoutMismatch::Identity { found, expected: id });
        }
        Ok(())
    }
}

/// Says which side may touch the segment (rule P1): `generation << 8 | phase`.
///
/// Changed by compare-exchange only. Every change is `AcqRel`: the side that takes a turn sees all
/// that was written before the turn was handed over.
#[cfg_attr(loom, derive(Default))]
#[repr(C, align(128))]
pub(crate) struct Turn(pub(super) AtomicU64);

/// The phase of a transfer, in the turn word.
///
/// | phase | entered by | the slots belong to |
/// | --- | --- | --- |
/// | `Idle` | owner | the pool |
/// | `Offered` | receiver | neither side: a sender may accept |
/// | `Accepted` | sender | the sender |
/// | `Announced` | sender | `free` → the sender, `filled` → the receiver |
/// | `Finished`, `Refused`, `Aborted` | sender, as its last write | the receiver |
/// | `Withdrawn` | receiver, from `Offered` only | neither side, until the next offer |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    Idle = 0,
    Offered = 1,
    Accepted = 2,
    Announced = 3,
    Finished = 4,
    Refused = 5,
    Aborted = 6,
    Withdrawn = 7,
}

impl Phase {
    /// Whether no sender touches the segment, and none can before it is offered again.
    pub(crate) fn is_off(self) -> bool {
        use Phase::*;
        matches!(self, Idle | Finished | Refused | Aborted | Withdrawn)
    }

    fn from_bits(bits: u8) -> Option<Phase> {
        use Phase::*;
        [Idle, Offered, Accepted, Announced, Finished, Refused, Aborted, Withdrawn]
            .into_iter()
            .find(|phase| *phase as u8 == bits)
    }
}

impl Turn {
    fn word(generation: u64, phase: Phase) -> u64 {
        generation << 8 | phase as u64
    }

    /// The generation and phase now.
    pub(crate) fn load(&self) -> Result<(u64, Phase), PeerFault> {
        let word = self.0.load(Acquire);
        match Phase::from_bits(word as u8) {
            Some(phase) => Ok((word >> 8, phase)),
            None => Err(PeerFault::ImpossibleTurn(word)),
        }
    }

    /// The phase now, if `generation` still has the turn.
    pub(crate) fn phase_of(&self, generation: u64) -> Option<Phase> {
        match self.load() {
            Ok((now, phase)) if now == generation => Some(phase),
            _ => None,
        }
    }

    /// Moves `generation` from one phase to another; fails with the word found if that differs.
    pub(crate) fn advance(&self, generation: u64, from: Phase, to: Phase) -> Result<(), PeerFault> {
        self.swap(Turn::word(generation, from), Turn::word(generation, to))
    }

    /// Opens the generation after `generation`, which must be `Idle`; returns the new one.
    pub(crate) fn open_next(&self, generation: u64) -> Result<u64, PeerFault> {
        let next = generation + 1;
        self.swap(Turn::word(generation, Phase::Idle), Turn::word(next, Phase::Offered))?;
        Ok(next)
    }

    fn swap(&self, from: u64, to: u64) -> Result<(), PeerFault> {
        match self.0.compare_exchange(from, to, AcqRel, Acquire) {
            Ok(_) => Ok(()),
            Err(found) => Err(PeerFault::ImpossibleTurn(found)),
        }
    }
}

/// Length of the chunk in one slot, and whether it is the last.
#[cfg_attr(loom, derive(Default))]
#[repr(transparent)]
pub(crate) struct ChunkWord(AtomicU32);

/// A [`ChunkWord`], read once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkLen {
    /// Bytes.
    pub(crate) len: u32,
    /// Whether it is the last chunk of the transfer.
    pub(crate) last: bool,
}

impl ChunkWord {
    const LAST: u32 = 1 << 31;

    /// `Relaxed`: the post of `filled` publishes it.
    pub(crate) fn store(&self, chunk: ChunkLen) {
        self.0.store(chunk.len | if chunk.last { Self::LAST } else { 0 }, Relaxed);
    }

    pub(crate) fn load(&self) -> ChunkLen {
        let word = self.0.load(Relaxed);
        ChunkLen { len: word & !Self::LAST, last: word & Self::LAST != 0 }
    }
}
