//! The client's side of loans over one connection: takes in what the server introduces.

use std::collections::VecDeque;
use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, PeerFault, ProtocolError, Rejection, Result};
use crate::loan::{Borrower, Content, KeptLoans, LoanLimits, SEALED};
use crate::peer::{ReceivedFds, Socket};
use crate::sync::atomic::{AtomicBool, Relaxed};
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
    /// What an honest server has introduced at most.
    limits: LoanLimits,
    /// Locked while the connection is read: who comes second finds what the first has read.
    inbox: Mutex<Inbox>,
    /// A message has been read, and the tasks not looked after yet. Any message: a signal that
    /// finds the connection full is not sent.
    signalled: AtomicBool,
    /// Let go of, and the server not told yet.
    returned: Mutex<Vec<u64>>,
}

/// What has been read from the connection, and not been used yet.
#[derive(Default)]
struct Inbox {
    /// Read after the server hung up: an announcement that it left behind can name them.
    loans: VecDeque<NewLoan>,
    /// The server's farewell has been read, with its reason.
    farewell: Option<Option<Rejection>>,
}

/// One message of the server.
enum Heard {
    Loan(NewLoan),
    Signal,
}

/// A loan as the server has introduced it, not examined yet.
struct NewLoan {
    id: u64,
    kind: u32,
    len: u64,
    /// Its descriptor, or why there is none.
    fd: Result<ReceivedFds>,
}

impl<P: Packets> SocketBorrower<P> {
    pub(super) fn new(socket: &Arc<P>, limits: LoanLimits) -> SocketBorrower<P> {
        SocketBorrower {
            socket: Arc::clone(socket),
            kept: KeptLoans::new(limits),
            limits,
            inbox: Mutex::new(Inbox::default()),
            signalled: AtomicBool::new(false),
            returned: Mutex::new(Vec::new()),
        }
    }

    /// Why the server hung up, if it sent a farewell.
    pub(super) fn last_words(&self) -> Option<Rejection> {
        self.read_all();
        lock(&self.inbox).farewell.flatten()
    }

    /// Reads all that has come. Sets loans aside, and leaves it to `borrow` to examine them: that
    /// can take its time, and this is called by threads that serve others as well. `false` if there
    /// may be more.
    pub(super) fn read_all(&self) -> bool {
        let mut inbox = lock(&self.inbox);
        for _ in 0..MOST_READ {
            match self.read_one(&mut inbox) {
                Ok(Some(Heard::Loan(loan))) if inbox.loans.len() < self.limits.count as usize => {
                    inbox.loans.push_back(loan);
                }
                Ok(Some(Heard::Loan(_too_many))) => {}
                Ok(Some(Heard::Signal)) => {}
                Ok(None) | Err(_) => return true,
            }
        }
        false
    }

    /// Whether anything has been read since the last call.
    pub(super) fn was_signalled(&self) -> bool {
        self.signalled.load(Relaxed) && self.signalled.swap(false, Relaxed)
    }

    /// The next loan that was introduced, if one has come.
    fn next_loan(&self, inbox: &mut Inbox) -> Result<Option<Heard>> {
        match inbox.loans.pop_front() {
            Some(loan) => Ok(Some(Heard::Loan(loan))),
            None => self.read_one(inbox),
        }
    }

    /// Reads one message, if one has come: a loan, a signal, or a farewell, which the inbox keeps.
    /// Nothing counts after a farewell.
    fn read_one(&self, inbox: &mut Inbox) -> Result<Option<Heard>> {
        if inbox.farewell.is_some() {
            return Ok(None);
        }
        let mut buffer = [0; MAX_MESSAGE + 1];
        let received = match self.socket.receive(&mut buffer) {
            // If the server hung up with messages unread, the first read fails, and the next one
            // has what it sent.
            Err(Error::Disconnected) => self.socket.receive(&mut buffer)?,
            received => received?,
        };
        let Some(Received { len, fds, lost }) = received else { return Ok(None) };
        self.signalled.store(true, Relaxed);
        let malformed = || PeerFault::MalformedMessage { len };
        match Message::decode(&buffer[..len])? {
            Message::Loan { id, kind, len } => {
                let fd = match fds.0.len() {
                    _ if lost => Err(Error::os("receiving a descriptor")(Errno::MFILE)),
                    1 => Ok(fds),
                    _ => Err(malformed().into()),
                };
                Ok(Some(Heard::Loan(NewLoan { id, kind, len, fd })))
            }
            Message::Wakeup => Ok(Some(Heard::Signal)),
            farewell @ Message::Farewell { .. } => {
                inbox.farewell = Some(farewell.rejection());
                Ok(None)
            }
            _ => Err(malformed().into()),
        }
    }

