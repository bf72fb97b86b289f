//! What can be wrong with what a peer wrote or handed over: told to people, matched by tests.

use crate::id::SegmentId;

/// How a peer broke the protocol (rule P3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeerFault {
    /// A chunk length beyond the slot.
    #[error("a chunk of {len} bytes in a slot of {limit}")]
    ChunkTooLong {
        /// The length found.
        len: u32,
        /// The slot's length.
        limit: u32,
    },
    /// An empty chunk that is not the last.
    #[error("an empty chunk that is not the last")]
    EmptyChunk,
    /// More bytes than the announced size.
    #[error("{received} bytes of an announced {announced}")]
    TooLong {
        /// The announced size, in bytes.
        announced: u64,
        /// Bytes received, with the chunk at fault.
        received: u64,
    },
    /// The end came before the announced size, or was not marked at it.
    #[error("the end at {received} bytes of an announced {announced}")]
    WrongEnd {
        /// The announced size, in bytes.
        announced: u64,
        /// Bytes received, with the chunk at fault.
        received: u64,
    },
    /// A reply whose status is none that a sender can give.
    #[error("a reply of unknown status {0}")]
    UnknownStatus(u32),
    /// Metadata longer than the header has room for.
    #[error("metadata of {len} bytes where {limit} fit")]
    MetadataTooLong {
        /// The length found.
        len: u32,
        /// The most that fits.
        limit: u32,
    },
    /// Metadata that does not read as the type asked for.
    #[error("metadata that does not read as {0}")]
    MetadataType(&'static str),
    /// The turn word changed in a way that no rule allows.
    #[error("an impossible phase in the turn word: {0:#x}")]
    ImpossibleTurn(u64),
    /// A semaphore was poisoned without a cause.
    #[error("a semaphore poisoned without a cause")]
    BaselessPoison,
    /// A queue message that does not decode.
    #[error("a malformed message of {len} bytes")]
    MalformedMessage {
        /// The message's length, in bytes.
        len: usize,
    },
    /// A request for a segment that was never handed over.
    #[error("a request for segment {0}, which was never handed over")]
    UnknownSegment(u32),
    /// A ring of requests that claims more than it can hold.
    #[error("a ring with {posted} requests put in and {taken} taken out")]
    ImpossibleRing {
        /// Requests that the client says it has put in so far.
        posted: u64,
        /// Requests taken out so far.
        taken: u64,
    },
    /// A segment that was handed over twice.
    #[error("segment {0} handed over twice")]
    RepeatedSegment(u32),
    /// Memory that was lent, and is not sealed memory as rule N2 asks.
    #[cfg(target_os = "linux")]
    #[error("lent memory that cannot be trusted: {0}")]
    UnusableMemory(LayoutMismatch),
    /// A file that was lent, and is not one as rule N8 asks.
    #[cfg(target_os = "linux")]
    #[error("a lent file that cannot be used: it is {0}")]
    UnusableFile(&'static str),
    /// A loan of a kind that this side has not asked for.
    #[error("a loan of unknown kind {0}")]
    UnknownLoanKind(u32),
    /// A loan that was introduced twice.
    #[error("loan {0} introduced twice")]
    RepeatedLoan(u64),
    /// A loan beyond the limits that this side has set.
    #[error("loan {0} beyond the limits of what may be lent")]
    LentTooMuch(u64),
    /// An answer from a loan that was never introduced, to a request that takes none.
    #[error("an answer from loan {0}, which was not introduced")]
    UnknownLoan(u64),
    /// An answer from bytes that the loan does not have.
    #[error("an answer of {len} bytes from {start} on, from a loan of {whole} bytes")]
    BeyondLoan {
        /// Where the answer begins.
        start: u64,
        /// The answer's bytes.
        len: u64,
        /// The loan's bytes.
        whole: u64,
    },
    /// A lent answer of unknown size.
    #[error("a lent answer of unknown size")]
    LoanWithoutSize,
    /// A loan returned that the client does not have.
    #[error("loan {0} returned, which the client did not have")]
    ReturnedUnlent(u64),
}

/// Why a segment cannot be used (rules L1 and L2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutMismatch {
    /// The memory does not begin with a segment header.
    #[error("it does not begin with a segment header")]
    NotASegment,
    /// The two processes were built with different layouts.
    #[error("its layout version is {theirs}, ours is {ours}")]
    Version {
        /// The version found.
        theirs: u32,
        /// The version that this build speaks.
        ours: u32,
    },
    /// Fewer or more bytes than the geometry takes.
    #[error("it has {found} bytes where its geometry takes {expected}")]
    Size {
        /// Bytes found.
        found: u64,
        /// Bytes that the geometry takes.
        expected: u64,
    },
    /// A geometry outside the limits.
    #[error("a geometry of {slot_count} slots of {slot_len} bytes is outside the limits")]
    Geometry {
        /// Slots claimed.
        slot_count: u32,
        /// Bytes a slot claimed.
        slot_len: u32,
    },
    /// The header names another segment than the request.
    #[error("it says that it is {found}, not {expected}")]
    Identity {
        /// What the header says.
        found: SegmentId,
        /// What was announced.
        expected: SegmentId,
    },
    /// The descriptor could still be shrunk, so that touching it could kill us (SIGBUS).
    #[error("its descriptor is not sealed as it must be")]
    Unsealed,
    /// The descriptor is not one of ordinary shared memory.
    #[error("its descriptor is not ordinary shared memory")]
    NotMemory,
    /// The memory belongs to another user, who could resize it.
    #[cfg(feature = "posix-mq")]
    #[error("it belongs to user {0}")]
    Foreign(u32),
    /// The memory has holes, which would be filled at our expense.
    #[error("only {present} of its {expected} bytes are allocated")]
    Sparse {
        /// Bytes allocated.
        present: u64,
        /// Bytes that the geometry takes.
        expected: u64,
    },
}
