//! How a segment is divided into slots.

use std::ops::RangeInclusive;

use crate::error::{LayoutMismatch, Misuse, Result};

/// Bytes from the start of a segment to its first slot: one page.
pub(crate) const HEADER_LEN: u32 = 4096;
/// The most slots: the header has room for this many chunk words.
pub(super) const MAX_SLOTS: u32 = if cfg!(loom) { 4 } else { 512 };
/// Slots begin on page boundaries, whatever their length.
pub(super) const PAGE: usize = 4096;

/// How a segment is divided: a number of slots, all of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub(super) slot_count: u32,
    pub(super) slot_len: u32,
}

impl Geometry {
    /// The most slots a segment has.
    pub const MAX_SLOTS: u32 = MAX_SLOTS;
    /// The longest slot, in bytes: 1 GiB.
    pub const MAX_SLOT_LEN: u32 = 1 << 30;

    pub(crate) fn new(slot_count: u32, slot_len: u32) -> Result<Geometry, LayoutMismatch> {
        let geometry = Geometry { slot_count, slot_len };
        let slots_len = (slot_count as usize).checked_mul(geometry.slot_stride());
        if (1..=Self::MAX_SLOTS).contains(&slot_count)
            && (1..=Self::MAX_SLOT_LEN).contains(&slot_len)
            && slots_len.is_some_and(|len| len <= isize::MAX as usize - HEADER_LEN as usize)
        {
            Ok(geometry)
        } else {
            Err(LayoutMismatch::Geometry { slot_count, slot_len })
        }
    }

    /// The geometry that divides `segment_len` bytes among `slots`, rounding down.
    pub(crate) fn divide(segment_len: u64, slots: u32) -> Result<Geometry, Misuse> {
        check_range("the number of slots", slots.into(), 1..=Self::MAX_SLOTS.into())?;
        let least = u64::from(slots);
        let lengths = least..=least * u64::from(Self::MAX_SLOT_LEN);
        let slot_len = u32::try_from(segment_len / least).unwrap_or(u32::MAX);
        Geometry::new(slots, slot_len)
            .map_err(|_| out_of_range("the segment's length in bytes", segment_len, lengths))
    }

    /// Slots in a segment.
    pub fn slot_count(self) -> u32 {
        self.slot_count
    }

    /// Bytes that a slot holds.
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

/// Fails unless a builder's number is within its limits.
pub(super) fn check_range(
    what: &'static str,
    given: u64,
    limits: RangeInclusive<u64>,
) -> Result<(), Misuse> {
    if limits.contains(&given) { Ok(()) } else { Err(out_of_range(what, given, limits)) }
}

fn out_of_range(what: &'static str, given: u64, limits: RangeInclusive<u64>) -> Misuse {
    Misuse::OutOfRange { what, given, least: *limits.start(), most: *limits.end() }
}
