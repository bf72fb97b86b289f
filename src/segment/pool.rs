//! The pool of segments: leases in order of arrival, and what becomes of a segment afterwards.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::crew;
use crate::error::{Awaited, Error, Misuse, Result};
use crate::peer::Link;
use crate::sync::modelled::{Mutex, lock, yield_now};
use crate::sync::{Deadline, Interrupted, Semaphore, Turnstile};

use super::{Backing, Geometry, Phase, PoolId, ReadSlots, Segment, SegmentId, WriteSlots};

/// How long a lease waits for a late sender to leave a segment before it replaces that segment.
/// A sender that runs leaves at its next slot, microseconds later; one that does not is stopped.
const GRACE: Duration = Duration::from_millis(20);

/// How often, during the grace, a sender that hung up is asked whether it left or died, and the turn
/// word is looked at. loom knows no time: there, as often as there is anything new.
const GLANCE: Duration = Duration::from_millis(if cfg!(loom) { 0 } else { 1 });

/// A fixed number of segments of one geometry, owned by the receiving process.
///
/// Cheap to clone; all clones are the same pool. Its memory is allocated when the pool is made and
/// reused from then on; a transfer needs one segment, whatever the size of what it moves.
///
/// ```
/// use shmferry::{Deadline, Memfd, SegmentPool};
/// use std::time::Duration;
///
/// let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(64 << 10).slots(4).create()?;
/// let deadline = Deadline::after(Duration::from_millis(10));
/// let first = pool.lease(deadline)?;
/// let _second = pool.lease(deadline)?;
/// assert!(pool.lease(deadline).is_err()); // timed out: both are taken
/// drop(first);
/// assert!(pool.lease(deadline).is_ok());
/// # Ok::<(), shmferry::Error>(())
/// ```
pub struct SegmentPool<B: Backing> {
    shared: Arc<Shared<B>>,
}

/// Numbers for a new [`SegmentPool`].
#[derive(Clone, Debug)]
#[must_use]
pub struct SegmentPoolBuilder<B> {
    segments: u32,
    segment_len: u64,
    slots: u32,
    grace: Duration,
    backing: std::marker::PhantomData<fn() -> B>,
}

/// How a pool is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Segments in the pool. Never changes.
    pub segments: usize,
    /// Segments that can be leased at once.
    pub idle: usize,
    /// Segments given back while their sender was still on them: leased again once it is off, or
    /// replaced.
    pub lingering: usize,
    /// Segments replaced so far, because a late sender might still have written to them (rule P6).
    pub retired: u64,
}

impl<B: Backing> SegmentPool<B> {
    /// Starts describing a pool: 8 segments of 2 MiB, in 8 slots each, unless told otherwise:
    /// `docs/design.md`, *Speed*, says why.
    pub fn builder() -> SegmentPoolBuilder<B> {
        SegmentPoolBuilder {
            segments: 8,
            segment_len: 2 << 20,
            slots: 8,
            grace: GRACE,
            backing: std::marker::PhantomData,
        }
    }

    /// Takes a segment, waiting for one until the deadline. Those who wait are served in the order
    /// in which they came. Where the only segment left may still be in a late sender's hands, it is
    /// given 20 ms more, beyond the deadline if need be, and then replaced.
    ///
    /// # Errors
    /// [`Error::Timeout`] when none came free in time; [`Error::Os`] when a retired segment could not be
    /// replaced.
    pub fn lease(&self, deadline: Deadline) -> Result<Lease<B>> {
        let pool = &self.shared;
        if !pool.available.try_enter() && !crew::lend(|| pool.available.enter(deadline)) {
            return Err(Error::Timeout(Awaited::Lease));
        }
        // From here on a segment is ours: idle, or lingering.
        let (idle, lingering, others_linger) = {
            let mut state = lock(&pool.state);
            let idle = state.idle.pop();
            let lingering = if idle.is_none() { state.lingering.pop_front() } else { None };
            (idle, lingering, !state.lingering.is_empty())
        };
        if others_linger {
            pool.tidy();
        }
        let stock = match (idle, lingering) {
            (Some(stock), _) if stock.is_sound() => stock,
            (Some(spoilt), _) => pool.replace(spoilt)?,
            (None, Some(lingering)) => pool.recover(lingering)?,
            (None, None) => unreachable!("the turnstile counts idle and lingering segments"),
        };
        Ok(Lease { stock: Some(stock), pool: Arc::clone(pool) })
    }

