//! The state that all clones of a pool share: its idle and quarantined segments.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Misuse, Result};
use crate::id::{PoolId, SegmentId};
use crate::process::Origin;
use crate::segment::{Backing, Geometry, ReadSlots, Segment};
use crate::sync::modelled::{Mutex, lock};
use crate::sync::{Deadline, FairSemaphore, blocking};

use super::lease::TakeBack;
use super::quarantine::{Ended, PooledSegment, Quarantined};

pub(super) struct Shared<B: Backing> {
    pub(super) id: PoolId,
    pub(super) geometry: Geometry,
    pub(super) grace: Duration,
    /// The process that owns it.
    pub(super) origin: Origin,
    /// Counts `idle` and `quarantined` together.
    pub(super) available: FairSemaphore,
    pub(super) state: Mutex<State<B>>,
    /// Last, since it is dropped after the segments.
    ownership: B::Ownership,
}

pub(super) struct State<B> {
    /// The one used last is leased first: its pages are warm.
    pub(super) idle: Vec<Arc<PooledSegment<B>>>,
    /// The oldest is checked first: its sender has had the most time to leave.
    pub(super) quarantined: VecDeque<Quarantined<B>>,
    /// Every segment that is not retired, by index.
    pub(super) live: BTreeMap<u32, Arc<PooledSegment<B>>>,
    /// How many segments have been replaced.
    pub(super) version: u64,
    /// Greater than every number ever used by a segment, or kept in `unused`.
    pub(super) next_index: u32,
    /// Numbers whose segment could not be made: no peer knows them, so they can be used again.
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

impl<B: Backing> Shared<B> {
    /// A pool for this number of segments, which `add` makes.
    pub(super) fn new(
        id: PoolId,
        geometry: Geometry,
        grace: Duration,
        segments: u32,
        ownership: B::Ownership,
    ) -> Shared<B> {
        let state = State {
            idle: Vec::new(),
            quarantined: VecDeque::new(),
            live: BTreeMap::new(),
            version: 0,
            next_index: 0,
            unused: Vec::new(),
        };
        let available = FairSemaphore::new(segments as usize);
        let (origin, state) = (Origin::here(), Mutex::new(state));
        Shared { id, geometry, grace, origin, available, state, ownership }
    }

    /// Makes one of the initial segments.
    pub(super) fn add(&self) -> Result<()> {
        let pooled = self.make()?;
        let mut state = lock(&self.state);
        state.live.insert(pooled.segment.id().index, Arc::clone(&pooled));
        state.idle.push(pooled);
        Ok(())
    }

    fn make(&self) -> Result<Arc<PooledSegment<B>>> {
        let index = lock(&self.state).fresh_index()?;
        let id = SegmentId { pool: self.id, index };
        match B::create(&self.ownership, id, self.geometry) {
            Ok((segment, backing)) => Ok(Arc::new(PooledSegment::new(segment, backing))),
            Err(error) => {
                // A number whose name is taken would fail each time.
                if !matches!(error, Error::NameTaken { .. }) {
                    lock(&self.state).unused.push(index);
                }
                Err(error)
            }
        }
    }

    /// A segment to lease. The caller has a permit of `available`, so there is one. Waits at most
    /// for `grace`, if a late sender may still write to the only one left.
    pub(super) fn take(&self, grace: Duration) -> Result<Arc<PooledSegment<B>>> {
        let (first, is_alone) = {
            let mut state = lock(&self.state);
            (state.idle.pop(), state.quarantined.is_empty())
        };
        match first {
            // The common case.
            Some(first) if is_alone && first.is_sound() => Ok(first),
            first => self.take_slowly(first, grace),
        }
    }

