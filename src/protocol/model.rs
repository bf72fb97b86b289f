//! The transfer under loom: pool, receiver, sender and links as they ship, by `ci/loom.sh`.
//!
//! Real are the turn word, the semaphores, the announcement, the chunk words, the return of
//! segments to the pool, and the links' locks. Replaced are the mapping (`mapping_model.rs`), the
//! futex (`sync/model.rs`), the queue (the test hands the request over), and the processor numbers,
//! so that no side spins. Each side of a transfer has a link of its own, as in two processes.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use loom::thread;

use super::*;
use crate::error::{Error, Misuse, Result};
use crate::peer::{Link, Registration};
use crate::segment::sealed::Backing as Rules;
use crate::segment::{
    Backing, Geometry, Mapping, Phase, PoolId, ReadSlots, Segment, SegmentId, SegmentPool,
    WriteSlots,
};
use crate::sync::task_model::run;
use crate::sync::{Deadline, Interrupted, Permit, Semaphore};

/// A backing of ordinary memory, whose accesses loom checks.
pub(crate) struct Watched(Mapping);

thread_local! {
    /// Whether the making of segments fails. All threads of a model run in one real thread.
    static NO_MEMORY: Cell<bool> = const { Cell::new(false) };
}

impl Backing for Watched {}

impl Rules for Watched {
    type Ownership = ();

    fn own(_: PoolId) -> Result<()> {
        Ok(())
    }

    fn available() -> Option<u64> {
        None
    }

    fn create(_: &(), id: SegmentId, geometry: Geometry) -> Result<(Segment<ReadSlots>, Watched)> {
        if NO_MEMORY.get() {
            return Err(Error::os("memfd_create")(std::io::ErrorKind::OutOfMemory));
        }
        let mapping = Mapping::watched(geometry);
        mapping.header().initialise(id, geometry);
        let writable = mapping.writable();
        Ok((Segment::new(id, mapping), Watched(writable)))
    }

    fn attach(&self, id: SegmentId, _: Geometry) -> Result<Segment<WriteSlots>> {
        Ok(Segment::new(id, self.0.writable()))
    }
}

pub(crate) type Pool = SegmentPool<Watched>;
pub(crate) type Asked = ShmTransfer<Receiver, Offered>;
pub(crate) type Asking = ShmTransfer<Sender, Starting>;

std::thread_local! {
    /// Whether sleepers check their link all the time. Each model runs in one real thread.
    static RECHECKS: Cell<bool> = const { Cell::new(false) };
}

/// When a sleeper checks its link again. loom has no clock: all the time, or never.
pub(super) fn recheck() -> Deadline {
    if RECHECKS.get() { Deadline::after(Duration::ZERO) } else { Deadline::NEVER }
}

/// As [`model`], with sleepers that check their link all the time.
fn model_with_rechecks(body: impl Fn() + Sync + Send + 'static) {
    RECHECKS.set(true);
    model(body);
    RECHECKS.set(false);
}

/// Grace periods: as long as a late sender takes, or none.
pub(crate) const LONG_GRACE: Duration = Duration::MAX;
const NO_GRACE: Duration = Duration::ZERO;

/// A pool of one segment, whose slots hold one byte each.
pub(crate) fn pool(slots: u32, grace: Duration) -> Pool {
    let builder = SegmentPool::<Watched>::builder().segments(1).segment_len(slots.into());
    builder.slots(slots).grace(grace).create().unwrap()
}

/// A link to a sender with this process's pid, whose death may free a segment.
pub(crate) fn link_to_sender() -> Arc<Link> {
    let peer = crate::peer::Peer { pid: Some(std::process::id()), uid: 0 };
    Arc::new(Link::to_receiver(peer))
}

pub(crate) fn link() -> Arc<Link> {
    Arc::new(Link::within())
}

/// A request and its transfer, sent over these links.
pub(crate) fn ask_over(pool: &Pool, receivers: &Arc<Link>, senders: &Arc<Link>) -> (Asked, Asking) {
    let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
    let asking = request.begin_here(senders).unwrap();
    request.sent_over(receivers);
    (asked, asking)
}

