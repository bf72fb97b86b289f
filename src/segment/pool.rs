//! The pool of segments: leases in order of arrival, and what becomes of a segment afterwards.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::{Awaited, Error, Misuse, Result};
use crate::peer::Link;
use crate::process::Origin;
use crate::protocol::Ended;
use crate::random::random;
use crate::sync::atomic::Relaxed;
use crate::sync::modelled::{Mutex, lock, yield_now};
use crate::sync::{Deadline, FairSemaphore, Interrupted, Semaphore};
use crate::workers;

#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests;

use super::{Backing, Geometry, Phase, PoolId, ReadSlots, Segment, SegmentId, WriteSlots};

/// How long a lease waits for a late sender to leave a segment before it replaces that segment.
/// A sender that runs leaves at its next slot, microseconds later; one that does not is stopped.
const GRACE: Duration = Duration::from_millis(20);

/// How often, during the grace, a sender that hung up is asked whether it left or died, and the turn
/// word is looked at. loom knows no time: there, as often as there is anything new.
const RECHECK: Duration = Duration::from_millis(if cfg!(loom) { 0 } else { 1 });

/// A generation that no turn word can name.
pub(crate) const NO_GENERATION: u64 = u64::MAX;

/// A fixed number of segments of one geometry, owned by the receiving process.
///
/// Cheap to clone; all clones are the same pool. Its memory is allocated when the pool is made and
/// reused from then on; a transfer needs one segment, whatever the size of what it moves.
///
/// ```
/// use shmferry::segment::{Memfd, SegmentPool};
/// use shmferry::Deadline;
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
    pub quarantined: usize,
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
    /// [`Error::Timeout`] when none came free in time; [`Error::Os`] when no segment that is left can
    /// be used, and none of them replaced, or [`Error::NameTaken`] when another has taken the name of
    /// a new one; [`Error::Misuse`] in a child of `fork`, whose parent's the pool is.
    pub fn lease(&self, deadline: Deadline) -> Result<Lease<B>> {
        let pool = &self.shared;
        pool.origin.check()?;
        if !pool.available.try_enter() && !workers::blocking(|| pool.available.enter(deadline)) {
            return Err(Error::Timeout(Awaited::Lease));
        }
        let pooled = pool.take()?;
        Ok(Lease { pooled: Some(pooled), pool: Arc::clone(pool) })
    }

    /// Which pool this is.
    pub fn id(&self) -> PoolId {
        self.shared.id
    }

    /// How its segments are cut.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// How the pool is doing at this moment. All zero in a child of `fork`: nothing of the pool is
    /// the child's.
    pub fn stats(&self) -> PoolStats {
        if !self.shared.origin.is_here() {
            return PoolStats { segments: 0, idle: 0, quarantined: 0, retired: 0 };
        }
        let state = lock(&self.shared.state);
        PoolStats {
            segments: state.live.len(),
            idle: state.idle.len(),
            quarantined: state.quarantined.len(),
            retired: state.version,
        }
    }

    /// The process that owns it.
    #[cfg(target_os = "linux")]
    pub(crate) fn origin(&self) -> Origin {
        self.shared.origin
    }

    /// Changes whenever a segment is replaced.
    pub(crate) fn version(&self) -> u64 {
        lock(&self.shared.state).version
    }

    /// The segments of this moment, with the edition that they make up.
    pub(crate) fn live(&self) -> (u64, Vec<Arc<PooledSegment<B>>>) {
        let state = lock(&self.shared.state);
        (state.version, state.live.values().cloned().collect())
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
            return Err(Misuse::OutOfRange {
                what: "the number of segments",
                given,
                least: 1,
                most,
            }
            .into());
        }
        let geometry = Geometry::divide(self.segment_len, self.slots)?;
        let asked = geometry.mapped_len() as u64 * u64::from(self.segments);
        // Asking the kernel for more than there is gets this process killed, not an error.
        if let Some(available) = B::available().filter(|available| *available < asked) {
            let source = format!("only {available} bytes are available");
            return Err(Error::Memory {
                asked,
                source: io::Error::new(io::ErrorKind::OutOfMemory, source),
            });
        }

        let id = PoolId(random().map_err(Error::os("getrandom"))?);
        let shared = Shared {
            id,
            geometry,
            grace: self.grace,
            origin: Origin::here(),
            available: FairSemaphore::new(self.segments as usize),
            state: Mutex::new(State {
                idle: Vec::new(),
                quarantined: VecDeque::new(),
                live: BTreeMap::new(),
                version: 0,
                next_index: 0,
                unused: Vec::new(),
            }),
            ownership: B::own(id)?,
        };
        for _ in 0..self.segments {
            let pooled = shared.make().map_err(|error| match error {
                Error::Os { source, .. } if is_lack_of_memory(&source) => {
                    Error::Memory { asked, source }
                }
                other => other,
            })?;
            let mut state = lock(&shared.state);
            state.live.insert(pooled.segment.id().index, Arc::clone(&pooled));
            state.idle.push(pooled);
        }
        Ok(SegmentPool { shared: Arc::new(shared) })
    }
}

