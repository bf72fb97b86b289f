//! The pool where segments cannot be made: sound ones are leased all the same, and nothing is lost.

use std::cell::Cell;

use super::*;
use crate::channel::{InProcess, RequestQueue, Requester};
use crate::error::Misuse;
use crate::id::SegmentId;
use crate::segment::sealed::Backing as Rules;
use crate::segment::{Backing, Memfd};
use crate::segment::{ReadSlots, Segment, WriteSlots};

thread_local! {
    /// Whether the making of segments fails in this thread.
    static REFUSED: Cell<bool> = const { Cell::new(false) };
    /// The number whose name is taken.
    static TAKEN: Cell<Option<u32>> = const { Cell::new(None) };
}

/// A memfd backing whose allocation can be made to fail.
struct Scarce(Memfd);

impl Backing for Scarce {}

impl Rules for Scarce {
    type Ownership = ();

    fn own(_: PoolId) -> Result<()> {
        Ok(())
    }

    fn available() -> Option<u64> {
        None
    }

    fn create(_: &(), id: SegmentId, geometry: Geometry) -> Result<(Segment<ReadSlots>, Scarce)> {
        if REFUSED.get() {
            return Err(Error::Os { call: "test", source: io::ErrorKind::OutOfMemory.into() });
        }
        if TAKEN.get() == Some(id.index) {
            return Err(Error::NameTaken { path: "test".into(), kind: "a file", uid: 7 });
        }
        let (segment, memory) = Memfd::create(&(), id, geometry)?;
        Ok((segment, Scarce(memory)))
    }

    fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
        self.0.attach(id, geometry)
    }
}

fn pool(segments: u32) -> SegmentPool<Scarce> {
    REFUSED.set(false);
    SegmentPool::builder().segments(segments).segment_len(400).slots(4).create().unwrap()
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn at_once() -> Deadline {
    Deadline::after(Duration::ZERO)
}

/// Corrupts a segment's turn word, as a peer can.
fn corrupt(pooled: &PooledSegment<Scarce>) {
    pooled.segment.header().turn.corrupt(7);
}

fn newest(pool: &SegmentPool<Scarce>) -> Arc<PooledSegment<Scarce>> {
    Arc::clone(pool.live().1.last().unwrap())
}

#[test]
fn a_segment_that_cannot_be_replaced_starves_no_sound_one() {
    let pool = pool(4);
    corrupt(&newest(&pool)); // the one that is leased next
    REFUSED.set(true);
    for _ in 0..100 {
        let leases = [(); 3].map(|()| pool.lease(soon()).unwrap());
        // The fourth is the corrupted one: the lease fails, and no permit is lost.
        assert!(matches!(pool.lease(at_once()), Err(Error::Os { .. })));
        assert!(matches!(pool.lease(at_once()), Err(Error::Os { .. })));
        drop(leases);
    }
    REFUSED.set(false);
    let leases: Vec<_> = (0..4).map(|_| pool.lease(soon()).unwrap()).collect();
    assert!(matches!(pool.lease(at_once()), Err(Error::Timeout(_))), "no more than four");
    drop(leases);
    assert_eq!(pool.stats().retired, 1);
}

#[test]
fn a_segment_that_could_not_be_replaced_comes_back_when_its_sender_leaves() {
    let pool = pool(2);
    let queue = InProcess::bounded(1);
    let (request, asked) = pool.lease(soon()).unwrap().request("slow").unwrap();
    queue.send(request, soon()).unwrap();
    let slow = queue.recv(soon()).unwrap().accept(10).unwrap();
    drop(asked); // returned while its sender may still write
    REFUSED.set(true);
    for _ in 0..10 {
        let lease = pool.lease(soon()).unwrap();
        assert!(matches!(pool.lease(at_once()), Err(Error::Os { .. })));
        drop(lease);
    }
    assert_eq!(pool.stats().quarantined, 1);
    drop(slow);
    let leases = [(); 2].map(|()| pool.lease(soon()).unwrap());
    assert_eq!(pool.stats().retired, 0);
    drop(leases);
}

#[test]
fn only_segments_that_were_made_have_numbers_and_none_has_one_twice() {
    let pool = pool(2);
    let queue = InProcess::bounded(1);
    for _ in 0..3 {
        corrupt(&newest(&pool));
        REFUSED.set(true);
        for _ in 0..5 {
            let lease = pool.lease(soon()).unwrap();
            assert!(pool.lease(at_once()).is_err());
            drop(lease);
        }
        REFUSED.set(false);
        let leases = [(); 2].map(|()| pool.lease(soon()).unwrap());
        drop(leases);
    }
    let indices: Vec<_> = lock(&pool.shared.state).live.keys().copied().collect();
    assert_eq!((indices[1], pool.stats().retired), (4, 3), "two at first, and three replaced");

    // When the numbers run out there is an error, and no number is used twice.
    lock(&pool.shared.state).next_index = u32::MAX;
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    corrupt(&newest(&pool));
    drop(transfer);
    let before = pool.live().1.len();
    let results: Vec<_> = (0..2).map(|_| pool.lease(at_once())).collect();
    assert!(results.iter().any(|lease| matches!(lease, Err(Error::Misuse(Misuse::PoolWornOut)))));
    assert_eq!(pool.live().1.len(), before);
}

#[test]
fn a_look_at_what_lingers_keeps_no_place_when_nothing_does() {
    let pool = pool(1);
    pool.shared.tidy();
    assert!(pool.lease(at_once()).is_ok());
}

#[test]
fn a_name_that_is_anothers_costs_one_replacement_and_no_more() {
    let pool = pool(1);
    TAKEN.set(Some(1));
    corrupt(&newest(&pool));
    assert!(matches!(pool.lease(at_once()), Err(Error::NameTaken { .. })));
    assert_eq!(pool.lease(at_once()).unwrap().segment().id().index(), 2);
    TAKEN.set(None);
}
