//! Functions of a sender for models only.

use super::*;

impl ShmTransfer<Sender, Sending> {
    /// Ends as if the sender's process had died: it writes nothing more.
    pub(crate) fn die(mut self) {
        if let Some(writer) = self.side.stand.leave(Phase::Idle) {
            writer.die();
        }
    }

    /// Batches wake-ups as `send_file` does, for models, which have no files.
    pub(crate) fn in_batches(mut self) -> Self {
        self.state.in_batches = true;
        self
    }
}
