//! The front door of a receiver: connect, ask for a key, read what comes.

use std::fmt;
use std::io;
#[cfg(unix)]
use std::os::fd::AsFd;
#[cfg(target_os = "linux")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[cfg(target_os = "linux")]
use rustix::process::{Resource, getrlimit};

#[cfg(target_os = "linux")]
use crate::address::Address;
#[cfg(target_os = "linux")]
use crate::channel::InProcess;
use crate::channel::Requester;
#[cfg(all(target_os = "linux", feature = "posix-mq"))]
use crate::channel::{Named, PosixMq};
#[cfg(target_os = "linux")]
use crate::channel::{Seqpacket, SeqpacketRequester};
use crate::error::{Error, Result};
#[cfg(target_os = "linux")]
use crate::loan::{Lent, LentBody, LoanLimits};
#[cfg(target_os = "linux")]
use crate::protocol::Spool;
use crate::protocol::{
    Chunk, DEFAULT_TIMEOUT, Metadata, Receiver, Receiving, Reply, ShmTransfer, Size,
};
#[cfg(target_os = "linux")]
use crate::segment::Memfd;
use crate::segment::{Backing, PoolStats, SegmentPool};
use crate::sync::Deadline;

/// Asks one server for bytes by key, from any number of threads at once.
///
/// It owns the shared memory that the bytes come through: as many segments as there can be
/// transfers at once ([`ClientBuilder::segments`]). Cheap to clone; all clones share them.
///
/// It connects when there is something to ask, and again after the server has been restarted:
/// either side may be started first.
///
/// ```no_run
/// use shmferry::{Client, Error, Refusal};
///
/// let cache = Client::connect("unix:/run/me/cache.sock")?;
/// match cache.get("/a.jpg") {
///     Ok(mut body) => _ = std::io::copy(&mut body, &mut std::io::stdout())?,
///     Err(Error::Refused(Refusal::NotFound)) => eprintln!("there is no such picture"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// With retries, for what may be asked for twice:
/// ```
/// use shmferry::{Client, Result};
/// use std::{thread, time::Duration};
///
/// fn fetch(cache: &Client, key: &str) -> Result<Vec<u8>> {
///     let mut pauses = [10, 100, 1000].into_iter().map(Duration::from_millis);
///     loop {
///         match cache.get(key).and_then(|body| body.read_all()) {
///             Err(error) if error.is_transient() => match pauses.next() {
///                 Some(pause) => thread::sleep(pause),
///                 None => return Err(error),
///             },
///             settled => return settled,
///         }
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Client {
    route: Arc<dyn Route>,
    timeout: Duration,
    lease_timeout: Duration,
}

impl Client {
    /// A client of the server at an address, `unix:PATH` or `mq:/NAME`, with 8 segments of 2 MiB.
    ///
    /// Does not wait for the server: [`get`](Self::get) does.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an address that cannot be right; [`Error::Memory`] when the system has
    /// less memory than the segments take; [`Error::Os`] for anything else that it refuses.
    #[cfg(target_os = "linux")]
    pub fn connect<A>(address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        Client::builder().connect(address)
    }