/// A segment taken from its pool; goes back when dropped.
///
/// [`request`](Self::request) turns it into a transfer.
pub struct Lease<B: Backing> {
    /// `None` once the lease has become a transfer.
    pooled: Option<Arc<PooledSegment<B>>>,
    pool: Arc<Shared<B>>,
}

impl<B: Backing> Lease<B> {
    /// The segment that was leased.
    pub fn segment(&self) -> &Segment<ReadSlots> {
        &self.pooled().segment
    }

    fn pooled(&self) -> &Arc<PooledSegment<B>> {
        match &self.pooled {
            Some(pooled) => pooled,
            None => unreachable!("only `into_parts` takes it, and the lease with it"),
        }
    }

    /// What it takes to lease the same segment again once its transfer is over.
    pub(crate) fn again(&self) -> LeaseAgain<B> {
        LeaseAgain { pooled: Arc::clone(self.pooled()), pool: Arc::clone(&self.pool) }
    }

    /// Splits the lease into what the request needs and what the transfer holds.
    pub(crate) fn into_parts(mut self) -> (Arc<PooledSegment<B>>, SegmentGuard) {
        let pooled = Arc::clone(self.pooled());
        self.pooled = None;
        let segment = Arc::clone(&pooled.segment);
        let pool = Arc::clone(&self.pool) as Arc<dyn TakeBack>;
        (pooled, SegmentGuard { segment, pool })
    }
}

impl<B: Backing> Drop for Lease<B> {
    fn drop(&mut self) {
        if let Some(pooled) = self.pooled.take().filter(|_| self.pool.origin.is_here()) {
            self.pool.put_idle(pooled);
        }
    }
}

impl<B: Backing> fmt::Debug for Lease<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("segment", self.segment()).finish()
    }
}

/// A segment that goes from one transfer to the next, past the line of those who wait for one.
pub(crate) struct LeaseAgain<B: Backing> {
    pooled: Arc<PooledSegment<B>>,
    pool: Arc<Shared<B>>,
}

impl<B: Backing> LeaseAgain<B> {
    /// Leases the segment again, or its replacement.
    pub(crate) fn lease(self, ended: Ended) -> Result<Lease<B>> {
        let Ended { generation, link } = ended;
        let LeaseAgain { pooled, pool } = self;
        match pool.recover(Quarantined { pooled, generation, link }, pool.grace) {
            Ok(pooled) => Ok(Lease { pooled: Some(pooled), pool }),
            Err((quarantined, error)) => {
                pool.put_quarantined(quarantined);
                Err(error)
            }
        }
    }
}

/// A segment in a transfer's hands, whatever its backing.
pub(crate) struct SegmentGuard {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pool: Arc<dyn TakeBack>,
}

impl SegmentGuard {
    /// Gives the segment back after `generation`. Straight to the idle ones if the sender is off
    /// it; otherwise it lingers (rule P6), and `link` tells whether the sender lives.
    pub(crate) fn give_back(&self, generation: u64, link: Option<Arc<Link>>) {
        self.pool.take_back(&self.segment, generation, link);
    }
}

impl SegmentGuard {
    /// Whether others stand in line for a segment of the pool.
    pub(crate) fn is_wanted(&self) -> bool {
        self.pool.is_waited_for()
    }
}

trait TakeBack: Send + Sync {
    fn is_waited_for(&self) -> bool;
    fn take_back(&self, segment: &Segment<ReadSlots>, generation: u64, link: Option<Arc<Link>>);
}

/// A segment of the pool, with what makes it reachable for peers.
pub(crate) struct PooledSegment<B> {
    pub(crate) segment: Arc<Segment<ReadSlots>>,
    pub(crate) backing: B,
    /// Mapped for writing when a sender in this process first needs it.
    writable: OnceLock<Arc<Segment<WriteSlots>>>,
}