fn ask(pool: &Pool) -> (Asked, Asking) {
    ask_over(pool, &link(), &link())
}

/// Sends these bytes, one in each chunk, until the receiver cancels.
pub(crate) fn send(asking: Asking, bytes: &[u8]) -> Result<u64> {
    let mut sending = asking.accept(bytes.len() as u64)?;
    for byte in bytes {
        sending.next_slot(Deadline::NEVER)?.send(&[*byte])?;
    }
    sending.finish()
}

pub(crate) fn found(asked: Asked) -> Result<ShmTransfer<Receiver, Receiving>> {
    match asked.reply(Deadline::NEVER)? {
        Reply::Found(body) => Ok(body),
        other => panic!("{other:?}"),
    }
}

/// The next chunk's byte; `None` at the end.
pub(crate) fn next(body: &mut ShmTransfer<Receiver, Receiving>) -> Result<Option<u8>> {
    let Some(mut chunk) = body.next_chunk(Deadline::NEVER)? else { return Ok(None) };
    let mut byte = [0];
    assert_eq!(chunk.copy_to(&mut byte), 1);
    Ok(Some(byte[0]))
}

pub(crate) fn receive(asked: Asked) -> Result<Vec<u8>> {
    let mut body = found(asked)?;
    let mut bytes = Vec::new();
    while let Some(byte) = next(&mut body)? {
        bytes.push(byte);
    }
    assert_eq!(body.size(), Size::Known(bytes.len() as u64));
    Ok(bytes)
}

/// A task's try for a permit of `semaphore`, which is registered with a link.
pub(crate) fn try_as_task(
    semaphore: &Semaphore,
    registration: &Registration,
    task: &Waker,
) -> Poll<std::result::Result<Permit, Interrupted>> {
    let is_severed = || registration.link().is_severed();
    match super::wait::poll_permit(semaphore, is_severed, Some(|| registration.wake_later(task))) {
        Err(Interrupted::TimedOut) => Poll::Pending,
        settled => Poll::Ready(settled),
    }
}

/// Runs `body` in every interleaving; says how many there were.
pub(crate) fn model(body: impl Fn() + Sync + Send + 'static) {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let runs = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 5_000;
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        body();
    });
    println!("{} interleavings", runs.load(Relaxed));
}

#[test]
fn the_announcement_and_the_first_chunk_go_out_with_one_post() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || assert_eq!(send(asking, &[7]).unwrap(), 1));
        let mut body = found(asked).unwrap();
        // No wait: the chunk's permit is the reply's.
        let now = Deadline::after(Duration::ZERO);
        let mut byte = [0];
        body.next_chunk(now).unwrap().unwrap().copy_to(&mut byte);
        assert_eq!((body.size(), byte), (Size::Known(1), [7]));
        sender.join().unwrap();
    });
}

#[test]
fn one_slot_in_strict_turns() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || assert_eq!(send(asking, &[1, 2]).unwrap(), 2));
        assert_eq!(receive(asked).unwrap(), [1, 2]);
        sender.join().unwrap();
    });
}

#[test]
fn two_slots_in_flight() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || assert_eq!(send(asking, &[1, 2, 3]).unwrap(), 3));
        assert_eq!(receive(asked).unwrap(), [1, 2, 3]);
        sender.join().unwrap();
    });
}

#[test]
fn wake_ups_in_batches() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let mut sending = asking.accept(4).unwrap().in_batches();
            for byte in 1..=4 {
                sending.next_slot(Deadline::NEVER).unwrap().send(&[byte]).unwrap();
            }
        });
        assert_eq!(receive(asked).unwrap(), [1, 2, 3, 4]);
        sender.join().unwrap();
    });
}

#[test]
fn a_wake_up_put_off_comes_with_an_abort() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let mut sending = asking.accept(3).unwrap().in_batches();
            sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
        });
        let mut body = found(asked).unwrap();
        assert_eq!(next(&mut body).unwrap(), Some(1));
        assert!(matches!(next(&mut body), Err(Error::Aborted)));
        sender.join().unwrap();
    });
}

