//! The front door of a sender: bind an address, serve each request with a handler.

use std::any::Any;
use std::cell::Cell;
use std::error::Error as StdError;
use std::fmt;
#[cfg(unix)]
use std::fs::File;
use std::io::{self, Write};
use std::mem;
#[cfg(unix)]
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

#[cfg(target_os = "linux")]
use crate::address::Address;
use crate::channel::RequestQueue;
use crate::error::{Error, Fault, Result};
#[cfg(target_os = "linux")]
use crate::loan::Loan;
use crate::peer::Peer;
#[cfg(target_os = "linux")]
use crate::protocol::Lending;
use crate::protocol::{
    DEFAULT_TIMEOUT, Metadata, Refusal, Sender, Sending, ShmTransfer, Size, Slot, Starting,
};
use crate::sync::Deadline;
use crate::workers::WorkerPool;

#[cfg(target_os = "linux")]
mod builder;

#[cfg(target_os = "linux")]
pub use builder::ServerBuilder;

/// How long to leave a failing system alone before requests are taken again.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// A server that has its address, and does not take requests yet: [`serve`](Self::serve) does.
///
/// Clients that ask meanwhile wait. Dropping it gives the address up.
///
/// ```no_run
/// use shmferry::{Refusal, Server};
/// use std::fs::File;
///
/// let server = Server::bind("unix:/run/me/cache.sock")?.serve(8, |request| {
///     match request.key() {
///         b"/greeting" => request.send_bytes(b"hello"),
///         b"/a.jpg" => request.send_file(&File::open("/srv/a.jpg")?),
///         _ => request.refuse(Refusal::NotFound),
///     }
/// })?;
/// server.wait();
/// # Ok::<(), shmferry::Error>(())
/// ```
#[must_use = "it serves nobody before `serve`"]
pub struct Server {
    queue: Arc<dyn RequestQueue>,
    timeout: Duration,
    hook: Arc<Hook>,
}

/// A request as the queue gives it out.
type Requested = ShmTransfer<Sender, Starting>;

/// What is told of errors, once there is something.
#[derive(Default)]
pub(crate) struct Hook(OnceLock<Box<OnError>>);

type OnError = dyn Fn(&ServeError) + Send + Sync;

