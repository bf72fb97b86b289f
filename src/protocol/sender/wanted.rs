//! Whether the receiver still wants an answer, for the task that works at it.

use std::sync::Arc;
use std::task::Waker;

use crate::peer::{Link, Work, Working};
use crate::segment::{Phase, Segment, WriteSlots};
use crate::sync::atomic::{AtomicBool, Relaxed};
use crate::sync::modelled::{Mutex, lock};

use super::{Sender, ShmTransfer, Stand, Starting};

/// A request, as seen by who works at its answer, whoever has the transfer meanwhile.
///
/// Until the answer is over on this side: nothing that the receiver does later counts, and nothing
/// of the receiver is kept.
pub(crate) struct Wanted(Mutex<Option<Watch>>);

struct Watch {
    request: Arc<Request>,
    link: Arc<Link>,
    /// What has the task woken, and which task.
    working: Option<(Working, Waker)>,
}

struct Request {
    segment: Arc<Segment<WriteSlots>>,
    generation: u64,
    /// The transfer has been taken up on this side.
    is_answered: AtomicBool,
}

impl ShmTransfer<Sender, Starting> {
    /// Watches whether the receiver wants the answer.
    pub(crate) fn wanted(&self) -> Wanted {
        let Stand::Asked { generation, registration } = &self.side.stand else {
            return Wanted(Mutex::new(None));
        };
        let segment = Arc::clone(&self.side.segment);
        let is_answered = AtomicBool::new(false);
        let request = Request { segment, generation: *generation, is_answered };
        let (request, link) = (Arc::new(request), Arc::clone(registration.link()));
        Wanted(Mutex::new(Some(Watch { request, link, working: None })))
    }
}

impl Wanted {
    /// To be called before the request is answered.
    pub(crate) fn set_answered(&self) {
        if let Some(Watch { request, .. }) = &*lock(&self.0) {
            // Published by the turn word, which is changed after this.
            request.is_answered.store(true, Relaxed);
        }
    }

    /// To be called when the answer is over on this side, or given up there.
    pub(crate) fn end(&self) {
        let watch = lock(&self.0).take();
        drop(watch); // not under the lock: this may drop the task
    }

    /// Whether the work is for nothing: the receiver has withdrawn the request, cancelled the
    /// answer, or hung up. If it is wanted, has the task woken when that changes.
    pub(crate) fn poll_lost(&self, task: &Waker) -> bool {
        let mut watch = lock(&self.0);
        let Some(Watch { request, link, working }) = &mut *watch else { return false };
        // An entry leaves the link only once its work is lost: one for this task still stands.
        let before = if working.as_ref().is_some_and(|(_, known)| known.will_wake(task)) {
            None
        } else {
            let work = Arc::clone(request) as _;
            working.replace((link.wake_idle(work, task), task.clone()))
        };
        let is_lost = request.is_given_up() || (request.is_under_way() && link.is_severed());
        drop(watch);
        drop(before); // not under the lock: this may drop its task
        is_lost
    }

    /// Whether the receiver can signal that it gives up; otherwise this is to be asked from time to
    /// time.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_told(&self) -> bool {
        lock(&self.0).as_ref().is_none_or(|watch| watch.link.can_be_signalled())
    }
}

impl Request {
    fn phase(&self) -> Option<Phase> {
        self.segment.header().turn.phase_of(self.generation)
    }

    fn is_under_way(&self) -> bool {
        matches!(self.phase(), Some(Phase::Offered | Phase::Accepted | Phase::Announced))
    }
}

impl Work for Request {
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