#[test]
fn a_stream_and_its_marked_end() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let mut sending = asking.accept(Size::Unknown).unwrap();
            sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
            sending.finish().unwrap();
        });
        let mut body = found(asked).unwrap();
        assert_eq!(next(&mut body).unwrap(), Some(1));
        assert_eq!(next(&mut body).unwrap(), None);
        sender.join().unwrap();
    });
}

#[test]
fn a_refusal_is_told_as_what_it_is() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || asking.refuse(Refusal::NotFound).unwrap());
        assert!(matches!(asked.reply(Deadline::NEVER), Ok(Reply::Refused(Refusal::NotFound))));
        // The segment is in the pool, or returns as soon as the sender has left.
        let (next, _late) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        drop(next);
        sender.join().unwrap();
    });
}

#[test]
fn a_sender_that_acts_on_the_turn_word_alone_sees_the_offer() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let lease = pool.lease(Deadline::NEVER).unwrap();
        let (pooled, guard) = lease.into_parts();
        let segment = pooled.writable().unwrap();
        // It knows the first generation before it is opened, and tries until it is.
        let sender = thread::spawn(move || {
            loop {
                let asking = ShmTransfer::begin(
                    Arc::clone(&segment),
                    1,
                    b"key"[..].into(),
                    &link(),
                    Loans::None,
                );
                match send(asking, &[1]) {
                    Err(Error::Stale) => thread::yield_now(),
                    sent => return assert_eq!(sent.unwrap(), 1),
                }
            }
        });
        let (asked, _offer, _) = ShmTransfer::offer(guard).unwrap();
        assert_eq!(receive(asked).unwrap(), [1]);
        sender.join().unwrap();
    });
}

#[test]
fn a_receiver_that_goes_ends_the_wait_for_a_slot() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let error = send(asking, &[1, 2, 3]).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error:?}");
        });
        let mut body = found(asked).unwrap();
        assert_eq!(next(&mut body).unwrap(), Some(1));
        drop(body);
        sender.join().unwrap();
    });
}

#[test]
fn a_segment_is_leased_again_after_a_cancellation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let old = thread::spawn(move || drop(send(asking, &[1, 1])));
        drop(found(asked).unwrap());
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        let new = thread::spawn(move || assert_eq!(send(asking, &[2]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
        new.join().unwrap();
    });
}

#[test]
fn a_segment_whose_sender_lingers_is_replaced() {
    model(|| {
        let pool = pool(1, NO_GRACE);
        let (asked, asking) = ask(&pool);
        let old = thread::spawn(move || drop(send(asking, &[1, 1])));
        drop(asked);
        let (asked, asking) = ask(&pool);
        // In this thread: the slot read is of this generation, wherever a late sender writes.
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
    });
}

#[test]
fn an_abort_ends_the_wait_after_what_was_filled() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let mut sending = asking.accept(3).unwrap();
            sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
        });
        let mut body = found(asked).unwrap();
        assert_eq!(next(&mut body).unwrap(), Some(1));
        let error = next(&mut body).unwrap_err();
        assert!(matches!(error, Error::Aborted), "{error:?}");
        sender.join().unwrap();
    });
}

#[test]
fn an_abort_before_any_answer_ends_the_wait_for_one() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || drop(asking));
        let error = asked.reply(Deadline::NEVER).unwrap_err();
        assert!(matches!(error, Error::Aborted), "{error:?}");
        sender.join().unwrap();
    });
}

#[test]
fn what_an_aborting_sender_does_stays_in_its_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let old = thread::spawn(move || drop(asking));
        drop(asked); // withdrawn, cancelled, or aborted already
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        let new = thread::spawn(move || assert_eq!(send(asking, &[2]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
        new.join().unwrap();
    });
}

#[test]
fn what_a_finishing_sender_does_stays_in_its_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let old = thread::spawn(move || drop(send(asking, &[1])));
        drop(asked); // withdrawn, cancelled, or finished already
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        let new = thread::spawn(move || assert_eq!(send(asking, &[2]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
        new.join().unwrap();
    });
}

