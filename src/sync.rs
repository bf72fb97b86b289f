//! Waiting: deadlines, the semaphore that lives in shared memory, and its in-process sibling.
//!
//! Nothing here knows of segments or transfers.

use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(loom)]
use loom as host;
#[cfg(not(loom))]
use std as host;

mod blocking;
mod deadline;
mod fair_semaphore;
mod semaphore;
mod spin;

pub use blocking::blocking;
pub(crate) use blocking::{OnDrop, at_place};
pub use deadline::Deadline;
#[cfg(unix)]
pub(crate) use deadline::wait_ready;
pub(crate) use fair_semaphore::FairSemaphore;
pub(crate) use semaphore::{Interrupted, Permit, Semaphore};
pub(crate) use spin::{BUDGET, Presence, Spinner, current_cpu};

/// Atomics and fences, through one door, so that a model checker can stand in for them.
pub(crate) mod atomic {
    pub(crate) use super::host::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::*, fence,
    };
}

/// Locks that are held while shared memory is touched, through one door as well.
pub(crate) mod modelled {
    pub(crate) use super::host::{
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

/// Locks a mutex whose data no panic can leave half-changed: every critical section here only moves
/// values, so a poisoned lock is as good as a sound one.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
