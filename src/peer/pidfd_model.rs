//! A peer's process for loom, where it is a thread: it has ended once the model calls `peer_died`.

use crate::sync::Deadline;
use crate::sync::modelled::{Mutex, lock};

use super::Link;

#[derive(Default)]
pub(super) struct PeerProcess {
    has_ended: Mutex<bool>,
}

impl PeerProcess {
    pub(super) fn open(_pid: Option<u32>) -> PeerProcess {
        PeerProcess::default()
    }

    pub(super) fn wait_ended(&self, _deadline: Deadline) -> bool {
        *lock(&self.has_ended)
    }
}

impl Link {
    /// Ends the peer's process. A thread that learns of it sees all that the process wrote before.
    pub(crate) fn peer_died(&self) {
        *lock(&self.process.has_ended) = true;
    }
}
