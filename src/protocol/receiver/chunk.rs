//! The bytes as the receiver takes them, chunk by chunk.

use std::any::type_name;
use std::fmt;
use std::io;
use std::time::Duration;

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
use crate::protocol::wait::publish_cpu;
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
    /// The slot that the next chunk comes in. Ours alone: the peer never says which (rule P3).
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
    /// Something went wrong that cannot be mended.
    Failed,
}

impl Receiving {
    /// With the permit for the first chunk.
    #[inline(always)]
    pub(super) fn new(size: Size, metadata: Box<[u8]>, permit: Permit) -> Receiving {
        let permit = Some(permit);
        Receiving { size, metadata, received: 0, cursor: 0, permit, open: None, end: End::Ahead }
    }
}

impl ShmTransfer<Receiver, Receiving> {
    /// How many bytes are to come in all, as announced.
    pub fn size(&self) -> Size {
        self.state.size
    }

    /// What the sender attached to its announcement.
    ///
    /// # Errors
    /// [`Error::Peer`] when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        M::decode(&self.state.metadata).ok_or(PeerFault::MetadataType(type_name::<M>()).into())
    }

    /// How long `copy_to` and `io::Read` wait for one step of the sender, and `copy_to` and
    /// [`Chunk::write_to`] without progress of the sink: without its other end's taking a single
    /// byte, as far as the kernel tells: of sockets and pipes it does, of TCP in steps of the
    /// receiver's window.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.side.waiter.timeout = timeout;
    }

    /// Waits for the next chunk, or what is unread of the current one; `None` at the end. Its slot
    /// goes back to the sender when the chunk is dropped.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which it may be called again; or, for good, what ended the
    /// transfer, once everything filled before that has been read (rule P7).
    pub fn next_chunk(&mut self, deadline: Deadline) -> Result<Option<Chunk<'_>>> {
        Ok(self.open_chunk(deadline)?.then_some(Chunk { transfer: self }))
    }

    /// Has a chunk open, unless the end was reached. A last chunk that is empty is the end.
    pub(in crate::protocol) fn open_chunk(&mut self, deadline: Deadline) -> Result<bool> {
        self.side.check_origin()?;
        while self.state.open.is_none() {
            match self.state.end {
                End::Reached => return Ok(false),
                End::Failed => return Err(Misuse::TransferOver.into()),
                End::Ahead => {}
            }
            let permit = match self.state.permit.take() {
                Some(permit) => permit,
                None => {
                    self.side.await_filled(deadline, Awaited::FilledSlot).inspect_err(|error| {
                        if !matches!(error, Error::Timeout(_)) {
                            self.state.end = End::Failed;
                        }
                    })?
                }
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
        // Cannot overflow: `received` is below an announced size, or a count of bytes really seen.
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
    pub(super) fn unread(&self) -> usize {
        self.state.open.as_ref().map_or(0, |open| open.chunk.len as usize - open.read)
    }

    /// Bytes still to be passed on, if that is known.
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

    /// Gives the current chunk's slot back, read or not.
    pub(in crate::protocol) fn close_chunk(&mut self) {
        if self.side.check_origin().is_err() {
            return; // the slot is for the parent to give back
        }
        let Some(OpenChunk { permit, chunk, .. }) = self.state.open.take() else { return };
        let slots = self.side.guard.segment.geometry().slot_count();
        self.state.cursor = (self.state.cursor + 1) % slots;
        if chunk.last {
            self.state.end = End::Reached; // the sender is off the segment: it waits for no slot
        } else {
            let header = self.side.header();
            publish_cpu(&header.receiver.cpu);
            header.free.add(permit);
            if !self.side.waiter.can_put_off(&header.filled, slots) {
                header.free.wake();
            }
        }
    }
}

impl io::Read for ShmTransfer<Receiver, Receiving> {
    /// Blocks until there are bytes. `Ok(0)` only at the true end: a transfer that breaks off is an
    /// error, whose source is an [`Error`].
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() || !self.open_chunk(Deadline::after(self.side.waiter.timeout))? {
            return Ok(0);
        }
        let read = self.consume(into);
        if self.unread() == 0 {
            self.close_chunk();
        }
        Ok(read)
    }
}

/// Bytes in a slot, lent to the receiver; the slot goes back to the sender on drop.
///
/// The sender's memory is never shown as plain bytes, since it could change under them (rule S1):
/// they are copied out, written to a descriptor by the kernel, or read one by one.
pub struct Chunk<'t> {
    pub(super) transfer: &'t mut ShmTransfer<Receiver, Receiving>,
}

impl Chunk<'_> {
    /// Bytes not yet consumed.
    pub fn len(&self) -> usize {
        self.transfer.unread()
    }

    /// Whether everything has been consumed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes not yet consumed, where they are: to look at them without copying all of them.
    ///
    /// What was read is what was sent only if the sender keeps to the rules: it could write there
    /// still, so that two reads of one byte may differ. Copy bytes before you check them.
    #[cfg(not(loom))]
    pub fn bytes(&self) -> &[SharedByte] {
        let ShmTransfer { side, state } = &*self.transfer;
        let read = state.open.as_ref().map_or(0, |open| open.read);
        side.guard.segment.readable().slot_bytes(state.cursor, read, self.len())
    }

    /// Consumes as many bytes as fit into `into`; returns how many.
    pub fn copy_to(&mut self, into: &mut [u8]) -> usize {
        self.transfer.consume(into)
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        self.transfer.close_chunk();
    }
}

impl fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("len", &self.len()).finish()
    }
}