    /// As [`take`](Self::take), where some segments are quarantined or not sound. Tries `in_hand`
    /// first, then sound ones. A segment that can be neither recovered nor replaced goes back as it
    /// was, and the next is tried, until each was tried once.
    #[cold]
    fn take_slowly(
        &self,
        mut in_hand: Option<Arc<PooledSegment<B>>>,
        mut grace: Duration,
    ) -> Result<Arc<PooledSegment<B>>> {
        let mut failed = None;
        for attempt in 1.. {
            let (idle, quarantined, segments, has_others) = {
                let mut state = lock(&self.state);
                // In one step: a caller that took two segments would leave too few for the others'
                // permits.
                state.quarantined.extend(failed.take());
                let idle = in_hand.take().or_else(|| state.idle.pop());
                let quarantined = if idle.is_some() { None } else { state.quarantined.pop_front() };
                (idle, quarantined, state.live.len(), !state.quarantined.is_empty())
            };
            if has_others && attempt == 1 {
                self.tidy();
            }
            let quarantined = match (idle, quarantined) {
                (Some(pooled), _) if pooled.is_sound() => return Ok(pooled),
                (Some(pooled), _) => Quarantined { pooled, ended: Ended::corrupted() },
                (None, Some(quarantined)) => quarantined,
                (None, None) => unreachable!("`available` counts idle and quarantined segments"),
            };
            match self.recover(quarantined, grace) {
                Ok(pooled) => return Ok(pooled),
                Err((quarantined, error)) if attempt >= segments => {
                    self.put_quarantined(quarantined);
                    return Err(error);
                }
                Err((quarantined, _)) => failed = Some(quarantined),
            }
            grace = Duration::ZERO; // a lease waits for one late sender only
        }
        unreachable!("the loop has no end of its own")
    }

    /// Whether `take` would find one that is idle, or that its sender has left: if only quarantined
    /// ones are left, those that can be are made idle.
    #[cfg(feature = "tokio")]
    pub(super) fn has_settled(&self) -> bool {
        let mut state = lock(&self.state);
        if state.idle.is_empty() {
            let now = Deadline::after(Duration::ZERO);
            let (settled, late) =
                state.quarantined.drain(..).partition::<VecDeque<_>, _>(|one| one.settle(now));
            state.quarantined = late;
            state.idle.extend(settled.into_iter().map(|one| one.pooled));
        }
        !state.idle.is_empty()
    }

    pub(super) fn put_idle(&self, pooled: Arc<PooledSegment<B>>) {
        lock(&self.state).idle.push(pooled);
        self.available.leave();
    }

    pub(super) fn put_quarantined(&self, quarantined: Quarantined<B>) {
        lock(&self.state).quarantined.push_back(quarantined);
        self.available.leave();
    }

    /// Checks, without waiting, the segment that has been quarantined longest: most often its
    /// sender has left it by now, or is dead. This releases the link, and with it descriptors,
    /// early.
    pub(super) fn tidy(&self) {
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

    /// Makes a quarantined segment usable, or replaces it with a fresh one. If neither is possible,
    /// returns it as it was.
    pub(super) fn recover(
        &self,
        quarantined: Quarantined<B>,
        grace: Duration,
    ) -> Result<Arc<PooledSegment<B>>, (Quarantined<B>, Error)> {
        if blocking(|| quarantined.settle(Deadline::after(grace))) {
            return Ok(quarantined.pooled);
        }
        // The old segment is retired for good (rule P6): a late sender writes only to memory that
        // is not read.
        let fresh = match self.make() {
            Ok(fresh) => fresh,
            Err(error) => return Err((quarantined, error)),
        };
        let mut state = lock(&self.state);
        state.live.remove(&quarantined.pooled.segment.id().index);
        state.live.insert(fresh.segment.id().index, Arc::clone(&fresh));
        state.version += 1;
        Ok(fresh)
    }
}

impl<B: Backing> TakeBack for Shared<B> {
    fn is_waited_for(&self) -> bool {
        self.available.waiting() > 0
    }

    fn take_back(&self, segment: &Segment<ReadSlots>, ended: Ended) {
        let pooled = lock(&self.state).live.get(&segment.id().index).cloned();
        let Some(pooled) = pooled else { unreachable!("a segment in use is never retired") };
        if ended.reclaim(segment) {
            self.put_idle(pooled);
        } else {
            self.put_quarantined(Quarantined { pooled, ended });
        }
    }
}
