//! The sender's side of a transfer: from the request to the last chunk.

use std::fmt;
use std::io;
#[cfg(unix)]
use std::ops::Range;
#[cfg(unix)]
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
use crate::peer::{Link, Peer, Registration};
use crate::segment::{ChunkLen, Header, Phase, Segment, WriteSlots};
use crate::sync::atomic::Relaxed;
use crate::sync::{BUDGET, Deadline, Interrupted, Permit, Presence, Spinner};

use super::{
    DEFAULT_TIMEOUT, Idle, METADATA_LIMIT, Metadata, Refusal, ShmTransfer, Size, Status,
    await_permit, can_put_off, publish_cpu,
};

#[cfg(all(test, not(loom)))]
mod tests;

/// The side that answers a request and puts the bytes in.
pub struct Sender {
    segment: Arc<Segment<WriteSlots>>,
    generation: u64,
    /// Where this side has brought the turn word to; what `Drop` has to end.
    phase: Phase,
    link: Arc<Link>,
    /// Given up before the last write: the link must not poison what may be in other hands by then.
    registration: Option<Registration>,
    spinner: Spinner,
    presence: Presence,
    /// When a slot was last handed over.
    posted: Option<Instant>,
    /// The receiver's wake-up has been put off.
    is_unwoken: bool,
    timeout: Duration,
}

/// How many of them there are in this process.
static SENDERS: AtomicUsize = AtomicUsize::new(0);

/// A request has come in; nothing has been answered yet.
#[derive(Debug)]
pub struct Starting {
    key: Arc<[u8]>,
}

/// The request was accepted; its bytes are being put in.
#[derive(Debug)]
pub struct Sending {
    size: Size,
    sent: u64,
    /// The slot that the next chunk goes to. Ours alone: the peer never says which (rule P3).
    cursor: u32,
    /// The permit for the slot at the cursor, if we have taken it.
    permit: Option<Permit>,
    /// Bytes already in that slot, by `io::Write`.
    pending: usize,
    /// Whether the next chunk follows at once, unless its source is slow.
    in_batches: bool,
}

impl ShmTransfer<Sender, Starting> {
    pub(crate) fn begin(
        segment: Arc<Segment<WriteSlots>>,
        generation: u64,
        key: Arc<[u8]>,
        link: &Arc<Link>,
    ) -> ShmTransfer<Sender, Starting> {
        let registration = link.count();
        let side = Sender {
            segment,
            generation,
            phase: Phase::Offered,
            link: Arc::clone(link),
            registration: Some(registration),
            spinner: Spinner::new(),
            presence: Presence::among(&SENDERS),
            posted: None,
            is_unwoken: false,
            timeout: DEFAULT_TIMEOUT,
        };
        ShmTransfer { side, state: Starting { key } }
    }

    /// Lets go without answering: the request went to nobody, and is handed back.
    pub(crate) fn forget(mut self) {
        self.side.phase = Phase::Idle;
    }

    /// What is asked for.
    pub fn key(&self) -> &[u8] {
        &self.state.key
    }

    /// Who asks; `None` within one process.
    pub fn peer(&self) -> Option<Peer> {
        self.side.link.peer()
    }

    /// Takes the request up, with so many bytes to follow ([`Size::Unknown`] for a stream). The
    /// receiver learns of it with the first chunk (rule P2).
    ///
    /// # Errors
    /// [`Error::Stale`] when the receiver has withdrawn the request: nothing was written.
    pub fn accept(self, size: impl Into<Size>) -> Result<ShmTransfer<Sender, Sending>> {
        self.accept_with(size, &())
    }

