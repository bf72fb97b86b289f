//! Peers that break the rules: each breach is reported as such, and does no other harm (rule P3).

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::wait::{Wait, Waiter, publish_cpu};
use super::*;
use crate::channel::{InProcess, Request, RequestQueue, Requester};
use crate::error::{Error, Fault, Misuse, PeerFault, Result};
use crate::peer::Link;
use crate::segment::{ChunkLen, Memfd, Phase, ReadSlots, Segment, SegmentPool, WriteSlots};
use crate::sync::atomic::{AtomicU32, Relaxed};
use crate::sync::{Deadline, Interrupted, Semaphore};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// A correct receiver with its pool, and the segment for the test to act as its sender.
struct Stage {
    pool: SegmentPool<Memfd>,
    transfer: ShmTransfer<Receiver, Offered>,
    segment: Arc<Segment<WriteSlots>>,
    generation: u64,
    _request: Request<Memfd>,
}

fn stage() -> Stage {
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(4).create().unwrap();
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    let segment = pool.live().1[0].writable().unwrap();
    let (generation, _) = segment.header().turn.load().unwrap();
    Stage { pool, transfer, segment, generation, _request: request }
}

/// The pool's one segment.
fn only(pool: &SegmentPool<Memfd>) -> Arc<Segment<ReadSlots>> {
    Arc::clone(&pool.live().1[0].segment)
}

impl Stage {
    /// Acts as a correct sender up to its first post, with these words in the announcement.
    fn announce(&self, status: u32, size: u64, metadata_len: u32, first: ChunkLen) {
        let header = self.segment.header();
        header.turn.advance(self.generation, Phase::Offered, Phase::Accepted).unwrap();
        header.announcement.status.store(status, Relaxed);
        header.announcement.size.store(size, Relaxed);
        header.announcement.metadata_len.store(metadata_len, Relaxed);
        header.turn.advance(self.generation, Phase::Accepted, Phase::Announced).unwrap();
        self.chunk(0, first);
    }

    fn chunk(&self, slot: usize, chunk: ChunkLen) {
        let header = self.segment.header();
        header.chunks[slot].store(chunk);
        header.filled.post(header.free.try_wait().unwrap());
    }

    /// Reads everything; returns the fault. The segment must not be used again.
    fn fault(self) -> PeerFault {
        let result = match self.transfer.reply(soon()) {
            Ok(Reply::Found(mut body)) => {
                let error = body.read_to_end(&mut Vec::new()).unwrap_err();
                // After a fault, nothing more is read.
                assert!(matches!(
                    body.next_chunk(soon()),
                    Err(Error::Misuse(Misuse::TransferOver))
                ));
                *error.into_inner().unwrap().downcast::<Error>().unwrap()
            }
            Ok(reply) => panic!("{reply:?}"),
            Err(error) => error,
        };
        assert_eq!(result.fault(), Fault::Peer);
        let lease = self.pool.lease(soon()).unwrap();
        assert_eq!(self.pool.stats().retired, 1, "a sender that is not off keeps the old segment");
        assert_ne!(lease.segment().id(), self.segment.id());
        match result {
            Error::Peer(error) => error.0,
            other => panic!("{other:?}"),
        }
    }
}

const FOUND: u32 = 1;

fn len(len: u32) -> ChunkLen {
    ChunkLen { len, last: false }
}

fn last(len: u32) -> ChunkLen {
    ChunkLen { len, last: true }
}

#[test]
fn a_chunk_longer_than_its_slot() {
    let stage = stage();
    stage.announce(FOUND, 1000, 0, len(101));
    assert_eq!(stage.fault(), PeerFault::ChunkTooLong { len: 101, limit: 100 });
}

#[test]
fn the_longest_chunk_that_a_word_can_say() {
    let stage = stage();
    stage.announce(FOUND, u64::MAX, 0, len(u32::MAX >> 1));
    assert_eq!(stage.fault(), PeerFault::ChunkTooLong { len: u32::MAX >> 1, limit: 100 });
}

#[test]
fn chunks_whose_sum_exceeds_the_size() {
    let stage = stage();
    stage.announce(FOUND, 150, 0, len(100));
    stage.chunk(1, last(100));
    assert_eq!(stage.fault(), PeerFault::TooLong { announced: 150, received: 200 });
}

