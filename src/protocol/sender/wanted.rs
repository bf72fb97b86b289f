//! Whether the receiver still wants an answer, for the task that works at it.

use std::sync::Arc;
use std::task::Waker;

use crate::peer::{Link, Work, Working};
use crate::segment::{Phase, Segment, WriteSlots};
use crate::sync::atomic::{AtomicBool, Relaxed};

use super::{Sender, ShmTransfer, Stand, Starting};

/// A request, as seen by who works at its answer, whoever has the transfer meanwhile.
pub(crate) struct Wanted {
    segment: Arc<Segment<WriteSlots>>,
    generation: u64,
    link: Arc<Link>,
    /// The transfer has been taken up, or given up, on this side.
    is_answered: AtomicBool,
}

impl ShmTransfer<Sender, Starting> {
    /// Watches whether the receiver wants the answer. `None` once the transfer is over.
    pub(crate) fn wanted(&self) -> Option<Wanted> {
        let Stand::Asked { generation, registration } = &self.side.stand else { return None };
        Some(Wanted {
            segment: Arc::clone(&self.side.segment),
            generation: *generation,
            link: Arc::clone(registration.link()),
            is_answered: AtomicBool::new(false),
        })
    }
}

impl Wanted {
    /// To be called before the request is answered, or dropped.
    pub(crate) fn set_answered(&self) {
        // Published by the turn word, which is changed after this.
        self.is_answered.store(true, Relaxed);
    }

    /// Whether the work is for nothing: the receiver has withdrawn the request, cancelled the
    /// answer, or hung up. Once the answer is complete, that does not count. If it is wanted, has
    /// the task woken when that changes; `working` keeps it so.
    pub(crate) fn poll_lost(
        self: &Arc<Self>,
        task: &Waker,
        working: &mut Option<(Working, Waker)>,
    ) -> bool {
        // Who is woken has lost it: so a task that was left to be woken still is.
        if !working.as_ref().is_some_and(|(_, known)| known.will_wake(task)) {
            *working = None; // first: it is not to be woken any more
            *working = Some((self.link.wake_idle(Arc::clone(self) as _, task), task.clone()));
        }
        self.is_given_up() || (self.is_under_way() && self.link.is_severed())
    }

    /// Whether the receiver can signal that it gives up; otherwise this is to be asked from time to
    /// time.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_told(&self) -> bool {
        self.link.can_be_signalled()
    }

    fn phase(&self) -> Option<Phase> {
        self.segment.header().turn.phase_of(self.generation)
    }

    fn is_under_way(&self) -> bool {
        matches!(self.phase(), Some(Phase::Offered | Phase::Accepted | Phase::Announced))
    }
}

impl Work for Wanted {
    fn is_given_up(&self) -> bool {
        match self.phase() {
            Some(Phase::Accepted | Phase::Announced) => {
                self.segment.header().receiver.cancelled.load(Relaxed) != 0
            }
            // The receiver's doing, or what comes after the end of an answer. Read after the phase:
            // who has seen such an end sees that there was an answer.
            Some(Phase::Withdrawn | Phase::Idle) | None => !self.is_answered.load(Relaxed),
            Some(_) => false,
        }
    }
}
