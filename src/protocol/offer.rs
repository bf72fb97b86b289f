//! What a request and its transfer share: whether the request is out, and over which link.

use std::any::Any;
use std::sync::Arc;

use crate::peer::{Link, Registration};
use crate::segment::{Phase, ReadSlots, Segment};
use crate::sync::modelled::{Mutex, lock};

/// What a request and its transfer share within the receiver's process: who will answer.
pub(crate) struct Offer {
    segment: Arc<Segment<ReadSlots>>,
    generation: u64,
    state: Mutex<OfferState>,
}

enum OfferState {
    /// The request waits to be sent.
    Unsent,
    /// It went over a connection, which now watches over the segment, and lives as long as this.
    Sent { registration: Registration, _connection: Option<Keep> },
    /// The transfer is over, and the segment may be in other hands.
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

/// A connection that lives as long as it is needed.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

impl Offer {
    pub(super) fn new(segment: Arc<Segment<ReadSlots>>, generation: u64) -> Offer {
        Offer { segment, generation, state: Mutex::new(OfferState::Unsent) }
    }

    /// The request went out: from now on the link's end ends the transfer's waits. The connection
    /// stays as long as the transfer, or its end would not be told.
    pub(crate) fn sent_over(&self, link: &Arc<Link>, connection: Option<Keep>) {
        let mut state = lock(&self.state);
        if !matches!(*state, OfferState::Over) {
            let registration = link.register(Arc::clone(&self.segment) as _);
            *state = OfferState::Sent { registration, _connection: connection };
        }
    }

    /// The request was dropped: nobody will answer.
    pub(crate) fn abandon(&self) {
        let state = lock(&self.state);
        if matches!(*state, OfferState::Unsent) {
            let header = self.segment.header();
            // Fails only if a sender has it after all, and then that one answers.
            if header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn).is_ok() {
                header.filled.poison();
            }
        }
    }

    /// Whether its transfer is over, so that the segment may be in other hands, or gone.
    pub(crate) fn is_over(&self) -> bool {
        matches!(*lock(&self.state), OfferState::Over)
    }

    pub(super) fn is_severed(&self) -> bool {
        self.link().is_some_and(|link| link.is_severed())
    }

    pub(super) fn link(&self) -> Option<Arc<Link>> {
        lock(&self.state).link()
    }

    /// Ends the offer: nothing can poison the segment any more on behalf of this transfer.
    pub(super) fn end(&self) -> Option<Arc<Link>> {
        let over = std::mem::replace(&mut *lock(&self.state), OfferState::Over);
        over.link()
    }
}