impl Server {
    /// Takes an address, `unix:PATH` or `mq:/NAME`, for this process.
    ///
    /// A dead server's leftovers are taken over: one that is killed, by `SIGTERM` say, leaves a
    /// socket and a lock file, which harm nothing. To leave nothing, [stop](Serving::stop) it. A
    /// missing directory is made, if its parent is there, and goes with the server. While another
    /// server is there, this fails at once: a successor tries again until that one has stopped. A
    /// server that becomes a daemon binds after its last fork.
    ///
    /// ```
    /// # use shmferry::*;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("cache.sock");
    /// let server = Server::bind(path.as_path())?; // or "unix:PATH", or "mq:/NAME"
    /// assert!(matches!(Server::bind(path.as_path()), Err(Error::AddressInUse { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::AddressInUse`] when a living process serves there; [`Error::NameTaken`] when
    /// something else stands there; [`Error::Misuse`] for an address that cannot be right;
    /// [`Error::Os`] when the system refuses it.
    #[cfg(target_os = "linux")]
    pub fn bind<A>(address: A) -> Result<Server>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        Server::builder().bind(address)
    }

    /// Describes a server with other bounds.
    ///
    /// ```
    /// # use shmferry::*;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("cache.sock");
    /// let server = Server::builder().max_clients(16).max_bytes(64 << 20).bind(path.as_path())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(target_os = "linux")]
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// A server of a queue of one's own choice: [`InProcess`](crate::channel::InProcess), say.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let serving = Server::with(queue).serve(2, |request| request.send_bytes(b"hello"))?;
    /// assert_eq!(client.get("key")?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with(queue: impl RequestQueue + 'static) -> Server {
        Server { queue: Arc::new(queue), timeout: DEFAULT_TIMEOUT, hook: Arc::default() }
    }

    /// How long a transfer waits for a client that takes nothing; 30 seconds by default. One that
    /// reads slowly but steadily is never given up.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let server = Server::with(queue).timeout(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn timeout(mut self, timeout: Duration) -> Server {
        self.timeout = timeout;
        self
    }

    /// Has `hook` told of every error: see [`ServeError`]. Only the first hook counts.
    ///
    /// Without a hook, and without the feature `tracing`, errors other than a client's leaving are
    /// written to standard error. The hook is called by the thread that met the error, and holds
    /// that worker up; a panic in it ends nothing else.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let server = Server::with(queue).on_error(|error| match error.fault() {
    ///     Fault::Peer | Fault::Time => {} // a client left
    ///     _ => eprintln!("{error}"),
    /// });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_error(self, hook: impl Fn(&ServeError) + Send + Sync + 'static) -> Server {
        self.hook.set(hook);
        self
    }

    /// Serves requests until it is [stopped](Serving::stop): has a thread call `handler` for each,
    /// `at_once` of them at work at a time. A handler that waits for its client, or within
    /// [`blocking`](crate::workers::blocking), is not counted as at work: slow clients do not keep
    /// others from being served. There are 4,096 threads at most.
    ///
    /// An error of the handler ends its transfer: its client is told
    /// ([`Error::Aborted`]) unless it had its answer already, [`on_error`](Self::on_error) is told
    /// the error, and the server goes on. So does a panic.
    ///
    /// # Errors
    /// [`Error::Os`] when the system refuses the first thread.
    ///
    /// # Panics
    /// If `at_once` is zero.
    pub fn serve<F, E>(self, at_once: usize, handler: F) -> Result<Serving>
    where
        F: Fn(Incoming) -> std::result::Result<(), E> + Send + Sync + 'static,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let Server { queue, timeout, hook } = self;
        // A worker that waits does not keep it alive, so that it gives its address up when its
        // owners have gone; a transfer under way does, and so can end.
        let requests = Arc::downgrade(&queue);
        let next = {
            let hook = Arc::clone(&hook);
            move || loop {
                let queue = requests.upgrade()?;
                match queue.recv(Deadline::NEVER) {
                    Ok(transfer) => return Some((queue, transfer)),
                    Err(Error::Closed | Error::Misuse(_)) => return None,
                    Err(error) => hook.tell(&ServeError::Queue(error)),
                }
                thread::sleep(PAUSE);
            }
        };
        let work = move |(_queue, transfer): (Arc<dyn RequestQueue>, Requested)| {
            let (key, peer) = (transfer.shared_key(), transfer.peer());
            let incoming = Incoming { transfer, timeout, duty: Duty };
            UNANSWERED.set(false);
            let error = match panic::catch_unwind(AssertUnwindSafe(|| handler(incoming))) {
                Ok(Ok(())) if UNANSWERED.take() => ServeError::Unanswered { key, peer },
                Ok(Ok(())) => return,
                Ok(Err(error)) => ServeError::Handler { key, peer, error: error.into() },
                Err(panic) => ServeError::Panic { key, peer, message: message_of(&*panic) },
            };
            hook.tell(&error);
        };
        let workers = WorkerPool::start("shmferry-worker", at_once, next, work);
        let workers = workers.map_err(Error::os("starting a thread"))?;
        Ok(Serving { inner: Arc::new(Inner { queue, workers }) })
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Hook {
    /// Only the first counts.
    pub(crate) fn set(&self, hook: impl Fn(&ServeError) + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(hook));
    }

    pub(crate) fn tell(&self, error: &ServeError) {
        #[cfg(feature = "tracing")]
        match error.fault() {
            Fault::Peer | Fault::Time => tracing::debug!("{error}"),
            _ => tracing::warn!("{error}"),
        }
        match self.0.get() {
            // The application's code: a panic in it, told by the panic hook, ends no worker.
            Some(hook) => _ = panic::catch_unwind(AssertUnwindSafe(|| hook(error))),
            None if cfg!(feature = "tracing") => {}
            None if matches!(error.fault(), Fault::Peer | Fault::Time) => {}
            // With standard error gone, nothing is left to tell.
            None => _ = writeln!(io::stderr(), "shmferry: {error}"),
        }
    }
}

/// What a panic says.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

/// A server at work. Cheap to clone; when the last clone is dropped, it stops, and transfers under
/// way go on.
#[derive(Clone)]
pub struct Serving {
    inner: Arc<Inner>,
}

