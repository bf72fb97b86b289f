//! The sender's side of a transfer: from the request to leaving the segment.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::Waker;
use std::time::Instant;

use crate::error::{Awaited, Error, Misuse, PeerFault, Result};
use crate::peer::{Link, Peer, Registration};
use crate::segment::{Header, Phase, Segment, SlotWriter, WriteSlots};
use crate::sync::atomic::Relaxed;
use crate::sync::{BUDGET, Deadline, Permit};

#[cfg(feature = "tokio")]
use super::wait::Awaiting;
use super::wait::{Idle, Wait, Waiter, poll_permit, publish_cpu, why_interrupted};
use super::{FOUND, METADATA_LIMIT, Metadata, Offer, Refusal, ShmTransfer, Size};

#[cfg(unix)]
mod file;
#[cfg(target_os = "linux")]
mod lend;
#[cfg(all(test, loom))]
mod model;
mod slot;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(any(feature = "tokio", loom))]
mod wanted;

#[cfg(target_os = "linux")]
pub(crate) use lend::Lending;
pub use slot::{Sending, Slot};
#[cfg(any(feature = "tokio", loom))]
pub(crate) use wanted::Wanted;

/// The side that answers a request and writes the bytes.
pub struct Sender {
    segment: Arc<Segment<WriteSlots>>,
    stand: Stand,
    waiter: Waiter,
    /// When a slot was last handed over.
    posted: Option<Instant>,
}

/// What a sender may do with its segment.
enum Stand {
    /// It may accept the offer. The link counts it as under way, but has nothing to poison yet.
    Asked {
        generation: u64,
        registration: Registration,
    },
    On(SlotWriter),
    /// It has left with this phase, or never accepted.
    Off(Phase),
}

/// The number of senders in this process.
static SENDERS: AtomicUsize = AtomicUsize::new(0);

/// A request has come in; nothing has been answered yet.
pub struct Starting {
    key: Arc<[u8]>,
    loans: Loans,
}

/// How an answer to this request can be lent.
#[derive(Clone)]
pub(crate) enum Loans {
    /// Not at all: the receiver asked for the bytes themselves, or the queue cannot.
    None,
    /// By introducing the loan over the connection.
    ByLink,
    /// By giving it to the receiver, who is in this process.
    Within(Arc<Offer>),
}

impl ShmTransfer<Sender, Starting> {
    pub(crate) fn begin(
        segment: Arc<Segment<WriteSlots>>,
        generation: u64,
        key: Arc<[u8]>,
        link: &Arc<Link>,
        loans: Loans,
    ) -> ShmTransfer<Sender, Starting> {
        let side = Sender {
            segment,
            stand: Stand::Asked { generation, registration: link.count() },
            waiter: Waiter::among(&SENDERS),
            posted: None,
        };
        ShmTransfer { side, state: Starting { key, loans } }
    }

    /// Disarms `Drop`: the request was never delivered, and is handed back.
    pub(crate) fn forget(mut self) {
        self.side.stand = Stand::Off(Phase::Idle);
    }

    /// What is asked for.
    pub fn key(&self) -> &[u8] {
        &self.state.key
    }

    /// What is asked for, as an owned value.
    pub(crate) fn shared_key(&self) -> Arc<[u8]> {
        Arc::clone(&self.state.key)
    }

    /// The process that asks; `None` within one process.
    pub fn peer(&self) -> Option<Peer> {
        self.side.stand.link()?.peer()
    }

    /// Accepts the request, and announces `size` bytes ([`Size::Unknown`] for a stream). The
    /// receiver learns of it with the first chunk (rule P2).
    ///
    /// # Errors
    /// [`Error::Stale`] when the receiver has withdrawn the request: nothing was written.
    #[inline(always)]
    pub fn accept(self, size: impl Into<Size>) -> Result<ShmTransfer<Sender, Sending>> {
        self.accept_with(size, &())
    }

    /// As [`accept`](Self::accept), with metadata beside the size.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for metadata that does not fit.
    #[inline(always)] // spares a move of the whole transfer
    pub fn accept_with(
        mut self,
        size: impl Into<Size>,
        metadata: &impl Metadata,
    ) -> Result<ShmTransfer<Sender, Sending>> {
        let size = size.into();
        self.side.accept(size, &metadata.encode())?;
        Ok(ShmTransfer { side: self.side, state: Sending::new(size) })
    }