    /// Takes in all loans that have come.
    fn take_in_all(&self) {
        let mut inbox = lock(&self.inbox);
        let mut left = self.limits.bytes;
        for _ in 0..MOST_READ {
            match self.next_loan(&mut inbox) {
                Ok(Some(Heard::Loan(loan))) => self.examine(loan, None, &mut left),
                Ok(Some(Heard::Signal)) => {}
                Ok(None) | Err(_) => return, // the connection's end is noticed by others
            }
        }
    }

    /// Examines a loan, and keeps it. Only the one that is `wanted` is looked at once no more is
    /// `left` of the bytes that an honest server can have introduced: that takes its time.
    fn examine(&self, loan: NewLoan, wanted: Option<u64>, left: &mut u64) {
        let NewLoan { id, kind, len, fd } = loan;
        if kind == SEALED {
            match left.checked_sub(len) {
                Some(rest) => *left = rest,
                None if len > self.limits.bytes => {
                    return self.take_in(id, Err(PeerFault::LentTooMuch(id).into()));
                }
                None if wanted != Some(id) => return self.give_back(vec![id]),
                None => {}
            }
        }
        self.take_in(
            id,
            fd.and_then(|mut fds| {
                let Some(fd) = fds.0.pop() else { unreachable!("one descriptor came with it") };
                Content::of_peer(fd, kind, len).map_err(|(fd, error)| {
                    fds.0.push(fd); // closed in the background: it can be of any kind
                    error
                })
            }),
        );
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

    /// Tells the server which loans were let go of, and those that it could not be told of before.
    /// While the connection is full, that waits for the next time.
    fn give_back(&self, ids: Vec<u64>) {
        let mut returned = lock(&self.returned);
        returned.extend(ids);
        while !returned.is_empty() {
            let count = returned.len().min(MOST_RETURNED);
            let ids: Vec<u8> = returned[..count].iter().flat_map(|id| id.to_le_bytes()).collect();
            let message = Message::Returned { ids: &ids }.encode();
            if self.socket.send_now(&message, None).is_err() {
                // The connection is full, or gone. An honest server has not lent more than that.
                returned.truncate(self.limits.count as usize);
                return;
            }
            returned.drain(..count);
        }
    }
}

impl<P: Packets> Borrower for SocketBorrower<P> {
    fn borrow(&self, id: u64) -> Result<Option<Content>> {
        if let Some(content) = self.kept.find(id)? {
            return Ok(Some(content));
        }
        let mut inbox = lock(&self.inbox);
        let mut left = self.limits.bytes;
        for _ in 0..MOST_READ {
            if let Some(content) = self.kept.find(id)? {
                return Ok(Some(content));
            }
            match self.next_loan(&mut inbox) {
                Ok(Some(Heard::Loan(loan))) => self.examine(loan, Some(id), &mut left),
                Ok(Some(Heard::Signal)) => {}
                Err(error @ Error::Peer(_)) => return Err(error),
                Ok(None) | Err(_) => break,
            }
        }
        drop(inbox);
        self.give_back(Vec::new()); // the server may not have heard of it yet
        Ok(None)
    }

    /// Takes in first what has come: loans whose answers were withdrawn, or dropped unread, are in
    /// the server's account as well, and fill the connection.
    fn make_room(&self, bytes: u64) {
        self.take_in_all();
        self.give_back(self.kept.make_room(bytes));
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
