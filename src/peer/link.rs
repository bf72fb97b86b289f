//! The link to one peer: what is poisoned when the connection hangs up, and why it did.

use std::collections::BTreeMap;
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

use crate::error::{Error, Rejection};
#[cfg(target_os = "linux")]
use crate::loan::Lender;
use crate::process::Origin;
use crate::sync::Deadline;
use crate::sync::modelled::{Mutex, lock};

use super::Peer;
use super::pidfd::PeerProcess;

/// Something whose waits can all be ended.
pub(crate) trait Poison: Send + Sync {
    /// Ends every wait, now and later.
    fn poison(&self);
}

/// A connection to one peer: ends the waits for that peer, and knows why.
pub(crate) struct Link {
    peer: Option<Peer>,
    /// Distinguishes a peer that is certainly dead from one that only hung up (rule P6).
    pub(super) process: PeerProcess,
    /// A child of `fork` leaves the link alone.
    origin: Origin,
    state: Mutex<LinkState>,
    /// Lends to the receiver, if it takes loans.
    #[cfg(target_os = "linux")]
    lender: OnceLock<Arc<dyn Lender>>,
}

#[derive(Default)]
struct LinkState {
    severed: bool,
    leaving: bool,
    rejection: Option<Rejection>,
    registered: BTreeMap<u64, Option<Arc<dyn Poison>>>,
    next: u64,
    relief: Option<Relief>,
}

/// A call to make once fewer than `below` are registered.
struct Relief {
    below: usize,
    then: Box<dyn FnOnce() + Send>,
}

impl Link {
    /// To a sender in another process, whose death allows the reuse of its segments.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_sender(peer: Peer) -> Link {
        Link { process: PeerProcess::open(peer.pid), ..Link::to_receiver(peer) }
    }

    /// To a receiver in another process.
    pub(crate) fn to_receiver(peer: Peer) -> Link {
        Link { peer: Some(peer), ..Link::within() }
    }

    /// To this same process, whose death needs no detection.
    pub(crate) fn within() -> Link {
        Link {
            peer: None,
            process: PeerProcess::default(),
            origin: Origin::here(),
            state: Mutex::default(),
            #[cfg(target_os = "linux")]
            lender: OnceLock::new(),
        }
    }

    /// Has the answers to this receiver lent by `lender`, where they can be. Only the first counts.
    #[cfg(target_os = "linux")]
    pub(crate) fn lend_by(&self, lender: Arc<dyn Lender>) {
        let _ = self.lender.set(lender);
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn lender(&self) -> Option<&dyn Lender> {
        self.lender.get().map(|lender| &**lender)
    }

    pub(crate) fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Poisons everything registered, now and later. The first call evaluates `why`, before any
    /// waiter can see the end.
    pub(crate) fn sever(&self, why: impl FnOnce() -> Option<Rejection>) {
        if !self.origin.is_here() {
            return;
        }
        let mut state = lock(&self.state);
        if !state.severed {
            state.rejection = why();
            state.severed = true;
        }
        state.registered.values().flatten().for_each(|registered| registered.poison());
    }

    pub(crate) fn is_severed(&self) -> bool {
        lock(&self.state).severed
    }

    /// Records that the server is leaving: further requests go to its successor. Transfers go on.
    pub(crate) fn set_leaving(&self) {
        lock(&self.state).leaving = true;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        lock(&self.state).leaving
    }

    /// The error for a waiter: why the other side is gone.
    pub(crate) fn disconnect_reason(&self) -> Error {
        lock(&self.state).rejection.map_or(Error::Disconnected, Error::Rejected)
    }

    /// Has `subject` poisoned when the link is severed; at once if it is already.
    pub(crate) fn register(self: &Arc<Link>, subject: Arc<dyn Poison>) -> Registration {
        let registration = self.count();
        registration.cover(subject);
        registration
    }

    /// Counts a transfer as under way, with nothing to poison yet.
    pub(crate) fn count(self: &Arc<Link>) -> Registration {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        state.registered.insert(number, None);
        Registration { link: Arc::clone(self), number }
    }

    /// Whether fewer than `bound` are registered.
    pub(crate) fn is_below(&self, bound: usize) -> bool {
        lock(&self.state).registered.len() < bound
    }

    /// Calls `then`, once, as soon as fewer than `below` are registered; immediately if they
    /// already are.
    pub(crate) fn when_below(&self, below: usize, then: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.state);
        if state.registered.len() < below {
            drop(state);
            then();
        } else {
            state.relief = Some(Relief { below, then: Box::new(then) });
        }
    }

    /// Whether the peer's process has ended, waiting for it until the deadline. `false` also when
    /// that cannot be known.
    pub(crate) fn wait_dead(&self, deadline: Deadline) -> bool {
        self.process.wait_ended(deadline)
    }
}

/// Keeps its subject registered; after its drop, the link does not poison the subject any more.
pub(crate) struct Registration {
    link: Arc<Link>,
    number: u64,
}

impl Registration {
    /// Has `subject` poisoned when the link is severed; at once if it is already.
    pub(crate) fn cover(&self, subject: Arc<dyn Poison>) {
        let mut state = lock(&self.link.state);
        if state.severed {
            subject.poison();
        }
        state.registered.insert(self.number, Some(subject));
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.link.origin.is_here() {
            return;
        }
        let mut state = lock(&self.link.state);
        state.registered.remove(&self.number);
        let registered = state.registered.len();
        let relief = state.relief.take_if(|relief| registered < relief.below);
        drop(state);
        if let Some(relief) = relief {
            (relief.then)();
        }
    }
}