    /// Answers that there will be no bytes, and why.
    ///
    /// # Errors
    /// [`Error::Stale`] when the receiver has withdrawn the request; [`Error::Misuse`] for metadata
    /// that does not fit.
    pub fn refuse(mut self, why: Refusal) -> Result<()> {
        let metadata = match &why {
            Refusal::Other { metadata, .. } => &metadata[..],
            _ => &[],
        };
        self.side.announce(why.to_word(), 0, metadata)?;
        self.side.end_without_bytes(Phase::Refused)
    }
}

impl Stand {
    /// The link to the receiver; `None` after the end.
    fn link(&self) -> Option<&Link> {
        match self {
            Stand::Asked { registration, .. } => Some(registration.link()),
            Stand::On(writer) => Some(writer.link()),
            Stand::Off(_) => None,
        }
    }

    /// Has a task woken as soon as the receiver may have freed a slot.
    fn wake_later(&self, task: &Waker) {
        if let Stand::On(writer) = self {
            writer.wake_later(task);
        }
    }

    /// Takes the writer out of a sender that leaves with this phase; `None` unless it has accepted.
    fn leave(&mut self, phase: Phase) -> Option<SlotWriter> {
        match mem::replace(self, Stand::Off(phase)) {
            Stand::On(writer) => Some(writer),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl Sender {
    fn header(&self) -> &Header {
        self.segment.header()
    }

    /// Accepts the request, with bytes to follow.
    #[inline(always)]
    fn accept(&mut self, size: Size, metadata: &[u8]) -> Result<()> {
        if size == Size::Known(Size::UNKNOWN) {
            return Err(Misuse::SizeReserved.into());
        }
        self.announce(FOUND, size.to_word(), metadata)
    }

    /// Accepts the request, and writes the announcement.
    fn announce(&mut self, status: u32, size: u64, metadata: &[u8]) -> Result<()> {
        let (len, limit) = (metadata.len(), METADATA_LIMIT);
        if len > limit {
            return Err(Misuse::MetadataTooLong { len, limit }.into());
        }
        self.take_up()?;
        let announcement = &self.header().announcement;
        announcement.status.store(status, Relaxed);
        announcement.size.store(size, Relaxed);
        announcement.metadata_len.store(len as u32, Relaxed);
        for (to, byte) in announcement.metadata.iter().zip(metadata) {
            to.store(*byte, Relaxed);
        }
        Ok(())
    }

    /// Takes the segment, if the request still stands (rule P1).
    #[inline(always)]
    fn take_up(&mut self) -> Result<()> {
        self.segment.origin().check()?;
        let stand = mem::replace(&mut self.stand, Stand::Off(Phase::Idle));
        let Stand::Asked { generation, registration } = stand else {
            return Err(Misuse::TransferOver.into());
        };
        let writer = SlotWriter::accept(&self.segment, generation, registration);
        let Some(writer) = writer else { return Err(Error::Stale) };
        // What it replaces is `Off`, which has nothing to drop.
        mem::forget(mem::replace(&mut self.stand, Stand::On(writer)));
        let announcement = &self.header().announcement;
        announcement.pid.store(self.segment.origin().pid(), Relaxed);
        publish_cpu(&announcement.cpu);
        Ok(())
    }

    /// The right to write. Fails if this sender does not have the segment, and in a child of
    /// `fork`: the parent has it there.
    fn writer(&mut self) -> Result<&mut SlotWriter> {
        self.segment.origin().check()?;
        match &mut self.stand {
            Stand::On(writer) => Ok(writer),
            _ => Err(Misuse::TransferOver.into()),
        }
    }

    /// Waits for a free slot as long as the receiver makes progress: until it has taken no byte for
    /// the whole timeout.
    fn await_progress(&mut self) -> Result<Permit> {
        let mut idle = Idle::new(self.waiter.timeout(), self.progress());
        loop {
            match self.await_free(idle.look_again()) {
                Err(Error::Timeout(_)) if !idle.is_over(self.progress()) => {}
                settled => return settled,
            }
        }
    }

    /// Changes whenever the receiver takes bytes (rule P9).
    pub(crate) fn progress(&self) -> u32 {
        self.header().receiver.progress.load(Relaxed)
    }

    fn await_free(&mut self, deadline: Deadline) -> Result<Permit> {
        let Sender { segment, stand, waiter, .. } = self;
        let header = segment.header();
        // Unlike the receiver, the sender does not drain permits after poison: no receiver is left
        // to read the slots.
        if header.free.is_poisoned() {
            return Err(self.why_poisoned());
        }
        let permit = waiter.wait(Wait {
            semaphore: &header.free,
            our_cpu: &header.announcement.cpu,
            peer_cpu: &header.receiver.cpu,
            deadline,
            is_severed: || stand.link().is_some_and(Link::is_severed),
        });
        permit.map_err(|why| why_interrupted(why, Awaited::FreeSlot, || self.why_poisoned()))
    }

    /// As [`await_free`](Self::await_free), without waiting: times out at once, and has the task
    /// woken later, if there is one.
    fn poll_free(&mut self, task: Option<&Waker>) -> Result<Permit> {
        let header = self.segment.header();
        if header.free.is_poisoned() {
            return Err(self.why_poisoned());
        }
        publish_cpu(&header.announcement.cpu);
        let is_severed = || self.stand.link().is_some_and(Link::is_severed);
        let wake_later = task.map(|task| || self.stand.wake_later(task));
        let permit = poll_permit(&header.free, is_severed, wake_later);
        permit.map_err(|why| why_interrupted(why, Awaited::FreeSlot, || self.why_poisoned()))
    }

    /// Why the wait for free slots ended: the receiver cancelled, or it died.
    fn why_poisoned(&self) -> Error {
        if self.header().receiver.cancelled.load(Relaxed) != 0 {
            return Error::Cancelled;
        }
        match self.stand.link() {
            Some(link) if link.is_severed() => link.disconnect_reason(),
            _ => PeerFault::BaselessPoison.into(),
        }
    }

    /// Hands a filled slot over and wakes the receiver; in batches, only once for several slots.
    fn hand_over(&mut self, permit: Permit, in_batches: bool) {
        let is_late = in_batches && self.puts_off_wake_up();
        let header = self.segment.header();
        header.filled.add(permit);
        if !is_late {
            header.filled.wake();
            self.stand.link().into_iter().for_each(Link::wake_tasks);
        }
    }

    /// Whether the wake-up for this slot can be put off until a later slot. It cannot for the slot
    /// with the announcement, or when the source is slower than a wake-up.
    fn puts_off_wake_up(&mut self) -> bool {
        let before = self.posted.replace(Instant::now()); // none before the slot that announces
        let slots = self.segment.geometry().slot_count();
        before.is_some_and(|before| before.elapsed() < BUDGET)
            && self.waiter.can_put_off(&self.header().free, slots)
    }

    /// Hands over the announcement, which no bytes follow, and leaves the segment.
    fn end_without_bytes(&mut self, phase: Phase) -> Result<()> {
        let header = self.header();
        // Nothing has been sent yet, so all slots are free.
        let permit = header.free.try_wait().map_err(|_| PeerFault::BaselessPoison)?;
        self.end(phase, permit)
    }

    /// Hands over the last permit and leaves the segment.
    fn end(&mut self, phase: Phase, permit: Permit) -> Result<()> {
        let Some(writer) = self.stand.leave(phase) else { return Err(Misuse::TransferOver.into()) };
        let header = self.segment.header();
        header.filled.add(permit);
        let (left, link) = writer.leave(phase);
        header.filled.wake(); // reads only
        link.wake_tasks();
        Ok(left?)
    }

    /// Gives up, unless the transfer has ended already.
    fn abort(&mut self) {
        if !self.segment.origin().is_here() {
            return;
        }
        if matches!(self.stand, Stand::Asked { .. }) {
            let _ = self.take_up(); // fails if the request was withdrawn
        }
        let Some(writer) = self.stand.leave(Phase::Aborted) else { return };
        let header = self.segment.header();
        header.filled.set_poison();
        // Fails only if the peer corrupted the word; the receiver cannot be told then.
        let (_, link) = writer.leave(Phase::Aborted);
        header.filled.wake(); // reads only
        link.wake_tasks();
    }
}

#[cfg(feature = "tokio")]
impl Awaiting for Sender {
    fn is_woken(&self) -> bool {
        self.stand.link().is_none_or(Link::can_be_signalled)
    }

    fn begin_tries(&mut self) -> bool {
        self.waiter.begin_tries(&self.segment.header().receiver.cpu)
    }

    fn end_tries(&mut self, in_time: bool) {
        self.waiter.end_tries(in_time);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for Starting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Starting").field("key", &self.key.escape_ascii().to_string()).finish()
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("segment", &self.segment.id()).finish_non_exhaustive()
    }
}