    /// Which pool this is.
    pub fn id(&self) -> PoolId {
        self.shared.id
    }

    /// How its segments are cut.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// How the pool is doing at this moment.
    pub fn stats(&self) -> PoolStats {
        let state = lock(&self.shared.state);
        PoolStats {
            segments: state.live.len(),
            idle: state.idle.len(),
            lingering: state.lingering.len(),
            retired: state.edition,
        }
    }

    /// Changes whenever a segment is replaced.
    pub(crate) fn edition(&self) -> u64 {
        lock(&self.shared.state).edition
    }

    /// The segments of this moment, with the edition that they make up.
    pub(crate) fn live(&self) -> (u64, Vec<Arc<Stock<B>>>) {
        let state = lock(&self.shared.state);
        (state.edition, state.live.values().cloned().collect())
    }
}

impl<B: Backing> Clone for SegmentPool<B> {
    fn clone(&self) -> Self {
        SegmentPool { shared: Arc::clone(&self.shared) }
    }
}

impl<B: Backing> fmt::Debug for SegmentPool<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { id, geometry, .. } = &*self.shared;
        f.debug_struct("SegmentPool")
            .field("id", id)
            .field("geometry", geometry)
            .field("stats", &self.stats())
            .finish()
    }
}

impl<B: Backing> SegmentPoolBuilder<B> {
    /// How many segments, and so how many transfers at once: 1 to 65,536.
    pub fn segments(mut self, count: u32) -> Self {
        self.segments = count;
        self
    }

    /// Bytes of payload that a segment holds, all slots together; what does not divide evenly among
    /// the slots is left out.
    pub fn segment_len(mut self, bytes: u64) -> Self {
        self.segment_len = bytes;
        self
    }

    /// How many slots a segment is cut into: 1 is strict turn-taking, more let both sides work at
    /// once.
    pub fn slots(mut self, count: u32) -> Self {
        self.slots = count;
        self
    }

    /// How long a late sender is waited for.
    #[cfg(loom)]
    pub(crate) fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Makes the pool, with all its memory present.
    ///
    /// # Errors
    /// [`Error::Misuse`] for numbers outside their limits, [`Error::Memory`] when the system has
    /// less memory than the pool takes, [`Error::Os`] for anything else it refuses.
    pub fn create(self) -> Result<SegmentPool<B>> {
        const MOST: u32 = 1 << 16;
        if !(1..=MOST).contains(&self.segments) {
            let (given, most) = (self.segments.into(), MOST.into());
            return Err(Misuse::OutOfRange { what: "the number of segments", given, least: 1, most }.into());
        }
        let geometry = Geometry::divide(self.segment_len, self.slots)?;
        let asked = geometry.mapped_len() as u64 * u64::from(self.segments);
        // Asking the kernel for more than there is gets this process killed, not an error.
        if let Some(available) = B::available().filter(|available| *available < asked) {
            let source = format!("only {available} bytes are available");
            return Err(Error::Memory { asked, source: io::Error::new(io::ErrorKind::OutOfMemory, source) });
        }

        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(Error::os("getrandom"))?;
        let id = PoolId(u64::from_ne_bytes(random));
        let shared = Shared {
            id,
            geometry,
            grace: self.grace,
            available: Turnstile::new(self.segments as usize),
            state: Mutex::new(State {
                idle: Vec::new(),
                lingering: VecDeque::new(),
                live: BTreeMap::new(),
                edition: 0,
                next_index: 0,
            }),
            ownership: B::own(id)?,
        };
        for _ in 0..self.segments {
            let stock = shared.make().map_err(|error| match error {
                Error::Os { source, .. } if is_lack_of_memory(&source) => Error::Memory { asked, source },
                other => other,
            })?;
            let mut state = lock(&shared.state);
            state.live.insert(stock.segment.id().index, Arc::clone(&stock));
            state.idle.push(stock);
        }
        Ok(SegmentPool { shared: Arc::new(shared) })
    }
}

/// A segment taken from its pool; goes back when dropped.
///
/// [`request`](Self::request) turns it into a transfer.
pub struct Lease<B: Backing> {
    /// `None` once the lease has become a transfer.
    stock: Option<Arc<Stock<B>>>,
    pool: Arc<Shared<B>>,
}

impl<B: Backing> Lease<B> {
    /// The segment that was leased.
    pub fn segment(&self) -> &Segment<ReadSlots> {
        &self.stock().segment
    }

