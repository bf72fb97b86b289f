//! What models need of a sender, and the product does not.

use super::*;

impl ShmTransfer<Sender, Sending> {
    /// The sender's process ends here, and writes nothing any more.
    pub(crate) fn die(mut self) {
        if let Some(writer) = self.side.stand.leave(Phase::Idle) {
            writer.die();
        }
    }

    /// As `send_file` sends, for models, which have no files.
    pub(crate) fn in_batches(mut self) -> Self {
        self.state.in_batches = true;
        self
    }
}
