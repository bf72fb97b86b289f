//! Functions of a semaphore for tests and models only.

use super::*;

impl Semaphore {
    pub(super) fn with(permits: u32) -> Semaphore {
        let (word, sleepers) = (AtomicU32::new(permits), AtomicU32::new(0));
        Semaphore { word, sleepers, parker: Default::default() }
    }

    #[allow(dead_code, reason = "for the tests of those parkers that can break")]
    pub(in crate::sync) fn parker(&self) -> &Parker {
        &self.parker
    }

    /// Hands a permit over, and wakes the threads that sleep for one.
    pub(crate) fn post(&self, permit: Permit) {
        self.add(permit);
        self.wake();
    }
}