    /// Describes a client with other numbers.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let client = Client::builder().segments(16).segment_len(512 << 10).in_process(&queue)?;
    /// assert_eq!(client.stats().segments, 16);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder() -> ClientBuilder {
        ClientBuilder {
            segments: 8,
            segment_len: 2 << 20,
            slots: 8,
            timeout: DEFAULT_TIMEOUT,
            lease_timeout: None,
            connect_timeout: None,
            connect_timeout_after_loss: None,
            users: Vec::new(),
            #[cfg(target_os = "linux")]
            keep: LoanLimits { bytes: 512 << 20, count: 256 },
        }
    }

    /// A client over a pool and a queue of one's own choice.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// use shmferry::segment::{Memfd, SegmentPool};
    ///
    /// let pool = SegmentPool::<Memfd>::builder().segments(2).create()?;
    /// let client = Client::with(pool, queue);
    /// assert_eq!(client.get("key")?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with<B: Backing>(pool: SegmentPool<B>, queue: impl Requester<B> + 'static) -> Client {
        let route = Arc::new((pool, queue));
        Client { route, timeout: DEFAULT_TIMEOUT, lease_timeout: DEFAULT_TIMEOUT }
    }

    /// The same client with another [timeout](ClientBuilder::timeout), for all that it asks from
    /// now on. Clones made before keep theirs.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::time::Duration;
    ///
    /// let hasty = client.clone().with_timeout(Duration::from_millis(20));
    /// let (_one, _two) = (client.get("a")?, client.get("b")?); // all segments
    /// assert!(matches!(hasty.get("c"), Err(Error::Timeout(_))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self.lease_timeout = timeout;
        self
    }

    /// Asks for a key of up to [`KEY_LIMIT`](crate::channel::KEY_LIMIT) bytes, and waits for the
    /// answer: up to the timeout for a segment, and up to the timeout for the server.
    ///
    /// A request that a server did not take, because it ended, goes to its successor.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// # let _server = Server::with(queue.clone()).serve(2, |request| match request.key() {
    /// #     b"/greeting" => request.send_bytes(b"hello"),
    /// #     _ => request.refuse(Refusal::NotFound),
    /// # })?;
    /// assert_eq!(client.get("/greeting")?.read_all()?, b"hello");
    /// assert!(matches!(client.get("/absent"), Err(Error::Refused(Refusal::NotFound))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// The server's handler may be called twice for one call of this, if it [lends](crate::loan): a
    /// lent answer that this client cannot take, or has just returned, is asked for again.
    ///
    /// # Errors
    /// [`Error::Refused`] when the server has no bytes for this key, with its reason.
    /// [`Error::Timeout`] when all segments were in use, no server was there, or none answered:
    /// which one it was is told, and the same call may be made again. [`Error::Disconnected`] when
    /// the server took the request and ended before it answered. [`Error::Aborted`] when it gave
    /// up. [`Error::Rejected`] when it turned this process away. [`Error::Misuse`] for a key that
    /// is too long, and in a child of `fork`. [`Error::Peer`] when it broke the protocol,
    /// [`Error::Os`] and [`Error::Memory`] when the system fails; [`Error::Closed`] for a queue
    /// within this process that is closed. [`Error::is_transient`] says after which to ask again.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Body> {
        self.ask(key.as_ref(), Deadline::after(self.lease_timeout), None)
    }

    /// As [`get`](Self::get), with one deadline for all of it. The body's own waits last up to the
    /// timeout each, as ever.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::time::Duration;
    ///
    /// let deadline = Deadline::after(Duration::from_secs(2));
    /// assert_eq!(client.get_before("key", deadline)?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`get`](Self::get).
    pub fn get_before(&self, key: impl AsRef<[u8]>, deadline: Deadline) -> Result<Body> {
        self.ask(key.as_ref(), deadline, Some(deadline))
    }

    /// How the segments are doing at this moment. One whose body was dropped half-way is counted as
    /// quarantined until its server has left it, or until it is needed and replaced.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let body = client.get("key")?;
    /// assert_eq!((client.stats().segments, client.stats().idle), (2, 1));
    /// # drop(body);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stats(&self) -> PoolStats {
        self.route.stats()
    }

    fn ask(&self, key: &[u8], lease: Deadline, reply: Option<Deadline>) -> Result<Body> {
        match self.route.ask(key, lease, &|| reply.unwrap_or(Deadline::after(self.timeout)))? {
            Reply::Found(mut transfer) => {
                transfer.set_timeout(self.timeout);
                Ok(Body { source: Source::Streamed(transfer) })
            }
            #[cfg(target_os = "linux")]
            Reply::Lent(mut body) => {
                body.set_timeout(self.timeout);
                Ok(Body { source: Source::Lent(body) })
            }
            Reply::Refused(why) => Err(Error::Refused(why)),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Numbers for a new [`Client`]. Each has a default that suits files of all sizes.
#[derive(Clone, Debug)]
#[must_use = "describes a client: `connect` makes it"]
pub struct ClientBuilder {
    segments: u32,
    segment_len: u64,
    slots: u32,
    timeout: Duration,
    lease_timeout: Option<Duration>,
    connect_timeout: Option<Duration>,
    connect_timeout_after_loss: Option<Duration>,
    users: Vec<u32>,
    #[cfg(target_os = "linux")]
    keep: LoanLimits,
}

impl ClientBuilder {
    /// How many segments, and so how many transfers at once: 1 to 65,536; 8 by default.
    pub fn segments(mut self, count: u32) -> Self {
        self.segments = count;
        self
    }

    /// Bytes of payload that a segment holds, all slots together; 2 MiB by default. The memory is
    /// allocated when the client is made.
    pub fn segment_len(mut self, bytes: u64) -> Self {
        self.segment_len = bytes;
        self
    }

    /// How many slots a segment is cut into, so that both sides can work at once: 1 to 512; 8 by
    /// default.
    pub fn slots(mut self, count: u32) -> Self {
        self.slots = count;
        self
    }

    /// How long each step waits: for a free segment, for a server and its answer, and in a body for
    /// each further progress of the server or of what the bytes are copied to. 30 seconds by
    /// default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long to wait for a free segment, if not for the timeout. Segments are given out in order
    /// of arrival: with many waiting, each for one that a slow reader holds, the last waits for
    /// several time-outs.
    pub fn lease_timeout(mut self, timeout: Duration) -> Self {
        self.lease_timeout = Some(timeout);
        self
    }

    /// How long to wait for a server that is not there, if not for the timeout. Zero fails at once.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// As [`connect_timeout`](Self::connect_timeout), once a server has been there and is gone, if
    /// it is the shorter of the two: its first start is waited for longer than its restart.
    pub fn connect_timeout_after_loss(mut self, timeout: Duration) -> Self {
        self.connect_timeout_after_loss = Some(timeout);
        self
    }

    /// How much of what the server [lends](crate::loan) is kept, so that the next answer from it
    /// needs neither a copy nor a descriptor: bytes of sealed memory (the server's memory, mapped
    /// here), and loans; 512 MiB and 256 by default. Each loan costs one descriptor, and no more
    /// are kept than a quarter of those that the process may have. With no loans, everything comes
    /// through segments. Sockets only; within a process, nothing has to be kept.
    #[cfg(target_os = "linux")]
    pub fn keep_loans(mut self, bytes: u64, loans: u32) -> Self {
        self.keep = LoanLimits { bytes, count: loans };
        self
    }

    /// Trusts a server of this user, too, besides one of ours. Sockets only.
    pub fn allow_user(mut self, uid: u32) -> Self {
        self.users.push(uid);
        self
    }

    /// Makes the client, with all its memory present. Does not wait for the server.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an address or a number that cannot be right; [`Error::Memory`] when
    /// the system has less memory than the segments take; [`Error::Os`] for anything else that it
    /// refuses.
    #[cfg(target_os = "linux")]
    pub fn connect<A>(self, address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        match address.try_into()? {
            Address::Unix(path) => {
                let (pool, requester) = self.socket(path)?;
                Ok(self.over(pool, requester))
            }
            #[cfg(feature = "posix-mq")]
            Address::Mq(name) => {
                let mut queue = PosixMq::new(name)?;
                let pool = self.pool::<Named>()?;
                if let Some(timeout) = self.connect_timeout {
                    queue = queue.connect_timeout(timeout);
                }
                if let Some(timeout) = self.connect_timeout_after_loss {
                    queue = queue.connect_timeout_after_loss(timeout);
                }
                let requester = queue.requester(&pool);
                Ok(self.over(pool, requester))
            }
            #[cfg(not(feature = "posix-mq"))]
            Address::Mq(_) => Err(crate::error::Misuse::NoPosixMq.into()),
        }
    }

    /// Makes a client of the server that takes requests from `queue`, within this process.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect).
    #[cfg(target_os = "linux")]
    pub fn in_process(self, queue: &InProcess) -> Result<Client> {
        let pool = self.pool::<Memfd>()?;
        Ok(self.over(pool, queue.clone()))
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn socket(&self, path: PathBuf) -> Result<(SegmentPool<Memfd>, SeqpacketRequester)> {
        let pool = self.pool::<Memfd>()?;
        // Each takes a descriptor: most of them are left to the rest of the process.
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let loans = u32::try_from(descriptors / 4).unwrap_or(u32::MAX).min(self.keep.count);
        let mut socket = Seqpacket::new(path).keep_loans(self.keep.bytes, loans);
        for uid in &self.users {
            socket = socket.allow_user(*uid);
        }
        if let Some(timeout) = self.connect_timeout {
            socket = socket.connect_timeout(timeout);
        }
        if let Some(timeout) = self.connect_timeout_after_loss {
            socket = socket.connect_timeout_after_loss(timeout);
        }
        let requester = socket.requester(&pool)?;
        Ok((pool, requester))
    }

    /// The timeouts of an answer, and of a lease.
    pub(crate) fn timeouts(&self) -> (Duration, Duration) {
        (self.timeout, self.lease_timeout.unwrap_or(self.timeout))
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn pool<B: Backing>(&self) -> Result<SegmentPool<B>> {
        let pool = SegmentPool::<B>::builder().segments(self.segments);
        pool.segment_len(self.segment_len).slots(self.slots).create()
    }

    #[cfg(target_os = "linux")]
    fn over<B: Backing>(&self, pool: SegmentPool<B>, queue: impl Requester<B> + 'static) -> Client {
        let (timeout, lease_timeout) = self.timeouts();
        Client { route: Arc::new((pool, queue)), timeout, lease_timeout }
    }
}

/// A pool and its queue, whatever the segments are made of.
trait Route: Send + Sync {
    fn ask(&self, key: &[u8], lease: Deadline, reply: &dyn Fn() -> Deadline) -> Result<Reply>;

    fn stats(&self) -> PoolStats;
}

impl<B: Backing, Q: Requester<B>> Route for (SegmentPool<B>, Q) {
    fn ask(&self, key: &[u8], lease: Deadline, reply: &dyn Fn() -> Deadline) -> Result<Reply> {
        let (pool, queue) = self;
        let lease = pool.lease(lease)?;
        queue.ask(lease, key, reply())
    }

    fn stats(&self) -> PoolStats {
        self.0.stats()
    }
}

/// The bytes behind a key, as they come.
///
/// Read it (`io::Read`), copy it to a descriptor without a copy in this process
/// ([`copy_to`](Self::copy_to)), or look at each chunk where it lies
/// ([`next_chunk`](Self::next_chunk)). Its segment goes back to the client when it is dropped, read
/// to the end or not.
///
/// A transfer that breaks off is an error, never a short read: `Ok(0)` is the true end.
#[derive(Debug)]
#[must_use = "a body that is dropped is not read"]
pub struct Body {
    source: Source,
}

/// How the bytes come.
#[derive(Debug)]
enum Source {
    Streamed(ShmTransfer<Receiver, Receiving>),
    #[cfg(target_os = "linux")]
    Lent(LentBody),
}

impl Body {
    /// How many bytes are to come in all, as the server has announced.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let body = client.get("key")?;
    /// assert_eq!(body.size(), Size::Known(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn size(&self) -> Size {
        match &self.source {
            Source::Streamed(transfer) => transfer.size(),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => Size::Known(body.size()),
        }
    }

    /// What the server attached.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// # let _server = Server::with(queue.clone()).serve(2, |request| {
    /// #     request.accept_with(0, &String::from("text/plain"))?.finish()
    /// # })?;
    /// let body = client.get("key")?;
    /// assert_eq!(body.metadata::<String>()?, "text/plain");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Peer`] when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        match &self.source {
            Source::Streamed(transfer) => transfer.metadata(),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => body.metadata(),
        }
    }

    /// How long this body waits without progress, instead of the client's timeout.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let mut body = client.get("key")?;
    /// body.set_timeout(std::time::Duration::from_secs(5));
    /// assert_eq!(body.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_timeout(&mut self, timeout: Duration) {
        match &mut self.source {
            Source::Streamed(transfer) => transfer.set_timeout(timeout),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => body.set_timeout(timeout),
        }
    }

    /// Reads everything that is still to come into memory.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// assert_eq!(client.get("key")?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// What ended the transfer, or [`Error::Timeout`] when the server made no progress. What had
    /// come by then is lost: to keep it, read.
    pub fn read_all(mut self) -> Result<Vec<u8>> {
        /// The peer's word for the size is no reason to take more memory than this at once.
        const MOST_AT_ONCE: u64 = 64 << 20;
        let announced = self.size().known().unwrap_or(0).min(MOST_AT_ONCE);
        let mut bytes = Vec::with_capacity(announced as usize);
        io::Read::read_to_end(&mut self, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies what is still to come to a socket, pipe or file, straight from the shared memory;
    /// returns the bytes that this call copied. Waits as long as there is progress on both sides
    /// within the timeout.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let file = tempfile::tempfile()?; // or a socket, or a pipe
    /// assert_eq!(client.get("key")?.copy_to(&file)?, 5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// What ended the transfer; [`Error::Sink`] when the descriptor fails, [`Error::Timeout`] when
    /// it takes nothing, after each of which the call may be made again, and goes on.
    #[cfg(unix)]
    pub fn copy_to(&mut self, sink: impl AsFd) -> Result<u64> {
        match &mut self.source {
            Source::Streamed(transfer) => transfer.copy_to(sink),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => body.copy_to(sink),
        }
    }

    /// As [`copy_to`](Self::copy_to), to a socket; but while others wait for a segment and the
    /// socket takes nothing, the rest is set aside in `spool`, so that a slow reader does not keep
    /// the segment.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use shmferry::protocol::Spool;
    /// use std::os::unix::net::UnixStream;
    ///
    /// let spool = Spool::new(1 << 30); // at most so many bytes in temporary files
    /// let (socket, _reader) = UnixStream::pair()?;
    /// assert_eq!(client.get("key")?.copy_to_or_spool(&socket, &spool)?, 5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`copy_to`](Self::copy_to).
    #[cfg(target_os = "linux")]
    pub fn copy_to_or_spool(self, socket: impl AsFd, spool: &Spool) -> Result<u64> {
        match self.source {
            Source::Streamed(transfer) => transfer.copy_to_or_spool(socket, spool),
            Source::Lent(mut body) => body.copy_to(socket), // holds no segment
        }
    }

    /// Waits for the next chunk, or what is unread of the current one; `None` at the end.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let _server = Server::with(queue.clone()).serve(2, |asked| asked.send_bytes(b"hello"))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let mut body = client.get("key")?;
    /// while let Some(chunk) = body.next_chunk(Deadline::NEVER)? {
    ///     assert!(!chunk.is_empty() && chunk.bytes().len() == chunk.len());
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Timeout`], after which the call may be made again; or, for good, what ended the
    /// transfer.
    pub fn next_chunk(&mut self, deadline: Deadline) -> Result<Option<Chunk<'_>>> {
        match &mut self.source {
            Source::Streamed(transfer) => transfer.next_chunk(deadline),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => body.next_chunk(),
        }
    }

    /// Everything that is still to come, as bytes that can be kept as long as one likes, shared
    /// between threads, and handed on. Without a copy, if the server has [lent](crate::loan) sealed
    /// memory; otherwise gathered into memory.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, loan::Loan, *};
    /// # let queue = InProcess::bounded(8);
    /// # let loan = Loan::from_bytes(b"hello")?;
    /// # let _server = Server::with(queue.clone()).serve(2, move |asked| asked.lend(&loan))?;
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let bytes = client.get("key")?.into_bytes()?;
    /// assert_eq!(&bytes[..], b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`read_all`](Self::read_all).
    #[cfg(target_os = "linux")]
    pub fn into_bytes(self) -> Result<Lent> {
        match self.source {
            Source::Lent(body) => body.into_bytes(),
            Source::Streamed(_) => Ok(self.read_all()?.into()),
        }
    }

    /// Whether the server has lent the bytes: then no segment is in use for them.
    #[cfg(target_os = "linux")]
    pub fn is_lent(&self) -> bool {
        matches!(self.source, Source::Lent(_))
    }

    /// The typed part beneath: a transfer, or what was lent.
    pub fn into_reply(self) -> Reply {
        match self.source {
            Source::Streamed(transfer) => Reply::Found(transfer),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => Reply::Lent(body),
        }
    }
}

impl io::Read for Body {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.source {
            Source::Streamed(transfer) => transfer.read(into),
            #[cfg(target_os = "linux")]
            Source::Lent(body) => body.read(into),
        }
    }
}
