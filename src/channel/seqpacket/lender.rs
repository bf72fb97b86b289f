//! The server's side of loans to one client: introduces them, within the client's account.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::error::PeerFault;
use crate::loan::{Account, Content, Introduced, Lender, Loan, LoanLimits, Standing};
use crate::peer::Socket;
use crate::sync::{Deadline, lock};

use super::send;
use super::wire::Message;

/// Lends over one connection.
pub(super) struct SocketLender {
    socket: Arc<Socket>,
    /// The kinds that the client takes (rule N9).
    kinds: u32,
    /// Locked while a loan is introduced, so that nobody announces it before it is on the way.
    account: Mutex<Account>,
}

impl SocketLender {
    pub(super) fn new(socket: &Arc<Socket>, kinds: u32, limits: LoanLimits) -> SocketLender {
        let account = Mutex::new(Account::new(limits));
        SocketLender { socket: Arc::clone(socket), kinds, account }
    }

    /// Strikes a loan out of the account: the client has returned it.
    pub(super) fn returned(&self, id: u64) -> Result<(), PeerFault> {
        lock(&self.account).strike(id)
    }
}

impl Lender for SocketLender {
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
                let at_once = Deadline::after(Duration::ZERO);
                let Ok(reopened) = reopened(content) else { return NO };
                let fd = reopened.as_ref().map_or(content.as_fd(), AsFd::as_fd);
                // The connection is full, or gone; or too many descriptors are on their way. A
                // client that makes room reads the connection, too.
                if send(&self.socket, &message, Some(fd), at_once).is_err() {
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
