//! The identity of pools and segments.

use std::fmt;

/// A pool's identifier: a random number, unique on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub(crate) u64);

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A segment's identifier: its pool, and its number there, which is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentId {
    pub(crate) pool: PoolId,
    pub(crate) index: u32,
}

impl SegmentId {
    /// The pool that the segment belongs to.
    pub fn pool(self) -> PoolId {
        self.pool
    }

    /// The segment's number in its pool.
    pub fn index(self) -> u32 {
        self.index
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pool, self.index)
    }
}
