//! The receiver's side of a transfer: the offer, the reply, and the return of the segment.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Poll, Waker, ready};

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
use crate::segment::{Ended, Header, MAX_METADATA, Phase, ReadSlots, Segment, SegmentGuard};
use crate::sync::atomic::Relaxed;
use crate::sync::{Deadline, Permit};

#[cfg(feature = "tokio")]
use super::wait::Awaiting;
use super::wait::{Wait, Waiter, or_pending, poll_permit, publish_cpu, why_interrupted};
use super::{FOUND, Offer, Refusal, ShmTransfer, Size};
#[cfg(target_os = "linux")]
use super::{FOUND_FOR_WANT_OF_ROOM, LENT};
#[cfg(target_os = "linux")]
use crate::loan::LentBody;

mod chunk;
#[cfg(unix)]
mod copy;

pub use chunk::{Chunk, Receiving};

/// The side that owns the segment and takes the bytes out of it.
pub struct Receiver {
    guard: SegmentGuard,
    generation: u64,
    offer: Arc<Offer>,
    pub(super) waiter: Waiter,
    /// True if the caller of [`give_up`](ShmTransfer::give_up) returns the segment, instead of
    /// `Drop`.
    is_kept: bool,
    /// The whole answer has come: its sender is leaving the segment, and waits for nothing.
    is_complete: bool,
}

/// The number of receivers in this process.
static RECEIVERS: AtomicUsize = AtomicUsize::new(0);

/// A request is out, or about to go out; no reply has been read yet.
#[derive(Debug)]
pub struct Offered {
    /// The reply is there: the permit that came with it.
    permit: Option<Permit>,
}

/// What a sender answered.
#[derive(Debug)]
pub enum Reply {
    /// The sender has what was asked for; the bytes follow.
    Found(ShmTransfer<Receiver, Receiving>),
    /// The sender refused, and says why. The segment goes back to the pool.
    Refused(Refusal),
    /// The sender has lent what was asked for. The segment goes back to the pool.
    #[cfg(target_os = "linux")]
    Lent(LentBody),
}

/// What a sender answered, without consuming the transfer.
pub(crate) enum Answer {
    Found(Receiving),
    Refused(Refusal),
    #[cfg(target_os = "linux")]
    Lent(LentPart),
}

/// The part of a loan that an announcement names: not checked yet.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy)]
pub(crate) struct LentPart {
    pub(crate) id: u64,
    start: u64,
    size: Size,
    metadata_len: u32,
}

impl ShmTransfer<Receiver, Offered> {
    /// Opens the next generation of a leased segment. From now on, a late sender of an older
    /// generation fails at its first step (rule P1).
    pub(crate) fn offer(
        guard: SegmentGuard,
    ) -> Result<(ShmTransfer<Receiver, Offered>, Arc<Offer>, u64)> {
        let generation = open(&guard.segment).inspect_err(|_| {
            // The turn word was corrupted while the segment was leased. It is returned, to be
            // replaced.
            guard.give_back(Ended::corrupted());
        })?;
        let offer = Arc::new(Offer::new(Arc::clone(&guard.segment), generation));
        let waiter = Waiter::among(&RECEIVERS);
        let side = Receiver {
            guard,
            generation,
            offer: Arc::clone(&offer),
            waiter,
            is_kept: false,
            is_complete: false,
        };
        Ok((ShmTransfer { side, state: Offered { permit: None } }, offer, generation))
    }

    /// Waits until [`reply`](Self::reply) has something to read, and consumes nothing.
    ///
    /// # Errors
    /// [`Error::Timeout`] when nothing came in time, after which it may be called again; or those
    /// of [`reply`](Self::reply).
    pub fn wait(&mut self, deadline: Deadline) -> Result<()> {
        self.side.check_origin()?;
        if self.state.permit.is_none() {
            self.state.permit = Some(self.side.await_filled(deadline, Awaited::Reply)?);
        }
        Ok(())
    }

    /// As [`wait`](Self::wait), without waiting: if nothing has come yet, `task` is woken once it
    /// may have. After a wake-up, call this again.
    ///
    /// # Errors
    /// Those of [`reply`](Self::reply).
    pub fn poll_wait(&mut self, task: &Waker) -> Poll<Result<()>> {
        self.poll_reply(Some(task))
    }

    /// As [`poll_wait`](Self::poll_wait), and nobody is woken.
    ///
    /// # Errors
    /// Those of [`reply`](Self::reply).
    pub fn try_wait(&mut self) -> Poll<Result<()>> {
        self.poll_reply(None)
    }

    pub(crate) fn poll_reply(&mut self, task: Option<&Waker>) -> Poll<Result<()>> {
        self.side.check_origin()?;
        if self.state.permit.is_none() {
            let polled = self.side.poll_filled(task, Awaited::Reply);
            self.state.permit = Some(ready!(or_pending(polled))?);
        }
        Poll::Ready(Ok(()))
    }

