//! The transfer: what its states share, and how each side waits for the other (rules P).

use std::any::Any;
use std::fmt;
#[cfg(unix)]
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{PeerFault, Result};
use crate::peer::{Link, Registration};
use crate::segment::{MAX_METADATA, Phase, ReadSlots, Segment};
use crate::sync::atomic::{AtomicU32, Relaxed};
use crate::sync::modelled::{Mutex, lock, yield_now};
use crate::sync::{Deadline, Interrupted, Permit, Presence, Semaphore, Spinner, current_cpu};
use crate::workers;

mod metadata;
#[cfg(all(test, loom))]
mod model;
mod receiver;
mod sender;
#[cfg(unix)]
mod sink;
#[cfg(target_os = "linux")]
mod spool;
#[cfg(all(test, not(loom)))]
mod tests;

pub use metadata::Metadata;
pub(crate) use receiver::{Answer, Ended};
pub use receiver::{Chunk, Offered, Receiver, Receiving, Reply};
pub use sender::{Sender, Sending, Slot, Starting};
#[cfg(target_os = "linux")]
pub use sink::send_all;
#[cfg(target_os = "linux")]
pub use spool::Spool;

/// One transfer through one segment, seen from one side, in one state.
///
/// Each state is a type of its own, and a step from one to the next consumes it, so that steps out
/// of order do not compile.
///
/// | side | state | what can be done | leads to |
/// | --- | --- | --- | --- |
/// | [`Receiver`] | [`Offered`] | [`reply`](ShmTransfer::reply) | `Receiving`, or a [`Refusal`] |
/// | [`Receiver`] | [`Receiving`] | [`next_chunk`](ShmTransfer::next_chunk), [`copy_to`](ShmTransfer::copy_to), `io::Read` | |
/// | [`Sender`] | [`Starting`] | [`accept`](ShmTransfer::accept), [`refuse`](ShmTransfer::refuse) | `Sending`, or the end |
/// | [`Sender`] | [`Sending`] | [`next_slot`](ShmTransfer::next_slot), [`send_file`](ShmTransfer::send_file), `io::Write`, [`finish`](ShmTransfer::finish) | the end |
///
/// Dropping is safe at every point (rule P5). A receiver that is dropped early cancels, and the
/// sender's next step fails with [`Error::Cancelled`](crate::Error::Cancelled). A sender that is dropped early, a panic
/// included, aborts: the receiver is given what was filled before, and then [`Error::Aborted`](crate::Error::Aborted).
///
/// # What does not compile
/// Asking for a chunk before there is a reply:
/// ```compile_fail,E0599
/// # use shmferry::protocol::;
/// fn early(mut transfer: ShmTransfer<Receiver, Offered>) {
///     let _ = transfer.next_chunk(Deadline::NEVER);
/// }
/// ```
/// Asking for the next chunk while holding one:
/// ```compile_fail,E0499
/// # use shmferry::protocol::;
/// fn two_at_once(mut body: ShmTransfer<Receiver, Receiving>) -> Result<()> {
///     let first = body.next_chunk(Deadline::NEVER)?;
///     let second = body.next_chunk(Deadline::NEVER)?;
///     drop((first, second));
///     Ok(())
/// }
/// ```
/// Sending before accepting, and accepting twice:
/// ```compile_fail,E0599
/// # use shmferry::protocol::;
/// fn unannounced(mut transfer: ShmTransfer<Sender, Starting>) {
///     let _ = transfer.next_slot(Deadline::NEVER);
/// }
/// ```
/// ```compile_fail,E0382
/// # use shmferry::protocol::;
/// fn twice(transfer: ShmTransfer<Sender, Starting>) {
///     let _ = transfer.accept(1);
///     let _ = transfer.accept(1);
/// }
/// ```
/// Finishing with a slot in hand:
/// ```compile_fail,E0505
/// # use shmferry::protocol::;
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

/// How long the calls that take no deadline wait for the next step of the other side, unless
/// [told otherwise](ShmTransfer::set_timeout): 30 seconds without progress.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The most bytes of [`Metadata`] that travel beside status and size.
pub const METADATA_LIMIT: usize = MAX_METADATA;

/// How many bytes a transfer will bring (rule P4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Exactly so many bytes; fewer or more is an error on both sides.
    Known(u64),
    /// A stream, whose end is marked when it comes.
    Unknown,
}

impl Size {
    const UNKNOWN: u64 = u64::MAX;