impl<B: Backing> PooledSegment<B> {
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
    /// The process that owns it.
    origin: Origin,
    /// Counts `idle` and `quarantined` together.
    available: FairSemaphore,
    state: Mutex<State<B>>,
    /// Last, since it is dropped after the segments.
    ownership: B::Ownership,
}

struct State<B> {
    /// The one used last is leased first: its pages are warm.
    idle: Vec<Arc<PooledSegment<B>>>,
    /// The oldest is looked at first: its sender has had the most time to leave.
    quarantined: VecDeque<Quarantined<B>>,
    /// Every segment that is not retired, by index.
    live: BTreeMap<u32, Arc<PooledSegment<B>>>,
    /// How many segments have been replaced.
    version: u64,
    /// Above all that were ever given to a segment, and to those in `unused`.
    next_index: u32,
    /// Numbers whose segment could not be made: no peer has heard of them.
    unused: Vec<u32>,
}

impl<B> State<B> {
    /// A number that no segment of this pool ever had.
    fn fresh_index(&mut self) -> Result<u32> {
        if let Some(index) = self.unused.pop() {
            return Ok(index);
        }
        let index = self.next_index;
        self.next_index = index.checked_add(1).ok_or(Misuse::PoolWornOut)?;
        Ok(index)
    }
}

/// Given back while its sender was on it.
struct Quarantined<B> {
    pooled: Arc<PooledSegment<B>>,
    generation: u64,
    link: Option<Arc<Link>>,
}

impl<B: Backing> Shared<B> {
    fn make(&self) -> Result<Arc<PooledSegment<B>>> {
        let index = lock(&self.state).fresh_index()?;
        let id = SegmentId { pool: self.id, index };
        match B::create(&self.ownership, id, self.geometry) {
            Ok((segment, backing)) => Ok(Arc::new(PooledSegment {
                segment: Arc::new(segment),
                backing,
                writable: OnceLock::new(),
            })),
            Err(error) => {
                // A number whose name is another's now would fail each time.
                if !matches!(error, Error::NameTaken { .. }) {
                    lock(&self.state).unused.push(index);
                }
                Err(error)
            }
        }
    }

    /// A segment to lease, for a caller that has passed the turnstile: it counts one for each.
    fn take(&self) -> Result<Arc<PooledSegment<B>>> {
        let first = {
            let mut state = lock(&self.state);
            match state.idle.pop() {
                Some(pooled) if state.quarantined.is_empty() => pooled,
                idle => {
                    drop(state);
                    return self.take_slowly(idle);
                }
            }
        };
        // Most often, all is as it should be.
        if first.is_sound() { Ok(first) } else { self.take_slowly(Some(first)) }
    }

    /// As [`take`](Self::take), where some linger or are not sound. Sound segments first. One that can
    /// be neither recovered nor replaced goes back as it was, and the next is tried, until each had
    /// its turn. Begins with the one in hand, if there is one.
    #[cold]
    fn take_slowly(
        &self,
        mut in_hand: Option<Arc<PooledSegment<B>>>,
    ) -> Result<Arc<PooledSegment<B>>> {
        let mut grace = self.grace;
        let mut failed = None;
        for attempt in 1.. {
            let (candidate, segments, others_linger) = {
                let mut state = lock(&self.state);
                // In one step: we never have more than one in hand, or others would find too few.
                state.quarantined.extend(failed.take());
                let candidate = match in_hand.take().or_else(|| state.idle.pop()) {
                    Some(pooled) => Candidate::Idle(pooled),
                    None => match state.quarantined.pop_front() {
                        Some(quarantined) => Candidate::Quarantined(quarantined),
                        None => {
                            unreachable!("the fair_semaphore counts idle and quarantined segments")
                        }
                    },
                };
                (candidate, state.live.len(), !state.quarantined.is_empty())
            };
            if others_linger && attempt == 1 {
                self.tidy();
            }
            let quarantined = match candidate {
                Candidate::Idle(pooled) if pooled.is_sound() => return Ok(pooled),
                Candidate::Idle(pooled) => {
                    Quarantined { pooled, generation: NO_GENERATION, link: None }
                }
                Candidate::Quarantined(quarantined) => quarantined,
            };
            match self.recover(quarantined, grace) {
                Ok(pooled) => return Ok(pooled),
                Err((quarantined, error)) if attempt >= segments => {
                    self.put_quarantined(quarantined);
                    return Err(error);
                }
                Err((quarantined, _)) => failed = Some(quarantined),
            }
            grace = Duration::ZERO; // the wait for a late sender is for one segment a lease
        }
        unreachable!("the loop has no end of its own")
    }

