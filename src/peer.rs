//! Who the other process is, and whether it lives. Death is pushed, not polled (rule P7).
//!
//! Each connection has a [`Link`]. Whoever waits for the peer enrols what it waits on; when the
//! connection hangs up, the process's one watcher thread severs the link, which poisons all that is
//! enrolled, and so wakes every waiter at once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Rejection};
use crate::process::Origin;
use crate::sync::Deadline;
use crate::sync::modelled::{Mutex, lock};

#[cfg(target_os = "linux")]
mod background_close;
#[cfg(target_os = "linux")]
mod credentials;
#[cfg(target_os = "linux")]
mod watcher;

#[cfg(target_os = "linux")]
pub(crate) use credentials::untaken;
/// There is no telling.
#[cfg(all(unix, not(target_os = "linux")))]
pub(crate) fn untaken(_: std::os::fd::BorrowedFd<'_>) -> Option<u64> {
    None
}
#[cfg(target_os = "linux")]
pub(crate) use watcher::{Watch, on_hang_up};

#[cfg(target_os = "linux")]
pub(crate) use background_close::{MOST_DESCRIPTORS, ReceivedFds, Socket, is_behind};

/// The process at the other end of a connection, as the kernel vouched for it when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its process id; `None` for a process that our pid namespace cannot name.
    pub pid: Option<u32>,
    /// The user it ran as.
    pub uid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid} of user {}", self.uid),
            None => write!(f, "a process of user {}", self.uid),
        }
    }
}

/// Something that can be ended for all who wait on it.
pub(crate) trait Poison: Send + Sync {
    /// Ends every wait, now and later.
    fn poison(&self);
}

/// The life line to one peer.
pub(crate) struct Link {
    peer: Option<Peer>,
    /// Tells a peer that is dead for certain from one that only hung up (rule P6). Should the pid
    /// have been reused before this was opened, it names a living process: the safe side.
    #[cfg(target_os = "linux")]
    process: Option<std::os::fd::OwnedFd>,
    /// A child of `fork` leaves the link alone.
    origin: Origin,
    state: Mutex<LinkState>,
}

#[derive(Default)]
struct LinkState {
    severed: bool,
    leaving: bool,
    rejection: Option<Rejection>,
    registered: BTreeMap<u64, Option<Arc<dyn Poison>>>,
    next: u64,
    relief: Option<Relief>,
    /// What a model says of the peer's process, which it does not have.
    #[cfg(loom)]
    peer_is_dead: bool,
}

/// What is to happen once fewer than `below` are enrolled.
struct Relief {
    below: usize,
    then: Box<dyn FnOnce() + Send>,
}

impl Link {
    /// To a sender in another process, whose death decides what becomes of segments.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_sender(peer: Peer) -> Link {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        // Without a pidfd (an old kernel, a peer in a foreign pid namespace) nobody is ever dead
        // for certain, and segments are retired instead.
        let pid = peer.pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Link { peer: Some(peer), process, ..Link::within() }
    }

    /// To a receiver in another process.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_receiver(peer: Peer) -> Link {
        Link { peer: Some(peer), ..Link::within() }
    }

    /// To this same process, which never outlives itself.
    pub(crate) fn within() -> Link {
        Link {
            peer: None,
            #[cfg(target_os = "linux")]
            process: None,
            origin: Origin::here(),
            state: Mutex::default(),
        }
    }

    pub(crate) fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Poisons everything enrolled, now and later. Whoever comes first finds out why, and nobody
    /// learns of the end before that.
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

    /// The server said that it ends: further requests are for its successor. Transfers go on.
    pub(crate) fn set_leaving(&self) {
        lock(&self.state).leaving = true;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        lock(&self.state).leaving
    }

    /// Why the other side is gone.
    pub(crate) fn disconnect_reason(&self) -> Error {
        lock(&self.state).rejection.map_or(Error::Disconnected, Error::Rejected)
    }

    /// Has `subject` poisoned when the link is severed; at once if it is already.
    pub(crate) fn register(self: &Arc<Link>, subject: Arc<dyn Poison>) -> Registration {
        let registration = self.count();
        registration.cover(subject);
        registration
    }

    /// Counts one more that is under way, with nothing to poison yet.
    pub(crate) fn count(self: &Arc<Link>) -> Registration {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        state.registered.insert(number, None);
        Registration { link: Arc::clone(self), number }
    }

    /// Whether fewer than `bound` are enrolled.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_below(&self, bound: usize) -> bool {
        lock(&self.state).registered.len() < bound
    }

    /// Calls `then`, once, as soon as fewer than `below` are enrolled; perhaps at once.
    pub(crate) fn when_below(&self, below: usize, then: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.state);
        if state.registered.len() < below {
            drop(state);
            then();
        } else {
            state.relief = Some(Relief { below, then: Box::new(then) });
        }
    }

    /// Whether the peer's process has ended, waiting for it until the deadline. `false` too when
    /// there is no telling.
    #[cfg(target_os = "linux")]
    pub(crate) fn wait_dead(&self, deadline: Deadline) -> bool {
        use rustix::event::PollFlags;
        #[cfg(loom)]
        if lock(&self.state).peer_is_dead {
            return true;
        }
        let Some(process) = &self.process else { return false };
        crate::sync::wait_ready(process, PollFlags::IN, deadline).unwrap_or(false)
    }

    /// For models: the peer's process has ended. What it wrote before is seen by all who learn
    /// of that.
    #[cfg(loom)]
    pub(crate) fn peer_died(&self) {
        lock(&self.state).peer_is_dead = true;
    }

    /// There is no telling.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn wait_dead(&self, _deadline: Deadline) -> bool {
        false
    }
}

/// Keeps its subject enrolled; once dropped, the link cannot poison the subject any more.
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

#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests;
