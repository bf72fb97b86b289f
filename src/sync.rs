//! Waiting: deadlines, the semaphore that lives in shared memory, and its in-process sibling.
//!
//! Nothing here knows of segments or transfers.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

mod fair_semaphore;
mod semaphore;
mod spin;

pub(crate) use fair_semaphore::FairSemaphore;
pub(crate) use semaphore::{Interrupted, Permit, Semaphore};
pub(crate) use spin::{BUDGET, Presence, Spinner, current_cpu};

/// Atomics and fences, through one door, so that a model checker can stand in for them.
pub(crate) mod atomic {
    #[cfg(loom)]
    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::*, fence,
    };
    #[cfg(not(loom))]
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::*, fence,
    };
}

/// What may be held, or repeated, while shared memory is touched, through one door as well.
pub(crate) mod modelled {
    #[cfg(loom)]
    pub(crate) use loom::{
        sync::{Condvar, Mutex, MutexGuard},
        thread::yield_now,
    };
    #[cfg(not(loom))]
    pub(crate) use std::{
        sync::{Condvar, Mutex, MutexGuard},
        thread::yield_now,
    };

    /// As [`lock`](super::lock).
    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

// The one place that chooses how a thread of one process sleeps for a thread of another.
#[cfg_attr(loom, path = "sync/model.rs")]
#[cfg_attr(all(not(loom), target_os = "linux", not(feature = "raw-sync")), path = "sync/futex.rs")]
#[cfg_attr(
    all(not(loom), any(not(target_os = "linux"), feature = "raw-sync")),
    path = "sync/raw_sync.rs"
)]
mod parker;
pub(crate) use parker::Parker;

/// A point in monotonic time after which a wait gives up; or never.
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

    /// `timeout` from now. A patience beyond what the clock can express means [`NEVER`](Self::NEVER).
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
        // A wait too long for the clock's type is as good as one without end: the caller loops.
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

/// Locks a mutex whose data no panic can leave half-changed: every critical section here only moves
/// values, so a poisoned lock is as good as a sound one.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
