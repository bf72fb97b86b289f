//! Decides when the sender has left a segment, so that it can be leased again (rule P6).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::Result;
use crate::peer::Link;
use crate::segment::{Backing, Phase, ReadSlots, Segment, WriteSlots};
use crate::sync::atomic::Relaxed;
use crate::sync::modelled::yield_now;
use crate::sync::{Deadline, Interrupted, Semaphore};

/// How often, during the grace period, the turn word is read, and a sender that hung up is checked
/// for its death. loom has no clock: there, whenever something changes.
const RECHECK: Duration = Duration::from_millis(if cfg!(loom) { 0 } else { 1 });

/// A segment of the pool, and its backing, by which peers reach it.
pub(crate) struct PooledSegment<B> {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pub(crate) backing: B,
    /// Mapped for writing when a sender in this process first needs it.
    writable: OnceLock<Arc<Segment<WriteSlots>>>,
}

impl<B: Backing> PooledSegment<B> {
    pub(super) fn new(segment: Segment<ReadSlots>, backing: B) -> PooledSegment<B> {
        PooledSegment { segment: Arc::new(segment), backing, writable: OnceLock::new() }
    }

    /// Whether the segment is idle and its semaphores work: `false` if a sender has corrupted them.
    pub(super) fn is_sound(&self) -> bool {
        let header = self.segment.header();
        let is_idle = matches!(header.turn.load(), Ok((_, Phase::Idle)));
        is_idle && header.filled.is_sound() && header.free.is_sound()
    }

    /// The segment mapped writable, for a sender in this same process.
    pub(crate) fn writable(&self) -> Result<Arc<Segment<WriteSlots>>> {
        if let Some(writable) = self.writable.get() {
            return Ok(Arc::clone(writable));
        }
        let mapped = Arc::new(self.backing.attach(self.segment.id(), self.segment.geometry())?);
        Ok(Arc::clone(self.writable.get_or_init(|| mapped)))
    }
}

/// A transfer that has ended: tells whether its sender has left the segment.
pub(crate) struct Ended {
    generation: u64,
    /// To the sender's process; tells whether it is alive.
    link: Option<Arc<Link>>,
}

impl Ended {
    /// The transfer of this generation, whose request went over this link.
    pub(crate) fn new(generation: u64, link: Option<Arc<Link>>) -> Ended {
        Ended { generation, link }
    }

    /// For a segment whose turn word was corrupted: no turn word can contain this generation.
    pub(crate) fn corrupted() -> Ended {
        Ended { generation: u64::MAX, link: None }
    }

    /// Sets a segment back to `Idle` if its sender has left it; `false` if not.
    pub(super) fn reclaim(&self, segment: &Segment<ReadSlots>) -> bool {
        let turn = &segment.header().turn;
        match turn.phase_of(self.generation) {
            Some(phase) if phase.is_off() => {
                turn.advance(self.generation, phase, Phase::Idle).is_ok()
            }
            _ => false,
        }
    }
}

/// A segment that was returned while its sender may still write to it.
pub(super) struct Quarantined<B> {
    pub(super) pooled: Arc<PooledSegment<B>>,
    pub(super) ended: Ended,
}

impl<B> Quarantined<B> {
    /// Waits until the sender has certainly left the segment; `false` if that is not known by the
    /// deadline.
    pub(super) fn settle(&self, deadline: Deadline) -> bool {
        let Ended { generation, link } = &self.ended;
        let header = self.pooled.segment.header();
        loop {
            match header.turn.phase_of(*generation) {
                Some(phase) if phase.is_off() => return self.ended.reclaim(&self.pooled.segment),
                Some(phase @ (Phase::Accepted | Phase::Announced)) => {
                    if let Some(link) = link.as_ref().filter(|link| link.is_severed()) {
                        // The sender may be dying, or alive and about to notice the hang-up.
                        if link.wait_dead(deadline.min(Deadline::after(RECHECK))) {
                            return Semaphore::SURVIVES_KILL
                                && self.was_sent_by(link)
                                && header.turn.advance(*generation, phase, Phase::Idle).is_ok();
                        }
                    }
                }
                // No correct sender leaves such a turn word.
                Some(_) | None => return false,
            }
            if deadline.has_passed() {
                return false;
            }
            // The sender posts `filled`, or poisons it, just before it leaves. If that permit was
            // taken already, no wake-up follows: hence the short sleeps.
            let recheck = deadline.min(Deadline::after(RECHECK));
            match header.filled.wait(recheck) {
                Ok(_) => {}
                Err(Interrupted::TimedOut | Interrupted::Poisoned) => yield_now(),
                Err(Interrupted::Os(_)) => return false,
            }
        }
    }

    /// Whether the process at the other end of the link says that it is the sender. Only then does
    /// its death free the segment: a child of `fork` may have inherited the connection, and be
    /// alive. In different pid namespaces the pids differ, and the segment is replaced.
    fn was_sent_by(&self, link: &Link) -> bool {
        let sender = self.pooled.segment.header().announcement.pid.load(Relaxed);
        link.peer().and_then(|peer| peer.pid) == Some(sender)
    }
}
