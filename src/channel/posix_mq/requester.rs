//! The client of a POSIX message queue: finds the server, and its successor, by itself.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::channel::lock_file::holder;
use crate::channel::reconnect::{self, Connect, ConnectTimeout, Reconnecting};
use crate::channel::{Request, Requester, SendError};
use crate::error::{Awaited, Error, Misuse, Result};
use crate::loan::Borrower;
use crate::peer::{Link, Peer, Watch, on_hang_up};
use crate::segment::SegmentPool;
use crate::sync::Deadline;
use crate::workers;

use super::Named;
use super::lifeline::{Lifeline, has_open, is_held};
use super::mqueue::Mqueue;
use super::name::Name;
use super::wire::{HEAD, Message};

/// Sends requests with segments of one pool to the server at one name. Used by many threads.
///
/// Transfers under way go on when it is dropped, and still end when the server dies.
pub struct PosixMqRequester {
    line: Reconnecting<Connector>,
    name: Name,
}

/// The server's address, and the pool whose segments are used.
struct Connector {
    name: Name,
    pool: SegmentPool<Named>,
}

/// The queue and the lifeline of one server process.
struct Connection {
    queue: Mqueue,
    /// The longest message that the queue takes, in bytes.
    longest: usize,
    lifeline: Arc<OwnedFd>,
    link: Arc<Link>,
    _watch: Watch,
}

impl PosixMqRequester {
    pub(super) fn new(
        name: Name,
        connect_timeout: ConnectTimeout,
        pool: &SegmentPool<Named>,
    ) -> PosixMqRequester {
        let connector = Connector { name: name.clone(), pool: pool.clone() };
        PosixMqRequester { line: Reconnecting::new(connector, pool.id(), connect_timeout), name }
    }

    /// The server, if it was found and is alive.
    pub fn server(&self) -> Option<Peer> {
        self.line.server()
    }

    pub(super) fn connect(&self, deadline: Deadline) -> Result<()> {
        self.line.connect(deadline)
    }
}

impl Requester<Named> for PosixMqRequester {
    /// Waits for the server until the deadline, or for the
    /// [`connect_timeout`](super::PosixMq::connect_timeout), and for room in its queue. A request
    /// that was sent to a server that then dies ends with [`Error::Disconnected`].
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for a key longer than the queue takes, if the system's limit on
    /// messages was lowered.
    fn send(&self, request: Request<Named>, deadline: Deadline) -> Result<(), SendError<Named>> {
        self.line.send(request, deadline)
    }
}

impl fmt::Debug for PosixMqRequester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PosixMqRequester")
            .field("name", &self.name.as_str())
            .field("server", &self.server())
            .finish_non_exhaustive()
    }
}

impl Connect for Connector {
    type Backing = Named;
    type Connection = Connection;

    fn connect(&self, _deadline: Deadline) -> Result<Option<Connection>> {
        let Some(lifeline) = Lifeline::follow(&self.name.lifeline())? else { return Ok(None) };
        // A server makes its lifeline last: the queue and the pid in the lock file are its own, if
        // it is still alive when we have them. Without a pid that is valid in our pid namespace,
        // the server's death is never certain, and segments are retired.
        let pid = holder(&self.name.lock()).filter(|&pid| has_open(pid, &lifeline));
        let Some(queue) = Mqueue::open(&self.name)? else { return Ok(None) };
        let link = Arc::new(Link::to_sender(Peer { pid, uid: geteuid().as_raw() }));
        if !is_held(&lifeline) {
            return Ok(None);
        }
        let lifeline = Arc::new(lifeline);
        let watch = on_hang_up(Arc::clone(&lifeline), {
            let link = Arc::clone(&link);
            move || link.sever(|| None)
        })?;
        Ok(Some(Connection { longest: queue.longest()?, queue, lifeline, link, _watch: watch }))
    }

    fn deliver(
        &self,
        over: &Connection,
        request: &Request<Named>,
        deadline: Deadline,
    ) -> Result<()> {
        let (owner, geometry) = (request.pooled.backing.owner(), self.pool.geometry());
        let message = Message {
            pid: owner.pid,
            pool: owner.pool.0,
            version: self.pool.version(),
            index: request.segment().index(),
            generation: request.generation,
            slot_count: geometry.slot_count(),
            slot_len: geometry.slot_len(),
            key: &request.key,
        };
        if HEAD + request.key.len() > over.longest {
            let limit = over.longest.saturating_sub(HEAD);
            return Err(Misuse::KeyTooLong { len: request.key.len(), limit }.into());
        }
        let message = message.encode();
        loop {
            // A dead server's queue still takes messages, and the watcher may not have reported its
            // end yet.
            if !is_held(&over.lifeline) {
                return Err(Error::Disconnected);
            }
            if over.queue.try_send(&message)? {
                return Ok(());
            }
            workers::blocking(|| over.wait_for_room(deadline))?;
        }
    }
}

impl Connection {
    fn wait_for_room(&self, deadline: Deadline) -> Result<()> {
        loop {
            let room = PollFd::new(&self.queue, PollFlags::OUT);
            let end = PollFd::new(&self.lifeline, PollFlags::empty());
            let mut either = [room, end];
            match poll(&mut either, deadline.timespec().as_ref()) {
                Ok(0) if deadline.has_passed() => return Err(Error::Timeout(Awaited::QueueRoom)),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) if !either[1].revents().is_empty() => return Err(Error::Disconnected),
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Error::os("poll")(errno)),
            }
        }
    }
}

/// Carries no descriptors, and so no loans.
impl Borrower for Connection {}

impl reconnect::Connection for Connection {
    fn link(&self) -> &Arc<Link> {
        &self.link
    }
}