#[test]
fn withdrawing_or_accepting_wins_and_never_both() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || match asking.accept(1) {
            Ok(mut sending) => match sending.next_slot(Deadline::NEVER) {
                Ok(_) | Err(Error::Cancelled) => true,
                Err(error) => panic!("{error:?}"),
            },
            Err(Error::Stale) => false,
            Err(error) => panic!("{error:?}"),
        });
        // As the receiver's drop does, which follows.
        let segment = Arc::clone(&pool.live().1[0].segment);
        let withdrawn = segment.header().turn.advance(1, Phase::Offered, Phase::Withdrawn).is_ok();
        drop(asked);
        assert_ne!(sender.join().unwrap(), withdrawn);
    });
}

#[test]
fn a_late_accept_of_an_old_generation_is_stale_and_writes_nothing() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, late) = ask(&pool);
        drop(asked);
        let old = thread::spawn(move || {
            let error = send(late, &[1]).unwrap_err();
            assert!(matches!(error, Error::Stale), "{error:?}");
        });
        let (asked, asking) = ask(&pool);
        let new = thread::spawn(move || assert_eq!(send(asking, &[2]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
        new.join().unwrap();
    });
}

#[test]
fn a_request_that_is_dropped_unsent_ends_the_wait_for_its_reply() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let requester = thread::spawn(move || drop(request));
        let error = asked.reply(Deadline::NEVER).unwrap_err();
        assert!(matches!(error, Error::Misuse(Misuse::NeverSent)), "{error:?}");
        requester.join().unwrap();
    });
}

#[test]
fn the_next_generation_begins_while_the_old_sender_is_in_its_last_wake() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let old = thread::spawn(move || assert_eq!(send(asking, &[1]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [1]);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        let new = thread::spawn(move || assert_eq!(send(asking, &[2]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
        new.join().unwrap();
    });
}

#[test]
fn a_severed_link_ends_the_wait_for_a_reply() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let ours = link();
        let watcher = {
            let ours = Arc::clone(&ours);
            thread::spawn(move || ours.sever(|| None))
        };
        request.sent_over(&ours); // registered before, while, or after the link is severed
        let error = asked.reply(Deadline::NEVER).unwrap_err();
        assert!(matches!(error, Error::Disconnected), "{error:?}");
        watcher.join().unwrap();
    });
}

#[test]
fn a_severed_link_ends_the_wait_for_a_slot() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let theirs = link();
        let (asked, asking) = ask_over(&pool, &link(), &theirs);
        let watcher = thread::spawn(move || theirs.sever(|| None));
        let sender = thread::spawn(move || {
            let error = send(asking, &[1, 2]).unwrap_err();
            assert!(matches!(error, Error::Disconnected), "{error:?}");
        });
        watcher.join().unwrap();
        sender.join().unwrap();
        drop(asked);
    });
}

#[test]
fn a_link_severed_late_poisons_nothing_of_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (ours, theirs) = (link(), link());
        let (asked, asking) = ask_over(&pool, &ours, &theirs);
        let old = thread::spawn(move || assert_eq!(send(asking, &[1]).unwrap(), 1));
        assert_eq!(receive(asked).unwrap(), [1]);
        let watcher = thread::spawn(move || {
            ours.sever(|| None);
            theirs.sever(|| None);
        });
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        old.join().unwrap();
        watcher.join().unwrap();
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
    });
}

#[test]
fn a_link_severed_while_its_sender_leaves_poisons_nothing_of_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let theirs = link();
        let (asked, asking) = ask_over(&pool, &link(), &theirs);
        let old = thread::spawn(move || drop(send(asking, &[1])));
        let watcher = thread::spawn(move || theirs.sever(|| None));
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        old.join().unwrap();
        watcher.join().unwrap();
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
    });
}

#[test]
fn a_cancellation_is_not_held_against_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let old = asking.accept(1).unwrap();
        drop(asked);
        drop(old);
        let theirs = link();
        let (asked, asking) = ask_over(&pool, &link(), &theirs);
        let watcher = thread::spawn(move || theirs.sever(|| None));
        let error = send(asking, &[1, 2]).unwrap_err();
        assert!(matches!(error, Error::Disconnected), "{error:?}");
        watcher.join().unwrap();
        drop(asked);
    });
}

