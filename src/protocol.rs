//! The transfer: its sides, its states, and what an answer says (rules P).

use std::any::type_name;
use std::fmt;
use std::time::Duration;
#[cfg(unix)]
use std::{fs::File, io};

use crate::error::{PeerFault, Result};
use crate::segment::MAX_METADATA;

mod metadata;
#[cfg(all(test, loom))]
pub(crate) mod model;
mod offer;
mod receiver;
mod sender;
#[cfg(unix)]
mod sink;
#[cfg(target_os = "linux")]
mod spool;
#[cfg(all(test, not(loom)))]
mod tests;
mod wait;

pub use metadata::Metadata;
pub(crate) use offer::{Keep, Offer};
pub(crate) use receiver::Answer;
pub use receiver::{Chunk, Offered, Receiver, Receiving, Reply};
#[cfg(target_os = "linux")]
pub(crate) use sender::Lending;
pub(crate) use sender::Loans;
#[cfg(any(feature = "tokio", loom))]
pub(crate) use sender::Wanted;
pub use sender::{Sender, Sending, Slot, Starting};
#[cfg(target_os = "linux")]
pub(crate) use sink::{SinkWait, write_some};
#[cfg(feature = "tokio")]
pub(crate) use wait::Awaiting;
#[cfg(target_os = "linux")]
pub use {sink::send_all, spool::Spool};

/// One transfer through one segment, seen from one side, in one state.
///
/// Each state is a type of its own, and a step from one to the next consumes it, so that steps out
/// of order do not compile.
///
/// | side | state | what can be done | leads to |
/// | --- | --- | --- | --- |
/// | [`Receiver`] | [`Offered`] | [`reply`](ShmTransfer::reply) | `Receiving`, or a [`Refusal`] |
/// | [`Receiver`] | [`Receiving`] | [`next_chunk`], [`copy_to`], `io::Read` | the end |
/// | [`Sender`] | [`Starting`] | [`accept`], [`refuse`] | `Sending`, or the end |
/// | [`Sender`] | [`Sending`] | [`next_slot`], [`send_file`], `io::Write`, [`finish`] | the end |
///
/// [`next_chunk`]: ShmTransfer::next_chunk
/// [`copy_to`]: ShmTransfer::copy_to
/// [`accept`]: ShmTransfer::accept
/// [`refuse`]: ShmTransfer::refuse
/// [`next_slot`]: ShmTransfer::next_slot
/// [`send_file`]: ShmTransfer::send_file
/// [`finish`]: ShmTransfer::finish
///
/// Dropping is safe at every point (rule P5). A receiver that is dropped early cancels, and the
/// sender's next step fails with [`Error::Cancelled`](crate::Error::Cancelled). A sender that is
/// dropped early, a panic included, aborts: the receiver is given what was filled before, and then
/// [`Error::Aborted`](crate::Error::Aborted).
///
/// # What does not compile
/// Asking for a chunk before there is a reply:
/// ```compile_fail,E0599
/// # use shmferry::{protocol::*, *};
/// fn early(mut transfer: ShmTransfer<Receiver, Offered>) {
///     let _ = transfer.next_chunk(Deadline::NEVER);
/// }
/// ```
/// Asking for the next chunk while one is borrowed:
/// ```compile_fail,E0499
/// # use shmferry::{protocol::*, *};
/// fn two_at_once(mut body: ShmTransfer<Receiver, Receiving>) -> Result<()> {
///     let first = body.next_chunk(Deadline::NEVER)?;
///     let second = body.next_chunk(Deadline::NEVER)?;
///     drop((first, second));
///     Ok(())
/// }
/// ```
/// Sending before accepting, and accepting twice:
/// ```compile_fail,E0599
/// # use shmferry::{protocol::*, *};
/// fn unannounced(mut transfer: ShmTransfer<Sender, Starting>) {
///     let _ = transfer.next_slot(Deadline::NEVER);
/// }
/// ```
/// ```compile_fail,E0382
/// # use shmferry::{protocol::*, *};
/// fn twice(transfer: ShmTransfer<Sender, Starting>) {
///     let _ = transfer.accept(1);
///     let _ = transfer.accept(1);
/// }
/// ```
/// Finishing while a slot is borrowed:
/// ```compile_fail,E0505
/// # use shmferry::{protocol::*, *};
/// fn unfinished(mut sending: ShmTransfer<Sender, Sending>) -> Result<()> {
///     let slot = sending.next_slot(Deadline::NEVER)?;
///     sending.finish()?;
///     slot.send(b"late")
/// }
/// ```
#[derive(Debug)]
#[must_use = "a transfer that is dropped is given up"]
pub struct ShmTransfer<Side, State> {
    side: Side,
    state: State,
}

#[cfg(feature = "tokio")]
impl<Side, State> ShmTransfer<Side, State> {
    pub(crate) fn side(&mut self) -> &mut Side {
        &mut self.side
    }
}

/// How long the calls without a deadline wait for the other side's next step, unless `set_timeout`
/// changes it: 30 seconds without progress.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The most bytes of [`Metadata`] that travel beside status and size.
pub const METADATA_LIMIT: usize = MAX_METADATA;

