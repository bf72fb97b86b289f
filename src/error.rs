//! `Error` and its parts: what went wrong, and whose fault it was.

use std::fmt;
use std::io;

use crate::protocol::Refusal;

mod fault;

pub(crate) use fault::{LayoutMismatch, PeerFault};

/// The result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, told apart by cause.
///
/// [`Error::fault`] sums a value up as one of five culprits. A timeout is never reported for a dead
/// peer, nor the reverse: [`Timeout`](Error::Timeout) means that the peer still seemed alive when
/// the deadline passed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The deadline passed first.
    #[error("timed out waiting for {0}")]
    Timeout(Awaited),

    /// The connection to the peer hung up: its process ended, or it closed the connection. What had
    /// been filled before that was still delivered.
    #[error("the peer is gone")]
    Disconnected,

    /// The server answered that it has no bytes for the key, and why.
    #[error("refused: {0}")]
    Refused(Refusal),

    /// The server gave the transfer up: its handler returned an error, panicked, or dropped it; its
    /// source failed; or this side took no byte for as long as the server's timeout.
    #[error("the sender gave the transfer up")]
    Aborted,

    /// The receiver no longer wants the bytes: it was dropped before the end.
    #[error("the receiver cancelled the transfer")]
    Cancelled,

    /// The request is out of date: its receiver withdrew it before anyone accepted.
    #[error("the request is out of date: its receiver has withdrawn it")]
    Stale,

    /// The answer was lent, and this side had returned that loan a moment before. Only
    /// [`ShmTransfer::reply`](crate::protocol::ShmTransfer::reply) says so: a client asks again by
    /// itself.
    #[error("the loan that answers was just returned: ask again")]
    LoanReturned,

    /// This side closed the queue, or dropped the other end of it.
    #[error("the request queue is closed")]
    Closed,

    /// The peer broke the protocol. Nothing it wrote was used.
    #[error("the peer broke the protocol: {0}")]
    Peer(#[source] ProtocolError),

    /// The segment offered is not one that this build can use.
    #[error("unusable segment: {0}")]
    Layout(#[source] UnusableSegment),

    /// The server turned this process away; or, where a server reports it, it turned a client away.
    #[error("turned away: {0}")]
    Rejected(#[from] Rejection),

    /// The call cannot be right, whatever the peer does.
    #[error(transparent)]
    Misuse(#[from] Misuse),

    /// The source came out shorter or longer than the size that had been announced.
    #[error("{announced} bytes were announced, but the source holds {found}")]
    SizeMismatch {
        /// Bytes announced with the status.
        announced: u64,
        /// Bytes that the source turned out to hold, as far as was read.
        found: u64,
    },

    /// There is not enough memory for a pool of this size. Nothing was kept.
    #[error("no memory for a pool of {asked} bytes: {source}")]
    Memory {
        /// Bytes that all segments of the pool take, headers included.
        asked: u64,
        /// What the system answered.
        source: io::Error,
    },

    /// Another living process serves this address.
    #[error("{address} is being served by process {pid}")]
    AddressInUse {
        /// The address asked for.
        address: String,
        /// The process that holds it.
        pid: u32,
    },

    /// Something else stands at a name that this process needs for itself.
    #[error("{path:?} is taken by {kind} of user {uid}")]
    NameTaken {
        /// The name, as a path.
        path: std::path::PathBuf,
        /// What stands there.
        kind: &'static str,
        /// The user whom it belongs to.
        uid: u32,
    },

    /// What the bytes were being copied to failed: a full disk, a client that left.
    #[error("the sink failed: {0}")]
    Sink(#[source] io::Error),

    /// What the bytes were being copied from failed.
    #[error("the source failed: {0}")]
    Source(#[source] io::Error),

    /// Input or output of the application's own failed, within a handler, say: an
    /// [`io::Error`] that `?` has converted.
    #[error(transparent)]
    Io(io::Error),

    /// A system call failed.
    #[error("{call}: {source}")]
    Os {
        /// What was being attempted.
        call: &'static str,
        /// What the system answered.
        source: io::Error,
    },
}

/// Whose fault an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// This process: a call that cannot be right, or something it decided itself.
    Ours,
    /// The process at the other end: it died, left, refused, cancelled, or misbehaved.
    Peer,
    /// What the bytes come from or go to: the file, the socket, the client behind it. Or what
    /// stands at a name that is needed.
    Outside,
    /// The operating system.
    System,
    /// Nobody in particular: time ran out.
    Time,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Ours => "this process",
            Fault::Peer => "the other process",
            Fault::Outside => "what the bytes come from or go to",
            Fault::System => "the operating system",
            Fault::Time => "time",
        })
    }
}

impl Error {
    /// Whose fault this is.
    pub fn fault(&self) -> Fault {
        match self {
            Error::Timeout(Awaited::Sink) => Fault::Outside,
            Error::Timeout(_) => Fault::Time,
            Error::Disconnected
            | Error::Refused(_)
            | Error::Aborted
            | Error::Cancelled
            | Error::Stale
            | Error::Peer(_)
            | Error::Layout(_)
            | Error::Rejected(_) => Fault::Peer,
            Error::Closed | Error::LoanReturned | Error::Misuse(_) | Error::AddressInUse { .. } => {
                Fault::Ours
            }
            Error::SizeMismatch { .. }
            | Error::Sink(_)
            | Error::Source(_)
            | Error::Io(_)
            | Error::NameTaken { .. } => Fault::Outside,
            Error::Memory { .. } | Error::Os { .. } => Fault::System,
        }
    }

    /// Whether asking again, for the whole, may succeed without a change of anything on this side:
    /// the server was late, ended, gave up, or had no room. What had come of a body before is no
    /// part of the second answer. A server may have done by then what it was asked for: ask again
    /// only for what may be done twice.
    ///
    /// ```
    /// use shmferry::{Error, Refusal};
    ///
    /// assert!(Error::Disconnected.is_transient());
    /// assert!(!Error::Refused(Refusal::NotFound).is_transient());
    /// ```
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Error::Timeout(_)
                | Error::Disconnected
                | Error::Aborted
                | Error::LoanReturned
                | Error::Refused(Refusal::Leaving)
                | Error::Rejected(Rejection::TooManyClients(_) | Rejection::Resources)
        )
    }

    pub(crate) fn os<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Os { call, source: source.into() }
    }
}

