//! The receiving state: takes the bytes, chunk by chunk.

use std::any::type_name;
use std::fmt;
use std::io;
use std::task::{Poll, Waker, ready};
use std::time::Duration;

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
#[cfg(target_os = "linux")]
use crate::loan::LentBody;
use crate::protocol::wait::{or_pending, publish_cpu};
use crate::protocol::{Metadata, ShmTransfer, Size};
use crate::segment::ChunkLen;
#[cfg(not(loom))]
use crate::segment::SharedByte;
use crate::sync::{Deadline, Permit};

use super::Receiver;

/// The sender has announced what it sends; its chunks follow.
#[derive(Debug)]
pub struct Receiving {
    size: Size,
    metadata: Box<[u8]>,
    received: u64,
    /// The slot that the next chunk comes in. Private to this side: the peer never says which (rule
    /// P3).
    pub(super) cursor: u32,
    /// The permit for the slot at the cursor, taken with the reply (rule P2).
    permit: Option<Permit>,
    pub(super) open: Option<OpenChunk>,
    end: End,
}

/// The chunk at the cursor, while bytes of it are unread.
#[derive(Debug)]
pub(super) struct OpenChunk {
    permit: Permit,
    pub(super) chunk: ChunkLen,
    pub(super) read: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Ahead,
    Reached,
    /// An error ended the transfer for good.
    Failed,
}

impl Receiving {
    /// Begins with the permit for the first chunk, which the reply took.
    #[inline(always)]
    pub(super) fn new(size: Size, metadata: Box<[u8]>, permit: Permit) -> Receiving {
        let permit = Some(permit);
        Receiving { size, metadata, received: 0, cursor: 0, permit, open: None, end: End::Ahead }
    }
}

impl ShmTransfer<Receiver, Receiving> {
    /// The announced number of bytes.
    pub fn size(&self) -> Size {
        self.state.size
    }

    /// The metadata that the sender attached to its announcement.
    ///
    /// # Errors
    /// [`Error::Peer`] when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        M::decode(&self.state.metadata).ok_or(PeerFault::MetadataType(type_name::<M>()).into())
    }

    /// How long `copy_to` and `io::Read` wait for one step of the sender, and how long `copy_to`
    /// and [`Chunk::write_to`] wait without progress of the sink. Progress means that the sink's
    /// other end has taken a byte. The kernel reports that for sockets and pipes; for TCP in steps
    /// of the receiver's window.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.side.waiter.set_timeout(timeout);
    }

    /// Waits for the next chunk, or returns the unread part of the current one; `None` at the end.
    /// The slot goes back to the sender when the chunk is dropped.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which it may be called again; or, for good, what ended the
    /// transfer, once everything filled before that has been read (rule P7).
    pub fn next_chunk(&mut self, deadline: Deadline) -> Result<Option<Chunk<'_>>> {
        Ok(self.open_chunk(deadline)?.then_some(Chunk { source: ChunkSource::Slot(self) }))
    }

    /// As [`next_chunk`](Self::next_chunk), without waiting: if none has come yet, `task` is woken
    /// once one may have. After a wake-up, call this again.
    ///
    /// # Errors
    /// What ended the transfer.
    pub fn poll_chunk(&mut self, task: &Waker) -> Poll<Result<Option<Chunk<'_>>>> {
        self.poll_next(Some(task))
    }

    /// As [`poll_chunk`](Self::poll_chunk), and nobody is woken.
    ///
    /// # Errors
    /// What ended the transfer.
    pub fn try_chunk(&mut self) -> Poll<Result<Option<Chunk<'_>>>> {
        self.poll_next(None)
    }

    fn poll_next(&mut self, task: Option<&Waker>) -> Poll<Result<Option<Chunk<'_>>>> {
        let is_open = ready!(self.poll_open(task))?;
        Poll::Ready(Ok(is_open.then_some(Chunk { source: ChunkSource::Slot(self) })))
    }

    /// Opens a chunk if none is open; `false` at the end. An empty last chunk is the end.
    pub(in crate::protocol) fn open_chunk(&mut self, deadline: Deadline) -> Result<bool> {
        self.open_with(|side| side.await_filled(deadline, Awaited::FilledSlot))
    }

    /// As [`open_chunk`](Self::open_chunk), without waiting; has the task woken later, if there is
    /// one.
    pub(crate) fn poll_open(&mut self, task: Option<&Waker>) -> Poll<Result<bool>> {
        or_pending(self.open_with(|side| side.poll_filled(task, Awaited::FilledSlot)))
    }

    #[inline(always)]
    fn open_with(&mut self, take: impl Fn(&mut Receiver) -> Result<Permit>) -> Result<bool> {
        self.side.check_origin()?;
        while self.state.open.is_none() {
            match self.state.end {
                End::Reached => return Ok(false),
                End::Failed => return Err(Misuse::TransferOver.into()),
                End::Ahead => {}
            }
            let permit = match self.state.permit.take() {
                Some(permit) => permit,
                None => take(&mut self.side).inspect_err(|error| {
                    if !matches!(error, Error::Timeout(_)) {
                        self.state.end = End::Failed;
                    }
                })?,
            };
            let word = &self.side.header().chunks[self.state.cursor as usize];
            let chunk =
                self.check_chunk(word.load()).inspect_err(|_| self.state.end = End::Failed)?;
            self.state.received += u64::from(chunk.len);
            self.state.open = Some(OpenChunk { permit, chunk, read: 0 });
            if chunk.len == 0 {
                self.close_chunk();
            }
        }
        Ok(true)
    }

    /// Checks a chunk's length against the slot, the announced size, and the end (rule P3).
    fn check_chunk(&self, chunk: ChunkLen) -> Result<ChunkLen, PeerFault> {
        let limit = self.side.guard.segment.geometry().slot_len();
        if chunk.len > limit {
            return Err(PeerFault::ChunkTooLong { len: chunk.len, limit });
        }
        if chunk.len == 0 && !chunk.last {
            return Err(PeerFault::EmptyChunk);
        }
        // Cannot overflow: `received` is at most the announced size, or a count of bytes really
        // received.
        let received = self.state.received + u64::from(chunk.len);
        match self.state.size {
            Size::Known(announced) if received > announced => {
                Err(PeerFault::TooLong { announced, received })
            }
            Size::Known(announced) if chunk.last != (received == announced) => {
                Err(PeerFault::WrongEnd { announced, received })
            }
            _ => Ok(chunk),
        }
    }

    /// Unread bytes of the open chunk.
    pub(crate) fn unread(&self) -> usize {
        self.state.open.as_ref().map_or(0, |open| open.chunk.len as usize - open.read)
    }

    /// Bytes still to be passed on, if the size is known.
    #[cfg(target_os = "linux")]
    pub(in crate::protocol) fn left(&self) -> Option<u64> {
        match self.state.size {
            Size::Known(size) => Some(size - self.state.received + self.unread() as u64),
            Size::Unknown => None,
        }
    }

    /// Copies unread bytes of the open chunk; returns how many.
    fn consume(&mut self, into: &mut [u8]) -> usize {
        let len = self.unread().min(into.len());
        if let Some(open) = &mut self.state.open {
            let memory = self.side.guard.segment.readable();
            memory.read_slot(self.state.cursor, open.read, &mut into[..len]);
            open.read += len;
            if open.read < open.chunk.len as usize {
                self.side.tell_progress();
            }
        }
        len
    }

    /// Copies unread bytes of the open chunk, and closes it with the last; returns how many.
    pub(crate) fn read_open(&mut self, into: &mut [u8]) -> usize {
        let read = self.consume(into);
        if self.unread() == 0 {
            self.close_chunk();
        }
        read
    }

    /// Returns the current chunk's slot to the sender, read or not.
    pub(in crate::protocol) fn close_chunk(&mut self) {
        if self.side.check_origin().is_err() {
            return; // the parent returns the slot
        }
        let Some(OpenChunk { permit, chunk, .. }) = self.state.open.take() else { return };
        let slots = self.side.guard.segment.geometry().slot_count();
        self.state.cursor = (self.state.cursor + 1) % slots;
        if chunk.last {
            self.state.end = End::Reached;
            self.side.is_complete = true;
        } else {
            let header = self.side.header();
            publish_cpu(&header.receiver.cpu);
            header.free.add(permit);
            if !self.side.waiter.can_put_off(&header.filled, slots) {
                header.free.wake();
                self.side.offer.wake_tasks();
            }
        }
    }
}