    /// Waits for the sender's answer. A small file has arrived whole by then (rule P2).
    ///
    /// # Errors
    /// [`Error::Timeout`] when none came in time, which withdraws the request: to go on waiting
    /// instead, [`wait`](Self::wait) first;
    /// [`Error::Disconnected`] or [`Error::Rejected`] when the queue's connection broke;
    /// [`Error::Aborted`] when the sender gave up, [`Error::LoanReturned`] when it lent what this
    /// side has just returned, and [`Error::Peer`] when its answer breaks the protocol.
    pub fn reply(mut self, deadline: Deadline) -> Result<Reply> {
        Ok(match self.read_reply(deadline)? {
            Answer::Found(state) => Reply::Found(self.receiving(state)),
            Answer::Refused(why) => Reply::Refused(why),
            #[cfg(target_os = "linux")]
            Answer::Lent(part) => match self.body_of(part)? {
                Some(body) => Reply::Lent(body),
                None => return Err(Error::LoanReturned),
            },
        })
    }

    /// As [`reply`](Self::reply), without consuming the transfer.
    #[inline]
    pub(crate) fn read_reply(&mut self, deadline: Deadline) -> Result<Answer> {
        self.side.check_origin()?;
        let permit = match self.state.permit.take() {
            Some(permit) => permit,
            None => self.side.await_filled(deadline, Awaited::Reply)?,
        };
        let announcement = &self.side.header().announcement;
        // Each word is read once, checked, and only then used (rule P3).
        let status = announcement.status.load(Relaxed);
        let size = Size::from_word(announcement.size.load(Relaxed));
        let len = announcement.metadata_len.load(Relaxed);
        if status != FOUND {
            #[cfg(target_os = "linux")]
            let loan = announcement.loan.load(Relaxed);
            match status {
                #[cfg(target_os = "linux")]
                LENT => {
                    let start = announcement.loan_start.load(Relaxed);
                    let part = LentPart { id: loan, start, size, metadata_len: len };
                    self.side.is_complete = true;
                    return Ok(Answer::Lent(part));
                }
                #[cfg(target_os = "linux")]
                FOUND_FOR_WANT_OF_ROOM => self.side.offer.make_room(loan),
                refusal => return self.side.refused(refusal, len).map(Answer::Refused),
            }
        }
        let metadata = if len == 0 { Box::default() } else { self.side.metadata(len)? };
        Ok(Answer::Found(Receiving::new(size, metadata, permit)))
    }

    /// What was lent; `None` if this side has returned that loan.
    #[cfg(target_os = "linux")]
    #[inline(never)] // keeps what is not lent as short as it was
    pub(crate) fn body_of(&self, lent: LentPart) -> Result<Option<LentBody>> {
        let Size::Known(len) = lent.size else { return Err(PeerFault::LoanWithoutSize.into()) };
        let metadata = self.side.metadata(lent.metadata_len)?;
        let content = self.side.offer.borrow(lent.id)?;
        let part = (lent.start, len);
        Ok(content.map(|content| LentBody::new(content, part, metadata)).transpose()?)
    }

    /// Goes on with the bytes that were announced.
    pub(crate) fn receiving(self, state: Receiving) -> ShmTransfer<Receiver, Receiving> {
        ShmTransfer { side: self.side, state }
    }

    /// Whether the request went to another process, which may have a successor.
    pub(crate) fn may_have_successor(&self) -> bool {
        self.side.offer.link().is_some_and(|link| link.peer().is_some())
    }

    /// Withdraws the request; `false` if a sender has taken it.
    pub(crate) fn withdraw(&self) -> bool {
        let turn = &self.side.header().turn;
        turn.advance(self.side.generation, Phase::Offered, Phase::Withdrawn).is_ok()
    }

    /// Ends the transfer as its drop does, but leaves it to the caller to return the segment.
    pub(crate) fn give_up(mut self) -> Ended {
        self.side.is_kept = true;
        self.side.end()
    }
}

/// Resets the header for a new generation, and offers it.
fn open(segment: &Segment<ReadSlots>) -> Result<u64, PeerFault> {
    let header = segment.header();
    let (generation, _) = header.turn.load()?;
    // The segment is idle: no other thread or process writes to what is reset here (rule P6).
    header.announcement.status.store(0, Relaxed);
    header.announcement.metadata_len.store(0, Relaxed);
    header.announcement.pid.store(0, Relaxed); // until this generation's sender writes its own
    header.filled.reset(0);
    header.free.reset(segment.geometry().slot_count());
    header.receiver.cancelled.store(0, Relaxed);
    header.receiver.pid.store(segment.origin().pid(), Relaxed);
    publish_cpu(&header.receiver.cpu);
    header.turn.open_next(generation)
}

impl Receiver {
    fn header(&self) -> &Header {
        self.guard.segment.header()
    }

    /// Fails in a child of `fork`: the transfer is its parent's.
    #[inline(always)]
    fn check_origin(&self) -> Result<(), Misuse> {
        self.guard.segment.origin().check()
    }

