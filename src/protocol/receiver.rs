//! The receiver's side of a transfer: from the offer to the last chunk, and the segment's way home.

use std::any::type_name;
use std::fmt;
use std::io;
#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
use crate::peer::Link;
#[cfg(not(loom))]
use crate::segment::SharedByte;
use crate::segment::{
    ChunkLen, Header, MAX_METADATA, NO_GENERATION, Phase, ReadSlots, Segment, SegmentGuard,
};
use crate::sync::atomic::{AtomicU32, Relaxed};
use crate::sync::{Deadline, Interrupted, Permit, Presence, Spinner};

#[cfg(unix)]
use super::sink::SinkWait;
use super::{
    DEFAULT_TIMEOUT, Metadata, Offer, Refusal, ShmTransfer, Size, Status, await_permit,
    can_put_off, publish_cpu,
};

/// The side that owns the segment and takes the bytes out of it.
pub struct Receiver {
    guard: SegmentGuard,
    generation: u64,
    offer: Arc<Offer>,
    spinner: Spinner,
    presence: Presence,
    pub(super) timeout: Duration,
    /// The segment goes back to its pool by another way than by our drop.
    is_kept: bool,
}

/// How many of them there are in this process.
static RECEIVERS: AtomicUsize = AtomicUsize::new(0);

/// A request is out, or about to go out; no reply has come yet.
#[derive(Debug)]
pub struct Offered(());

/// The sender has announced what it sends; its chunks follow.
#[derive(Debug)]
pub struct Receiving {
    pub(super) size: Size,
    metadata: Box<[u8]>,
    pub(super) received: u64,
    /// The slot that the next chunk comes in. Ours alone: the peer never says which (rule P3).
    cursor: u32,
    /// The permit for the slot at the cursor, taken with the reply (rule P2).
    permit: Option<Permit>,
    open: Option<OpenChunk>,
    end: End,
}

/// The chunk at the cursor, while bytes of it are unread.
#[derive(Debug)]
struct OpenChunk {
    permit: Permit,
    chunk: ChunkLen,
    read: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Ahead,
    Reached,
    /// Something went wrong that cannot be mended.
    Failed,
}

/// What a sender answered.
#[derive(Debug)]
pub enum Reply {
    /// It has what was asked for; the bytes follow.
    Found(ShmTransfer<Receiver, Receiving>),
    /// It has not, and says why. The segment is on its way back to the pool.
    Refused(Refusal),
}

impl ShmTransfer<Receiver, Offered> {
    /// Opens the next generation of a leased segment. Whatever a late sender of an older one does
    /// from now on fails at its first step (rule P1).
    pub(crate) fn offer(
        guard: SegmentGuard,
    ) -> Result<(ShmTransfer<Receiver, Offered>, Arc<Offer>, u64)> {
        match Self::open(&guard.segment) {
            Ok(generation) => Ok(Self::offered(guard, generation)),
            Err(fault) => {
                // Spoilt while it was leased. It goes back nevertheless, as one to be replaced.
                guard.give_back(NO_GENERATION, None);
                Err(fault.into())
            }
        }
    }

    fn open(segment: &Segment<ReadSlots>) -> Result<u64, PeerFault> {
        let header = segment.header();
        let (generation, _) = header.turn.load()?;
        // The segment is idle: nobody else touches what is reset here (rule P6).
        header.announcement.status.store(0, Relaxed);
        header.announcement.pid.store(0, Relaxed); // until the sender of this generation tells its own
        header.filled.reset(0);
        header.free.reset(segment.geometry().slot_count());
        header.receiver.cancelled.store(0, Relaxed);
        header.receiver.pid.store(segment.origin().pid(), Relaxed);
        publish_cpu(&header.receiver.cpu);
        header.turn.open_next(generation)
    }

    fn offered(
        guard: SegmentGuard,
        generation: u64,
    ) -> (ShmTransfer<Receiver, Offered>, Arc<Offer>, u64) {
        let offer = Arc::new(Offer::new(Arc::clone(&guard.segment), generation));
        let side = Receiver {
            guard,
            generation,
            offer: Arc::clone(&offer),
            spinner: Spinner::new(),
            presence: Presence::among(&RECEIVERS),
            timeout: DEFAULT_TIMEOUT,
            is_kept: false,
        };
        (ShmTransfer { side, state: Offered(()) }, offer, generation)
    }

