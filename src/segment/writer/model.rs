//! What models need of a writer, and the product does not.

use super::*;

impl SlotWriter {
    /// Its process ends here: it writes nothing to shared memory any more. The claim was a word of
    /// that process's own.
    pub(crate) fn die(self) {
        self.segment.is_claimed.store(false, Release);
    }
}