#[test]
fn what_was_filled_before_a_link_ended_is_read_whenever_the_reader_looks() {
    model_with_rechecks(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let sender = thread::spawn(move || {
            assert_eq!(send(asking, &[1]).unwrap(), 1);
            ours.sever(|| None); // its process has ended
        });
        assert_eq!(receive(asked).unwrap(), [1]);
        sender.join().unwrap();
    });
}

#[test]
fn a_link_that_ended_is_seen_although_the_peer_wipes_the_poison_off() {
    model_with_rechecks(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let segment = Arc::clone(&pool.live().1[0].segment);
        let peer = thread::spawn(move || {
            ours.sever(|| None);
            segment.header().filled.reset(0);
            asking.forget();
        });
        let error = asked.reply(Deadline::NEVER).unwrap_err();
        assert!(matches!(error, Error::Disconnected), "{error:?}");
        peer.join().unwrap();
    });
}

#[test]
fn two_that_lease_the_only_segment_take_turns() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let first = pool.lease(Deadline::NEVER).unwrap();
        let others = [1, 2].map(|byte| {
            let pool = pool.clone();
            thread::spawn(move || {
                let (asked, asking) = ask(&pool);
                assert_eq!(send(asking, &[byte]).unwrap(), 1);
                assert_eq!(receive(asked).unwrap(), [byte]);
            })
        });
        drop(first);
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!((pool.stats().idle, pool.stats().retired), (1, 0));
    });
}

#[test]
fn a_task_that_leases_takes_its_turn_or_gives_it_up() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let first = pool.lease(Deadline::NEVER).unwrap();
        let [mut patient, mut impatient] = [pool.lease_soon(), pool.lease_soon()];
        let waiting = [
            thread::spawn(move || {
                drop(run(|task| Pin::new(&mut patient).poll(&mut Context::from_waker(task))));
            }),
            thread::spawn(move || {
                let task = &mut Context::from_waker(Waker::noop());
                let _lease = Pin::new(&mut impatient).poll(task);
            }),
        ];
        drop(first);
        waiting.into_iter().for_each(|waiting| waiting.join().unwrap());
        assert_eq!((pool.stats().idle, pool.stats().retired), (1, 0));
        let last = pool.try_lease();
        assert!(last.is_ready() && pool.try_lease().is_pending());
    });
}

/// The server hangs up before it takes the request: the request is either withdrawn or taken, never
/// both.
#[test]
fn a_request_is_asked_again_only_if_no_sender_has_taken_it() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let lease = pool.lease(Deadline::NEVER).unwrap();
        let again = lease.again();
        let (request, mut asked) = lease.request("key").unwrap();
        let (ours, theirs) = (link(), link());
        let asking = request.begin_here(&theirs).unwrap();
        request.sent_over(&ours);
        let server = thread::spawn(move || match asking.accept(1) {
            Ok(_) => true, // and dies
            Err(Error::Stale) => false,
            Err(error) => panic!("{error:?}"),
        });
        let watcher = thread::spawn(move || ours.sever(|| None));
        match asked.read_reply(Deadline::NEVER) {
            Err(Error::Disconnected | Error::Aborted) => {}
            outcome => panic!("{:?}", outcome.map(drop)),
        }
        let is_untaken = asked.withdraw();
        let lease = again.lease(asked.give_up(), true).unwrap();
        let was_taken = server.join().unwrap();
        assert_ne!(is_untaken, was_taken);
        // The segment can be offered to the successor in either case.
        let (request, asked) = lease.request("key").unwrap();
        let asking = request.begin_here(&link()).unwrap();
        request.sent_over(&link());
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        watcher.join().unwrap();
    });
}

#[test]
fn a_hang_up_on_a_sender_that_lives_gives_no_segment_back_before_it_has_left() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let old = thread::spawn(move || drop(send(asking, &[1, 1])));
        ours.sever(|| None);
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
    });
}

#[test]
fn a_hang_up_on_a_sender_that_lives_and_lingers_has_its_segment_replaced() {
    model(|| {
        let pool = pool(1, NO_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let old = thread::spawn(move || drop(send(asking, &[1, 1])));
        ours.sever(|| None);
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        old.join().unwrap();
    });
}

#[test]
fn a_segment_whose_sender_died_is_leased_again() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link_to_sender();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let sending = asking.accept(2).unwrap();
        let dying = {
            let ours = Arc::clone(&ours);
            thread::spawn(move || {
                sending.die();
                ours.peer_died();
            })
        };
        ours.sever(|| None);
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        dying.join().unwrap();
    });
}

