//! What a request and its transfer share: whether the request was sent, and over which link.

use std::any::Any;
use std::sync::Arc;

use crate::peer::{Link, Registration};
use crate::segment::{Phase, ReadSlots, Segment};
use crate::sync::modelled::{Mutex, lock};

/// Shared by a request and its transfer, within the receiver's process. Says over which link the
/// answer will come.
pub(crate) struct Offer {
    segment: Arc<Segment<ReadSlots>>,
    generation: u64,
    state: Mutex<OfferState>,
}

enum OfferState {
    /// The request has not been sent yet.
    Unsent,
    /// It went over a connection. The connection's end poisons the segment, and this keeps it open.
    Sent { registration: Registration, _connection: Option<Keep> },
    /// The transfer is over, and another transfer may have the segment.
    Over,
}

impl OfferState {
    fn link(&self) -> Option<Arc<Link>> {
        match self {
            OfferState::Sent { registration, .. } => Some(Arc::clone(registration.link())),
            OfferState::Unsent | OfferState::Over => None,
        }
    }
}

/// Keeps a connection open.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

impl Offer {
    pub(super) fn new(segment: Arc<Segment<ReadSlots>>, generation: u64) -> Offer {
        Offer { segment, generation, state: Mutex::new(OfferState::Unsent) }
    }

    /// Records that the request was sent: from now on the link's end ends the transfer's waits. The
    /// connection is kept open as long as the transfer; otherwise its end would not be noticed.
    pub(crate) fn sent_over(&self, link: &Arc<Link>, connection: Option<Keep>) {
        let mut state = lock(&self.state);
        if !matches!(*state, OfferState::Over) {
            let registration = link.register(Arc::clone(&self.segment) as _);
            *state = OfferState::Sent { registration, _connection: connection };
        }
    }

    /// Withdraws the offer, because the request was dropped unsent: no answer will come.
    pub(crate) fn abandon(&self) {
        let state = lock(&self.state);
        if matches!(*state, OfferState::Unsent) {
            let header = self.segment.header();
            // Fails only if a sender has accepted it after all: that sender will answer.
            if header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn).is_ok() {
                header.filled.poison();
            }
        }
    }

    /// Whether the transfer is over: another transfer may have the segment then, or it may be
    /// unmapped.
    pub(crate) fn is_over(&self) -> bool {
        matches!(*lock(&self.state), OfferState::Over)
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
