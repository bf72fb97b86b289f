//! What tests need of segments, and the product does not.

#[cfg(not(loom))]
use super::header::Turn;
use super::{Mapping, Segment, WriteSlots};

impl Segment<WriteSlots> {
    /// The memory, for writing its slots without a turn.
    pub(crate) fn writable(&self) -> &Mapping {
        &self.mapping
    }
}

#[cfg(not(loom))]
impl Turn {
    /// Overwrites the word, as a peer can.
    pub(crate) fn spoil(&self, word: u64) {
        self.0.store(word, crate::sync::atomic::Release);
    }
}