    /// Waits for the sender's answer. A small file has arrived whole by then (rule P2).
    ///
    /// # Errors
    /// [`Error::Timeout`] when none came in time, which withdraws the request;
    /// [`Error::Disconnected`] or [`Error::Rejected`] when the queue's connection broke;
    /// [`Error::Aborted`] when the sender gave up, and [`Error::Peer`] when it answered nonsense.
    pub fn reply(mut self, deadline: Deadline) -> Result<Reply> {
        match self.read_reply(deadline) {
            Ok(Answer::Found(found)) => Ok(Reply::Found(self.receiving(found))),
            Ok(Answer::Refused(why)) => Ok(Reply::Refused(why)),
            Err(error) => Err(error),
        }
    }

    /// As [`reply`](Self::reply), with the transfer still in hand.
    #[inline]
    pub(crate) fn read_reply(&mut self, deadline: Deadline) -> Result<Answer> {
        self.side.check_origin()?;
        let permit = self.side.await_filled(deadline, Awaited::Reply)?;
        let announcement = &self.side.header().announcement;
        // Each word is read once, checked, and only then used (rule P3).
        let status = Status::from_word(announcement.status.load(Relaxed))?;
        let size = announcement.size.load(Relaxed);
        let len = announcement.metadata_len.load(Relaxed);
        match status {
            Status::Refused(why) => {
                if why == Refusal::Leaving {
                    self.side.note_leaving();
                }
                Ok(Answer::Refused(why))
            }
            Status::Found => {
                let metadata = if len == 0 { Box::default() } else { self.side.metadata(len)? };
                Ok(Answer::Found(Announced { size, metadata, permit }))
            }
        }
    }

    /// Goes on with the bytes that were announced.
    #[inline(always)]
    pub(crate) fn receiving(self, found: Announced) -> ShmTransfer<Receiver, Receiving> {
        let Announced { size, metadata, permit } = found;
        let (size, permit) = (Size::from_word(size), Some(permit));
        let state = Receiving {
            size,
            metadata,
            received: 0,
            cursor: 0,
            permit,
            open: None,
            end: End::Ahead,
        };
        ShmTransfer { side: self.side, state }
    }

    /// Whether the request went to another process, which a successor may replace.
    pub(crate) fn may_have_successor(&self) -> bool {
        self.side.offer.link().is_some_and(|link| link.peer().is_some())
    }

    /// Withdraws the request; `false` if a sender has taken it.
    pub(crate) fn withdraw(&self) -> bool {
        let turn = &self.side.header().turn;
        turn.advance(self.side.generation, Phase::Offered, Phase::Withdrawn).is_ok()
    }

    /// Ends the transfer as its drop does, but for the segment, which the caller sees to.
    pub(crate) fn give_up(mut self) -> Ended {
        self.side.is_kept = true;
        let link = self.side.end();
        Ended { generation: self.side.generation, link }
    }
}

/// What a sender answered, while the transfer is in other hands.
pub(crate) enum Answer {
    Found(Announced),
    Refused(Refusal),
}

/// What a sender announced.
pub(crate) struct Announced {
    /// As it stood there.
    size: u64,
    metadata: Box<[u8]>,
    /// For the first chunk, which came with it (rule P2).
    permit: Permit,
}

/// A transfer that is over, as far as its segment goes.
pub(crate) struct Ended {
    pub(crate) generation: u64,
    pub(crate) link: Option<Arc<Link>>,
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
    /// [`Chunk::write_to`] without progress of the sink: without its other end's taking a single byte,
    /// as far as the kernel tells: of sockets and pipes it does, of TCP in steps of the receiver's window.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.side.timeout = timeout;
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

