//! The epoll on which all workers of a queue wait; each event wakes one of them.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::error::{Error, Result};
use crate::process::Origin;
use crate::sync::Deadline;

/// The tokens of the two eventfds; no other descriptor of a queue has these, or that of the timer.
const CLOSER: u64 = u64::MAX;
pub(super) const WAKE_ONE: u64 = u64::MAX - 1;
/// The token of the timer: see [`Poller::wake_after`].
pub(super) const TIMER: u64 = u64::MAX - 2;

/// The pause before the next attempt when the kernel is out of memory.
const PAUSE: Duration = Duration::from_millis(10);

/// Descriptors, each armed for one event at a time: the worker woken for one has it exclusively
/// until it arms it again.
pub(super) struct Poller {
    epoll: OwnedFd,
    /// An eventfd that is readable for good once the poller is closed.
    closer: OwnedFd,
    closed: AtomicBool,
    /// An eventfd that wakes one worker each time it is written to; never read.
    wake_one: OwnedFd,
    timer: OwnedFd,
    /// A child of `fork` shares the epoll and both eventfds with its parent, and leaves them alone.
    origin: Origin,
}

impl Poller {
    pub(super) fn new() -> Result<Poller> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::os("epoll_create1"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let closer = eventfd(0, flags).map_err(Error::os("eventfd"))?;
        epoll::add(&epoll, &closer, epoll::EventData::new_u64(CLOSER), epoll::EventFlags::IN)
            .map_err(Error::os("epoll_ctl"))?;
        let wake_one = eventfd(0, flags).map_err(Error::os("eventfd"))?;
        let each_write = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &wake_one, epoll::EventData::new_u64(WAKE_ONE), each_write)
            .map_err(Error::os("epoll_ctl"))?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map_err(Error::os("timerfd_create"))?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), each_write)
            .map_err(Error::os("epoll_ctl"))?;
        Ok(Poller {
            epoll,
            timer,
            closer,
            closed: AtomicBool::new(false),
            wake_one,
            origin: Origin::here(),
        })
    }

    /// Adds a descriptor, armed.
    pub(super) fn add(&self, fd: impl AsFd, token: u64) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), ONE_EVENT)
            .map_err(Error::os("epoll_ctl"))
    }

    /// Arms a descriptor for its next event. While the kernel fails, for lack of memory or another
    /// reason, tries again until the poller is closed: events of an unarmed descriptor would never
    /// be reported. Fails for a descriptor that was removed.
    pub(super) fn arm(&self, fd: impl AsFd, token: u64) -> Result<()> {
        loop {
            match epoll::modify(&self.epoll, &fd, epoll::EventData::new_u64(token), ONE_EVENT) {
                Ok(()) => return Ok(()),
                Err(gone @ (Errno::NOENT | Errno::BADF)) => {
                    return Err(Error::os("epoll_ctl")(gone));
                }
                Err(_) => {
                    self.check_open()?;
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Waits for an event, and returns its token; [`WAKE_ONE`] after [`wake_one`](Self::wake_one),
    /// and `None` at the deadline. They differ: before the deadline is told, there are no other
    /// events.
    ///
    /// # Errors
    /// [`Error::Closed`] once [`close`](Self::close) was called.
    pub(super) fn wait(&self, deadline: Deadline) -> Result<Option<u64>> {
        loop {
            self.check_open()?;
            let mut events = [MaybeUninit::uninit()];
            match epoll::wait(&self.epoll, &mut events, deadline.timespec().as_ref()) {
                Ok(([event], _)) if event.data.u64() == CLOSER => {}
                Ok(([event], _)) => return Ok(Some(event.data.u64())),
                Ok(_) if deadline.has_passed() => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::os("epoll_wait")(errno)),
            }
        }
    }

    /// The process that made it.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Fails with [`Error::Closed`] once [`close`](Self::close) was called, and with
    /// [`Misuse::Forked`](crate::error::Misuse::Forked) in a child of `fork`.
    pub(super) fn check_open(&self) -> Result<()> {
        self.origin.check()?;
        if self.closed.load(Ordering::Acquire) { Err(Error::Closed) } else { Ok(()) }
    }

    /// Ends the wait of one worker, or the next wait if no worker waits now.
    pub(super) fn wake_one(&self) {
        // Can fail only by overflow of the 64-bit counter, which is never reached.
        let _ = rustix::io::write(&self.wake_one, &1u64.to_ne_bytes());
    }

    /// Reports the token [`TIMER`] to one worker, once so much time has passed.
    pub(super) fn wake_after(&self, time: Duration) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let once = Itimerspec {
            it_interval: zero,
            it_value: time.try_into().unwrap_or(Timespec { tv_sec: 1, ..zero }),
        };
        // Cannot fail: the timer is ours, and the time is valid.
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        debug_assert!(set.is_ok(), "timerfd_settime: {set:?}");
    }

    /// Ends every wait, now and later.
    pub(super) fn close(&self) {
        if !self.origin.is_here() {
            return;
        }
        self.closed.store(true, Ordering::Release);
        // Can fail only by overflow, and then it is readable already.
        let _ = rustix::io::write(&self.closer, &1u64.to_ne_bytes());
    }
}

/// Readable when a worker has something to do.
impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

const ONE_EVENT: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);