    fn stock(&self) -> &Arc<Stock<B>> {
        match &self.stock {
            Some(stock) => stock,
            None => unreachable!("only `into_parts` takes it, and the lease with it"),
        }
    }

    /// Splits the lease into what the request needs and what the transfer holds.
    pub(crate) fn into_parts(mut self) -> (Arc<Stock<B>>, Holding) {
        let stock = Arc::clone(self.stock());
        self.stock = None;
        let segment = Arc::clone(&stock.segment);
        let pool = Arc::clone(&self.pool) as Arc<dyn TakeBack>;
        (stock, Holding { segment, pool })
    }
}

impl<B: Backing> Drop for Lease<B> {
    fn drop(&mut self) {
        if let Some(stock) = self.stock.take() {
            self.pool.put_idle(stock);
        }
    }
}

impl<B: Backing> fmt::Debug for Lease<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("segment", self.segment()).finish()
    }
}

/// A segment in a transfer's hands, whatever its backing.
pub(crate) struct Holding {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pool: Arc<dyn TakeBack>,
}

impl Holding {
    /// Gives the segment back after `generation`. Straight to the idle ones if the sender is off
    /// it; otherwise it lingers (rule P6), and `link` tells whether the sender lives.
    pub(crate) fn give_back(&self, generation: u64, link: Option<Arc<Link>>) {
        self.pool.take_back(&self.segment, generation, link);
    }
}

trait TakeBack: Send + Sync {
    fn take_back(&self, segment: &Segment<ReadSlots>, generation: u64, link: Option<Arc<Link>>);
}

/// A segment of the pool, with what makes it reachable for peers.
pub(crate) struct Stock<B> {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pub(crate) backing: B,
    /// Mapped for writing when a sender in this process first needs it.
    writable: OnceLock<Arc<Segment<WriteSlots>>>,
}

impl<B: Backing> Stock<B> {
    /// Whether the segment is really idle, and its semaphores wake, as one that no sender has spoilt.
    fn is_sound(&self) -> bool {
        let header = self.segment.header();
        let idle = matches!(header.turn.load(), Ok((_, Phase::Idle)));
        idle && header.filled.is_sound() && header.free.is_sound()
    }

    /// The segment as a sender in this same process has it.
    pub(crate) fn writable(&self) -> Result<Arc<Segment<WriteSlots>>> {
        if let Some(writable) = self.writable.get() {
            return Ok(Arc::clone(writable));
        }
        let mapped = Arc::new(self.backing.attach(self.segment.id(), self.segment.geometry())?);
        Ok(Arc::clone(self.writable.get_or_init(|| mapped)))
    }
}

struct Shared<B: Backing> {
    id: PoolId,
    geometry: Geometry,
    grace: Duration,
    /// Counts `idle` and `lingering` together.
    available: Turnstile,
    state: Mutex<State<B>>,
    /// Last, since it is dropped after the segments.
    ownership: B::Ownership,
}

struct State<B> {
    /// The one used last is leased first: its pages are warm.
    idle: Vec<Arc<Stock<B>>>,
    /// The oldest is looked at first: its sender has had the most time to leave.
    lingering: VecDeque<Lingering<B>>,
    /// Every segment that is not retired, by index.
    live: BTreeMap<u32, Arc<Stock<B>>>,
    /// How many segments have been replaced.
    edition: u64,
    next_index: u32,
}

/// Given back while its sender was on it.
struct Lingering<B> {
    stock: Arc<Stock<B>>,
    generation: u64,
    link: Option<Arc<Link>>,
}

impl<B: Backing> Shared<B> {
    fn make(&self) -> Result<Arc<Stock<B>>> {
        let index = {
            let mut state = lock(&self.state);
            state.next_index += 1;
            state.next_index - 1
        };
        let id = SegmentId { pool: self.id, index };
        let (segment, backing) = B::create(&self.ownership, id, self.geometry)?;
        Ok(Arc::new(Stock { segment: Arc::new(segment), backing, writable: OnceLock::new() }))
    }

    fn put_idle(&self, stock: Arc<Stock<B>>) {
        lock(&self.state).idle.push(stock);
        self.available.leave();
    }

    fn put_lingering(&self, lingering: Lingering<B>) {
        lock(&self.state).lingering.push_back(lingering);
        self.available.leave();
    }

