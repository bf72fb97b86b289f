//! The queue over a Unix socket, which carries descriptors, and tells of the peer's death.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{env, io};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::getuid;

use crate::channel::pause;
use crate::channel::reconnect::ConnectTimeout;
use crate::error::{Awaited, Error, Misuse, Result};
use crate::loan::LoanLimits;
use crate::peer::{Peer, Socket};
use crate::segment::{Memfd, SegmentPool};
use crate::sync::{Deadline, wait_ready};
use crate::workers;

mod address;
mod borrower;
mod client;
mod lender;
mod lines;
#[cfg(all(test, loom))]
mod model;
mod packets;
mod queue;
mod requester;
pub(crate) mod ring;
mod signal;
mod wake_policy;
pub(crate) mod wire;

pub use queue::SeqpacketQueue;
pub use requester::SeqpacketRequester;

/// The address of a Unix-socket queue, and who may use it (rule S3).
///
/// One server takes requests from many clients, each with a pool of its own. Either side may start
/// first, and each outlives the other: a client connects by itself, and again when the server was
/// restarted.
///
/// Each connection has a ring in shared memory for requests with keys of up to 240 bytes. While the
/// server is awake, such a request needs no system call. Requests that do not fit go over the
/// socket.
///
/// ```
/// use shmferry::channel::{Requester, RequestQueue, Seqpacket};
/// use shmferry::protocol::Reply;
/// use shmferry::segment::{Memfd, SegmentPool};
/// use shmferry::{Deadline, Refusal};
/// use std::thread;
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("cache.sock");
/// // Two processes in real life; the client does not need the server yet.
/// let pool = SegmentPool::<Memfd>::builder().segments(2).create()?;
/// let cache = Seqpacket::new(&path).requester(&pool)?;
///
/// let queue = Seqpacket::new(&path).bind()?;
/// let server = thread::spawn(move || {
///     let transfer = queue.recv(Deadline::NEVER)?;
///     assert_eq!(transfer.key(), b"/a.jpg");
///     transfer.refuse(Refusal::NotFound)
/// });
///
/// let (request, transfer) = pool.lease(Deadline::NEVER)?.request("/a.jpg")?;
/// cache.send(request, Deadline::NEVER)?;
/// assert!(matches!(transfer.reply(Deadline::NEVER)?, Reply::Refused(Refusal::NotFound)));
/// # server.join().unwrap()?;
/// # Ok::<(), shmferry::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "it does nothing until it is bound or connected"]
pub struct Seqpacket {
    path: PathBuf,
    policy: Policy,
}

/// The limits that a server sets for its clients, and the users that either side trusts.
#[derive(Clone)]
struct Policy {
    users: Vec<u32>,
    max_clients: u32,
    max_segments: u32,
    max_bytes: u64,
    /// Lent to one client, by a server.
    loans: LoanLimits,
    /// Kept by a client.
    keep: LoanLimits,
    connect_timeout: ConnectTimeout,
    on_rejected: Option<Arc<OnRejected>>,
}

type OnRejected = dyn Fn(Option<Peer>, &Error) + Send + Sync;

impl Seqpacket {
    /// A queue at this path. Only processes of the same user may use it, unless
    /// [`allow_user`](Self::allow_user) is called.
    pub fn new(path: impl Into<PathBuf>) -> Seqpacket {
        let policy = Policy {
            users: vec![getuid().as_raw()],
            max_clients: 256,
            max_segments: 1024,
            max_bytes: 4 << 30,
            loans: LoanLimits { bytes: 1 << 30, count: 1024 },
            keep: LoanLimits::NONE,
            connect_timeout: ConnectTimeout::default(),
            on_rejected: None,
        };
        Seqpacket { path: path.into(), policy }
    }

