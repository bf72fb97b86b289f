//! Loans: content that a server hands to its clients without a copy (rules N).
//!
//! Bytes that are asked for again and again need no copy each time. The server keeps them in sealed
//! memory, or as an open file: a [`Loan`]. A handler answers with [`Incoming::lend`]. A client's
//! first answer from a loan brings its descriptor; later ones are a number, an offset and a length.
//! The client maps sealed memory once and keeps the mapping. [`Body::into_bytes`] gives it to the
//! user as a [`Lent`]: a `&[u8]` that never changes and never faults, whatever becomes of the
//! server.
//!
//! Where a loan is not possible (a POSIX message queue, a client that takes none, an account that
//! is full, no descriptors), the same bytes go through the segment, and nobody has to care.
//!
//! ```
//! use shmferry::loan::Loan;
//! use shmferry::{channel::InProcess, Client, Refusal, Server};
//!
//! let table = Loan::from_bytes(&[7; 1 << 20])?;
//! let queue = InProcess::bounded(8); // or an address, for another process
//! let serving = Server::with(queue.clone()).serve(2, move |request| match request.key() {
//!     b"/table" => request.lend(&table),
//!     _ => request.refuse(Refusal::NotFound),
//! })?;
//! let client = Client::builder().segments(2).in_process(&queue)?;
//!
//! let bytes = client.get("/table")?.into_bytes()?; // no copy
//! drop((client, serving));
//! assert!(bytes.iter().all(|byte| *byte == 7)); // still there
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it costs, and whom
//! Making a loan costs one copy and the memory, which is charged to the process that makes it, and
//! stays as long as anybody holds it: the server's [`Loan`], a client's kept mapping, a user's
//! [`Lent`]. Nothing can be revoked: a file that changes becomes a new loan, and who holds the old
//! one has a snapshot. A server bounds what each client has
//! ([`ServerBuilder::lend_at_most`](crate::ServerBuilder::lend_at_most)), and a client what it
//! keeps ([`ClientBuilder::keep_loans`](crate::ClientBuilder::keep_loans)). A client that claims to
//! have returned a loan can still hold the memory, as anyone who was ever given it.
//!
//! [`Incoming::lend`]: crate::Incoming::lend
//! [`Body::into_bytes`]: crate::Body::into_bytes

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::{Bound, RangeBounds};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::{Misuse, PeerFault, Result};

mod account;
mod body;
mod content;
mod kept;
mod lent;
mod memory;
mod seal;
#[cfg(feature = "loan-store")]
mod store;
#[cfg(all(test, not(loom)))]
mod tests;

pub(crate) use account::{Account, Standing};
pub use body::LentBody;
pub(crate) use content::{Content, FILE, SEALED};
pub(crate) use kept::KeptLoans;
pub use lent::Lent;
#[cfg(feature = "loan-store")]
pub use store::{LoanStats, LoanStore};

/// How much may be lent to a client, or kept by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoanLimits {
    /// Bytes of sealed memory.
    pub(crate) bytes: u64,
    /// Loans of either kind: each costs a client a descriptor.
    pub(crate) count: u32,
}

impl LoanLimits {
    /// No loans.
    pub(crate) const NONE: LoanLimits = LoanLimits { bytes: 0, count: 0 };

    /// What both allow.
    pub(crate) fn and(self, other: LoanLimits) -> LoanLimits {
        LoanLimits { bytes: self.bytes.min(other.bytes), count: self.count.min(other.count) }
    }
}

/// Content that a server can lend any number of times: sealed memory, or an open file.
///
/// Cheap to clone; [`slice`](Self::slice) gives a part of it. The memory is freed when the last
/// clone is dropped, and every client has let go of it.
#[derive(Clone)]
pub struct Loan {
    /// Names it to clients (rule N3).
    id: u64,
    content: Content,
    start: u64,
    len: u64,
}

/// The next loan's number. Never used again in this process, whose clients know loans by it.
static NEXT: AtomicU64 = AtomicU64::new(1);