#[test]
fn an_end_before_the_size_is_reached() {
    let stage = stage();
    stage.announce(FOUND, 150, 0, len(100));
    stage.chunk(1, last(10));
    assert_eq!(stage.fault(), PeerFault::WrongEnd { announced: 150, received: 110 });
}

#[test]
fn no_end_where_the_size_is_reached() {
    let stage = stage();
    stage.announce(FOUND, 100, 0, len(100));
    assert_eq!(stage.fault(), PeerFault::WrongEnd { announced: 100, received: 100 });
}

#[test]
fn statuses_that_no_sender_gives() {
    for status in [0, 8, 0x0002_0000, u32::MAX] {
        let stage = stage();
        stage.announce(status, 0, 0, last(0));
        assert_eq!(stage.fault(), PeerFault::UnknownStatus(status));
    }
}

#[test]
fn an_answer_from_a_loan_that_nobody_introduced() {
    let stage = stage();
    stage.announce(LENT, 0, 0, last(0));
    assert_eq!(stage.fault(), PeerFault::UnknownLoan(0));
}

#[test]
fn a_lent_answer_of_unknown_size() {
    let stage = stage();
    stage.announce(LENT, u64::MAX, 0, last(0));
    assert_eq!(stage.fault(), PeerFault::LoanWithoutSize);
}

#[test]
fn metadata_longer_than_the_header() {
    for metadata_len in [1025, u32::MAX] {
        let stage = stage();
        stage.announce(FOUND, 0, metadata_len, last(0));
        assert_eq!(stage.fault(), PeerFault::MetadataTooLong { len: metadata_len, limit: 1024 });
    }
}

#[test]
fn an_empty_chunk_that_is_not_the_last() {
    let stage = stage();
    stage.announce(FOUND, 1000, 0, len(0));
    assert_eq!(stage.fault(), PeerFault::EmptyChunk);
}

#[test]
fn poison_without_a_cause() {
    let Stage { transfer, segment, _request, .. } = stage();
    segment.header().filled.poison();
    let error = transfer.reply(soon()).map(drop).unwrap_err();
    assert!(
        matches!(error, Error::Peer(crate::error::ProtocolError(PeerFault::BaselessPoison))),
        "{error}"
    );
}

#[test]
fn a_death_ends_waits_that_the_peer_tried_to_keep_up() {
    // The peer clears `sleepers` and the poison; then it dies, or hangs up.
    let Stage { transfer, segment, _request, .. } = stage();
    let link = Arc::new(Link::to_sender(crate::peer::Peer { pid: None, uid: 0 }));
    _request.sent_over(&link);
    let waiting = std::thread::spawn(move || transfer.reply(Deadline::NEVER).map(drop));
    segment.header().filled.reset(0);
    link.sever(|| None);
    segment.header().filled.reset(0);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Disconnected)));
}

/// A child of the server, forked after it had bound, may be the one that writes (rule P6).
#[cfg(target_os = "linux")]
#[test]
fn a_death_frees_a_segment_only_if_it_was_its_senders_own() {
    use std::process::{Command, Stdio};
    enum Tells {
        ItsOwnPid,
        Another,
        /// It accepted and wrote no pid.
        None,
    }
    for (tells, is_freed) in
        [(Tells::ItsOwnPid, true), (Tells::Another, false), (Tells::None, false)]
    {
        let mut server = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pool = one_segment();
        // As the transfer before left it.
        only(&pool).header().announcement.pid.store(server.id(), Relaxed);
        let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        let link = Arc::new(Link::to_sender(crate::peer::Peer { pid: Some(server.id()), uid: 0 }));
        request.sent_over(&link);
        let segment = only(&pool);
        let header = segment.header();
        let (generation, _) = header.turn.load().unwrap();
        header.turn.advance(generation, Phase::Offered, Phase::Accepted).unwrap();
        match tells {
            Tells::ItsOwnPid => header.announcement.pid.store(server.id(), Relaxed),
            Tells::Another => header.announcement.pid.store(server.id() + 1, Relaxed),
            Tells::None => {}
        }
        server.kill().unwrap();
        assert!(link.wait_dead(soon()));
        link.sever(|| None);
        drop(transfer);
        drop(pool.lease(soon()).unwrap());
        let is_freed = is_freed && Semaphore::SURVIVES_KILL;
        assert_eq!(pool.stats().retired, u64::from(!is_freed));
        server.wait().unwrap();
    }
}

