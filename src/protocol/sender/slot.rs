//! The sending state: writes the bytes, slot by slot.

use std::fmt;
use std::io;
use std::task::{Poll, Waker, ready};
use std::time::Duration;

use crate::error::{Error, Misuse, Result};
use crate::protocol::wait::{or_pending, publish_cpu};
use crate::protocol::{ShmTransfer, Size};
use crate::segment::{ChunkLen, Phase};
use crate::sync::{Deadline, Permit};

use super::{Sender, Stand};

/// The request was accepted; its bytes are being written.
#[derive(Debug)]
pub struct Sending {
    /// The announced size, as it stands in the announcement.
    size: u64,
    pub(super) sent: u64,
    /// The slot that the next chunk goes to. Private to this side: the peer never says which (rule
    /// P3).
    pub(super) cursor: u32,
    /// The permit for the slot at the cursor, if we have taken it.
    permit: Option<Permit>,
    /// Bytes that `io::Write` has already put into that slot.
    pending: u32,
    /// Whether the next chunk follows at once, unless its source is slow.
    pub(super) in_batches: bool,
}

impl Sending {
    #[inline]
    pub(super) fn new(size: Size) -> Sending {
        let size = size.to_word();
        Sending { size, sent: 0, cursor: 0, permit: None, pending: 0, in_batches: false }
    }
}

impl ShmTransfer<Sender, Sending> {
    /// How many bytes were announced.
    pub fn size(&self) -> Size {
        Size::from_word(self.state.size)
    }

    /// Bytes handed to the receiver so far.
    pub fn sent(&self) -> u64 {
        self.state.sent
    }

    /// How long `send_file`, `finish` and `io::Write` wait without the receiver's taking a single
    /// byte. A receiver that is slow but steady is not cut off.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.side.waiter.set_timeout(timeout);
    }

    /// Waits for a free slot. Sends what `io::Write` has buffered in the current slot first.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which it may be called again; [`Error::Cancelled`] or
    /// [`Error::Disconnected`] when the receiver has given up or died.
    pub fn next_slot(&mut self, deadline: Deadline) -> Result<Slot<'_>> {
        self.free_slot(Some(deadline))
    }

    /// As [`next_slot`](Self::next_slot), without waiting: if none is free, `task` is woken once
    /// one may be. After a wake-up, call this again.
    ///
    /// # Errors
    /// Those of [`next_slot`](Self::next_slot), but for [`Error::Timeout`].
    pub fn poll_slot(&mut self, task: &Waker) -> Poll<Result<Slot<'_>>> {
        self.poll_free_slot(Some(task))
    }

    /// As [`poll_slot`](Self::poll_slot), and nobody is woken.
    ///
    /// # Errors
    /// Those of [`poll_slot`](Self::poll_slot).
    pub fn try_slot(&mut self) -> Poll<Result<Slot<'_>>> {
        self.poll_free_slot(None)
    }

    /// Ends the transfer; returns the bytes sent. Needed after `io::Write`, and for a transfer of
    /// unknown size. One of known size ends by itself with its last byte.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when fewer bytes were sent than announced, which aborts.
    pub fn finish(mut self) -> Result<u64> {
        self.side.segment.origin().check()?;
        let found = self.state.sent + u64::from(self.state.pending);
        if self.size().known().is_some_and(|announced| announced != found) {
            return Err(self.mismatch(found));
        }
        if !matches!(self.side.stand, Stand::Off(Phase::Finished)) {
            self.take_slot(None)?;
            self.publish(self.state.pending as usize, true)?;
        }
        Ok(self.state.sent)
    }

    /// As [`next_slot`](Self::next_slot). Without a deadline, the timeout applies.
    pub(super) fn free_slot(&mut self, deadline: Option<Deadline>) -> Result<Slot<'_>> {
        self.publish_pending()?;
        self.take_slot(deadline)?;
        Ok(Slot { transfer: self })
    }

    /// Whether [`finish`](Self::finish) needs a slot: the last byte has not ended the transfer.
    #[cfg(feature = "tokio")]
    pub(crate) fn needs_end(&self) -> bool {
        !matches!(self.side.stand, Stand::Off(_))
    }

    fn poll_free_slot(&mut self, task: Option<&Waker>) -> Poll<Result<Slot<'_>>> {
        self.publish_pending()?;
        ready!(self.poll_room(task))?;
        Poll::Ready(Ok(Slot { transfer: self }))
    }

    /// Takes the permit for the next slot, unless it has it; has the task woken later, if there is
    /// one. After that, writing does not wait before that slot is full.
    pub(crate) fn poll_room(&mut self, task: Option<&Waker>) -> Poll<Result<()>> {
        self.side.writer()?;
        if self.state.permit.is_none() {
            self.state.permit = Some(ready!(or_pending(self.side.poll_free(task)))?);
        }
        Poll::Ready(Ok(()))
    }

    /// Bytes that may still be sent, those included that `io::Write` has buffered.
    pub(super) fn room(&self) -> u64 {
        self.size().known().map_or(u64::MAX, |size| size - self.state.sent)
    }

    /// Bytes that may still be written.
    pub(crate) fn unwritten(&self) -> u64 {
        self.room() - u64::from(self.state.pending)
    }

    pub(super) fn mismatch(&self, found: u64) -> Error {
        Error::SizeMismatch { announced: self.state.size, found }
    }

    fn slot_len(&self) -> usize {
        self.side.segment.geometry().slot_len() as usize
    }

    /// Takes the permit for the slot at the cursor, unless it has it. Without a deadline, the
    /// timeout applies.
    fn take_slot(&mut self, deadline: Option<Deadline>) -> Result<()> {
        self.side.writer()?;
        if self.state.permit.is_none() {
            self.state.permit = Some(match deadline {
                Some(deadline) => self.side.await_free(deadline)?,
                None => self.side.await_progress()?,
            });
        }
        Ok(())
    }

    /// Hands over what `io::Write` has put into the slot at the cursor.
    fn publish_pending(&mut self) -> Result<()> {
        match self.state.pending {
            0 => Ok(()),
            pending => self.publish(pending as usize, false),
        }
    }

    /// Hands the slot at the cursor over, with `len` bytes in it. The chunk that completes a known
    /// size is the last, whatever `is_end` says.
    pub(super) fn publish(&mut self, len: usize, is_end: bool) -> Result<()> {
        self.side.writer()?; // a permit kept past the end must not touch the next transfer
        let Some(permit) = self.state.permit.take() else {
            return Err(Misuse::TransferOver.into());
        };
        let sent = self.state.sent + len as u64;
        let last = is_end || self.size() == Size::Known(sent);
        let chunk = ChunkLen { len: len as u32, last };
        let header = self.side.segment.header();
        header.chunks[self.state.cursor as usize].store(chunk);
        publish_cpu(&header.announcement.cpu);
        self.state.cursor = (self.state.cursor + 1) % self.side.segment.geometry().slot_count();
        self.state.sent = sent;
        self.state.pending = 0;
        self.side.writer()?.announce()?;
        if last {
            return self.side.end(Phase::Finished, permit);
        }
        self.side.hand_over(permit, self.state.in_batches);
        Ok(())
    }
}