/// How many bytes a transfer will bring (rule P4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Exactly so many bytes; fewer or more is an error on both sides.
    Known(u64),
    /// A stream: its last chunk is marked as the end.
    Unknown,
}

impl Size {
    const UNKNOWN: u64 = u64::MAX;

    fn from_word(word: u64) -> Size {
        if word == Self::UNKNOWN { Size::Unknown } else { Size::Known(word) }
    }

    fn to_word(self) -> u64 {
        self.known().unwrap_or(Self::UNKNOWN)
    }

    /// The length of a file. For one without blocks on a disk, as in procfs, the stated length can
    /// be wrong: the size is then unknown.
    ///
    /// # Errors
    /// When `fstat` fails, or when the file cannot be read at an offset: a pipe, a directory.
    #[cfg(unix)]
    pub fn of_file(file: &File) -> io::Result<Size> {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let found = file.metadata()?;
        let size = Size::Known(found.len());
        if found.is_file() && found.blocks() > 0 {
            return Ok(size);
        }
        let read = file.read_at(&mut [0], found.len().saturating_sub(1))?;
        let is_as_it_says = (read > 0) == (found.len() > 0);
        Ok(if is_as_it_says { size } else { Size::Unknown })
    }

    /// The number of bytes, if it is known.
    pub fn known(self) -> Option<u64> {
        match self {
            Size::Known(bytes) => Some(bytes),
            Size::Unknown => None,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Known(bytes) => write!(f, "{bytes} bytes"),
            Size::Unknown => f.write_str("an unknown number of bytes"),
        }
    }
}

impl From<u64> for Size {
    #[inline]
    fn from(bytes: u64) -> Size {
        Size::Known(bytes)
    }
}

/// A sender's answer that brings no bytes.
///
/// ```
/// use shmferry::Refusal;
///
/// let why = Refusal::other(7).with(&String::from("the disk is being replaced"));
/// assert!(matches!(why, Refusal::Other { code: 7, .. }));
/// assert_eq!(why.metadata::<String>()?, "the disk is being replaced");
/// # Ok::<(), shmferry::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// There is nothing by that key.
    NotFound,
    /// The sender failed.
    Failed,
    /// The sender does not understand the key.
    Invalid,
    /// The server is shutting down and did not take the request.
    /// [`Client::get`](crate::Client::get) and [`Requester::ask`](crate::channel::Requester::ask)
    /// ask its successor by themselves; they return this only if none came before the deadline.
    Leaving,
    /// A reason of the application's own.
    Other {
        /// The reason's number, whose meaning the two sides agree on.
        code: u16,
        /// Encoded details: see [`metadata`](Refusal::metadata).
        metadata: Box<[u8]>,
    },
}

impl Refusal {
    /// A reason of the application's own, without metadata.
    pub fn other(code: u16) -> Refusal {
        Refusal::Other { code, metadata: Box::default() }
    }

    /// The same reason with metadata of up to [`METADATA_LIMIT`] bytes: a refusal with
    /// more cannot be sent ([`Error::Misuse`](crate::Error::Misuse)). Only [`Refusal::Other`] has
    /// metadata; other reasons are returned unchanged.
    pub fn with(self, metadata: &impl Metadata) -> Refusal {
        match self {
            Refusal::Other { code, .. } => {
                Refusal::Other { code, metadata: metadata.encode().into() }
            }
            standard => standard,
        }
    }

    /// The metadata that the sender attached to a [`Refusal::Other`].
    ///
    /// # Errors
    /// [`Error::Peer`](crate::Error::Peer) when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        let bytes = match self {
            Refusal::Other { metadata, .. } => &metadata[..],
            _ => &[],
        };
        M::decode(bytes).ok_or(PeerFault::MetadataType(type_name::<M>()).into())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotFound => f.write_str("there is nothing by that key"),
            Refusal::Failed => f.write_str("the server failed"),
            Refusal::Invalid => f.write_str("the key makes no sense to the server"),
            Refusal::Leaving => f.write_str("the server ends, and did not take the request"),
            Refusal::Other { code, .. } => write!(f, "the application's reason {code}"),
        }
    }
}

/// The status word of an announcement that is followed by bytes. Others are the two
/// below, and those of a [`Refusal`]. Zero means that there is no announcement yet.
const FOUND: u32 = 1;
/// The status word of an answer that was lent: the announcement says which part of which loan.
#[cfg(target_os = "linux")]
const LENT: u32 = 6;
/// As [`FOUND`], where the answer would have been lent, had the receiver returned other loans
/// first.
#[cfg(target_os = "linux")]
const FOUND_FOR_WANT_OF_ROOM: u32 = 7;

impl Refusal {
    fn from_word(word: u32) -> Option<Refusal> {
        Some(match word {
            2 => Refusal::NotFound,
            3 => Refusal::Failed,
            4 => Refusal::Invalid,
            5 => Refusal::Leaving,
            _ if word >> 16 == 1 => Refusal::other(word as u16),
            _ => return None,
        })
    }

    fn to_word(&self) -> u32 {
        match self {
            Refusal::NotFound => 2,
            Refusal::Failed => 3,
            Refusal::Invalid => 4,
            Refusal::Leaving => 5,
            Refusal::Other { code, .. } => 1 << 16 | u32::from(*code),
        }
    }
}