#[test]
fn a_stale_sender_poisons_nobody() {
    // Its request is withdrawn and the segment offered anew, to another; then its connection ends.
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(4).create().unwrap();
    let (old, withdrawn) = pool.lease(soon()).unwrap().request("old").unwrap();
    let ended = Arc::new(Link::to_receiver(crate::peer::Peer { pid: None, uid: 0 }));
    let stale = old.begin_here(&ended).unwrap();
    drop(withdrawn);

    let queue = InProcess::bounded(1);
    let (request, transfer) = pool.lease(soon()).unwrap().request("new").unwrap();
    queue.send(request, soon()).unwrap();
    let mut sending = queue.recv(soon()).unwrap().accept(10).unwrap();
    ended.sever(|| None);
    assert!(matches!(stale.accept(1), Err(Error::Stale)));
    sending.next_slot(soon()).unwrap().send(b"0123456789").unwrap();
    let Reply::Found(mut body) = transfer.reply(soon()).unwrap() else { panic!() };
    let mut bytes = String::new();
    body.read_to_string(&mut bytes).unwrap();
    assert_eq!(bytes, "0123456789");
}

#[test]
fn permits_out_of_nowhere_bring_no_foreign_bytes() {
    // `filled` counts more slots than there are: their lengths are what the header says, zero or
    // stale, and still checked.
    let stage = stage();
    stage.announce(FOUND, 1000, 0, len(100));
    let flood = stage.segment.header().filled.try_wait().unwrap();
    stage.segment.header().filled.reset(1 << 20);
    drop(flood);
    for slot in 1..4 {
        stage.segment.header().chunks[slot].store(len(100));
    }
    // Round and round, the same hundred bytes, up to the size: and then no end is marked.
    assert_eq!(stage.fault(), PeerFault::WrongEnd { announced: 1000, received: 1000 });
}

#[test]
fn a_spoilt_turn_word_costs_the_segment_and_no_more() {
    let stage = stage();
    stage.segment.header().turn.corrupt(u64::MAX);
    drop(stage.transfer);
    let lease = stage.pool.lease(soon()).unwrap();
    assert_eq!(stage.pool.stats().retired, 1);
    drop(lease);

    // Corrupted while idle, it is replaced before it is leased.
    stage.pool.live().1[0].segment.header().turn.corrupt(7);
    let (_request, transfer) = stage.pool.lease(soon()).unwrap().request("key").unwrap();
    drop(transfer);
    assert_eq!(stage.pool.stats().retired, 2);
}

#[test]
fn a_receiver_that_poisons_or_flips_phases_is_caught_by_the_sender() {
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(1).create().unwrap();
    let queue = InProcess::bounded(1);
    let request = || {
        let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        queue.send(request, soon()).unwrap();
        (queue.recv(soon()).unwrap(), transfer)
    };

    let (sender, _transfer) = request();
    let mut sending = sender.accept(1000).unwrap();
    only(&pool).header().free.poison();
    let error = sending.next_slot(soon()).map(drop).unwrap_err();
    assert!(
        matches!(error, Error::Peer(crate::error::ProtocolError(PeerFault::BaselessPoison))),
        "{error}"
    );
    drop((sending, _transfer));

    let (sender, _transfer) = request();
    let mut sending = sender.accept(1000).unwrap();
    only(&pool).header().turn.corrupt(0xdead);
    let error = sending.next_slot(soon()).unwrap().send(b"a").unwrap_err();
    assert!(
        matches!(
            error,
            Error::Peer(crate::error::ProtocolError(PeerFault::ImpossibleTurn(0xdead)))
        ),
        "{error}"
    );
}

#[test]
fn a_receiver_that_leaves_no_slot_for_a_refusal_is_caught() {
    let pool = one_segment();
    let (sender, _transfer) = asked(&pool);
    only(&pool).header().free.reset(0);
    let error = sender.refuse(Refusal::NotFound).unwrap_err();
    assert!(
        matches!(error, Error::Peer(crate::error::ProtocolError(PeerFault::BaselessPoison))),
        "{error}"
    );
}