    /// The metadata, `len` bytes of it, copied out (rule P3).
    #[inline(never)]
    fn metadata(&self, len: u32) -> Result<Box<[u8]>, PeerFault> {
        let limit = MAX_METADATA as u32;
        let bytes = self.header().announcement.metadata.get(..len as usize);
        let bytes = bytes.ok_or(PeerFault::MetadataTooLong { len, limit })?;
        Ok(bytes.iter().map(|byte| byte.load(Relaxed)).collect())
    }

    /// The refusal that a status word stands for. For [`Refusal::Leaving`], marks the link, so that
    /// later requests go to the server's successor.
    fn refused(&mut self, status: u32, metadata_len: u32) -> Result<Refusal> {
        let why = Refusal::from_word(status).ok_or(PeerFault::UnknownStatus(status))?;
        self.is_complete = true;
        Ok(match why {
            Refusal::Leaving => {
                if let Some(link) = self.offer.link() {
                    link.set_leaving();
                }
                why
            }
            Refusal::Other { code, .. } if metadata_len > 0 => {
                Refusal::Other { code, metadata: self.metadata(metadata_len)? }
            }
            standard => standard,
        })
    }

    /// Tells a sender that waits for a slot that bytes were taken (rule P9). A hint; only the
    /// receiver writes it.
    pub(super) fn tell_progress(&self) {
        let progress = &self.header().receiver.progress;
        progress.store(progress.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Whether other callers wait for a segment of the pool.
    #[cfg(target_os = "linux")]
    pub(super) fn is_segment_wanted(&self) -> bool {
        self.guard.is_wanted()
    }

    fn await_filled(&mut self, deadline: Deadline, awaited: Awaited) -> Result<Permit> {
        let Receiver { guard, offer, waiter, .. } = self;
        let header = guard.segment.header();
        let permit = waiter.wait(Wait {
            semaphore: &header.filled,
            our_cpu: &header.receiver.cpu,
            peer_cpu: &header.announcement.cpu,
            deadline,
            is_severed: || offer.is_severed(),
        });
        permit.map_err(|why| why_interrupted(why, awaited, || self.why_poisoned()))
    }

    /// As [`await_filled`](Self::await_filled), without waiting: times out at once, and has the
    /// task woken later, if there is one.
    fn poll_filled(&mut self, task: Option<&Waker>, awaited: Awaited) -> Result<Permit> {
        let header = self.header();
        publish_cpu(&header.receiver.cpu);
        let wake_later = task.map(|task| || self.offer.wake_later(task));
        let permit = poll_permit(&header.filled, || self.offer.is_severed(), wake_later);
        permit.map_err(|why| why_interrupted(why, awaited, || self.why_poisoned()))
    }

    /// Why the wait for filled slots ended: the sender aborted, it died, or this side ended it.
    fn why_poisoned(&self) -> Error {
        match (self.header().turn.phase_of(self.generation), self.offer.link()) {
            (Some(Phase::Aborted), _) => Error::Aborted,
            (Some(Phase::Withdrawn), None) => Misuse::NeverSent.into(),
            (_, Some(link)) if link.is_severed() => link.disconnect_reason(),
            // An aborting sender poisons first, and sets the phase as its last write.
            (Some(Phase::Accepted | Phase::Announced), _) => Error::Aborted,
            _ => PeerFault::BaselessPoison.into(),
        }
    }

    /// Ends the transfer for both sides, unless the whole answer has come.
    fn end(&mut self) -> Ended {
        let breaks_off = !self.is_complete && self.break_off();
        // After the withdrawal: whoever is just sending the request tells the sender, too.
        let link = self.offer.end();
        if breaks_off {
            link.iter().for_each(|link| link.tell_end());
        }
        Ended::new(self.generation, link)
    }

    /// Withdraws the offer if no sender accepted it, and cancels if a sender is still writing;
    /// whether either was the case.
    fn break_off(&self) -> bool {
        let header = self.header();
        // Fails for every transfer that a sender has accepted, as intended.
        let withdrawn = header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn);
        let phase = header.turn.phase_of(self.generation);
        let is_answering = matches!(phase, Some(Phase::Accepted | Phase::Announced));
        if is_answering {
            header.receiver.cancelled.store(1, Relaxed); // published by the poison
            header.free.poison();
        }
        is_answering || withdrawn.is_ok()
    }
}

#[cfg(feature = "tokio")]
impl Awaiting for Receiver {
    fn is_woken(&self) -> bool {
        self.offer.wakes()
    }

    fn begin_tries(&mut self) -> bool {
        self.waiter.begin_tries(&self.guard.segment.header().announcement.cpu)
    }

    fn end_tries(&mut self, in_time: bool) {
        self.waiter.end_tries(in_time);
    }
}

impl Drop for Receiver {
    /// Ends the transfer, and returns the segment.
    fn drop(&mut self) {
        if !self.is_kept && self.check_origin().is_ok() {
            let ended = self.end();
            self.guard.give_back(ended);
        }
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("segment", &self.guard.segment.id())
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
