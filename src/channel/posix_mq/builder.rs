//! The address and settings of a POSIX message queue, for server and client.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::channel::reconnect::ConnectTimeout;
use crate::error::{Error, Result};
use crate::peer::Peer;
use crate::segment::SegmentPool;
use crate::sync::Deadline;

use super::name::Name;
use super::{Named, PosixMqQueue, PosixMqRequester};

/// The address of a POSIX message queue, for processes of one user.
///
/// One server takes requests from many clients, each with a pool of its own. Either side may start
/// first, and each outlives the other. There is no connection. Each process keeps a FIFO open in
/// `/dev/shm`: the other side learns of its death from a hang-up, at once and without polling.
///
/// ```
/// use shmferry::channel::{Named, PosixMq, Requester, RequestQueue};
/// use shmferry::protocol::Reply;
/// use shmferry::segment::SegmentPool;
/// use shmferry::{Deadline, Refusal};
/// use std::thread;
///
/// # let name = format!("/shmferry-doc-{}", std::process::id());
/// // Two processes in real life; the client does not need the server yet.
/// let pool = SegmentPool::<Named>::builder().segments(2).create()?;
/// let cache = PosixMq::new(&name)?.requester(&pool);
///
/// let queue = PosixMq::new(&name)?.bind()?;
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
///
/// # What does not compile
/// A message cannot carry a descriptor, and so not a segment of [`Memfd`](crate::segment::Memfd):
/// ```compile_fail,E0277
/// # use shmferry::*;
/// fn wrong_backing(cache: PosixMqRequester, request: Request<Memfd>) {
///     let _ = cache.send(request, Deadline::NEVER);
/// }
/// ```
#[derive(Clone)]
#[must_use = "it does nothing until it is bound or connected"]
pub struct PosixMq {
    name: Name,
    policy: Policy,
}

#[derive(Clone)]
pub(super) struct Policy {
    pub(super) capacity: u32,
    pub(super) max_segments: u32,
    connect_timeout: ConnectTimeout,
    pub(super) on_rejected: Option<Arc<OnRejected>>,
}

pub(super) type OnRejected = dyn Fn(Option<Peer>, &Error) + Send + Sync;

impl PosixMq {
    /// The queue of this name: a slash, and up to 200 bytes without another.
    ///
    /// # Errors
    /// [`Error::Misuse`] for any other name.
    pub fn new(name: impl Into<String>) -> Result<PosixMq> {
        let policy = Policy {
            capacity: 10,
            max_segments: 1024,
            connect_timeout: ConnectTimeout::default(),
            on_rejected: None,
        };
        Ok(PosixMq { name: Name::parse(name.into())?, policy })
    }

    /// The name.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// The most requests that wait in the queue until a worker takes them; 10 by default, as Linux
    /// allows without configuration (`/proc/sys/fs/mqueue/msg_max`). Beyond it, `send` waits.
    pub fn capacity(mut self, requests: u32) -> Self {
        self.policy.capacity = requests;
        self
    }

    /// The most segments of one client that a server keeps mapped; 1024 by default. Beyond it, the
    /// least recently used one is unmapped, and mapped again when it is needed.
    pub fn max_segments(mut self, segments: u32) -> Self {
        self.policy.max_segments = segments.max(1);
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

    /// Sets a callback for each request that the server cannot use, with the reason. Requests of a
    /// client that is gone are dropped silently.
    pub fn on_rejected(
        mut self,
        report: impl Fn(Option<Peer>, &Error) + Send + Sync + 'static,
    ) -> Self {
        self.policy.on_rejected = Some(Arc::new(report));
        self
    }

    /// Serves at this name. The queue of a dead server is replaced by an empty one: the clients
    /// whose requests were in it have learned of its death.
    ///
    /// # Errors
    /// [`Error::AddressInUse`] when a living server is there; [`Error::NameTaken`] when one of its
    /// names is in use by another user, or for another kind of file; [`Error::Misuse`] for a
    /// capacity beyond what the system allows; [`Error::Os`] when a system call fails otherwise,
    /// such as for a queue of this name that shmferry did not make.
    pub fn bind(self) -> Result<PosixMqQueue> {
        PosixMqQueue::bind(self.name, self.policy)
    }

    /// A client of the server at this name, for requests with segments of `pool`. Looks for the
    /// server at its first request.
    pub fn requester(self, pool: &SegmentPool<Named>) -> PosixMqRequester {
        PosixMqRequester::new(self.name, self.policy.connect_timeout, pool)
    }

    /// As [`requester`](Self::requester), but waits until the server is there.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it is not there in time, [`Error::Os`] when a system call fails.
    pub fn connect(
        self,
        pool: &SegmentPool<Named>,
        deadline: Deadline,
    ) -> Result<PosixMqRequester> {
        let requester = self.requester(pool);
        requester.connect(deadline)?;
        Ok(requester)
    }
}

impl fmt::Debug for PosixMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PosixMq").field("name", &self.name()).finish_non_exhaustive()
    }
}