#[test]
fn a_hang_up_of_a_process_without_a_name_here_is_not_taken_for_its_death() {
    // As with a server in another pid namespace, or on a kernel without pidfds (rule P6).
    let pool = one_segment();
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    let link = Arc::new(Link::to_sender(crate::peer::Peer { pid: None, uid: 0 }));
    let on_it = request.begin_here(&link).unwrap().accept(1).unwrap();
    request.sent_over(&link);
    link.sever(|| None);
    drop(transfer);
    let old = only(&pool).id();
    assert_ne!(pool.lease(soon()).unwrap().segment().id(), old);
    assert_eq!(pool.stats().retired, 1);
    drop(on_it);
}

#[test]
fn a_small_file_costs_one_post_each_way() {
    // Rule P2: by the first permit, announcement, bytes and end are all there.
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(4).create().unwrap();
    let queue = InProcess::bounded(1);
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    let mut sending = queue.recv(soon()).unwrap().accept(5).unwrap();
    assert!(
        only(&pool).header().filled.try_wait().is_err(),
        "nothing is posted with the acceptance"
    );
    sending.next_slot(soon()).unwrap().send(b"small").unwrap();
    assert_eq!(only(&pool).header().turn.load(), Ok((1, Phase::Finished)));
    let Reply::Found(mut body) = transfer.reply(soon()).unwrap() else { panic!() };
    assert!(
        only(&pool).header().filled.try_wait().is_err(),
        "one post, and the reply has taken it"
    );
    let mut bytes = String::new();
    body.read_to_string(&mut bytes).unwrap();
    assert_eq!(bytes, "small");
}

#[test]
fn a_segment_spoilt_while_it_is_leased_is_replaced_and_not_lost() {
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(1).create().unwrap();
    for (round, word) in
        [7, 0x1ff, u64::MAX, 5 << 8 | Phase::Offered as u64].into_iter().enumerate()
    {
        let lease = pool.lease(soon()).unwrap();
        lease.segment().header().turn.corrupt(word);
        let error = lease.request("key").map(drop).unwrap_err();
        assert!(
            matches!(error, Error::Peer(crate::error::ProtocolError(PeerFault::ImpossibleTurn(found))) if found == word),
            "{error}"
        );
        drop(pool.lease(soon()).expect("the pool keeps its capacity"));
        assert_eq!(pool.stats().retired, round as u64 + 1);
    }
    let stats = pool.stats();
    assert_eq!((stats.segments, stats.idle), (1, 1));
}

#[test]
fn a_sender_that_has_given_up_touches_nothing_any_more() {
    // Too many bytes abort. A caller that writes on must not reach the segment's next transfer.
    use std::io::Write;
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(2).create().unwrap();
    let queue = InProcess::bounded(1);
    for announced in [0, 10] {
        let request = || {
            let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
            queue.send(request, soon()).unwrap();
            (queue.recv(soon()).unwrap(), transfer)
        };
        let (starting, transfer) = request();
        let mut old = starting.accept(announced).unwrap();
        old.next_slot(soon()).map(|_slot| ()).unwrap();
        old.write_all(&b"01234"[..announced as usize / 2]).unwrap();
        old.write_all(&[0; 100]).unwrap_err();
        drop(transfer);

        let (starting, transfer) = request();
        let mut new = starting.accept(Size::Unknown).unwrap();
        let untouched = |result: Result<()>| {
            assert!(
                matches!(
                    result,
                    Err(Error::Misuse(Misuse::TransferOver) | Error::SizeMismatch { .. })
                ),
                "{result:?}"
            );
            assert!(
                only(&pool).header().filled.try_wait().is_err(),
                "a permit from an older transfer"
            );
        };
        if announced > 0 {
            untouched(
                old.flush()
                    .map_err(|error| error.into_inner().unwrap().downcast().map(|e| *e).unwrap()),
            );
        }
        untouched(old.next_slot(soon()).map(drop));
        untouched(old.finish().map(drop));
        new.write_all(b"new").unwrap();
        new.finish().unwrap();
        let Reply::Found(mut body) = transfer.reply(soon()).unwrap() else { panic!() };
        let mut bytes = String::new();
        body.read_to_string(&mut bytes).unwrap();
        assert_eq!(bytes, "new");
    }
    assert_eq!(pool.stats().retired, 0);
}

/// A request on its way to a sender in this process, and its transfer.
fn asked(
    pool: &SegmentPool<Memfd>,
) -> (ShmTransfer<Sender, Starting>, ShmTransfer<Receiver, Offered>) {
    let queue = InProcess::bounded(1);
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    (queue.recv(soon()).unwrap(), transfer)
}

