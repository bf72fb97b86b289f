//! The queue over a Unix socket: requests, segment descriptors, identity and death in one connection.

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
use crate::peer::{Peer, Socket};
use crate::segment::{Memfd, SegmentPool};
use crate::sync::{Deadline, wait_ready};
use crate::workers;

mod address;
mod client;
#[cfg(all(test, loom))]
mod model;
mod queue;
mod requester;
pub(crate) mod ring;
mod wake_policy;
pub(crate) mod wire;

pub use queue::SeqpacketQueue;
pub use requester::SeqpacketRequester;

/// Where a Unix-socket queue is, and who may use it (rule S3).
///
/// One server takes requests from many clients, each with a pool of its own. Either side may start
/// first, and each outlives the other: a client connects by itself, and again when the server was
/// restarted.
///
/// Requests with keys of up to 240 bytes travel in a ring in shared memory that each connection has, without
/// a system call as long as the server is awake; what does not fit there travels over the socket.
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

/// What a server takes from its clients, and whom a client trusts as its server.
#[derive(Clone)]
struct Policy {
    users: Vec<u32>,
    max_clients: u32,
    max_segments: u32,
    max_bytes: u64,
    connect_timeout: ConnectTimeout,
    on_rejected: Option<Arc<OnRejected>>,
}

type OnRejected = dyn Fn(Option<Peer>, &Error) + Send + Sync;

impl Seqpacket {
    /// A queue at this path. Only processes of the same user may use it, unless told otherwise.
    pub fn new(path: impl Into<PathBuf>) -> Seqpacket {
        let policy = Policy {
            users: vec![getuid().as_raw()],
            max_clients: 256,
            max_segments: 1024,
            max_bytes: 4 << 30,
            connect_timeout: ConnectTimeout::default(),
            on_rejected: None,
        };
        Seqpacket { path: path.into(), policy }
    }

    /// The path `shmferry/NAME.sock` in this user's runtime directory: `$XDG_RUNTIME_DIR`, or a
    /// directory of the user's own in the temporary one.
    ///
    /// # Errors
    /// [`Error::Misuse`] when the directory that stands there is not this user's alone.
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

    /// Lets processes of another user in too; on a client, trusts a server of that user. The
    /// socket's file stays 0600: to reach it, the other user needs to be given access to it.
    pub fn allow_user(mut self, uid: u32) -> Self {
        self.policy.users.push(uid);
        self
    }

    /// The most clients that a server has at a time; 256 unless told otherwise. Beyond it, those
    /// that have connected and said nothing make room first.
    pub fn max_clients(mut self, clients: u32) -> Self {
        self.policy.max_clients = clients.max(1);
        self
    }

    /// The most segments that a server takes from one client; 1024 unless told otherwise.
    pub fn max_segments(mut self, segments: u32) -> Self {
        self.policy.max_segments = segments;
        self
    }

    /// The most bytes of segments that a server takes from one client; 4 GiB unless told otherwise.
    /// As much again may be in segments that the client has retired, and that transfers under way
    /// keep mapped for their time.
    ///
    /// That is also the most memory that a client can cost: an honest one has paid for its segments
    /// itself, but one that gives their pages back to the system has the server pay for each that
    /// it writes to.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.policy.max_bytes = bytes;
        self
    }

    /// How long a client's `send` waits for a server that is not there, within its deadline; as long
    /// as the deadline unless told otherwise. Zero means one look.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.policy.connect_timeout.always = Some(timeout);
        self
    }

    /// As [`connect_timeout`](Self::connect_timeout), but only once the client has found a server: how long it waits
    /// for the successor of one that is gone. As long as the server has said that it ends and still
    /// lives, the time does not count.
    pub fn connect_timeout_after_loss(mut self, timeout: Duration) -> Self {
        self.policy.connect_timeout.after_loss = Some(timeout);
        self
    }

    /// Has a server report each client that it turns away, and why.
    pub fn on_rejected(
        mut self,
        report: impl Fn(Option<Peer>, &Error) + Send + Sync + 'static,
    ) -> Self {
        self.policy.on_rejected = Some(Arc::new(report));
        self
    }

    /// Serves at this path. A socket left behind by a dead server is taken over; a missing
    /// directory is made, for this user only, and removed again at the end.
    ///
    /// # Errors
    /// [`Error::AddressInUse`] when a living server is there, [`Error::NameTaken`] when its lock
    /// file is another user's, or no regular file, [`Error::Misuse`] for a path that is too long,
    /// [`Error::Os`] for what the system refuses.
    pub fn bind(self) -> Result<SeqpacketQueue> {
        SeqpacketQueue::bind(&self.path, self.policy)
    }

    /// A client of the server at this path, for requests with segments of `pool`. Connects when it
    /// first has something to send.
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

/// A new socket of our kind.
fn socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::os("socket"))
}

fn socket_address(path: &Path) -> Result<SocketAddrUnix> {
    let len = path.as_os_str().len();
    SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::NAMETOOLONG => Misuse::PathTooLong { path: path.to_owned(), len, limit: 107 }.into(),
        errno => Error::os("socket path")(errno),
    })
}

/// Sends one message, and a descriptor with it, waiting for room until the deadline.
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
            Err(Errno::AGAIN) => {
                match workers::blocking(|| wait_ready(socket, PollFlags::OUT, deadline)) {
                    Ok(true) => {}
                    Ok(false) => return Err(Error::Timeout(Awaited::QueueRoom)),
                    Err(errno) => return Err(Error::os("poll")(errno)),
                }
            }
            // The system has too many descriptors on their way; it says nothing when that ends.
            Err(Errno::TOOMANYREFS) if !deadline.has_passed() => {
                workers::blocking(|| pause(0, deadline))
            }
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                return Err(Error::Disconnected);
            }
            Err(errno) => return Err(Error::os("sendmsg")(errno)),
        }
    }
}
