//! The client of a Unix-socket queue: connects by itself, and again to a server's successor.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

use crate::channel::reconnect::{self, Connect, Reconnecting};
use crate::channel::{Request, Requester, SendError, pause};
use crate::error::{Awaited, Error, Rejection, Result};
use crate::loan::{Borrower, Content, FILE, LoanLimits, SEALED};
use crate::peer::{Link, Peer, Socket, Watch, on_hang_up};
use crate::process::Origin;
use crate::segment::{Memfd, SegmentPool, create_words};
use crate::sync::atomic::{Acquire, AtomicU64, Release};
use crate::sync::{Deadline, FairSemaphore, lock, wait_ready};
use crate::workers;

use super::borrower::SocketBorrower;
use super::lines::Lines;
use super::ring::{Posted, Poster, RING_LEN};
use super::signal::SocketSignal;
use super::wire::{Message, VERSION};
use super::{Policy, send, socket, socket_address};

/// Sends requests with segments of one pool to the server at one path. Used by many threads.
///
/// Transfers under way go on when it is dropped: the connection stays open as long as any of them.
pub struct SeqpacketRequester {
    path: PathBuf,
    line: Reconnecting<Connector>,
}

/// The server's address, and the pool whose segments are used.
struct Connector {
    address: SocketAddrUnix,
    policy: Policy,
    pool: SegmentPool<Memfd>,
    /// Readable when a connection is.
    lines: Lines<Connection>,
}

impl SeqpacketRequester {
    pub(super) fn new(
        path: &Path,
        policy: Policy,
        pool: SegmentPool<Memfd>,
    ) -> Result<SeqpacketRequester> {
        pool.origin().check()?;
        let (id, connect_timeout) = (pool.id(), policy.connect_timeout);
        let (address, lines) = (socket_address(path)?, Lines::new()?);
        let connector = Connector { address, policy, pool, lines };
        Ok(SeqpacketRequester {
            path: path.to_owned(),
            line: Reconnecting::new(connector, id, connect_timeout),
        })
    }

    /// The server's process, if there is a connection to it.
    pub fn server(&self) -> Option<Peer> {
        self.line.server()
    }

    pub(super) fn connect(&self, deadline: Deadline) -> Result<()> {
        self.line.connect(deadline)
    }

    /// Reads what the server has sent, and wakes the tasks that have something to take. To be
    /// called whenever the descriptor ([`AsFd`]) is readable, by a program whose tasks wait
    /// ([`poll_wait`](crate::protocol::ShmTransfer::poll_wait) and the like). It is not readable
    /// any more then, until something new comes. `false` if there may be more by now: call it
    /// again, after others had their turn. Never waits.
    ///
    /// # Errors
    /// [`Error::Os`] when the system fails; [`Error::Misuse`] in a child of `fork`.
    pub fn attend(&self) -> Result<bool> {
        self.line.check_origin()?;
        self.line.connector().lines.attend(|connection| connection.attend())
    }
}

/// Readable when [`attend`](SeqpacketRequester::attend) has something to do. The same descriptor
/// for all connections, one after the other.
impl AsFd for SeqpacketRequester {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.connector().lines.as_fd()
    }
}

impl Requester<Memfd> for SeqpacketRequester {
    /// Connects first if there is no connection, waiting for the server until the deadline, or for
    /// the [`connect_timeout`](super::Seqpacket::connect_timeout). A request that cannot be sent to
    /// a server that died goes to its successor; one that was sent and not taken ends with
    /// [`Error::Disconnected`].
    fn send(&self, request: Request<Memfd>, deadline: Deadline) -> Result<(), SendError<Memfd>> {
        self.line.send(request, deadline)
    }

    fn patience(&self) -> Option<Duration> {
        self.line.patience()
    }
}

impl Connect for Connector {
    type Backing = Memfd;
    type Connection = Connection;

    fn connect(&self, deadline: Deadline) -> Result<Option<Connection>> {
        Connection::open(&self.address, &self.policy, &self.pool, deadline)
    }

    fn deliver(
        &self,
        over: &Connection,
        request: &Request<Memfd>,
        deadline: Deadline,
    ) -> Result<()> {
        over.deliver(&self.pool, request, deadline)
    }