    /// As [`accept`](Self::accept), with metadata beside the size.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for metadata that does not fit.
    pub fn accept_with(
        mut self,
        size: impl Into<Size>,
        metadata: &impl Metadata,
    ) -> Result<ShmTransfer<Sender, Sending>> {
        let size = size.into();
        if size == Size::Known(Size::UNKNOWN) {
            return Err(Misuse::SizeReserved.into());
        }
        let metadata = metadata.encode();
        if metadata.len() > METADATA_LIMIT {
            return Err(
                Misuse::MetadataTooLong { len: metadata.len(), limit: METADATA_LIMIT }.into()
            );
        }
        self.side.take_up()?;
        let announcement = &self.side.header().announcement;
        announcement.status.store(Status::Found.to_word(), Relaxed);
        announcement.size.store(size.to_word(), Relaxed);
        announcement.metadata_len.store(metadata.len() as u32, Relaxed);
        for (to, byte) in announcement.metadata.iter().zip(metadata) {
            to.store(byte, Relaxed);
        }
        let state =
            Sending { size, sent: 0, cursor: 0, permit: None, pending: 0, in_batches: false };
        Ok(ShmTransfer { side: self.side, state })
    }

    /// Answers that there will be no bytes, and why.
    ///
    /// # Errors
    /// [`Error::Stale`] when the receiver has withdrawn the request.
    pub fn refuse(mut self, why: Refusal) -> Result<()> {
        self.side.take_up()?;
        let header = self.side.header();
        header.announcement.status.store(Status::Refused(why).to_word(), Relaxed);
        // Nothing has been sent yet, so that all slots are free.
        let permit = header.free.try_wait().map_err(|_| PeerFault::BaselessPoison)?;
        self.side.end(Phase::Refused, permit)
    }
}

impl ShmTransfer<Sender, Sending> {
    /// For models: the sender's process ends here, and writes nothing any more.
    #[cfg(loom)]
    pub(crate) fn die(mut self) {
        self.side.phase = Phase::Idle;
        self.side.segment.disclaim(); // a word of that process's own
    }

    /// How many bytes were announced.
    pub fn size(&self) -> Size {
        self.state.size
    }

    /// Bytes handed to the receiver so far.
    pub fn sent(&self) -> u64 {
        self.state.sent
    }

