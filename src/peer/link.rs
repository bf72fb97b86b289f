//! The link to one peer: what is poisoned when the connection hangs up, and why it did; and which
//! tasks wait for that peer.
//!
//! # Tasks
//! A thread that waits sleeps on the segment's semaphore. A task has no thread: it leaves its waker
//! here, and the process *asks* its peer to be woken. A side that has posted looks whether the
//! other has asked, and if so, [`Signal`]s it, once, whatever number of tasks wait. That side then
//! *looks*: it asks anew, and wakes those tasks that have something to take.
//!
//! No wake-up is lost. A task leaves its waker, sees to it that its process has asked, and only
//! then tries once more. Task: ask, `fence(SeqCst)`, read the semaphore. Poster: change the
//! semaphore, `fence(SeqCst)` (in `Semaphore::wake`), read whether the peer has asked. The fences
//! are totally ordered: the task sees what was posted, or the poster that it is to signal. A process
//! that has asked is not asked for again before the signal has come; the look that follows asks
//! first, and then reads the semaphores of all who wait by then, with the same fence between.
//!
//! A task that [works](Work) for the peer is to stop when that gives up. A side that gives up tells
//! the other, asked or not: it writes the turn word, and then sends. Who receives that looks, under
//! the lock under which tasks leave their wakers before they read the turn word once more.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, OnceLock};
use std::task::Waker;

use crate::error::{Error, Rejection};
#[cfg(target_os = "linux")]
use crate::loan::Lender;
use crate::process::Origin;
use crate::sync::Deadline;
use crate::sync::atomic::{AtomicBool, Relaxed, SeqCst, fence};
use crate::sync::modelled::{Mutex, lock};

use super::Peer;
use super::pidfd::PeerProcess;

/// Something whose waits can all be ended.
pub(crate) trait Poison: Send + Sync {
    /// Ends every wait, now and later.
    fn poison(&self);

    /// Whether a wait would end now.
    fn has_news(&self) -> bool;
}

/// How two processes tell each other that tasks have something to take.
pub(crate) trait Signal: Send + Sync {
    /// Asks the peer to signal this process after its next post.
    fn ask(&self);

    /// Whether the peer has asked.
    fn is_asked(&self) -> bool;

    /// Signals the peer, which has asked. Never waits.
    fn signal(&self);

    /// Signals the peer, which need not have asked. Never waits.
    fn tell(&self);
}

/// What a task does for the peer, as long as that wants it.
#[cfg(any(feature = "tokio", loom))]
pub(crate) trait Work: Send + Sync {
    /// Whether the peer has given it up.
    fn is_given_up(&self) -> bool;
}

/// Where the other side's tasks are.
enum Other {
    /// In this process: they wait on this very link. Whether they have asked.
    Here(AtomicBool),
    /// In another process, which can be signalled once there is something for that.
    There(OnceLock<Box<dyn Signal>>),
}

/// A connection to one peer: ends the waits for that peer, and knows why.
pub(crate) struct Link {
    peer: Option<Peer>,
    /// Distinguishes a peer that is certainly dead from one that only hung up (rule P6).
    pub(super) process: PeerProcess,
    /// A child of `fork` leaves the link alone.
    origin: Origin,
    state: Mutex<LinkState>,
    other: Other,
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
    /// Of the tasks among them that wait for the peer.
    wakers: BTreeMap<u64, Waker>,
    next: u64,
    relief: Option<Relief>,
    /// Whether the peer has been asked for a signal that has not come yet.
    has_asked: bool,
    /// What tasks do for the peer, and who they are.
    #[cfg(any(feature = "tokio", loom))]
    work: BTreeMap<u64, (Arc<dyn Work>, Waker)>,
}

impl LinkState {
    /// The wakers of those that have something to take.
    fn take_ready(&mut self) -> Vec<Waker> {
        let LinkState { registered, wakers, .. } = self;
        let has_news = |number: &u64| match registered.get(number) {
            Some(Some(subject)) => subject.has_news(),
            _ => false,
        };
        let ready: Vec<u64> = wakers.keys().copied().filter(has_news).collect();
        ready.iter().filter_map(|number| wakers.remove(number)).collect()
    }

    /// The wakers of those that work for nothing.
    fn take_idle(&mut self) -> Vec<Waker> {
        #[cfg(any(feature = "tokio", loom))]
        {
            let idle = self.work.iter().filter(|(_, (work, _))| work.is_given_up());
            let idle: Vec<u64> = idle.map(|(number, _)| *number).collect();
            idle.iter()
                .filter_map(|number| self.work.remove(number))
                .map(|(_, task)| task)
                .collect()
        }
        #[cfg(not(any(feature = "tokio", loom)))]
        Vec::new()
    }

