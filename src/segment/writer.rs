//! The right to write to a segment's slots: at most one sender of this process has it at a time.

use std::sync::Arc;
use std::task::Waker;

use crate::error::PeerFault;
use crate::peer::{Link, Registration};
use crate::sync::atomic::{Acquire, Release};

use super::{Mapping, Phase, Segment, WriteSlots};

#[cfg(all(test, loom))]
mod model;

/// The right to write to a segment's slots, from accepting one generation of it until leaving it.
/// Slots cannot be written without it.
///
/// It holds three things, which begin and end in this file only:
/// - the *turn*, in shared memory: tells the peer which side has the slots (rule P1);
/// - the *claim*, in this process: prevents two workers of this process from writing to one slot
///   when a client resets the turn word. Its `Acquire` and `Release` order one sender's writes to
///   the slots before the next one's, whatever the peer does to the turn word;
/// - the *registration* with the link: a hang-up poisons the segment while this writer has it, and
///   neither before nor after, when another transfer may have it.
#[must_use = "a writer that does not leave keeps the segment"]
pub(crate) struct SlotWriter {
    segment: Arc<Segment<WriteSlots>>,
    generation: u64,
    /// `Accepted` or `Announced`.
    phase: Phase,
    registration: Registration,
}

impl SlotWriter {
    /// Accepts the offer of this generation; `None` if it was withdrawn, or if another sender of
    /// this process has claimed the segment.
    #[inline]
    pub(crate) fn accept(
        segment: &Arc<Segment<WriteSlots>>,
        generation: u64,
        registration: Registration,
    ) -> Option<SlotWriter> {
        segment.header().turn.advance(generation, Phase::Offered, Phase::Accepted).ok()?;
        if segment.is_claimed.swap(true, Acquire) {
            return None;
        }
        let segment = Arc::clone(segment);
        registration.cover(Arc::clone(&segment) as _);
        Some(SlotWriter { segment, generation, phase: Phase::Accepted, registration })
    }

    /// Moves the turn to `Announced`, before the first chunk; does nothing later.
    pub(crate) fn announce(&mut self) -> Result<(), PeerFault> {
        if self.phase == Phase::Accepted {
            self.segment.header().turn.advance(self.generation, self.phase, Phase::Announced)?;
            self.phase = Phase::Announced;
        }
        Ok(())
    }

    /// The link to the receiver.
    pub(crate) fn link(&self) -> &Link {
        self.registration.link()
    }

    /// Has a task woken as soon as the receiver may have freed a slot.
    pub(crate) fn wake_later(&self, task: &Waker) {
        self.registration.wake_later(task);
    }

    /// The memory, for writing its slots.
    pub(crate) fn slots(&self) -> &Mapping {
        &self.segment.mapping
    }

    /// Leaves the segment with this phase. The turn word is the last write: a process that reads
    /// the phase knows that this sender has left (rule P6), and finds the segment unclaimed.
    /// Returns the link, since the receiver is still to be woken.
    pub(crate) fn leave(self, phase: Phase) -> (Result<(), PeerFault>, Arc<Link>) {
        let link = Arc::clone(self.registration.link());
        drop(self.registration);
        self.segment.is_claimed.store(false, Release);
        (self.segment.header().turn.advance(self.generation, self.phase, phase), link)
    }
}