impl io::Write for ShmTransfer<Sender, Sending> {
    /// Copies bytes into the current slot, after waiting for a free one; a full slot is sent. Bytes
    /// beyond the announced size are an error that aborts the transfer.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        self.side.segment.origin().check().map_err(Error::from)?;
        let room = self.unwritten();
        if bytes.len() as u64 > room {
            let found = self.state.sent + u64::from(self.state.pending) + bytes.len() as u64;
            self.side.abort();
            return Err(self.mismatch(found).into());
        }
        self.take_slot(None)?;
        let pending = self.state.pending as usize;
        let space = self.slot_len() - pending;
        let len = bytes.len().min(space);
        let ShmTransfer { side, state } = self;
        side.writer()?.slots().write_slot(state.cursor, pending, &bytes[..len]);
        state.pending += len as u32; // at most a slot's length
        if len == space || len as u64 == room {
            self.publish_pending()?;
        }
        Ok(len)
    }

    /// Hands over what is in the current slot.
    fn flush(&mut self) -> io::Result<()> {
        Ok(self.publish_pending()?)
    }
}

/// A free slot, lent to the sender; kept for its next chunk if dropped unsent.
pub struct Slot<'t> {
    pub(super) transfer: &'t mut ShmTransfer<Sender, Sending>,
}

impl Slot<'_> {
    /// Bytes that fit, in the slot and in the announced size.
    pub fn capacity(&self) -> usize {
        let room = usize::try_from(self.transfer.room()).unwrap_or(usize::MAX);
        self.transfer.slot_len().min(room)
    }

    /// Sends these bytes as one chunk, copying them. An empty chunk is not sent.
    ///
    /// # Errors
    /// [`Error::Misuse`] when they do not fit the slot, [`Error::SizeMismatch`] when they do not
    /// fit the announced size.
    pub fn send(self, bytes: &[u8]) -> Result<()> {
        let transfer = self.transfer;
        transfer.side.segment.origin().check()?;
        let (len, limit) = (bytes.len(), transfer.slot_len());
        if len > limit {
            return Err(Misuse::ChunkTooLong { len, limit }.into());
        }
        if len as u64 > transfer.room() {
            return Err(transfer.mismatch(transfer.state.sent + len as u64));
        }
        if len == 0 {
            return Ok(());
        }
        transfer.side.writer()?.slots().write_slot(transfer.state.cursor, 0, bytes);
        transfer.publish(len, false)
    }
}

impl fmt::Debug for Slot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("capacity", &self.capacity()).finish()
    }
}