    fn put_idle(&self, pooled: Arc<PooledSegment<B>>) {
        lock(&self.state).idle.push(pooled);
        self.available.leave();
    }

    fn put_quarantined(&self, quarantined: Quarantined<B>) {
        lock(&self.state).quarantined.push_back(quarantined);
        self.available.leave();
    }

    /// Looks after the segment that has lingered longest, without waiting: most often its sender is off it by
    /// now, or dead. As long as it lingers, it holds on to the link, and that to descriptors.
    fn tidy(&self) {
        if !self.available.try_enter() {
            return;
        }
        let oldest = lock(&self.state).quarantined.pop_front();
        match oldest {
            Some(quarantined) if quarantined.settle(Deadline::after(Duration::ZERO)) => {
                self.put_idle(quarantined.pooled);
            }
            Some(quarantined) => self.put_quarantined(quarantined),
            None => self.available.leave(),
        }
    }

    /// Makes a lingering segment usable, or puts a fresh one in its place; hands it back as it was
    /// where neither can be done.
    fn recover(
        &self,
        quarantined: Quarantined<B>,
        grace: Duration,
    ) -> Result<Arc<PooledSegment<B>>, (Quarantined<B>, Error)> {
        if workers::blocking(|| quarantined.settle(Deadline::after(grace))) {
            return Ok(quarantined.pooled);
        }
        // Retired for good (rule P6): a late sender can then only write to memory that is not read.
        match self.make() {
            Ok(fresh) => {
                let mut state = lock(&self.state);
                state.live.remove(&quarantined.pooled.segment.id().index);
                state.live.insert(fresh.segment.id().index, Arc::clone(&fresh));
                state.version += 1;
                Ok(fresh)
            }
            Err(error) => Err((quarantined, error)),
        }
    }
}

/// What a lease may find.
enum Candidate<B> {
    Idle(Arc<PooledSegment<B>>),
    Quarantined(Quarantined<B>),
}

impl<B: Backing> TakeBack for Shared<B> {
    fn is_waited_for(&self) -> bool {
        self.available.waiting() > 0
    }

    fn take_back(&self, segment: &Segment<ReadSlots>, generation: u64, link: Option<Arc<Link>>) {
        let pooled = lock(&self.state).live.get(&segment.id().index).cloned();
        let Some(pooled) = pooled else { unreachable!("a segment in use is never retired") };
        if reclaim(segment, generation) {
            self.put_idle(pooled);
        } else {
            self.put_quarantined(Quarantined { pooled, generation, link });
        }
    }
}

impl<B> Quarantined<B> {
    /// Waits until the sender is off the segment for certain (rule P6); `false` when that cannot be
    /// told by the deadline.
    fn settle(&self, deadline: Deadline) -> bool {
        let turn = &self.pooled.segment.header().turn;
        loop {
            match turn.phase_of(self.generation) {
                Some(phase) if phase.is_off() => {
                    return reclaim(&self.pooled.segment, self.generation);
                }
                Some(phase @ (Phase::Accepted | Phase::Announced)) => {
                    if let Some(link) = self.link.as_ref().filter(|link| link.is_severed()) {
                        // It may be dying, or alive and about to find out that we hung up.
                        if link.wait_dead(deadline.min(Deadline::after(RECHECK))) {
                            return Semaphore::SURVIVES_KILL
                                && self.was_sent_by(link)
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
            let recheck = deadline.min(Deadline::after(RECHECK));
            match self.pooled.segment.header().filled.wait(recheck) {
                Ok(_) => {}
                Err(Interrupted::TimedOut | Interrupted::Poisoned) => yield_now(),
                Err(Interrupted::Os(_)) => return false,
            }
        }
    }
}

impl<B> Quarantined<B> {
    /// Whether the process at the other end of the link says that it is the sender. Only then does
    /// its death free the segment: another may have inherited the connection, by a fork, and live.
    /// Where the two processes do not number processes alike, the pids differ, and the segment is
    /// replaced.
    fn was_sent_by(&self, link: &Link) -> bool {
        let told = self.pooled.segment.header().announcement.pid.load(Relaxed);
        link.peer().and_then(|peer| peer.pid) == Some(told)
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