struct Inner {
    queue: Arc<dyn RequestQueue>,
    workers: WorkerPool,
}

impl Serving {
    /// Stops taking requests, from any thread. Transfers under way go on: [`wait`](Self::wait) for
    /// them. The address is free for a successor from here on, and what was not taken is sent to
    /// it.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// # let serving = Server::with(queue).serve(2, |request| request.send_bytes(b"hello"))?;
    /// serving.stop();
    /// serving.wait();
    /// assert!(client.get("key").is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(&self) {
        self.inner.queue.close();
    }

    /// Waits until it is stopped and its last transfer has ended: for ever, if nobody stops it, and
    /// in a handler, which waits for itself.
    pub fn wait(&self) {
        self.inner.workers.join(Deadline::NEVER);
    }

    /// As [`wait`](Self::wait), up to a deadline; `false` if that came first.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// # let serving = Server::with(queue).serve(2, |request| request.send_bytes(b"hello"))?;
    /// use std::time::Duration;
    ///
    /// assert!(!serving.wait_until(Deadline::after(Duration::from_millis(1))));
    /// serving.stop();
    /// assert!(serving.wait_until(Deadline::after(Duration::from_secs(30))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_until(&self, deadline: Deadline) -> bool {
        self.inner.workers.join(deadline)
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("workers", &self.inner.workers).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// What a [server](Server) cannot return, since nobody called it: told to
/// [`on_error`](Server::on_error).
#[derive(Debug)]
#[non_exhaustive]
pub enum ServeError {
    /// A handler returned an error.
    Handler {
        /// What was asked for.
        key: Arc<[u8]>,
        /// Who asked; `None` within one process.
        peer: Option<Peer>,
        /// What the handler returned.
        error: Box<dyn StdError + Send + Sync>,
    },
    /// A handler returned `Ok`, and had dropped its request unanswered: its client was told
    /// [`Error::Aborted`].
    Unanswered {
        /// What was asked for.
        key: Arc<[u8]>,
        /// Who asked; `None` within one process.
        peer: Option<Peer>,
    },
    /// The client of a [server of tasks](crate::tokio::Server) gave up, or is gone: its handler was
    /// dropped.
    #[cfg(feature = "tokio")]
    Unwanted {
        /// What was asked for.
        key: Arc<[u8]>,
        /// Who asked; `None` within one process.
        peer: Option<Peer>,
    },
    /// A handler panicked.
    Panic {
        /// What was asked for.
        key: Arc<[u8]>,
        /// Who asked; `None` within one process.
        peer: Option<Peer>,
        /// What the panic said.
        message: String,
    },
    /// A client was turned away, or one that broke the protocol was cut off.
    Rejected {
        /// Who it was, if that is known.
        peer: Option<Peer>,
        /// Why.
        reason: String,
    },
    /// No requests could be taken. It is tried again after 100 ms.
    Queue(Error),
}

impl ServeError {
    /// Whose fault it is: [`Fault::Peer`] and [`Fault::Time`] for clients that leave and stall,
    /// which is no reason to wake anybody.
    pub fn fault(&self) -> Fault {
        match self {
            ServeError::Handler { error, .. } => fault_of(&**error),
            ServeError::Panic { .. } | ServeError::Unanswered { .. } => Fault::Ours,
            #[cfg(feature = "tokio")]
            ServeError::Unwanted { .. } => Fault::Peer,
            ServeError::Rejected { .. } => Fault::Outside,
            ServeError::Queue(error) => error.fault(),
        }
    }
}

/// Whose fault a handler's error is: ours, unless it is one of this crate's, or carries one.
fn fault_of(error: &(dyn StdError + 'static)) -> Fault {
    let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let carried = carried.and_then(|carried| carried.downcast_ref::<Error>());
    error.downcast_ref::<Error>().or(carried).map_or(Fault::Ours, Error::fault)
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = |peer: &Option<Peer>| match peer {
            Some(peer) => peer.to_string(),
            None => "a client".to_owned(),
        };
        match self {
            ServeError::Handler { key, error, .. } => {
                write!(f, "serving {} failed: {error}", key.escape_ascii())
            }
            ServeError::Unanswered { key, .. } => {
                write!(f, "serving {} failed: the handler gave no answer", key.escape_ascii())
            }
            #[cfg(feature = "tokio")]
            ServeError::Unwanted { key, .. } => {
                write!(f, "serving {} broke off: its client gave up", key.escape_ascii())
            }
            ServeError::Panic { key, message, .. } => {
                write!(f, "serving {} panicked: {message}", key.escape_ascii())
            }
            ServeError::Rejected { peer, reason } => {
                write!(f, "turned {} away: {reason}", who(peer))
            }
            ServeError::Queue(error) => write!(f, "cannot take requests: {error}"),
        }
    }
}

