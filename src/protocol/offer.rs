//! What a request and its transfer share: whether the request was sent, and over which link.

use std::mem;
use std::sync::Arc;
use std::task::Waker;

use crate::peer::{Link, Registration};
use crate::segment::{Phase, ReadSlots, Segment};
use crate::sync::modelled::{Mutex, lock};
#[cfg(target_os = "linux")]
use crate::{
    error::{PeerFault, Result},
    loan::Content,
};

/// Shared by a request and its transfer, within the receiver's process. Says over which link the
/// answer will come.
pub(crate) struct Offer {
    segment: Arc<Segment<ReadSlots>>,
    generation: u64,
    state: Mutex<OfferState>,
    /// Kept open as long as the transfer; otherwise its end would not be noticed.
    connection: Mutex<Option<Keep>>,
    /// Within a process: what the sender lends.
    #[cfg(target_os = "linux")]
    given: Mutex<Option<Content>>,
}

enum OfferState {
    /// The request has not been sent yet. A task may wait for the answer nevertheless.
    Unsent(Option<Waker>),
    /// It went over a link, whose end poisons the segment.
    Sent(Registration),
    /// The transfer is over, and another transfer may have the segment.
    Over,
}

impl OfferState {
    fn link(&self) -> Option<Arc<Link>> {
        match self {
            OfferState::Sent(registration) => Some(Arc::clone(registration.link())),
            OfferState::Unsent(_) | OfferState::Over => None,
        }
    }
}

/// Keeps a connection open, over which a server may have lent something.
#[cfg(target_os = "linux")]
pub(crate) type Keep = Arc<dyn crate::loan::Borrower>;
#[cfg(not(target_os = "linux"))]
pub(crate) type Keep = Arc<dyn std::any::Any + Send + Sync>;

impl Offer {
    pub(super) fn new(segment: Arc<Segment<ReadSlots>>, generation: u64) -> Offer {
        Offer {
            segment,
            generation,
            state: Mutex::new(OfferState::Unsent(None)),
            connection: Mutex::new(None),
            #[cfg(target_os = "linux")]
            given: Mutex::new(None),
        }
    }

    /// Records the connection that the request is about to be sent over, and keeps it open. Before
    /// it is sent: another thread can read the answer before this one goes on.
    pub(crate) fn goes_over(&self, connection: Keep) {
        *lock(&self.connection) = Some(connection);
    }

    /// Records that the request was sent: from now on the link's end ends the transfer's waits.
    pub(crate) fn sent_over(&self, link: &Arc<Link>) {
        let mut state = lock(&self.state);
        if matches!(*state, OfferState::Over) {
            drop(state);
            link.tell_end(); // who gave up knew of no link yet
            return;
        }
        let sent = OfferState::Sent(link.register(Arc::clone(&self.segment) as _));
        let before = mem::replace(&mut *state, sent);
        drop(state);
        wake(before); // to wait for the link
    }

    /// Withdraws the offer, because the request was dropped unsent: no answer will come.
    pub(crate) fn abandon(&self) {
        let mut state = lock(&self.state);
        if let OfferState::Unsent(waker) = &mut *state {
            let header = self.segment.header();
            // Fails only if a sender has accepted it after all: that sender will answer.
            if header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn).is_ok() {
                header.filled.poison();
                let waker = waker.take();
                drop(state); // a waker may run its task at once
                waker.into_iter().for_each(Waker::wake);
            }
        }
    }

    /// Whether the transfer is over: another transfer may have the segment then, or it may be
    /// unmapped.
    pub(crate) fn is_over(&self) -> bool {
        matches!(*lock(&self.state), OfferState::Over)
    }

    /// Gives the receiver, in this same process, what its sender lends.
    #[cfg(target_os = "linux")]
    pub(super) fn give(&self, content: Content) {
        *lock(&self.given) = Some(content);
    }

    /// The loan of this number, as far as this side has it.
    #[cfg(target_os = "linux")]
    pub(super) fn borrow(&self, id: u64) -> Result<Option<Content>> {
        let given = lock(&self.given).take();
        match (given, self.connection()) {
            (Some(content), _) => Ok(Some(content)),
            (None, Some(connection)) => connection.borrow(id),
            (None, None) => Err(PeerFault::UnknownLoan(id).into()),
        }
    }

    /// Returns loans of so many bytes, so that the server can lend more.
    #[cfg(target_os = "linux")]
    pub(super) fn make_room(&self, bytes: u64) {
        if let Some(connection) = self.connection() {
            connection.make_room(bytes);
        }
    }

    #[cfg(target_os = "linux")]
    fn connection(&self) -> Option<Keep> {
        lock(&self.connection).clone()
    }

    /// Has a task woken as soon as the answer, or more of it, can have come.
    pub(super) fn wake_later(&self, task: &Waker) {
        match &mut *lock(&self.state) {
            OfferState::Unsent(waker) => *waker = Some(task.clone()),
            OfferState::Sent(registration) => registration.wake_later(task),
            OfferState::Over => {}
        }
    }

    /// To be called after each post to the sender.
    pub(super) fn wake_tasks(&self) {
        // Not under the lock: a waker may run its task at once.
        if let Some(link) = self.link() {
            link.wake_tasks();
        }
    }

    /// Whether a task that waits for the answer is woken; otherwise it has to try from time to
    /// time.
    #[cfg(feature = "tokio")]
    pub(super) fn wakes(&self) -> bool {
        self.link().is_none_or(|link| link.can_be_signalled())
    }

    pub(super) fn is_severed(&self) -> bool {
        self.link().is_some_and(|link| link.is_severed())
    }

    pub(super) fn link(&self) -> Option<Arc<Link>> {
        lock(&self.state).link()
    }

    /// Ends the offer: from here on, nothing poisons the segment on behalf of this transfer.
    pub(super) fn end(&self) -> Option<Arc<Link>> {
        let over = std::mem::replace(&mut *lock(&self.state), OfferState::Over);
        over.link()
    }
}

/// Wakes the task that waited for the request to be sent.
fn wake(before: OfferState) {
    if let OfferState::Unsent(Some(waker)) = before {
        waker.wake();
    }
}