    /// Copies everything to a socket, pipe or file, straight from the segment; returns the bytes
    /// copied. Waits as long as there is progress within the [timeout](Self::set_timeout). After
    /// an error of the sink, a second call goes on where the first one ended.
    ///
    /// # Errors
    /// Those of [`next_chunk`](Self::next_chunk), and [`Error::Sink`] or [`Error::Timeout`] when
    /// the sink does not take the bytes.
    #[cfg(unix)]
    pub fn copy_to(&mut self, sink: impl AsFd) -> Result<u64> {
        self.copy_until(sink.as_fd(), &mut None, |_| false).map(|(copied, _)| copied)
    }

    /// Copies to a sink, until it is done or, while the sink takes nothing, told to stop. Returns the
    /// bytes copied, and whether that is all.
    #[cfg(unix)]
    pub(super) fn copy_until(
        &mut self,
        sink: BorrowedFd<'_>,
        wait: &mut Option<SinkWait>,
        is_ended: impl Fn(&Receiver) -> bool,
    ) -> Result<(u64, bool)> {
        let mut copied = 0;
        // A chunk that the sink did not take whole stays open: a second call goes on where this ended.
        while self.open_chunk(Deadline::after(self.side.timeout))? {
            let before = self.unread();
            let is_written = self.write_open(sink, wait, &is_ended)?;
            copied += (before - self.unread()) as u64;
            if !is_written {
                return Ok((copied, false));
            }
            self.close_chunk();
        }
        Ok((copied, true))
    }

    /// Has the kernel write the unread bytes of the open chunk; `false` if it was told to stop. The wait
    /// for the sink goes on over several calls, until it takes something.
    #[cfg(unix)]
    pub(super) fn write_open(
        &mut self,
        sink: BorrowedFd<'_>,
        wait: &mut Option<SinkWait>,
        is_ended: impl Fn(&Receiver) -> bool,
    ) -> Result<bool> {
        self.side.check_origin()?;
        let ShmTransfer { side, state } = self;
        let Some(open) = &mut state.open else { return Ok(true) };
        let len = open.chunk.len as usize;
        while open.read < len {
            match side.guard.segment.readable().send_slot(
                state.cursor,
                open.read,
                len - open.read,
                sink,
            ) {
                Ok(0) => return Err(Error::Sink(io::ErrorKind::WriteZero.into())),
                Ok(sent) => {
                    open.read += sent;
                    *wait = None;
                    side.tell_progress();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let side = &*side;
                    let wait = wait.get_or_insert_with(|| SinkWait::new(sink, side.timeout));
                    if !wait.go_on(sink, || side.tell_progress(), || is_ended(side))? {
                        return Ok(false);
                    }
                }
                Err(error) => return Err(Error::Sink(error)),
            }
        }
        Ok(true)
    }

    /// Has a chunk open, unless the end was reached. A last chunk that is empty is the end.
    pub(super) fn open_chunk(&mut self, deadline: Deadline) -> Result<bool> {
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
    pub(super) fn close_chunk(&mut self) {
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
            if !can_put_off(&header.filled, slots, &self.side.presence) {
                header.free.wake();
            }
        }
    }
}