#[test]
fn a_sender_that_dies_while_it_sends_leaves_nothing_in_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link_to_sender();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let mut sending = asking.accept(2).unwrap();
        drop(sending.next_slot(Deadline::NEVER).unwrap()); // and keeps its permit
        let dying = {
            let ours = Arc::clone(&ours);
            thread::spawn(move || {
                sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
                sending.die();
                ours.peer_died();
            })
        };
        let watcher = {
            let ours = Arc::clone(&ours);
            thread::spawn(move || ours.sever(|| None))
        };
        drop(asked);
        let (asked, asking) = ask(&pool);
        // Replaced only if it announced and died between the reads of its phase and of its death.
        assert!(pool.stats().retired <= 1);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        dying.join().unwrap();
        watcher.join().unwrap();
    });
}

#[test]
fn a_link_severed_in_the_midst_costs_the_transfer_and_not_the_segment() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let old = thread::spawn(move || drop(send(asking, &[1])));
        let watcher = thread::spawn(move || ours.sever(|| None));
        match receive(asked) {
            Ok(bytes) => assert_eq!(bytes, [1]),
            Err(Error::Disconnected) => {}
            Err(error) => panic!("{error:?}"),
        }
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[3]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [3]);
        old.join().unwrap();
        watcher.join().unwrap();
    });
}

#[test]
fn a_request_dropped_unsent_poisons_nothing_of_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let requester = thread::spawn(move || drop(request));
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        requester.join().unwrap();
    });
}

#[test]
fn a_request_sent_after_its_transfer_is_over_poisons_nothing_of_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let sending = {
            let ours = Arc::clone(&ours);
            thread::spawn(move || request.sent_over(&ours))
        };
        let watcher = thread::spawn(move || ours.sever(|| None));
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        sending.join().unwrap();
        watcher.join().unwrap();
    });
}

#[test]
fn a_batch_that_is_cancelled_leaves_the_segment_to_the_next_generation() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let (asked, asking) = ask(&pool);
        let sender = thread::spawn(move || {
            let mut sending = asking.accept(4).unwrap().in_batches();
            for byte in 1..=4 {
                let slot = sending.next_slot(Deadline::NEVER);
                if let Err(error) = slot.and_then(|slot| slot.send(&[byte])) {
                    assert!(matches!(error, Error::Cancelled), "{error:?}");
                    return;
                }
            }
        });
        let mut body = found(asked).unwrap();
        assert_eq!(next(&mut body).unwrap(), Some(1));
        drop(body);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        assert_eq!(send(asking, &[9]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [9]);
        sender.join().unwrap();
    });
}

#[test]
fn a_request_dropped_although_a_sender_has_it_is_answered_or_withdrawn() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let asking = request.begin_here(&link()).unwrap();
        let requester = thread::spawn(move || drop(request));
        let sender = thread::spawn(move || send(asking, &[1]));
        let received = receive(asked);
        match sender.join().unwrap() {
            Ok(_) => assert_eq!(received.unwrap(), [1]),
            Err(Error::Stale) => {
                assert!(matches!(received, Err(Error::Misuse(Misuse::NeverSent))), "{received:?}");
            }
            Err(error) => panic!("{error:?}"),
        }
        requester.join().unwrap();
    });
}

#[test]
fn a_sender_whose_link_is_severed_goes_on_to_its_next_look_at_free() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let theirs = link();
        let (asked, asking) = ask_over(&pool, &link(), &theirs);
        let sender = thread::spawn(move || send(asking, &[1]));
        let watcher = thread::spawn(move || theirs.sever(|| None));
        let received = receive(asked);
        // What it finished is received whole: the sender's link ends only the sender's waits.
        match sender.join().unwrap() {
            Ok(_) => assert_eq!(received.unwrap(), [1]),
            Err(Error::Disconnected) => {
                assert!(matches!(received, Err(Error::Aborted)), "{received:?}");
            }
            Err(error) => panic!("{error:?}"),
        }
        watcher.join().unwrap();
    });
}

