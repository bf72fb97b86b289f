//! The server's side of loans to one client: introduces them, within the client's account.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::error::PeerFault;
use crate::loan::{Account, Content, Introduced, Lender, Loan, LoanLimits, Standing};
use crate::peer::Socket;
use crate::sync::modelled::{Mutex, lock};

use super::packets::Packets;
use super::wire::Message;

#[cfg(all(test, not(loom)))]
mod tests;

/// Lends over one connection.
pub(super) struct SocketLender<P = Socket> {
    socket: Arc<P>,
    /// The kinds that the client takes (rule N9).
    kinds: u32,
    /// Locked while a loan is introduced, so that nobody announces it before it is on the way.
    account: Mutex<Account>,
}

impl<P: Packets> SocketLender<P> {
    pub(super) fn new(socket: &Arc<P>, kinds: u32, limits: LoanLimits) -> SocketLender<P> {
        let account = Mutex::new(Account::new(limits));
        SocketLender { socket: Arc::clone(socket), kinds, account }
    }

    /// Strikes loans out of the account: the client has returned them. Their numbers are those of
    /// [`Message::Returned`].
    pub(super) fn take_back(&self, ids: &[u8]) -> Result<(), PeerFault> {
        let mut account = lock(&self.account);
        ids.chunks_exact(size_of::<u64>())
            .try_for_each(|id| account.strike(u64::from_le_bytes(std::array::from_fn(|i| id[i]))))
    }
}

impl<P: Packets> Lender for SocketLender<P> {
    /// Never waits: a client that does not read its connection gets the bytes through the segment.
    fn introduce(&self, loan: &Loan) -> Introduced {
        const NO: Introduced = Introduced::No { wanted: 0 };
        let (id, content) = (loan.id(), loan.content());
        let (kind, len, bytes) = (content.kind(), content.len(), content.memory_len());
        if kind & self.kinds == 0 {
            return NO;
        }
        let mut account = lock(&self.account);
        match account.standing(id, bytes) {
            Standing::Known => Introduced::Yes,
            Standing::TooLarge => NO,
            Standing::Full => Introduced::No { wanted: bytes.max(1) },
            Standing::Fits => {
                let message = Message::Loan { id, kind, len }.encode();
                let Ok(reopened) = reopened(content) else { return NO };
                let fd = reopened.as_ref().map_or(content.as_fd(), AsFd::as_fd);
                // The connection is full, or gone; or too many descriptors are on their way. A
                // client that makes room reads the connection, too.
                if self.socket.send_now(&message, Some(fd)).is_err() {
                    return Introduced::No { wanted: bytes.max(1) };
                }
                account.enter(id, bytes);
                Introduced::Yes
            }
        }
    }
}

/// A lent file, opened anew for this client: a client could set flags of a descriptor that it
/// shares with others (`O_DIRECT`, say), and so fail their reads. Sealed memory is not read by
/// descriptors' flags, and needs none of that.
fn reopened(content: &Content) -> rustix::io::Result<Option<OwnedFd>> {
    let Content::File(_) = content else { return Ok(None) };
    let path = format!("/proc/self/fd/{}", content.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(Some)
}