    /// How long `send_file`, `finish` and `io::Write` wait without progress: without the receiver's
    /// taking a single byte. One that reads slowly but steadily is waited for as long as it reads.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.side.timeout = timeout;
    }

    /// Waits for a free slot. What `io::Write` has put in so far goes out first.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which it may be called again; [`Error::Cancelled`] or
    /// [`Error::Disconnected`] when nobody wants the bytes any more.
    pub fn next_slot(&mut self, deadline: Deadline) -> Result<Slot<'_>> {
        self.free_slot(Some(deadline))
    }

    fn free_slot(&mut self, deadline: Option<Deadline>) -> Result<Slot<'_>> {
        if self.state.pending > 0 {
            self.publish(self.state.pending)?;
        }
        self.take_slot(deadline)?;
        Ok(Slot { transfer: self })
    }

    /// Sends a file from its beginning, as many bytes as are still to come of the announced size, or
    /// all of it when the size is unknown, and ends the transfer; returns the bytes sent in all. They
    /// are read straight into the segment, by `pread`: the file's own position neither matters nor
    /// moves.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the file ends before the announced size, [`Error::Source`]
    /// when it cannot be read, and those of [`next_slot`](Self::next_slot). All of them abort.
    #[cfg(unix)]
    pub fn send_file(self, file: impl AsFd) -> Result<u64> {
        let len =
            self.state.size.known().map(|size| size - self.state.sent - self.state.pending as u64);
        self.send_from(file, 0, len)
    }

    /// As [`send_file`](Self::send_file), for the bytes of a file in `range`.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] when the range is not as long as what is still to come.
    #[cfg(unix)]
    pub fn send_file_range(self, file: impl AsFd, range: Range<u64>) -> Result<u64> {
        let len = range.end.saturating_sub(range.start);
        let room = self.room() - self.state.pending as u64;
        if self.state.size != Size::Unknown && room != len {
            return Err(Misuse::RangeLength { range: len, expected: room }.into());
        }
        self.send_from(file, range.start, Some(len))
    }

    /// Ends the transfer; returns the bytes sent. Needed after `io::Write` and after a transfer of
    /// unknown size; one of known size ends by itself with its last byte.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when fewer bytes were sent than announced, which aborts.
    pub fn finish(mut self) -> Result<u64> {
        self.side.segment.origin().check()?;
        let found = self.state.sent + self.state.pending as u64;
        if self.state.size.known().is_some_and(|announced| announced != found) {
            return Err(self.mismatch(found));
        }
        if self.side.phase != Phase::Finished {
            if self.state.permit.is_none() {
                self.take_slot(None)?;
            }
            self.publish_chunk(ChunkLen { len: self.state.pending as u32, last: true })?;
        }
        Ok(self.state.sent)
    }

    #[cfg(unix)]
    fn send_from(mut self, file: impl AsFd, start: u64, len: Option<u64>) -> Result<u64> {
        self.state.in_batches = true;
        let mut done = 0;
        while Some(done) != len {
            let left =
                len.map_or(usize::MAX, |len| usize::try_from(len - done).unwrap_or(usize::MAX));
            let slot = self.free_slot(None)?;
            done += match (slot.fill_from(&file, start + done, left)?, len) {
                (0, Some(_)) if self.state.size != Size::Unknown => {
                    return Err(self.mismatch(self.state.sent));
                }
                (0, Some(announced)) => return Err(Error::SizeMismatch { announced, found: done }),
                (0, None) => break,
                (filled, _) => filled as u64,
            };
        }
        self.finish()
    }

    /// As `send_file` sends, for models, which have no files.
    #[cfg(loom)]
    pub(crate) fn in_batches(mut self) -> Self {
        self.state.in_batches = true;
        self
    }

    /// Bytes that may still be sent.
    fn room(&self) -> u64 {
        self.state.size.known().map_or(u64::MAX, |size| size - self.state.sent)
    }

    fn mismatch(&self, found: u64) -> Error {
        Error::SizeMismatch { announced: self.state.size.to_word(), found }
    }

    fn slot_len(&self) -> usize {
        self.side.segment.geometry().slot_len() as usize
    }

    /// Has the permit for the slot at the cursor. Without a deadline, waits as the patience says.
    fn take_slot(&mut self, deadline: Option<Deadline>) -> Result<()> {
        self.side.is_on()?;
        if self.state.permit.is_none() {
            self.state.permit = Some(match deadline {
                Some(deadline) => self.side.await_free(deadline)?,
                None => self.side.await_progress()?,
            });
        }
        Ok(())
    }

    /// Hands the slot at the cursor over, with `len` bytes in it. The chunk that completes a known
    /// size is the last.
    fn publish(&mut self, len: usize) -> Result<()> {
        let last = self.state.size == Size::Known(self.state.sent + len as u64);
        self.publish_chunk(ChunkLen { len: len as u32, last })
    }

    fn publish_chunk(&mut self, chunk: ChunkLen) -> Result<()> {
        self.side.is_on()?; // a permit from before the end is none for the segment's next transfer
        let Some(permit) = self.state.permit.take() else {
            return Err(Misuse::TransferOver.into());
        };
        let header = self.side.segment.header();
        header.chunks[self.state.cursor as usize].store(chunk);
        self.state.cursor = (self.state.cursor + 1) % self.side.segment.geometry().slot_count();
        self.state.sent += u64::from(chunk.len);
        self.state.pending = 0;
        publish_cpu(&header.announcement.cpu);
        if self.side.phase == Phase::Accepted {
            header.turn.advance(self.side.generation, Phase::Accepted, Phase::Announced)?;
            self.side.phase = Phase::Announced;
        }
        if chunk.last {
            self.side.end(Phase::Finished, permit)
        } else {
            self.side.hand_over(permit, self.state.in_batches);
            Ok(())
        }
    }
}

