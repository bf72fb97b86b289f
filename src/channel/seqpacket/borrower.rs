//! The client's side of loans over one connection: takes in what the server introduces.

use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, PeerFault, ProtocolError, Rejection, Result};
use crate::loan::{Borrower, Content, KeptLoans, LoanLimits};
use crate::peer::Socket;
use crate::sync::modelled::{Mutex, lock};

use super::client::Received;
use super::packets::Packets;
use super::wire::{MAX_MESSAGE, MOST_RETURNED, Message};

#[cfg(all(test, loom))]
mod model;

/// How many messages are read in search of one loan. An honest server has introduced it before: no
/// more are on their way than the connection holds.
const MOST_READ: usize = 4096;

/// Reads what comes over one connection, and keeps what was lent.
pub(super) struct SocketBorrower<P = Socket> {
    socket: Arc<P>,
    kept: KeptLoans,
    /// Locked while the connection is read: who comes second finds what the first has read.
    reading: Mutex<()>,
    /// Let go of, and the server not told yet.
    returned: Mutex<Vec<u64>>,
}

impl<P: Packets> SocketBorrower<P> {
    pub(super) fn new(socket: &Arc<P>, limits: LoanLimits) -> SocketBorrower<P> {
        SocketBorrower {
            socket: Arc::clone(socket),
            kept: KeptLoans::new(limits),
            reading: Mutex::new(()),
            returned: Mutex::new(Vec::new()),
        }
    }

    /// Why the server hung up, if it sent a farewell.
    pub(super) fn last_words(&self) -> Option<Rejection> {
        let _reading = lock(&self.reading);
        // If the server hung up with messages unread, the first read fails, and the next one has
        // what it sent.
        let first = self.read_one();
        let first = if first.is_err() { self.read_one() } else { first };
        let mut read = first;
        for _ in 0..MOST_READ {
            match read {
                Ok(Read::Farewell(why)) => return why,
                Ok(Read::Loan) => read = self.read_one(),
                Ok(Read::Nothing) | Err(_) => return None,
            }
        }
        None
    }

    /// Reads one message, if one has come.
    fn read_one(&self) -> Result<Read> {
        let mut buffer = [0; MAX_MESSAGE + 1];
        let Some(Received { len, mut fds, lost }) = self.socket.receive(&mut buffer)? else {
            return Ok(Read::Nothing);
        };
        match Message::decode(&buffer[..len])? {
            Message::Loan { id, kind, len: loan_len } => {
                let content = match (fds.0.pop(), fds.0.is_empty(), lost) {
                    (_, _, true) => Err(Error::os("receiving a descriptor")(Errno::MFILE)),
                    (Some(fd), true, _) => Content::of_peer(fd, kind, loan_len),
                    _ => Err(PeerFault::MalformedMessage { len }.into()),
                };
                self.take_in(id, content);
                Ok(Read::Loan)
            }
            farewell @ Message::Farewell { .. } => Ok(Read::Farewell(farewell.rejection())),
            _ => Err(PeerFault::MalformedMessage { len }.into()),
        }
    }

    /// Keeps a loan, or what was wrong with it. One that could not be taken for want of memory or
    /// descriptors is returned.
    fn take_in(&self, id: u64, content: Result<Content>) {
        let content = match content {
            Ok(content) => Ok(content),
            Err(Error::Peer(ProtocolError(fault))) => Err(fault),
            Err(_) => return self.give_back(vec![id]),
        };
        self.give_back(self.kept.keep(id, content));
    }

    /// Tells the server which loans were let go of. While the connection is full, that waits for
    /// the next time.
    fn give_back(&self, ids: Vec<u64>) {
        if ids.is_empty() {
            return;
        }
        let mut returned = lock(&self.returned);
        returned.extend(ids);
        while !returned.is_empty() {
            let count = returned.len().min(MOST_RETURNED);
            let ids: Vec<u8> = returned[..count].iter().flat_map(|id| id.to_le_bytes()).collect();
            let message = Message::Returned { ids: &ids }.encode();
            if self.socket.send_now(&message, None).is_err() {
                return; // full; or gone, and then nobody has to know
            }
            returned.drain(..count);
        }
    }
}

/// What a message was.
enum Read {
    Nothing,
    Loan,
    Farewell(Option<Rejection>),
}

impl<P: Packets> Borrower for SocketBorrower<P> {
    fn borrow(&self, id: u64) -> Result<Option<Content>> {
        if let Some(content) = self.kept.find(id)? {
            return Ok(Some(content));
        }
        let _reading = lock(&self.reading);
        for _ in 0..MOST_READ {
            if let Some(content) = self.kept.find(id)? {
                return Ok(Some(content));
            }
            match self.read_one() {
                Ok(Read::Loan) => {}
                Err(error @ Error::Peer(_)) => return Err(error),
                _ => break,
            }
        }
        Ok(None)
    }

    fn make_room(&self, bytes: u64) {
        self.give_back(self.kept.make_room(bytes));
    }
}
