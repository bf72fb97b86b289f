//! Waiting: deadlines, the semaphore in shared memory, and the fair one within a process.
//!
//! Nothing here depends on segments or transfers.

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
#[cfg(all(test, loom))]
pub(crate) mod task_model;

pub use blocking::blocking;
pub(crate) use blocking::{OnDrop, at_place};
pub use deadline::Deadline;
#[cfg(unix)]
pub(crate) use deadline::wait_ready;
pub(crate) use fair_semaphore::{FairSemaphore, Place};
pub(crate) use semaphore::{Interrupted, Permit, Semaphore};
pub(crate) use spin::{BUDGET, Presence, Spinner, current_cpu};

/// Atomics and fences, all imported from here, so that loom can replace them.
pub(crate) mod atomic {
    pub(crate) use super::host::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::*, fence,
    };
}

/// Locks held while shared memory is touched, imported from here for the same reason.
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

// Chooses the parker: how a thread of one process sleeps until a thread of another wakes it.
#[cfg_attr(loom, path = "sync/model.rs")]
#[cfg_attr(all(not(loom), target_os = "linux", not(feature = "raw-sync")), path = "sync/futex.rs")]
#[cfg_attr(
    all(not(loom), any(not(target_os = "linux"), feature = "raw-sync")),
    path = "sync/raw_sync.rs"
)]
mod parker;
pub(crate) use parker::Parker;

/// Locks a mutex whose data no panic can leave half-changed: every critical section here only moves
/// values, so poisoning is ignored.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