#[test]
fn a_sender_is_not_stopped_by_a_hang_up_that_only_its_receiver_knows_of() {
    model(|| {
        let pool = pool(2, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        let sender = thread::spawn(move || send(asking, &[1, 2]));
        ours.sever(|| None);
        let sent = sender.join().unwrap();
        assert_eq!(sent.unwrap(), 2);
        // Everything was filled before the receiver looked.
        assert_eq!(receive(asked).unwrap(), [1, 2]);
    });
}

#[test]
fn a_sender_that_stands_still_is_waited_for_until_the_grace_is_over() {
    model(|| {
        let pool = pool(1, NO_GRACE);
        let (asked, asking) = ask(&pool);
        let still = asking.accept(1).unwrap();
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 1);
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
        drop(still);
    });
}

#[test]
fn a_link_severed_while_its_sender_aborts_poisons_nothing_of_the_next_generation() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let theirs = link();
        let (asked, asking) = ask_over(&pool, &link(), &theirs);
        let old = thread::spawn(move || drop(asking));
        let watcher = thread::spawn(move || theirs.sever(|| None));
        drop(asked);
        let (asked, asking) = ask(&pool);
        assert_eq!(pool.stats().retired, 0);
        old.join().unwrap();
        watcher.join().unwrap();
        assert_eq!(send(asking, &[2]).unwrap(), 1);
        assert_eq!(receive(asked).unwrap(), [2]);
    });
}

#[test]
fn a_link_severed_while_its_receiver_goes_poisons_nothing_of_another_threads_transfer() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let ours = link();
        let (asked, asking) = ask_over(&pool, &ours, &link());
        drop(asking); // aborted
        let going = thread::spawn(move || drop(asked));
        let watcher = thread::spawn(move || ours.sever(|| None));
        let lease = loop {
            match pool.lease(Deadline::after(Duration::ZERO)) {
                Ok(lease) => break lease,
                Err(Error::Timeout(_)) => thread::yield_now(),
                Err(error) => panic!("{error:?}"),
            }
        };
        let (request, asked) = lease.request("key").unwrap();
        let asking = request.begin_here(&link()).unwrap();
        request.sent_over(&link());
        going.join().unwrap();
        watcher.join().unwrap();
        // By two chunks: a wait that is ended by poison comes after what was filled.
        let sender = thread::spawn(move || assert_eq!(send(asking, &[2, 3]).unwrap(), 2));
        assert_eq!(receive(asked).unwrap(), [2, 3]);
        sender.join().unwrap();
    });
}

#[test]
fn what_lingers_beside_is_looked_after_and_not_given_back_too_early() {
    model(|| {
        let builder = SegmentPool::<Watched>::builder().segments(2).segment_len(1);
        let pool: Pool = builder.slots(1).grace(NO_GRACE).create().unwrap();
        let (first, asking) = ask(&pool);
        let still = asking.accept(1).unwrap();
        let (second, asking) = ask(&pool);
        let late = thread::spawn(move || drop(send(asking, &[1, 1])));
        drop((first, second));
        // The first lease also checks the second segment.
        let leased = [2, 3].map(|byte| (byte, ask(&pool)));
        for (byte, (asked, asking)) in leased {
            assert_eq!(send(asking, &[byte]).unwrap(), 1);
            assert_eq!(receive(asked).unwrap(), [byte]);
        }
        late.join().unwrap();
        drop(still);
    });
}

#[test]
fn a_segment_that_cannot_be_replaced_is_not_lost() {
    model(|| {
        let pool = pool(1, NO_GRACE);
        let (asked, asking) = ask(&pool);
        let still = asking.accept(1).unwrap();
        drop(asked);
        NO_MEMORY.set(true);
        let refused = pool.lease(Deadline::NEVER).map(drop);
        NO_MEMORY.set(false);
        assert!(matches!(refused, Err(Error::Os { .. })), "{refused:?}");
        drop(pool.lease(Deadline::after(Duration::ZERO)).unwrap());
        assert_eq!(pool.stats().retired, 1, "its sender is still on it");
        drop(still);
    });
}