impl From<Error> for io::Error {
    /// Keeps the error as the source, under the kind that callers of `io::Read` look for. The way
    /// back, by `?` or `into`, gives the same error.
    fn from(error: Error) -> io::Error {
        if let Error::Io(error) = error {
            return error;
        }
        let kind = match &error {
            Error::Timeout(_) => io::ErrorKind::TimedOut,
            Error::Disconnected => io::ErrorKind::ConnectionReset,
            Error::Aborted | Error::Cancelled | Error::Stale | Error::LoanReturned => {
                io::ErrorKind::ConnectionAborted
            }
            Error::Peer(_) | Error::Layout(_) => io::ErrorKind::InvalidData,
            Error::Misuse(_) => io::ErrorKind::InvalidInput,
            Error::Refused(Refusal::NotFound) => io::ErrorKind::NotFound,
            Error::Sink(source)
            | Error::Source(source)
            | Error::Memory { source, .. }
            | Error::Os { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl From<io::Error> for Error {
    /// The error of this crate that it carries, or [`Error::Io`].
    fn from(error: io::Error) -> Error {
        error.downcast::<Error>().unwrap_or_else(Error::Io)
    }
}

/// What a wait was for when its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Awaited {
    /// A segment of the pool to become free.
    Lease,
    /// A sender to accept the request and answer.
    Reply,
    /// The sender to fill a slot.
    FilledSlot,
    /// The receiver to free a slot.
    FreeSlot,
    /// A request to arrive.
    Request,
    /// Room in the queue.
    QueueRoom,
    /// A server to listen at the address.
    Server,
    /// The sink to take bytes.
    Sink,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Awaited::Lease => "a free segment",
            Awaited::Reply => "the sender's reply",
            Awaited::FilledSlot => "the sender to fill a slot",
            Awaited::FreeSlot => "the receiver to free a slot",
            Awaited::Request => "a request",
            Awaited::QueueRoom => "room in the request queue",
            Awaited::Server => "a server at the address",
            Awaited::Sink => "the sink to take bytes",
        })
    }
}

/// How a peer broke the protocol (rule P3): for people to read, by `Display`.
///
/// Opaque, since there is nothing that a program could do about one breach and not about another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct ProtocolError(pub(crate) PeerFault);

/// Why a segment cannot be used (rules L1 and L2): for people to read, by `Display`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct UnusableSegment(pub(crate) LayoutMismatch);

impl From<PeerFault> for Error {
    fn from(fault: PeerFault) -> Error {
        Error::Peer(ProtocolError(fault))
    }
}

impl From<LayoutMismatch> for Error {
    fn from(mismatch: LayoutMismatch) -> Error {
        Error::Layout(UnusableSegment(mismatch))
    }
}

