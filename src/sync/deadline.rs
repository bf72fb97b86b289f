//! Deadlines, and the wait for a descriptor until one.

use std::time::{Duration, Instant};

/// A point in monotonic time after which a wait gives up, or never.
///
/// Deadlines are absolute, so that a call made of several waits keeps to one.
///
/// ```
/// use shmferry::Deadline;
/// use std::time::Duration;
///
/// let deadline = Deadline::after(Duration::from_secs(5));
/// assert!(!deadline.has_passed());
/// assert!(deadline.remaining().unwrap() <= Duration::from_secs(5));
/// assert_eq!(Deadline::NEVER.remaining(), None);
/// assert_eq!(Deadline::after(Duration::MAX), Deadline::NEVER); // overflow means for ever
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// No deadline: wait as long as it takes, or until the peer dies.
    pub const NEVER: Deadline = Deadline(None);

    /// `timeout` from now. One beyond what the clock can express means [`NEVER`](Self::NEVER).
    pub fn after(timeout: Duration) -> Deadline {
        Deadline(Instant::now().checked_add(timeout))
    }

    /// This instant.
    pub fn at(instant: Instant) -> Deadline {
        Deadline(Some(instant))
    }

    /// The instant; `None` means never.
    pub fn instant(self) -> Option<Instant> {
        self.0
    }

    /// What is left: zero once the deadline has passed, `None` when there is none.
    pub fn remaining(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether nothing is left.
    pub fn has_passed(self) -> bool {
        self.remaining() == Some(Duration::ZERO)
    }

    /// The earlier of the two.
    pub fn min(self, other: Deadline) -> Deadline {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Deadline(Some(a.min(b))),
            (a, b) => Deadline(a.or(b)),
        }
    }

    /// What is left, as system calls take it.
    #[cfg(unix)]
    pub(crate) fn timespec(self) -> Option<rustix::thread::Timespec> {
        // A wait too long for the clock's type becomes one without end: callers loop.
        self.remaining().and_then(|left| left.try_into().ok())
    }
}

/// Waits until a descriptor is ready; `false` when the deadline came first.
#[cfg(unix)]
pub(crate) fn wait_ready(
    fd: impl std::os::fd::AsFd,
    events: rustix::event::PollFlags,
    deadline: Deadline,
) -> rustix::io::Result<bool> {
    use rustix::event::{PollFd, poll};
    use rustix::io::Errno;
    loop {
        match poll(&mut [PollFd::new(&fd, events)], deadline.timespec().as_ref()) {
            Ok(0) if deadline.has_passed() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}