    fn from_word(word: u64) -> Size {
        if word == Self::UNKNOWN { Size::Unknown } else { Size::Known(word) }
    }

    fn to_word(self) -> u64 {
        match self {
            Size::Known(bytes) => bytes,
            Size::Unknown => Self::UNKNOWN,
        }
    }

    /// What a file holds. One without blocks on a disk may hold something else than it says, as
    /// in procfs: then the size is unknown.
    ///
    /// # Errors
    /// When the file cannot be asked, or not be read at an offset: a pipe, a directory.
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
    fn from(bytes: u64) -> Size {
        Size::Known(bytes)
    }
}

/// A sender's answer that brings no bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// There is nothing by that key.
    NotFound,
    /// The sender failed.
    Failed,
    /// The key makes no sense to the sender.
    Invalid,
    /// The server ends, and did not take the request: its successor can be asked, which
    /// [`Requester::ask`](crate::channel::Requester::ask) does by itself.
    Leaving,
    /// A code of the application's own.
    Other(u16),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotFound => f.write_str("there is nothing by that key"),
            Refusal::Failed => f.write_str("the server failed"),
            Refusal::Invalid => f.write_str("the key makes no sense to the server"),
            Refusal::Leaving => f.write_str("the server ends, and did not take the request"),
            Refusal::Other(code) => write!(f, "the application's reason {code}"),
        }
    }
}

/// The status word of an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Found,
    Refused(Refusal),
}

impl Status {
    const FOUND: u32 = 1;
    const NOT_FOUND: u32 = 2;
    const FAILED: u32 = 3;
    const INVALID: u32 = 4;
    const LEAVING: u32 = 5;
    const OTHER: u32 = 1 << 16;

    /// Zero, which the receiver wrote before it offered, is no status.
    fn from_word(word: u32) -> Result<Status, PeerFault> {
        Ok(match word {
            Self::FOUND => Status::Found,
            Self::NOT_FOUND => Status::Refused(Refusal::NotFound),
            Self::FAILED => Status::Refused(Refusal::Failed),
            Self::INVALID => Status::Refused(Refusal::Invalid),
            Self::LEAVING => Status::Refused(Refusal::Leaving),
            _ if word >> 16 == 1 => Status::Refused(Refusal::Other(word as u16)),
            _ => return Err(PeerFault::UnknownStatus(word)),
        })
    }

    fn to_word(self) -> u32 {
        match self {
            Status::Found => Self::FOUND,
            Status::Refused(Refusal::NotFound) => Self::NOT_FOUND,
            Status::Refused(Refusal::Failed) => Self::FAILED,
            Status::Refused(Refusal::Invalid) => Self::INVALID,
            Status::Refused(Refusal::Leaving) => Self::LEAVING,
            Status::Refused(Refusal::Other(code)) => Self::OTHER | u32::from(code),
        }
    }
}

/// What a request and its transfer share within the receiver's process: who will answer.
pub(crate) struct Offer {
    segment: Arc<Segment<ReadSlots>>,
    generation: u64,
    state: Mutex<OfferState>,
}

enum OfferState {
    /// The request waits to be sent.
    Unsent,
    /// It went over a connection, which now watches over the segment, and lives as long as this.
    Sent { registration: Registration, _connection: Option<Keep> },
    /// The transfer is over, and the segment may be in other hands.
    Over,
}

/// A connection that lives as long as somebody needs it.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

impl Offer {
    fn new(segment: Arc<Segment<ReadSlots>>, generation: u64) -> Offer {
        Offer { segment, generation, state: Mutex::new(OfferState::Unsent) }
    }

    /// The request went out: from now on the link's end ends the transfer's waits. The connection stays
    /// as long as the transfer, or its end would not be told.
    pub(crate) fn sent_over(&self, link: &Arc<Link>, connection: Option<Keep>) {
        let mut state = lock(&self.state);
        if !matches!(*state, OfferState::Over) {
            let registration = link.register(Arc::clone(&self.segment) as _);
            *state = OfferState::Sent { registration, _connection: connection };
        }
    }

    /// The request was dropped: nobody will answer.
    pub(crate) fn abandon(&self) {
        let state = lock(&self.state);
        if matches!(*state, OfferState::Unsent) {
            let header = self.segment.header();
            // Fails only if a sender has it after all, and then that one answers.
            if header.turn.advance(self.generation, Phase::Offered, Phase::Withdrawn).is_ok() {
                header.filled.poison();
            }
        }
    }