/// Why a server turned a client away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// It speaks another version.
    #[error("the other side speaks version {theirs}, we speak {ours}")]
    Version {
        /// The server's version.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// This user is not welcome.
    #[error("user {0} may not connect")]
    User(u32),
    /// The pool has more segments than the server takes from one client.
    #[error("a pool of more than {0} segments")]
    TooManySegments(u32),
    /// The pool has more memory than the server maps for one client.
    #[error("a pool of more than {0} bytes")]
    TooManyBytes(u64),
    /// The server serves as many clients as it may.
    #[error("it already serves {0} clients")]
    TooManyClients(u32),
    /// The server says that this process broke the protocol.
    #[error("it says that we broke the protocol")]
    Protocol,
    /// The server has run out of memory or descriptors.
    #[error("it has run out of memory or descriptors")]
    Resources,
}

/// A call that cannot be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// A builder's number is outside its limits.
    #[error("{what} is {given}; it must be from {least} to {most}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// What was given.
        given: u64,
        /// The least that works.
        least: u64,
        /// The most that works.
        most: u64,
    },
    /// A key longer than a request carries.
    #[error("a key of {len} bytes; a request carries at most {limit}")]
    KeyTooLong {
        /// The key's length, in bytes.
        len: usize,
        /// The most that fits.
        limit: usize,
    },
    /// Metadata longer than an announcement carries.
    #[error("metadata of {len} bytes; an announcement carries at most {limit}")]
    MetadataTooLong {
        /// The encoded length, in bytes.
        len: usize,
        /// The most that fits.
        limit: usize,
    },
    /// More bytes than a slot holds were sent as one chunk.
    #[error("a chunk of {len} bytes; the slot holds {limit}")]
    ChunkTooLong {
        /// The chunk's length, in bytes.
        len: usize,
        /// The slot's capacity, in bytes.
        limit: usize,
    },
    /// The range to send is not as long as what is still to come of the announced size.
    #[error("a range of {range} bytes where {expected} are still to come")]
    RangeLength {
        /// The range's length, in bytes.
        range: u64,
        /// What is still to come, in bytes.
        expected: u64,
    },
    /// A part of a loan that the loan does not have.
    #[error("bytes {start} to {end} of a loan of {len}")]
    LoanRange {
        /// The first byte.
        start: u64,
        /// The byte behind the last.
        end: u64,
        /// The loan's length, in bytes.
        len: u64,
    },
    /// A descriptor that cannot be lent as a file: what it is.
    #[error("a file to lend must be a regular one, open for reading only; this is {0}")]
    NotLendable(&'static str),
    /// The largest `u64` stands for "unknown" and cannot be a size.
    #[error("no transfer can be u64::MAX bytes long")]
    SizeReserved,
    /// The transfer has failed or ended already; there is nothing more to do on it.
    #[error("the transfer is over")]
    TransferOver,
    /// The request was dropped before it was sent, so that no reply can come.
    #[error("the request was dropped before it was sent")]
    NeverSent,
    /// The request's segment is not of the pool that this queue was connected for.
    #[error("the request's segment is of another pool than the queue was connected for")]
    ForeignPool,
    /// The pool has replaced so many segments that their numbers, 32 bits of them, are used up.
    #[error("the pool has used up its 2^32 segment numbers: make a new pool")]
    PoolWornOut,
    /// Something that belongs to another process: the one that this process was forked from.
    #[error(
        "it belongs to process {made_by}, which this process was forked from: make it anew here \
         (a server that becomes a daemon binds after its last fork)"
    )]
    Forked {
        /// The process that made it.
        made_by: u32,
    },
    /// Text that is no address.
    #[error("{0:?} is no address; an address is unix:PATH or mq:/NAME")]
    Address(String),
    /// An address of a POSIX message queue in a build without them.
    #[error("this build has no POSIX message queues: it lacks the feature `posix-mq`")]
    NoPosixMq,
    /// A message queue, asked for by a task.
    #[error(
        "tasks cannot wait over a message queue, which tells nobody of what has come; use \
         `unix:PATH`, or the blocking `Client` and `Server` on a thread"
    )]
    NoTasksOverQueues,
    /// A name that no POSIX message queue can have.
    #[error("{0:?} names no message queue; a name is a slash and up to 200 bytes without another")]
    QueueName(String),
    /// A socket path that the system cannot take.
    #[error("the socket path {path:?} is {len} bytes long; the system takes at most {limit}")]
    PathTooLong {
        /// The path.
        path: std::path::PathBuf,
        /// Its length, in bytes.
        len: usize,
        /// The most that fits.
        limit: usize,
    },
    /// The directory for the default socket belongs to someone else, or others may write to it.
    #[error("{0:?} is not a directory that only this user can write to")]
    UnsafeDirectory(std::path::PathBuf),
}