impl StdError for ServeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            ServeError::Handler { error, .. } => Some(&**error),
            ServeError::Queue(error) => Some(error),
            _ => None,
        }
    }
}

/// A request, and the duty to answer it: with a file, with bytes, bit by bit, or with a refusal.
///
/// Dropped unanswered, it tells its client so ([`Error::Aborted`]).
#[derive(Debug)]
#[must_use = "a request that is dropped is aborted"]
pub struct Incoming {
    transfer: ShmTransfer<Sender, Starting>,
    timeout: Duration,
    duty: Duty,
}

thread_local! {
    /// A request was dropped unanswered on this thread.
    static UNANSWERED: Cell<bool> = const { Cell::new(false) };
}

/// Notes that a request is dropped, unless it is [answered](Incoming::answered).
#[derive(Debug)]
struct Duty;

impl Drop for Duty {
    fn drop(&mut self) {
        // Fails when the thread ends, and then there is no handler that returns.
        let _ = UNANSWERED.try_with(|unanswered| unanswered.set(true));
    }
}

impl Incoming {
    /// The transfer, to be answered.
    fn answered(self) -> ShmTransfer<Sender, Starting> {
        mem::forget(self.duty);
        self.transfer
    }

    /// What is asked for.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let _serving = Server::with(queue).serve(2, |request| {
    ///     let key = request.key().to_vec();
    ///     request.send_bytes(&key)
    /// })?;
    /// assert_eq!(client.get("echo")?.read_all()?, b"echo");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(&self) -> &[u8] {
        self.transfer.key()
    }

    /// Who asks, as the kernel vouches for it; `None` within one process.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let _serving = Server::with(queue).serve(2, |request| match request.peer() {
    ///     Some(peer) if peer.uid == 0 => request.send_bytes(b"for root only"),
    ///     Some(_) => request.refuse(Refusal::NotFound),
    ///     None => request.send_bytes(b"for this very process"),
    /// })?;
    /// assert_eq!(client.get("key")?.read_all()?, b"for this very process");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn peer(&self) -> Option<Peer> {
        self.transfer.peer()
    }

    /// Answers that there are no bytes, and why.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let _serving = Server::with(queue).serve(2, |request| request.refuse(Refusal::other(7)))?;
    /// assert!(matches!(client.get("key"), Err(Error::Refused(Refusal::Other { code: 7, .. }))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Stale`] when the client has given up; [`Error::Misuse`] for metadata longer than
    /// [`METADATA_LIMIT`](crate::protocol::METADATA_LIMIT).
    pub fn refuse(self, why: Refusal) -> Result<()> {
        self.answered().refuse(why)
    }

    /// Answers with a whole file, from its beginning; its own position neither matters nor moves.
    /// Waits for the client as long as that makes progress.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::fs::File;
    ///
    /// let _serving = Server::with(queue).serve(2, |request| {
    ///     request.send_file(&File::open("/proc/self/status")?)
    /// })?;
    /// assert!(client.get("key")?.read_all()?.starts_with(b"Name:"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`accept`](Self::accept) and [`Outgoing::finish`]; [`Error::Source`] when the file
    /// cannot be read, [`Error::SizeMismatch`] when it came out shorter than it was: the client
    /// sees a transfer that broke off.
    #[cfg(unix)]
    pub fn send_file(self, file: &File) -> Result<()> {
        let size = Size::of_file(file).map_err(Error::Source)?;
        self.accept(size)?.send_file(file).map(drop)
    }

    /// Answers with a [loan](crate::loan), or a part of one: no byte is copied, if the client takes
    /// loans. Otherwise its bytes are sent.
    ///
    /// A client that cannot take the loan, for want of descriptors say, or that has just returned
    /// it, asks for the same key again: lend what may be asked for twice.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, loan::Loan, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let loan = Loan::from_bytes(b"hello, world")?;
    /// let _serving = Server::with(queue).serve(2, move |request| match request.key() {
    ///     b"all" => request.lend(&loan),
    ///     _ => request.lend(&loan.slice(..5)?),
    /// })?;
    /// assert_eq!(client.get("part")?.read_all()?, b"hello");
    /// assert!(client.get("all")?.is_lent());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`accept`](Self::accept); if the bytes are sent, those of
    /// [`send_file`](Self::send_file).
    #[cfg(target_os = "linux")]
    pub fn lend(self, loan: &Loan) -> Result<()> {
        self.lend_with(loan, &())
    }

    /// As [`lend`](Self::lend), with metadata.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, loan::Loan, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let loan = Loan::from_bytes(b"hello")?;
    /// let _serving = Server::with(queue).serve(2, move |request| {
    ///     request.lend_with(&loan, &String::from("text/plain"))
    /// })?;
    /// assert_eq!(client.get("key")?.metadata::<String>()?, "text/plain");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for metadata that does not fit.
    #[cfg(target_os = "linux")]
    pub fn lend_with(self, loan: &Loan, metadata: &impl Metadata) -> Result<()> {
        self.lend_or_send(loan, metadata).map(drop)
    }

    /// Whether the client takes loans of some kind.
    #[cfg(all(target_os = "linux", feature = "loan-store"))]
    pub(crate) fn takes_loans(&self) -> bool {
        self.transfer.takes_loans()
    }

    /// As [`lend_with`](Self::lend_with); whether it was lent, or its bytes were sent.
    #[cfg(target_os = "linux")]
    pub(crate) fn lend_or_send(self, loan: &Loan, metadata: &impl Metadata) -> Result<bool> {
        let timeout = self.timeout;
        match self.answered().try_lend(loan, metadata)? {
            Lending::Lent => Ok(true),
            Lending::Send(mut sending) => {
                sending.set_timeout(timeout);
                sending.send_loan(loan)?;
                Ok(false)
            }
        }
    }

    /// Answers with these bytes.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let _serving = Server::with(queue).serve(2, |request| request.send_bytes(b"hello"))?;
    /// assert_eq!(client.get("key")?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`accept`](Self::accept) and [`Outgoing::finish`].
    pub fn send_bytes(self, bytes: &[u8]) -> Result<()> {
        let mut outgoing = self.accept(bytes.len() as u64)?;
        io::Write::write_all(&mut outgoing, bytes)?;
        outgoing.finish()
    }

    /// Accepts the request, with so many bytes to be written; [`Size::Unknown`] for as many as
    /// there will be.
    ///
    /// Nothing is sent by this alone, not even the size: that goes with the first bytes, when a
    /// slot is full (256 KiB, unless the client says otherwise), or at `flush`, or at the end. A
    /// source that is slower than the client's timeout has to flush, or the client takes it for
    /// late.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::io::Write;
    ///
    /// let _serving = Server::with(queue).serve(2, |request| -> Result<()> {
    ///     let mut outgoing = request.accept(Size::Unknown)?;
    ///     for number in 0..3 {
    ///         writeln!(outgoing, "line {number}")?;
    ///     }
    ///     outgoing.finish()
    /// })?;
    /// assert_eq!(client.get("key")?.read_all()?, b"line 0\nline 1\nline 2\n");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Stale`] when the client has given up: nothing was sent.
    pub fn accept(self, size: impl Into<Size>) -> Result<Outgoing> {
        self.accept_with(size, &())
    }

    /// As [`accept`](Self::accept), with metadata beside the size.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::io::Write;
    ///
    /// let _serving = Server::with(queue).serve(2, |request| -> Result<()> {
    ///     let mut outgoing = request.accept_with(2, &String::from("text/plain"))?;
    ///     outgoing.write_all(b"ok")?;
    ///     outgoing.finish()
    /// })?;
    /// let body = client.get("key")?;
    /// assert_eq!(body.metadata::<String>()?, "text/plain");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for metadata longer than
    /// [`METADATA_LIMIT`](crate::protocol::METADATA_LIMIT).
    pub fn accept_with(self, size: impl Into<Size>, metadata: &impl Metadata) -> Result<Outgoing> {
        let timeout = self.timeout;
        let mut transfer = self.answered().accept_with(size, metadata)?;
        transfer.set_timeout(timeout);
        Ok(Outgoing { transfer })
    }

    /// The transfer beneath.
    pub fn into_transfer(self) -> ShmTransfer<Sender, Starting> {
        self.answered()
    }
}