    fn connected(&self, connection: &Arc<Connection>) -> Result<()> {
        self.lines.add(&*connection.socket, connection)
    }
}

impl fmt::Debug for SeqpacketRequester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeqpacketRequester")
            .field("path", &self.path)
            .field("server", &self.server())
            .finish_non_exhaustive()
    }
}

/// One connection to one server process.
struct Connection {
    socket: Arc<Socket>,
    link: Arc<Link>,
    /// The version of the pool that the server knows; `NONE` before the first.
    version: AtomicU64,
    /// The segments that the server has.
    known: Mutex<BTreeSet<u32>>,
    /// Lets one thread at a time pass segments.
    updating: FairSemaphore,
    /// What the server lends.
    loans: Arc<SocketBorrower>,
    /// The ring; `None` if there was no memory for it.
    ring: Option<Poster>,
    origin: Origin,
    _watch: Watch,
}

/// A version that no pool reaches.
const NONE: u64 = u64::MAX;

impl Connection {
    /// Connects and passes the pool's segments; `None` when no server is there now.
    fn open(
        address: &SocketAddrUnix,
        policy: &Policy,
        pool: &SegmentPool<Memfd>,
        deadline: Deadline,
    ) -> Result<Option<Connection>> {
        let socket = Socket::from(socket()?);
        for attempt in 0.. {
            match rustix::net::connect(&socket, address) {
                Ok(()) => break,
                // No socket; a socket without a server.
                Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
                // The server's backlog is full.
                Err(Errno::AGAIN) if deadline.has_passed() => {
                    return Err(Error::Timeout(Awaited::QueueRoom));
                }
                Err(Errno::AGAIN) => pause(attempt, deadline),
                Err(errno) => return Err(Error::os("connect")(errno)),
            }
        }
        let server = Peer::of_socket(&socket)?;
        if !policy.trusts(server) {
            return Err(Rejection::User(server.uid).into());
        }
        let socket = Arc::new(socket);
        let link = Arc::new(Link::to_sender(server));
        let loans = Arc::new(SocketBorrower::new(&socket, policy.keep));
        let watch = on_hang_up(Arc::clone(&socket), {
            let (loans, link) = (Arc::clone(&loans), Arc::clone(&link));
            move || link.sever(|| loans.last_words())
        })?;
        let (version, known, updating) =
            (AtomicU64::new(NONE), Mutex::default(), FairSemaphore::new(1));
        // Without memory for the ring, requests go over the connection.
        let (ring, memory) =
            create_words(&format!("shmferry.ring-{}", pool.id()), RING_LEN).ok().unzip();
        let ring = ring.map(Poster::new);
        if let Some(ring) = &ring {
            link.signal_by(Box::new(SocketSignal::of_client(ring.words(), &socket)));
        }
        let origin = Origin::here();
        let connection = Connection {
            socket,
            link,
            version,
            known,
            updating,
            loans,
            ring,
            origin,
            _watch: watch,
        };
        match connection.introduce(policy.keep, pool, memory, deadline) {
            Ok(()) => Ok(Some(connection)),
            Err(Error::Disconnected) => Ok(None), // it died, or rejected us, meanwhile
            Err(error) => Err(error),
        }
    }

    fn introduce(
        &self,
        limits: LoanLimits,
        pool: &SegmentPool<Memfd>,
        ring: Option<OwnedFd>,
        deadline: Deadline,
    ) -> Result<()> {
        let geometry = pool.geometry();
        let hello = Message::Hello {
            version: VERSION,
            pool: pool.id().0,
            slot_count: geometry.slot_count(),
            slot_len: geometry.slot_len(),
            loans: if limits.count > 0 { SEALED | FILE } else { 0 },
            limits,
        };
        self.say(hello, None, deadline)?;
        if let Some(ring) = ring {
            self.say(Message::Ring, Some(ring.as_fd()), deadline)?;
        }
        Ok(())
    }

