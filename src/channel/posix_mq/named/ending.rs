//! atexit handler: unlinks segment names of pools that are still alive.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::process::PerProcess;
use crate::sync::lock;

use super::Owner;
use super::names::remove;

/// The pools that this process made. A child of `fork` has none of its parent's to remove.
static LIVING: PerProcess<Mutex<BTreeSet<Owner>>> = PerProcess::new();

/// Whether the handler is registered. A child of `fork` inherits the handler as well.
static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Marks a pool: if it is still alive at a normal exit of the process, its names are removed.
pub(super) fn outlived_by(owner: Owner) {
    if !REGISTERED.load(Ordering::Relaxed) {
        // SAFETY: the handler takes nothing, does not unwind, and runs while its code is there: of
        // a library that is unloaded, the system runs the handlers first. Registering it twice is
        // harmless.
        let failed = unsafe { libc::atexit(remove_all) };
        // Without it the names stay until the next pool is made, as those of a killed process do.
        debug_assert_eq!(failed, 0);
        REGISTERED.store(failed == 0, Ordering::Relaxed);
    }
    lock(LIVING.get()).insert(owner);
}

/// Unmarks a pool: its names were removed with it.
pub(super) fn is_over(owner: Owner) {
    lock(LIVING.get()).remove(&owner);
}

extern "C" fn remove_all() {
    if let Some(living) = LIVING.get_if_made() {
        lock(living).iter().for_each(|&owner| remove(owner));
    }
}