fn one_segment() -> SegmentPool<Memfd> {
    SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(4).create().unwrap()
}

#[test]
fn the_size_that_stands_for_unknown_cannot_be_announced() {
    let pool = one_segment();
    let (starting, transfer) = asked(&pool);
    assert!(matches!(starting.accept(u64::MAX), Err(Error::Misuse(Misuse::SizeReserved))));
    assert!(matches!(transfer.reply(soon()), Err(Error::Aborted)));
}

#[test]
fn a_source_that_cannot_be_read_aborts() {
    let pool = one_segment();
    let (starting, transfer) = asked(&pool);
    let unreadable = std::fs::File::open("/").unwrap(); // a directory
    let error = starting.accept(10).unwrap().send_file(&unreadable).unwrap_err();
    assert!(matches!(error, Error::Source(_)), "{error:?}");
    assert!(matches!(transfer.reply(soon()), Err(Error::Aborted)));
    assert_eq!(pool.stats().idle, 1);
}

#[test]
fn both_sides_say_who_and_where_they_are() {
    let pool = one_segment();
    let segment = only(&pool);
    let (starting, _transfer) = asked(&pool);
    let sending = starting.accept(1).unwrap();
    let header = segment.header();
    assert_eq!(header.receiver.pid.load(Relaxed), std::process::id());
    assert_eq!(header.announcement.pid.load(Relaxed), std::process::id());
    drop(sending);
    let cpu = AtomicU32::new(u32::MAX);
    assert_eq!(publish_cpu(&cpu), cpu.load(Relaxed));
}

#[test]
fn wake_ups_wait_only_where_it_is_crowded_and_half_of_the_slots_are_left() {
    static ONE: AtomicUsize = AtomicUsize::new(0);
    static MANY: AtomicUsize = AtomicUsize::new(0);
    let alone = Waiter::among(&ONE);
    let crowd: Vec<_> = (0..4096).map(|_| Waiter::among(&MANY)).collect();
    let pool = one_segment();
    let segment = only(&pool);
    let free = &segment.header().free;
    for (slots, left, put_off) in [
        (1, 0, false),
        (2, 0, false),
        (2, 1, true),
        (3, 1, false),
        (3, 2, true),
        (8, 3, false),
        (8, 4, true),
    ] {
        free.reset(left);
        assert_eq!(crowd[0].can_put_off(free, slots), put_off, "{left} of {slots} left");
        assert!(!alone.can_put_off(free, slots));
    }
}

#[test]
fn what_was_filled_just_before_a_death_is_not_lost() {
    let stage = stage();
    let header = stage.segment.header();
    static ALL: AtomicUsize = AtomicUsize::new(0);
    let cpu = AtomicU32::new(0);
    // The worst moment is between a timed-out wait and the check of the link: the sender fills a
    // slot and dies, and the watcher severs the link.
    let is_severed = || {
        header.filled.add(header.free.try_wait().unwrap());
        header.filled.poison();
        true
    };
    let wait = |is_severed: &dyn Fn() -> bool| {
        Waiter::among(&ALL).wait(Wait {
            semaphore: &header.filled,
            our_cpu: &cpu,
            peer_cpu: &cpu,
            deadline: soon(),
            is_severed,
        })
    };
    assert!(wait(&is_severed).is_ok(), "the slot that was filled");
    assert!(matches!(wait(&|| true), Err(Interrupted::Poisoned)));
}

#[test]
fn a_client_that_puts_the_turn_word_back_has_no_second_worker_in_its_slot() {
    let pool =
        SegmentPool::<Memfd>::builder().segments(1).segment_len(400).slots(1).create().unwrap();
    let (request, _asked) = pool.lease(soon()).unwrap().request("key").unwrap();
    let link = Arc::new(Link::to_receiver(crate::peer::Peer { pid: None, uid: 0 }));
    let begin = || request.begin_here(&link).unwrap();
    let turn = || pool.live().1[0].segment.header().turn.corrupt(1 << 8 | 1);
    let (one, two, three) = (begin(), begin(), begin());
    let one = one.accept(4).unwrap();
    turn();
    assert!(matches!(two.accept(4), Err(Error::Stale)), "another worker is on the segment");
    // Once the first has left, this process does not claim the segment any more.
    drop(one);
    turn();
    assert!(three.accept(4).is_ok());
}
