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
    /// Locked while the connection is read: who comes second finds what the first has read. Holds
    /// the reason of a farewell, once one was read.
    reading: Mutex<Option<Rejection>>,
    /// Let go of, and the server not told yet.
    returned: Mutex<Vec<u64>>,
}

impl<P: Packets> SocketBorrower<P> {
    pub(super) fn new(socket: &Arc<P>, limits: LoanLimits) -> SocketBorrower<P> {
        SocketBorrower {
            socket: Arc::clone(socket),
            kept: KeptLoans::new(limits),
            reading: Mutex::new(None),
            returned: Mutex::new(Vec::new()),
        }
    }

    /// Why the server hung up, if it sent a farewell.
    pub(super) fn last_words(&self) -> Option<Rejection> {
        let mut farewell = lock(&self.reading);
        let _ = self.read(&mut farewell, || false);
        *farewell
    }

    /// Reads what has come, until that is enough.
    fn read(&self, farewell: &mut Option<Rejection>, is_enough: impl Fn() -> bool) -> Result<()> {
        let mut was_reset = false;
        for _ in 0..MOST_READ {
            if is_enough() {
                break;
            }
            match self.read_one() {
                Ok(Read::Loan) => {}
                Ok(Read::Farewell(why)) => *farewell = why,
                Ok(Read::Nothing) => break,
                // If the server hung up with messages unread, the first read fails, and the next
                // one has what it sent.
                Err(Error::Disconnected) if !was_reset => was_reset = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
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

    /// Tells the server which loans were let go of, and those that it could not be told before: the
    /// connection was full.
    fn give_back(&self, ids: Vec<u64>) {
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
        let read = self.read(&mut lock(&self.reading), || !matches!(self.kept.find(id), Ok(None)));
        if let Some(content) = self.kept.find(id)? {
            return Ok(Some(content));
        }
        self.give_back(Vec::new()); // the server may not have heard of it yet
        match read {
            Err(error @ Error::Peer(_)) => Err(error),
            _ => Ok(None),
        }
    }

    fn make_room(&self, bytes: u64) {
        // First: what was introduced and not looked for takes room as well.
        let _ = self.read(&mut lock(&self.reading), || false);
        self.give_back(self.kept.make_room(bytes));
    }
}
