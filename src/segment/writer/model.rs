//! Functions of a writer for models only.

use super::*;

impl SlotWriter {
    /// Ends as if its process had died: it writes nothing more to shared memory. The claim is
    /// private memory of that process, so it is released.
    pub(crate) fn die(self) {
        self.segment.is_claimed.store(false, Release);
    }
}
