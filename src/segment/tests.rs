//! Functions of segments for tests only.

#[cfg(not(loom))]
use super::header::Turn;
use super::{Mapping, Segment, WriteSlots};

impl Segment<WriteSlots> {
    /// The memory, for writing to slots without taking a turn.
    pub(crate) fn writable(&self) -> &Mapping {
        &self.mapping
    }
}

#[cfg(not(loom))]
impl Turn {
    /// Overwrites the word, as a peer can.
    pub(crate) fn corrupt(&self, word: u64) {
        self.0.store(word, crate::sync::atomic::Release);
    }
}