impl io::Read for ShmTransfer<Receiver, Receiving> {
    /// Blocks until there are bytes. Returns `Ok(0)` only at the true end. A transfer that ends
    /// early is an error, whose source is an [`Error`].
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() || !self.open_chunk(Deadline::after(self.side.waiter.timeout()))? {
            return Ok(0);
        }
        Ok(self.read_open(into))
    }
}

/// Bytes in a slot; the slot goes back to the sender on drop. Or bytes of a loan.
///
/// They are never exposed as `&[u8]`, because the sender could change those in a slot at any time
/// (rule S1). They are copied out, written to a descriptor by the kernel, or read one by one.
pub struct Chunk<'t> {
    pub(super) source: ChunkSource<'t>,
}

pub(super) enum ChunkSource<'t> {
    Slot(&'t mut ShmTransfer<Receiver, Receiving>),
    #[cfg(target_os = "linux")]
    Lent(&'t mut LentBody),
}

#[cfg(target_os = "linux")]
impl LentBody {
    /// The bytes at hand: all that is to come of sealed memory, some of a file; `None` at the end.
    pub(crate) fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>> {
        self.read_ahead()?;
        Ok((self.left() > 0).then_some(Chunk { source: ChunkSource::Lent(self) }))
    }
}

impl Chunk<'_> {
    /// Bytes not yet consumed.
    pub fn len(&self) -> usize {
        match &self.source {
            ChunkSource::Slot(transfer) => transfer.unread(),
            #[cfg(target_os = "linux")]
            ChunkSource::Lent(body) => body.seen().len(),
        }
    }

    /// Whether everything has been consumed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes not yet consumed, in place: to inspect them without a copy.
    ///
    /// A sender that breaks the rules can still write to them, so that two reads of one byte may
    /// differ. Copy bytes before you check them.
    #[cfg(not(loom))]
    pub fn bytes(&self) -> &[SharedByte] {
        match &self.source {
            ChunkSource::Slot(transfer) => {
                let ShmTransfer { side, state } = &**transfer;
                let read = state.open.as_ref().map_or(0, |open| open.read);
                side.guard.segment.readable().slot_bytes(state.cursor, read, self.len())
            }
            #[cfg(target_os = "linux")]
            ChunkSource::Lent(body) => body.seen_shared(),
        }
    }

    /// Consumes as many bytes as fit into `into`; returns how many.
    pub fn copy_to(&mut self, into: &mut [u8]) -> usize {
        match &mut self.source {
            ChunkSource::Slot(transfer) => transfer.consume(into),
            #[cfg(target_os = "linux")]
            ChunkSource::Lent(body) => body.consume(into),
        }
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        match &mut self.source {
            ChunkSource::Slot(transfer) => transfer.close_chunk(),
            #[cfg(target_os = "linux")]
            ChunkSource::Lent(body) => body.advance(body.seen().len()),
        }
    }
}

impl fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("len", &self.len()).finish()
    }
}