impl io::Read for ShmTransfer<Receiver, Receiving> {
    /// Blocks until there are bytes. `Ok(0)` only at the true end: a transfer that breaks off is an
    /// error, whose source is an [`Error`].
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() || !self.open_chunk(Deadline::after(self.side.timeout))? {
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
/// The sender's memory is never shown as plain bytes, since it could change under them (rule S1): they are
/// copied out, written to a descriptor by the kernel, or read one by one.
pub struct Chunk<'t> {
    transfer: &'t mut ShmTransfer<Receiver, Receiving>,
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
    /// What was read is what was sent only if the sender keeps to the rules: it could write there still, so
    /// that two reads of one byte may differ. Whoever checks bytes before using them copies them first.
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

    /// Consumes all bytes, having the kernel write them to a socket, pipe or file.
    ///
    /// Neither a socket nor a pipe is blocked on while others could work: when it takes nothing
    /// more, this thread [lends](crate::workers::blocking) its place until it does.
    ///
    /// # Errors
    /// [`Error::Timeout`] when the sink takes nothing for the transfer's
    /// [timeout](ShmTransfer::set_timeout); [`Error::Sink`] when it fails.
    #[cfg(unix)]
    pub fn write_to(&mut self, sink: impl AsFd) -> Result<()> {
        self.transfer.write_open(sink.as_fd(), &mut None, |_| false).map(drop)
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

impl Receiver {
    fn header(&self) -> &Header {
        self.guard.segment.header()
    }

    /// The metadata, so many bytes of it (rule P3).
    #[inline(never)]
    fn metadata(&self, len: u32) -> Result<Box<[u8]>, PeerFault> {
        let limit = MAX_METADATA as u32;
        let bytes = self.header().announcement.metadata.get(..len as usize);
        let bytes = bytes.ok_or(PeerFault::MetadataTooLong { len, limit })?;
        Ok(bytes.iter().map(|byte| byte.load(Relaxed)).collect())
    }

    /// Has what is asked next go to the successor of a server that ends.
    #[cold]
    fn note_leaving(&self) {
        if let Some(link) = self.offer.link() {
            link.set_leaving();
        }
    }

    /// Tells a sender that waits for a slot that bytes were taken (rule P9). A hint, ours alone to write.
    pub(super) fn tell_progress(&self) {
        let progress = &self.header().receiver.progress;
        progress.store(progress.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Whether others stand in line for a segment of the pool.
    #[cfg(target_os = "linux")]
    pub(super) fn is_segment_wanted(&self) -> bool {
        self.guard.is_wanted()
    }

    /// Fails in a child of `fork`: the transfer is its parent's.
    #[inline(always)]
    fn check_origin(&self) -> Result<(), Misuse> {
        self.guard.segment.origin().check()
    }

    fn await_filled(&mut self, deadline: Deadline, awaited: Awaited) -> Result<Permit> {
        let header = self.guard.segment.header();
        let is_severed = || self.offer.is_severed();
        let cpus: (&AtomicU32, &AtomicU32) = (&header.receiver.cpu, &header.announcement.cpu);
        match await_permit(
            &header.filled,
            (&mut self.spinner, &self.presence),
            cpus,
            deadline,
            is_severed,
        ) {
            Ok(permit) => Ok(permit),
            Err(interrupted) => Err(self.why_interrupted(interrupted, awaited)),
        }
    }

    #[cold]
    fn why_interrupted(&self, interrupted: Interrupted, awaited: Awaited) -> Error {
        match interrupted {
            Interrupted::TimedOut => Error::Timeout(awaited),
            Interrupted::Poisoned => self.why_poisoned(),
            Interrupted::Os(source) => Error::os("futex")(source),
        }
    }

    /// Who ended the wait for filled slots: the sender, its death, or our own side.
    fn why_poisoned(&self) -> Error {
        match (self.header().turn.phase_of(self.generation), self.offer.link()) {
            (Some(Phase::Aborted), _) => Error::Aborted,
            (Some(Phase::Withdrawn), None) => Misuse::NeverSent.into(),
            (_, Some(link)) if link.is_severed() => link.disconnect_reason(),
            // An aborting sender poisons just before its last act, which sets the phase.
            (Some(Phase::Accepted | Phase::Announced), _) => Error::Aborted,
            _ => PeerFault::BaselessPoison.into(),
        }
    }
}

impl Receiver {
    /// Withdraws what no sender accepted, and cancels what one is still at.
    fn end(&mut self) -> Option<Arc<Link>> {
        let link = self.offer.end();
        let header = self.header();
        // Fails, rightly, for every transfer that a sender has taken up.
        let _ = header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn);
        if let Some(Phase::Accepted | Phase::Announced) = header.turn.phase_of(self.generation) {
            header.receiver.cancelled.store(1, Relaxed); // published by the poison
            header.free.poison();
        }
        link
    }
}

impl Drop for Receiver {
    /// Ends the transfer, and gives the segment back.
    fn drop(&mut self) {
        if !self.is_kept && self.check_origin().is_ok() {
            let link = self.end();
            self.guard.give_back(self.generation, link);
        }
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.guard.segment.id();
        f.debug_struct("Receiver")
            .field("segment", &id)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