    /// The path `shmferry/NAME.sock` in this user's runtime directory: `$XDG_RUNTIME_DIR`, or a
    /// private directory of the user in the temporary directory.
    ///
    /// # Errors
    /// [`Error::Misuse`] when that directory exists and is not private to this user.
    pub fn runtime_path(name: &str) -> Result<PathBuf> {
        let dir = match env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir).join("shmferry"),
            None => env::temp_dir().join(format!("shmferry-{}", getuid().as_raw())),
        };
        address::check_private(&dir)?;
        Ok(dir.join(format!("{name}.sock")))
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// On a server, accepts processes of another user too; on a client, trusts a server of that
    /// user. The socket file keeps mode 0600: the other user has to be given access to it.
    pub fn allow_user(mut self, uid: u32) -> Self {
        self.policy.users.push(uid);
        self
    }

    /// The most clients that a server has at a time; 256 by default. Beyond it, clients that have
    /// connected and sent nothing are dropped first.
    pub fn max_clients(mut self, clients: u32) -> Self {
        self.policy.max_clients = clients.max(1);
        self
    }

    /// The most segments that a server maps for one client; 1024 by default.
    pub fn max_segments(mut self, segments: u32) -> Self {
        self.policy.max_segments = segments;
        self
    }

    /// The most bytes of segments that a server maps for one client; 4 GiB by default. As much
    /// again may be in segments that the client has retired and that transfers under way keep
    /// mapped.
    ///
    /// It also bounds the memory that a client can cost the server. The pages of a segment are
    /// charged to the client; if the client frees them, the server is charged for each page it
    /// writes to.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.policy.max_bytes = bytes;
        self
    }

    /// The most that a server lends to one client: bytes of sealed memory, and loans; 1 GiB and
    /// 1024 by default. Beyond it, answers go through the segment until the client has returned
    /// some.
    pub fn lend_at_most(mut self, bytes: u64, loans: u32) -> Self {
        self.policy.loans = LoanLimits { bytes, count: loans };
        self
    }

    /// The most that a client keeps of what is lent to it: bytes of sealed memory, and loans, each
    /// of which costs a descriptor. None by default: it then gets everything through the segment.
    pub fn keep_loans(mut self, bytes: u64, loans: u32) -> Self {
        self.policy.keep = LoanLimits { bytes, count: loans };
        self
    }

    /// How long a client's `send` waits for an absent server, within its deadline; until the
    /// deadline by default. Zero means a single attempt.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.policy.connect_timeout.always = Some(timeout);
        self
    }

    /// As [`connect_timeout`](Self::connect_timeout), but only after a first connection: how long
    /// the client waits for the successor of a server that is gone. The time does not run while a
    /// server that is leaving is still alive.
    pub fn connect_timeout_after_loss(mut self, timeout: Duration) -> Self {
        self.policy.connect_timeout.after_loss = Some(timeout);
        self
    }

    /// Sets a callback for each client that the server rejects, with the reason.
    pub fn on_rejected(
        mut self,
        report: impl Fn(Option<Peer>, &Error) + Send + Sync + 'static,
    ) -> Self {
        self.policy.on_rejected = Some(Arc::new(report));
        self
    }

    /// Serves at this path. The socket of a dead server is replaced. A missing directory is made,
    /// private to this user, and removed again at the end.
    ///
    /// # Errors
    /// [`Error::AddressInUse`] when a living server is there, [`Error::NameTaken`] when its lock
    /// file is not a regular file of this user, [`Error::Misuse`] for a path that is too long,
    /// [`Error::Os`] when a system call fails.
    pub fn bind(self) -> Result<SeqpacketQueue> {
        SeqpacketQueue::bind(&self.path, self.policy)
    }

    /// A client of the server at this path, for requests with segments of `pool`. Connects at its
    /// first request.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a path that is too long, or the pool of a process that this one was
    /// forked from.
    pub fn requester(self, pool: &SegmentPool<Memfd>) -> Result<SeqpacketRequester> {
        SeqpacketRequester::new(&self.path, self.policy, pool.clone())
    }

    /// As [`requester`](Self::requester), but waits until the server is there.
    ///
    /// # Errors
    /// Also [`Error::Timeout`] when it is not there in time.
    pub fn connect(
        self,
        pool: &SegmentPool<Memfd>,
        deadline: Deadline,
    ) -> Result<SeqpacketRequester> {
        let requester = self.requester(pool)?;
        requester.connect(deadline)?;
        Ok(requester)
    }
}

impl fmt::Debug for Seqpacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seqpacket").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Policy {
    fn trusts(&self, peer: Peer) -> bool {
        self.users.contains(&peer.uid)
    }
}

/// A new socket: sequenced packets, non-blocking.
fn socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::os("socket"))
}

fn socket_address(path: &Path) -> Result<SocketAddrUnix> {
    let len = path.as_os_str().len();
    if len == 0 {
        return Err(Misuse::Address("unix:".to_owned()).into());
    }
    SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::INVAL => Misuse::Address(format!("unix:{}", path.display())).into(), // a NUL
        Errno::NAMETOOLONG => Misuse::PathTooLong { path: path.to_owned(), len, limit: 107 }.into(),
        errno => Error::os("socket path")(errno),
    })
}

/// Sends one message, with a descriptor if one is given; waits for room until the deadline.
fn send(
    socket: &Socket,
    message: &[u8],
    fd: Option<BorrowedFd<'_>>,
    deadline: Deadline,
) -> Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    loop {
        let fds = fd.as_slice();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[io::IoSlice::new(message)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            // Not even a look: a caller that does not wait may hold a lock, and a look would give
            // this thread's place to a worker that waits for that lock.
            Err(Errno::AGAIN) if deadline.has_passed() => {
                return Err(Error::Timeout(Awaited::QueueRoom));
            }
            Err(Errno::AGAIN) => {
                match workers::blocking(|| wait_ready(socket, PollFlags::OUT, deadline)) {
                    Ok(true) => {}
                    Ok(false) => return Err(Error::Timeout(Awaited::QueueRoom)),
                    Err(errno) => return Err(Error::os("poll")(errno)),
                }
            }
            // Too many descriptors are in flight in the system; there is no event for the end of
            // that.
            Err(Errno::TOOMANYREFS) if deadline.has_passed() => {
                return Err(Error::Timeout(Awaited::QueueRoom));
            }
            Err(Errno::TOOMANYREFS) => workers::blocking(|| pause(0, deadline)),
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                return Err(Error::Disconnected);
            }
            Err(errno) => return Err(Error::os("sendmsg")(errno)),
        }
    }
}
