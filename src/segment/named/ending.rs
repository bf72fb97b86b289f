//! The end of a process whose threads still hold pools: their names go, though nothing is dropped.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::process;
use std::sync::{Mutex, OnceLock};

use crate::sync::lock;

use super::Owner;
use super::names::remove;

/// The pools of this process.
static LIVING: Mutex<BTreeSet<Owner>> = Mutex::new(BTreeSet::new());

/// The process that registered [`remove_all`]; one that it forks has no names to remove.
static REGISTERED: OnceLock<u32> = OnceLock::new();

/// Has the names of a pool removed when the process ends in order before it.
pub(super) fn outlived_by(owner: Owner) {
    REGISTERED.get_or_init(|| {
        // SAFETY: the handler takes nothing, does not unwind, and runs while its code is there: of a
        // library that is unloaded, the system runs the handlers first.
        let failed = unsafe { libc::atexit(remove_all) };
        // Without it the names are left to the next pool, as those of a killed process are.
        debug_assert_eq!(failed, 0);
        process::id()
    });
    lock(&LIVING).insert(owner);
}

/// Has them left alone: whoever holds the pool has removed them.
pub(super) fn is_over(owner: Owner) {
    lock(&LIVING).remove(&owner);
}

extern "C" fn remove_all() {
    if REGISTERED.get() == Some(&process::id()) {
        lock(&LIVING).iter().for_each(|&owner| remove(owner));
    }
}
