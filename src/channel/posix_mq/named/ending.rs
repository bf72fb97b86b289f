//! The handler at exit: removes the names of pools that are still alive when their process ends.
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

/// The handler is registered. A child of `fork` inherits the handler as well.
static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Has the names of a pool removed when the process ends in order before it.
pub(super) fn outlived_by(owner: Owner) {
    if !REGISTERED.load(Ordering::Relaxed) {
        // SAFETY: the handler takes nothing, does not unwind, and runs while its code is there: of
        // a library that is unloaded, the system runs the handlers first. Twice does no harm.
        let failed = unsafe { libc::atexit(remove_all) };
        // Without it the names are left to the next pool, as those of a killed process are.
        debug_assert_eq!(failed, 0);
        REGISTERED.store(failed == 0, Ordering::Relaxed);
    }
    lock(LIVING.get()).insert(owner);
}

/// Has them left alone: they went with their pool.
pub(super) fn is_over(owner: Owner) {
    lock(LIVING.get()).remove(&owner);
}

extern "C" fn remove_all() {
    if let Some(living) = LIVING.get_if_made() {
        lock(living).iter().for_each(|&owner| remove(owner));
    }
}