    /// Looks after the segment that has lingered longest, without waiting: most often its sender is off it by
    /// now, or dead. As long as it lingers, it holds on to the link, and that to descriptors.
    fn tidy(&self) {
        if !self.available.try_enter() {
            return;
        }
        let oldest = lock(&self.state).lingering.pop_front();
        match oldest {
            Some(lingering) if lingering.settle(Deadline::after(Duration::ZERO)) => {
                self.put_idle(lingering.stock);
            }
            Some(lingering) => self.put_lingering(lingering),
            None => self.available.leave(),
        }
    }

    /// Makes a lingering segment usable, or puts a fresh one in its place.
    fn recover(&self, lingering: Lingering<B>) -> Result<Arc<Stock<B>>> {
        if crew::lend(|| lingering.settle(Deadline::after(self.grace))) {
            return Ok(lingering.stock);
        }
        self.replace(lingering.stock)
    }

    /// Retires a segment for good (rule P6): a late sender can then only write to memory that
    /// nobody reads. Without memory for a fresh one, it stays, to be replaced the next time.
    fn replace(&self, stock: Arc<Stock<B>>) -> Result<Arc<Stock<B>>> {
        match self.make() {
            Ok(fresh) => {
                let mut state = lock(&self.state);
                state.live.remove(&stock.segment.id().index);
                state.live.insert(fresh.segment.id().index, Arc::clone(&fresh));
                state.edition += 1;
                Ok(fresh)
            }
            Err(error) => {
                self.put_idle(stock); // not sound, and so not leased as it is
                Err(error)
            }
        }
    }
}

impl<B: Backing> TakeBack for Shared<B> {
    fn take_back(&self, segment: &Segment<ReadSlots>, generation: u64, link: Option<Arc<Link>>) {
        let stock = lock(&self.state).live.get(&segment.id().index).cloned();
        let Some(stock) = stock else { unreachable!("a segment in use is never retired") };
        if reclaim(segment, generation) {
            self.put_idle(stock);
        } else {
            self.put_lingering(Lingering { stock, generation, link });
        }
    }
}

impl<B> Lingering<B> {
    /// Waits until the sender is off the segment for certain (rule P6); `false` when that cannot be
    /// told by the deadline.
    fn settle(&self, deadline: Deadline) -> bool {
        let turn = &self.stock.segment.header().turn;
        loop {
            match turn.phase_of(self.generation) {
                Some(phase) if phase.is_off() => return reclaim(&self.stock.segment, self.generation),
                Some(phase @ (Phase::Accepted | Phase::Announced)) => {
                    if let Some(link) = self.link.as_ref().filter(|link| link.is_severed()) {
                        // It may be dying, or alive and about to find out that we hung up.
                        if link.wait_dead(deadline.min(Deadline::after(GLANCE))) {
                            return Semaphore::SURVIVES_KILL
                                && turn.advance(self.generation, phase, Phase::Idle).is_ok();
                        }
                    }
                }
                // Nothing that an honest sender leaves behind.
                Some(_) | None => return false,
            }
            if deadline.has_passed() {
                return false;
            }
            // Its last act is announced here, just before it: by a permit or by poison. Who has taken
            // that permit already hears nothing more, and so nobody sleeps for long.
            let glance = deadline.min(Deadline::after(GLANCE));
            match self.stock.segment.header().filled.wait(glance) {
                Ok(_) => {}
                Err(Interrupted::TimedOut | Interrupted::Poisoned) => yield_now(),
                Err(Interrupted::Os(_)) => return false,
            }
        }
    }
}

/// Turns a segment that its sender has left back to `Idle`; `false` if it has not.
fn reclaim(segment: &Segment<ReadSlots>, generation: u64) -> bool {
    let turn = &segment.header().turn;
    match turn.phase_of(generation) {
        Some(phase) if phase.is_off() => turn.advance(generation, phase, Phase::Idle).is_ok(),
        _ => false,
    }
}

fn is_lack_of_memory(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull)
}

#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests {
    use super::*;
    use crate::segment::Memfd;

    #[test]
    fn a_look_at_what_lingers_keeps_no_place_when_nothing_does() {
        let builder = SegmentPool::<Memfd>::builder().segments(1).segment_len(64);
        let pool = builder.slots(1).create().unwrap();
        pool.shared.tidy();
        assert!(pool.lease(Deadline::after(Duration::ZERO)).is_ok());
    }
}