impl io::Write for ShmTransfer<Sender, Sending> {
    /// Copies bytes into the current slot, waiting for a free one first; a full slot goes out.
    /// Bytes past the announced size are an error that aborts the transfer.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        self.side.segment.origin().check().map_err(Error::from)?;
        let room = self.room() - self.state.pending as u64;
        if bytes.len() as u64 > room {
            let found = self.state.sent + (self.state.pending + bytes.len()) as u64;
            self.side.abort();
            return Err(self.mismatch(found).into());
        }
        self.take_slot(None)?;
        let space = self.slot_len() - self.state.pending;
        let len = bytes.len().min(space);
        self.side.segment.writable().write_slot(
            self.state.cursor,
            self.state.pending,
            &bytes[..len],
        );
        self.state.pending += len;
        if len == space || len as u64 == room {
            self.publish(self.state.pending)?;
        }
        Ok(len)
    }

    /// Hands over what is in the current slot.
    fn flush(&mut self) -> io::Result<()> {
        if self.state.pending > 0 {
            self.publish(self.state.pending)?;
        }
        Ok(())
    }
}

/// A free slot, lent to the sender; kept for its next chunk if dropped unsent.
pub struct Slot<'t> {
    transfer: &'t mut ShmTransfer<Sender, Sending>,
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
        self.transfer.side.segment.origin().check()?;
        let limit = self.transfer.slot_len();
        if bytes.len() > limit {
            return Err(Misuse::ChunkTooLong { len: bytes.len(), limit }.into());
        }
        if bytes.len() as u64 > self.transfer.room() {
            let found = self.transfer.state.sent + bytes.len() as u64;
            return Err(self.transfer.mismatch(found));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.transfer.side.segment.writable().write_slot(self.transfer.state.cursor, 0, bytes);
        self.transfer.publish(bytes.len())
    }

    /// Sends one chunk read from a file at `offset`, as long as fits; returns its length. Zero
    /// means that the file ends here: nothing was sent.
    ///
    /// # Errors
    /// [`Error::Source`] when the file cannot be read.
    #[cfg(unix)]
    pub fn send_from(self, file: impl AsFd, offset: u64) -> Result<usize> {
        self.fill_from(file, offset, usize::MAX)
    }

    #[cfg(unix)]
    fn fill_from(self, file: impl AsFd, offset: u64, limit: usize) -> Result<usize> {
        self.transfer.side.segment.origin().check()?;
        let capacity = self.capacity().min(limit);
        let ShmTransfer { side, state } = &mut *self.transfer;
        let mut filled = 0;
        while filled < capacity {
            let (memory, at) = (side.segment.writable(), offset + filled as u64);
            match memory.pread_slot(state.cursor, filled, capacity - filled, file.as_fd(), at) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Source(error)),
            }
        }
        if filled > 0 {
            self.transfer.publish(filled)?;
        }
        Ok(filled)
    }
}

impl fmt::Debug for Slot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("capacity", &self.capacity()).finish()
    }
}

impl Sender {
    fn header(&self) -> &Header {
        self.segment.header()
    }

    /// Takes the segment, if the request still stands (rule P1).
    fn take_up(&mut self) -> Result<()> {
        self.segment.origin().check()?;
        let header = self.segment.header();
        if header.turn.advance(self.generation, Phase::Offered, Phase::Accepted).is_err() {
            self.phase = Phase::Idle; // never ours: nothing to end
            return Err(Error::Stale);
        }
        // A client that puts the turn word back could have two workers of this process in one slot.
        if !self.segment.claim() {
            self.phase = Phase::Idle; // the other one's
            return Err(Error::Stale);
        }
        self.phase = Phase::Accepted;
        // Only now is the segment ours to poison: before, it may be in other hands (P1).
        if let Some(registration) = &self.registration {
            registration.cover(Arc::clone(&self.segment) as _);
        }
        header.announcement.pid.store(self.segment.origin().pid(), Relaxed);
        publish_cpu(&header.announcement.cpu);
        Ok(())
    }

    /// Fails unless the segment is in our hands, and not in those of the process that this one was
    /// forked from.
    fn is_on(&self) -> Result<()> {
        self.segment.origin().check()?;
        match self.phase {
            Phase::Accepted | Phase::Announced => Ok(()),
            _ => Err(Misuse::TransferOver.into()),
        }
    }