    fn deliver(
        &self,
        pool: &SegmentPool<Memfd>,
        request: &Request<Memfd>,
        deadline: Deadline,
    ) -> Result<()> {
        self.update(pool, deadline)?;
        let (index, generation, key) =
            (request.segment().index(), request.generation, &*request.key);
        let takes_loans = request.takes_loans;
        let Some((ring, number)) = self.post(index, generation, takes_loans, key) else {
            let message = Message::Request { index, generation, takes_loans, key };
            return self.say(message, None, deadline);
        };
        let heard = match ring.follow(number, self.link.is_below(1)) {
            Posted::Taken => Ok(()),
            // The watcher may not have reported the end yet.
            Posted::Awaiting => self.check_open(),
            Posted::MustWake(need_wakeup) => {
                match self.say(Message::Wakeup, None, Deadline::after(Duration::ZERO)) {
                    // A full connection wakes the server as well.
                    Ok(()) | Err(Error::Timeout(_)) => {
                        ring.lower(need_wakeup);
                        Ok(())
                    }
                    failed => failed,
                }
            }
        };
        // After its hang-up a server takes no more requests.
        heard.or_else(|error| if ring.was_taken(number) { Ok(()) } else { Err(error) })
    }

    /// Fails, and severs the link, if the server has hung up or is dead.
    fn check_open(&self) -> Result<()> {
        match wait_ready(&*self.socket, PollFlags::empty(), Deadline::after(Duration::ZERO)) {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.link.sever(|| self.loans.last_words());
                Err(self.link.disconnect_reason())
            }
            Err(errno) => Err(Error::os("poll")(errno)),
        }
    }

    /// Posts a request to the ring, if it fits.
    fn post(
        &self,
        index: u32,
        generation: u64,
        takes_loans: bool,
        key: &[u8],
    ) -> Option<(&Poster, u64)> {
        let ring = self.ring.as_ref()?;
        Some((ring, ring.post(index, generation, takes_loans, key)?))
    }

    /// Brings the server up to date with the pool's segments.
    fn update(&self, pool: &SegmentPool<Memfd>, deadline: Deadline) -> Result<()> {
        let current = || self.version.load(Acquire) == pool.version();
        if current() {
            return Ok(());
        }
        let update = || if current() { Ok(()) } else { self.hand_over(pool, deadline) };
        let updated = workers::blocking(|| self.updating.within(deadline, update));
        updated.unwrap_or(Err(Error::Timeout(Awaited::QueueRoom)))
    }

    /// Retires segments that have left the pool, and passes new ones.
    fn hand_over(&self, pool: &SegmentPool<Memfd>, deadline: Deadline) -> Result<()> {
        let (version, live) = pool.live();
        let indices: BTreeSet<u32> =
            live.iter().map(|pooled| pooled.segment.id().index()).collect();
        let known = lock(&self.known).clone();
        for &index in known.difference(&indices) {
            self.say(Message::Retire { index }, None, deadline)?;
            lock(&self.known).remove(&index);
        }
        for pooled in &live {
            let index = pooled.segment.id().index();
            if !known.contains(&index) {
                self.say(Message::Segment { index }, Some(pooled.backing.as_fd()), deadline)?;
                lock(&self.known).insert(index);
            }
        }
        self.version.store(version, Release);
        Ok(())
    }

    /// Sends one message; severs the link if the server is gone.
    fn say(
        &self,
        message: Message<'_>,
        memory: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<()> {
        let sent = send(&self.socket, &message.encode(), memory, deadline);
        if let Err(Error::Disconnected) = sent {
            self.link.sever(|| self.loans.last_words());
            return Err(self.link.disconnect_reason());
        }
        sent
    }
}

impl Connection {
    /// Reads all that has come, and wakes the tasks that have something to take. `false` if there
    /// may be more.
    fn attend(&self) -> bool {
        let is_all = self.loans.read_all();
        self.link.look();
        is_all
    }

    /// A signal, or the message that stands for it, may have been read by who looked for a loan.
    fn look(&self) {
        if self.loans.was_signalled() {
            self.link.look();
        }
    }
}

impl Borrower for Connection {
    fn borrow(&self, id: u64) -> Result<Option<Content>> {
        let borrowed = self.loans.borrow(id);
        self.look();
        borrowed
    }

    fn make_room(&self, bytes: u64) {
        self.loans.make_room(bytes);
        self.look();
    }
}

impl reconnect::Connection for Connection {
    fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            return;
        }
        self.link.sever(|| None);
        // Closing does not hang up as long as a child of `fork` has the socket open as well. Fails
        // only if the server has hung up already.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }
}