    /// All wakers. Those that work are to be woken again, when their work is given up.
    fn take_all(&mut self) -> Vec<Waker> {
        let all = mem::take(&mut self.wakers).into_values();
        #[cfg(any(feature = "tokio", loom))]
        let all = all.chain(self.work.values().map(|(_, task)| task.clone()));
        all.collect()
    }
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
        Link { peer: Some(peer), other: Other::There(OnceLock::new()), ..Link::within() }
    }

    /// To this same process, whose death needs no detection.
    pub(crate) fn within() -> Link {
        Link {
            peer: None,
            process: PeerProcess::default(),
            origin: Origin::here(),
            state: Mutex::default(),
            other: Other::Here(AtomicBool::new(false)),
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
        let wakers = state.take_all();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Tells the peer's process by `signal` that tasks have something to take, and is told so in
    /// the same way. Only the first counts.
    pub(crate) fn signal_by(&self, signal: Box<dyn Signal>) {
        let Other::There(other) = &self.other else { return };
        let state = lock(&self.state);
        let _ = other.set(signal);
        if state.has_asked {
            self.ask(); // for the tasks that wait already
        }
    }

    /// To be called after each post to the peer and the [`wake`](crate::sync::Semaphore::wake) that
    /// follows it: signals the peer, if it has asked.
    #[inline(never)] // keeps what posts as short as it was
    pub(crate) fn wake_tasks(&self) {
        match &self.other {
            Other::Here(asked) if asked.load(Relaxed) => self.look(),
            Other::There(other) => match other.get() {
                Some(signal) if signal.is_asked() => signal.signal(),
                _ => {}
            },
            Other::Here(_) => {}
        }
    }

    /// To be called after a request was withdrawn, or an answer cancelled: has the peer stop its
    /// work for it.
    #[inline(never)] // keeps the end of a transfer short that was answered
    pub(crate) fn tell_end(&self) {
        match &self.other {
            Other::Here(_) => self.look(),
            Other::There(other) => other.get().into_iter().for_each(|signal| signal.tell()),
        }
    }

    /// The peer has signalled: wakes the tasks that have something to take, and those that work for
    /// nothing. While others wait, asks anew, and looks again at what came before the peer could
    /// see that.
    #[inline(never)] // keeps a post short that wakes nobody
    pub(crate) fn look(&self) {
        let mut state = lock(&self.state);
        let mut wakers = state.take_idle();
        if state.has_asked {
            wakers.extend(state.take_ready());
            state.has_asked = !state.wakers.is_empty();
            if state.has_asked {
                self.ask();
                wakers.extend(state.take_ready());
            } else if let Other::Here(asked) = &self.other {
                asked.store(false, Relaxed);
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether a peer that has been asked can signal this process, which reads its signals.
    #[cfg(feature = "tokio")]
    pub(crate) fn can_be_signalled(&self) -> bool {
        match &self.other {
            Other::Here(_) => true,
            Other::There(other) => other.get().is_some() && lock(&self.state).relief.is_none(),
        }
    }

    /// Asks the peer for a signal. What it posted before is seen from here on.
    fn ask(&self) {
        match &self.other {
            Other::Here(asked) => asked.store(true, Relaxed),
            Other::There(other) => other.get().into_iter().for_each(|signal| signal.ask()),
        }
        fence(SeqCst);
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
    /// already are. Until then, the peer's signals are not read: tasks that wait are woken, and
    /// have to [try from time to time](Self::can_be_signalled).
    pub(crate) fn when_below(&self, below: usize, then: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.state);
        if state.registered.len() < below {
            drop(state);
            then();
        } else {
            state.relief = Some(Relief { below, then: Box::new(then) });
            let wakers = state.take_all();
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Has a task woken when the peer gives up its `work`, or the link is severed. The caller reads
    /// both once more after this. Also woken when the peer's signals are not read any more.
    #[cfg(any(feature = "tokio", loom))]
    pub(crate) fn wake_idle(self: &Arc<Link>, work: Arc<dyn Work>, task: &Waker) -> Working {
        let task = task.clone();
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        state.work.insert(number, (work, task));
        Working { link: Arc::clone(self), number }
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

    /// Has a task woken as soon as the wait for the peer can have ended. The caller tries once more
    /// after this. Nobody is woken if the two processes have nothing to signal each other by.
    pub(crate) fn wake_later(&self, waker: &Waker) {
        let waker = waker.clone();
        let mut state = lock(&self.link.state);
        let before = state.wakers.insert(self.number, waker);
        // Under the lock: who finds that it has been asked relies on it.
        if mem::replace(&mut state.has_asked, true) {
            fence(SeqCst);
        } else {
            self.link.ask();
        }
        drop(state);
        drop(before); // not under the lock: this may drop its task
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
        let _waker = if state.wakers.is_empty() { None } else { state.wakers.remove(&self.number) };
        let registered = state.registered.len();
        let relief = state.relief.take_if(|relief| registered < relief.below);
        drop(state);
        if let Some(relief) = relief {
            (relief.then)();
        }
    }
}

/// Keeps a task to be woken when its work is given up.
#[cfg(any(feature = "tokio", loom))]
pub(crate) struct Working {
    link: Arc<Link>,
    number: u64,
}

#[cfg(any(feature = "tokio", loom))]
impl Drop for Working {
    fn drop(&mut self) {
        if !self.link.origin.is_here() {
            return;
        }
        let before = lock(&self.link.state).work.remove(&self.number);
        drop(before); // not under the lock: this may drop its task
    }
}