    /// Waits for a free slot as long as the receiver makes progress: until it has taken no byte for as
    /// long as the patience.
    fn await_progress(&mut self) -> Result<Permit> {
        let mut idle =
            Idle::new(self.timeout, self.segment.header().receiver.progress.load(Relaxed));
        loop {
            match self.await_free(idle.look_again()) {
                Err(Error::Timeout(_)) => {
                    let progress = self.segment.header().receiver.progress.load(Relaxed);
                    if idle.is_over(progress) {
                        return Err(Error::Timeout(Awaited::FreeSlot));
                    }
                }
                settled => return settled,
            }
        }
    }

    fn await_free(&mut self, deadline: Deadline) -> Result<Permit> {
        let header = self.segment.header();
        // Unlike the receiver, the sender drains nothing: there is nobody to fill slots for.
        if header.free.is_poisoned() {
            return Err(self.why_poisoned());
        }
        let cpus = (&header.announcement.cpu, &header.receiver.cpu);
        let is_severed = || self.link.is_severed();
        match await_permit(
            &header.free,
            (&mut self.spinner, &self.presence),
            cpus,
            deadline,
            is_severed,
        ) {
            Ok(permit) => Ok(permit),
            Err(Interrupted::TimedOut) => Err(Error::Timeout(Awaited::FreeSlot)),
            Err(Interrupted::Poisoned) => Err(self.why_poisoned()),
            Err(Interrupted::Os(source)) => Err(Error::os("futex")(source)),
        }
    }

    /// Hands a filled slot over and wakes the receiver; in batches, not for each slot. Never put off is
    /// the wake-up for the announcement, and none of a source that is slower than a wake-up.
    fn hand_over(&mut self, permit: Permit, in_batches: bool) {
        let header = self.segment.header();
        let before = if in_batches { self.posted.replace(Instant::now()) } else { None };
        header.filled.add(permit);
        let slots = self.segment.geometry().slot_count();
        // None before the first slot, which announces.
        let is_fast = before.is_some_and(|before| before.elapsed() < BUDGET);
        self.is_unwoken = is_fast && can_put_off(&header.free, slots, &self.presence);
        if !self.is_unwoken {
            header.filled.wake();
        }
    }

    /// Who ended the wait for free slots: the receiver, or its death.
    fn why_poisoned(&self) -> Error {
        if self.header().receiver.cancelled.load(Relaxed) != 0 {
            Error::Cancelled
        } else if self.link.is_severed() {
            self.link.disconnect_reason()
        } else {
            PeerFault::BaselessPoison.into()
        }
    }

    /// Hands over the last permit and leaves the segment: the turn word is the last write, so that
    /// whoever reads the phase knows that we are off (rule P6).
    fn end(&mut self, phase: Phase, permit: Permit) -> Result<()> {
        let header = self.segment.header();
        header.filled.add(permit);
        self.registration = None;
        self.segment.disclaim(); // before the turn: whoever takes the next one finds it free
        let left = header.turn.advance(self.generation, self.phase, phase);
        self.phase = phase;
        header.filled.wake(); // reads only
        Ok(left?)
    }

    /// Gives up, unless the transfer has ended already.
    fn abort(&mut self) {
        if !self.segment.origin().is_here() {
            return;
        }
        if self.phase == Phase::Offered && self.take_up().is_err() {
            return;
        }
        if matches!(self.phase, Phase::Accepted | Phase::Announced) {
            let header = self.segment.header();
            header.filled.set_poison();
            self.registration = None;
            self.segment.disclaim();
            // Fails only if the peer spoilt the word, and then nobody can be told any more.
            let _ = header.turn.advance(self.generation, self.phase, Phase::Aborted);
            self.phase = Phase::Aborted;
            header.filled.wake(); // reads only
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sender { generation, phase, .. } = self;
        f.debug_struct("Sender")
            .field("segment", &self.segment.id())
            .field("generation", generation)
            .field("phase", phase)
            .finish_non_exhaustive()
    }
}