/// An answer under way: write to it (`io::Write`), and [finish](Self::finish) it.
///
/// What is written is sent when a slot is full, at `flush`, and at the end. Flush what the client
/// is to see at once; the size and the metadata, too, go with the first bytes that are sent.
///
/// Dropped before that, it tells its client that the transfer broke off. An answer of known size
/// has ended with its last byte.
#[derive(Debug)]
#[must_use = "an answer that is dropped unfinished breaks off"]
pub struct Outgoing {
    transfer: ShmTransfer<Sender, Sending>,
}

impl Outgoing {
    /// How many bytes were announced.
    pub fn size(&self) -> Size {
        self.transfer.size()
    }

    /// Bytes handed to the client so far, without those that wait for a flush.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::io::Write;
    ///
    /// let _serving = Server::with(queue).serve(2, |request| -> Result<()> {
    ///     let mut outgoing = request.accept(5)?;
    ///     assert_eq!((outgoing.size(), outgoing.sent()), (Size::Known(5), 0));
    ///     outgoing.write_all(b"hello")?;
    ///     assert_eq!(outgoing.sent(), 5);
    ///     outgoing.finish()
    /// })?;
    /// assert_eq!(client.get("key")?.read_all()?, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sent(&self) -> u64 {
        self.transfer.sent()
    }

    /// Sends a file from its beginning, as many bytes as are still to come of the announced size,
    /// or all of it when the size is unknown, and ends the answer; returns the bytes sent in all.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// use std::fs::File;
    ///
    /// let _serving = Server::with(queue).serve(2, |request| -> Result<()> {
    ///     let file = File::open("/proc/self/status")?;
    ///     let sent = request.accept(Size::of_file(&file)?)?.send_file(&file)?;
    ///     assert!(sent > 0);
    ///     Ok(())
    /// })?;
    /// assert!(client.get("key")?.read_all()?.starts_with(b"Name:"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Incoming::send_file`].
    #[cfg(unix)]
    pub fn send_file(self, file: impl AsFd) -> Result<u64> {
        self.transfer.send_file(file)
    }

    /// Waits for room for the next chunk, to be filled where it lies.
    ///
    /// ```
    /// # use shmferry::{channel::InProcess, *};
    /// # let queue = InProcess::bounded(8);
    /// # let client = Client::builder().segments(2).in_process(&queue)?;
    /// let _serving = Server::with(queue).serve(2, |request| -> Result<()> {
    ///     let mut outgoing = request.accept(Size::Unknown)?;
    ///     outgoing.next_slot(Deadline::NEVER)?.send(b"one chunk")?;
    ///     outgoing.finish()
    /// })?;
    /// assert_eq!(client.get("key")?.read_all()?, b"one chunk");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Timeout`], after which the call may be made again; [`Error::Cancelled`] or
    /// [`Error::Disconnected`] when nobody wants the bytes any more.
    pub fn next_slot(&mut self, deadline: Deadline) -> Result<Slot<'_>> {
        self.transfer.next_slot(deadline)
    }

    /// Hands over what was written, and ends the answer.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when fewer bytes were written than announced, which the client sees
    /// as a transfer that broke off; [`Error::Cancelled`] or [`Error::Disconnected`] when the
    /// client has gone; [`Error::Timeout`] when it takes nothing.
    pub fn finish(self) -> Result<()> {
        self.transfer.finish().map(drop)
    }

    /// The transfer beneath.
    pub fn into_transfer(self) -> ShmTransfer<Sender, Sending> {
        self.transfer
    }
}

impl io::Write for Outgoing {
    /// Waits for room as long as the client makes progress.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.transfer.write(bytes)
    }

    /// Hands over what was written so far.
    fn flush(&mut self) -> io::Result<()> {
        self.transfer.flush()
    }
}