impl Loan {
    /// A copy of these bytes in sealed memory.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when the system has less memory than that;
    /// [`Error::Os`](crate::Error::Os) when it refuses for another reason: no descriptors, say.
    pub fn from_bytes(bytes: &[u8]) -> Result<Loan> {
        Ok(Loan::new(seal::copy(bytes, bytes.len() as u64)?))
    }

    /// All that a reader gives, in sealed memory. Blocks as the reader does.
    ///
    /// # Errors
    /// Those of [`from_bytes`](Self::from_bytes), and [`Error::Source`](crate::Error::Source) when
    /// the reader fails.
    pub fn from_reader(reader: impl Read) -> Result<Loan> {
        Ok(Loan::new(seal::copy(reader, 0)?))
    }

    /// A copy of a file's content in sealed memory, from its beginning; the file position is
    /// neither used nor moved. A file that changes meanwhile is copied as it is read.
    ///
    /// # Errors
    /// Those of [`from_reader`](Self::from_reader).
    pub fn from_file(file: &File) -> Result<Loan> {
        Ok(Loan::new(seal::copy_file(file)?))
    }

    /// The file itself, as long as it is now. A client reads it by `pread` and `sendfile`; it is
    /// never mapped. Costs no memory and no copy by the server, but gives no snapshot: a client
    /// sees later changes, and a file that is cut short meanwhile is an error there.
    ///
    /// Clients get descriptors that are opened anew for reading: what they do to them harms nobody
    /// else. This one must have been opened for reading only.
    ///
    /// # Errors
    /// [`Misuse::NotLendable`] for a descriptor that can write, for anything but a regular file,
    /// and for a file of a FUSE file system, whose reads can block for ever;
    /// [`Error::Source`](crate::Error::Source) when it cannot be examined.
    pub fn file(file: File) -> Result<Loan> {
        Ok(Loan::new(Content::of_file(file)?))
    }

    /// Lends on what was lent, without a copy, under a number of one's own: so that a relay can
    /// hand its server's loans to its own clients. `None` for bytes that were gathered into memory.
    pub fn from_lent(lent: &Lent) -> Option<Loan> {
        let (content, range) = lent.content()?;
        let (start, len) = (range.start as u64, range.len() as u64);
        Some(Loan { start, len, ..Loan::new(content) })
    }

    fn new(content: Content) -> Loan {
        let len = content.len();
        Loan { id: NEXT.fetch_add(1, Relaxed), content, start: 0, len }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it, which counts as the same loan: a client that has one part has them all.
    ///
    /// # Errors
    /// [`Misuse::LoanRange`] when the range is not within it.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<Loan> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => self.len,
        };
        if start > end || end > self.len {
            return Err(Misuse::LoanRange { start, end, len: self.len }.into());
        }
        Ok(Loan { start: self.start + start, len: end - start, ..self.clone() })
    }

    /// Its number.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Where in the whole loan this part begins, in bytes.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }
}

impl AsFd for Loan {
    /// The descriptor of the whole loan, of which this may be a part.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.content.as_fd()
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loan").field("id", &self.id).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Says whether a loan can be announced to a client: introduces it first, if need be (rule N3).
pub(crate) trait Lender: Send + Sync {
    fn introduce(&self, loan: &Loan) -> Introduced;
}

/// Whether a client can be told a loan's number.
pub(crate) enum Introduced {
    /// It has the descriptor.
    Yes,
    /// It has not. If it returned so many bytes of loans, it could have it next time; zero if that
    /// would not help.
    No { wanted: u64 },
}

/// Finds what a server has lent over one connection.
pub(crate) trait Borrower: Send + Sync {
    /// The loan of this number; `None` if it was returned, or could not be kept.
    fn borrow(&self, id: u64) -> Result<Option<Content>> {
        Err(PeerFault::UnknownLoan(id).into())
    }

    /// Returns loans of so many bytes, those unused for longest.
    fn make_room(&self, _bytes: u64) {}
}
