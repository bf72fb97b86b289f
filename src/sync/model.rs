//! The parker for loom: the guarantees of the kernel's futex, built from loom's mutex and condvar.

use std::io;

use loom::sync::{Condvar, Mutex};

use super::Deadline;
use super::atomic::{AtomicU32, Relaxed};

/// Stands for the kernel's hash bucket: for a waker, its lock makes comparing the word and going to
/// sleep one step. It orders nothing else, and so the word is read `Relaxed`.
#[derive(Default)]
pub(crate) struct Parker {
    bucket: Mutex<()>,
    woken: Condvar,
}

impl Parker {
    pub(crate) const KIND: u32 = 0;
    pub(crate) const SURVIVES_KILL: bool = true;

    pub(crate) fn initialise(&self) {}

    pub(crate) fn is_sound(&self) -> bool {
        true
    }

    pub(crate) fn park(
        &self,
        word: &AtomicU32,
        expected: u32,
        _deadline: Deadline,
    ) -> io::Result<()> {
        let bucket = self.bucket.lock().unwrap();
        if word.load(Relaxed) == expected {
            drop(self.woken.wait(bucket).unwrap());
        }
        Ok(())
    }

    pub(crate) fn unpark_all(&self, _word: &AtomicU32) {
        let _bucket = self.bucket.lock().unwrap();
        self.woken.notify_all();
    }
}