    /// Whether its transfer is over, so that the segment may be in other hands, or gone.
    pub(crate) fn is_over(&self) -> bool {
        matches!(*lock(&self.state), OfferState::Over)
    }

    fn is_severed(&self) -> bool {
        self.link().is_some_and(|link| link.is_severed())
    }

    fn link(&self) -> Option<Arc<Link>> {
        match &*lock(&self.state) {
            OfferState::Sent { registration, .. } => Some(Arc::clone(registration.link())),
            _ => None,
        }
    }

    /// Ends the offer: nothing can poison the segment any more on behalf of this transfer.
    fn end(&self) -> Option<Arc<Link>> {
        let over = std::mem::replace(&mut *lock(&self.state), OfferState::Over);
        match over {
            OfferState::Sent { registration, .. } => Some(Arc::clone(registration.link())),
            _ => None,
        }
    }
}

/// Takes a permit: at once, after a short spin where that can pay (rule P8), or after a sleep,
/// while another of this process's crew may work in our place.
fn await_permit(
    semaphore: &Semaphore,
    (spinner, presence): (&mut Spinner, &Presence),
    (our_cpu, peer_cpu): (&AtomicU32, &AtomicU32),
    deadline: Deadline,
    is_severed: impl Fn() -> bool,
) -> Result<Permit, Interrupted> {
    let cpu = publish_cpu(our_cpu);
    let can_pay = cpu != peer_cpu.load(Relaxed) && !presence.is_crowded();
    match spinner.try_wait(semaphore, can_pay) {
        Err(Interrupted::TimedOut) => {}
        settled => return settled,
    }
    let start = Instant::now();
    let outcome = workers::blocking(|| {
        loop {
            match semaphore.wait(deadline.min(recheck())) {
                // What was filled before the end is still ours, if it came since we looked (P7).
                Err(Interrupted::TimedOut) if is_severed() => {
                    return semaphore.try_wait().map_err(|_| Interrupted::Poisoned);
                }
                Err(Interrupted::TimedOut) if !deadline.has_passed() => yield_now(),
                settled => return settled,
            }
        }
    });
    spinner.slept(start.elapsed());
    outcome
}

/// Whether whoever has just posted may wake its peer later, for several slots at once. Where others wait for a
/// processor, a peer that is woken for each slot runs dry and sleeps again, slot by slot.
///
/// No wake-up is lost: at least half of the slots are in `ours`, which only we take from. So we do not sleep
/// before we have posted again; and a transfer's end, of whatever kind, wakes in any case.
fn can_put_off(ours: &Semaphore, slots: u32, presence: &Presence) -> bool {
    presence.is_crowded() && ours.permits() >= slots.div_ceil(2)
}

/// Death is pushed, by poison; but a peer that hangs up and lives on can wipe the poison off again.
/// So a sleeper looks at what only its own process knows, once a second. loom knows no time: there, a
/// sleeper looks all the time, or never, as the model has it.
fn recheck() -> Deadline {
    #[cfg(loom)]
    return if model::RECHECKS.get() { Deadline::after(Duration::ZERO) } else { Deadline::NEVER };
    #[cfg(not(loom))]
    Deadline::after(Duration::from_secs(1))
}

/// How long one side has waited for the other without progress (rule P9): any byte that it took counts.
/// Looked at several times within the patience, so that a side that stops is cut soon after it.
struct Idle<P> {
    timeout: Duration,
    seen: P,
    /// When progress was last seen.
    since: Instant,
}

impl<P: PartialEq> Idle<P> {
    fn new(timeout: Duration, seen: P) -> Idle<P> {
        Idle { timeout, seen, since: Instant::now() }
    }

    /// When to look for progress next.
    fn look_again(&self) -> Deadline {
        const LOOKS: u32 = 16;
        let least = Duration::from_millis(1);
        let end = self.since.checked_add(self.timeout).map_or(Deadline::NEVER, Deadline::at);
        end.min(Deadline::after((self.timeout / LOOKS).max(least)))
    }

    /// Whether the patience is over, with what is to be seen now.
    fn is_over(&mut self, now: P) -> bool {
        if now != self.seen {
            self.seen = now;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.timeout
    }
}

/// Tells the peer which processor this side runs on (rule P8). A hint: nothing rests on it.
fn publish_cpu(ours: &AtomicU32) -> u32 {
    let cpu = current_cpu();
    if ours.load(Relaxed) != cpu {
        ours.store(cpu, Relaxed);
    }
    cpu
}
