//! What every request queue promises, run over each backend: one suite, so that none drifts.

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use shmferry::channel::{
    InProcess, KEY_LIMIT, RequestQueue, Requester, SendError, Seqpacket, SeqpacketQueue,
};
use shmferry::error::{Awaited, Misuse};
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Lease, Memfd, SegmentPool};
use shmferry::{Deadline, Error, Refusal, Size};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn shortly() -> Deadline {
    Deadline::after(Duration::from_millis(20))
}

/// Both ends of a queue, with whatever must outlive them.
struct Ends<B: Backing> {
    pool: SegmentPool<B>,
    requester: Box<dyn Requester<B>>,
    queue: Arc<dyn RequestQueue>,
    _dir: Option<tempfile::TempDir>,
}

fn pool<B: Backing>(segments: u32) -> SegmentPool<B> {
    SegmentPool::builder().segments(segments).segment_len(4 * 1024).slots(4).create().unwrap()
}

fn in_process_of<B: Backing>() -> Ends<B> {
    let queue = InProcess::bounded(16);
    Ends { pool: pool(4), requester: Box::new(queue.clone()), queue: Arc::new(queue), _dir: None }
}

fn in_process() -> Ends<Memfd> {
    in_process_of()
}

fn seqpacket() -> Ends<Memfd> {
    let dir = tempfile::tempdir().unwrap();
    let (pool, path) = (pool(4), dir.path().join("queue.sock"));
    let queue: SeqpacketQueue = Seqpacket::new(&path).bind().unwrap();
    let requester = Seqpacket::new(&path).requester(&pool).unwrap();
    Ends { pool, requester: Box::new(requester), queue: Arc::new(queue), _dir: Some(dir) }
}

macro_rules! conforms {
    ($($backend:ident),*) => {$(
        mod $backend {
            #[test] fn bytes_arrive() { super::bytes_arrive(super::$backend()) }
            #[test] fn streams_arrive() { super::streams_arrive(super::$backend()) }
            #[test] fn refusals_arrive() { super::refusals_arrive(super::$backend()) }
            #[test] fn a_reply_that_is_late_can_be_waited_for_again() {
                super::a_reply_that_is_late_can_be_waited_for_again(super::$backend())
            }
            #[test] fn metadata_arrives() { super::metadata_arrives(super::$backend()) }
            #[test] fn keys_are_bytes_up_to_the_limit() { super::keys_are_bytes_up_to_the_limit(super::$backend()) }
            #[test] fn many_workers_serve_many_askers() { super::many_workers_serve_many_askers(super::$backend()) }
            #[test] fn an_empty_queue_times_out() { super::an_empty_queue_times_out(super::$backend()) }
            #[test] fn an_unanswered_request_times_out_and_goes_stale() { super::an_unanswered_request_times_out_and_goes_stale(super::$backend()) }
            #[test] fn a_dropped_sender_aborts() { super::a_dropped_sender_aborts(super::$backend()) }
            #[test] fn a_panicking_sender_aborts() { super::a_panicking_sender_aborts(super::$backend()) }
            #[test] fn a_dropped_receiver_cancels() { super::a_dropped_receiver_cancels(super::$backend()) }
            #[test] fn an_unsent_request_is_told() { super::an_unsent_request_is_told(super::$backend()) }
            #[test] fn closing_wakes_every_worker() { super::closing_wakes_every_worker(super::$backend()) }
            #[test] fn a_dropped_queue_ends_what_it_held() { super::a_dropped_queue_ends_what_it_held(super::$backend()) }
        }
    )*};
}
conforms!(in_process, seqpacket);

#[cfg(feature = "posix-mq")]
mod by_name {
    use super::*;
    use shmferry::channel::{Named, PosixMq, PosixMqQueue};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    conforms!(in_process_named, posix_mq);

    fn in_process_named() -> Ends<Named> {
        in_process_of()
    }

    fn posix_mq() -> Ends<Named> {
        static NAMES: AtomicUsize = AtomicUsize::new(0);
        let name = format!("/shmferry-test-{}-{}", std::process::id(), NAMES.fetch_add(1, Relaxed));
        let pool = pool(4);
        let queue: PosixMqQueue = PosixMq::new(&name).unwrap().bind().unwrap();
        let requester = PosixMq::new(&name).unwrap().requester(&pool);
        Ends { pool, requester: Box::new(requester), queue: Arc::new(queue), _dir: None }
    }
}

fn body_of(reply: Reply) -> Vec<u8> {
    match reply {
        Reply::Found(mut body) => {
            let mut bytes = Vec::new();
            body.read_to_end(&mut bytes).unwrap();
            bytes
        }
        other => panic!("{other:?}"),
    }
}

fn ask<B: Backing>(ends: &Ends<B>, lease: Lease<B>, key: &[u8]) -> Result<Reply, Error> {
    let (request, transfer) = lease.request(key)?;
    ends.requester.send(request, soon())?;
    transfer.reply(soon())
}

fn bytes_arrive<B: Backing>(ends: Ends<B>) {
    let queue = Arc::clone(&ends.queue);
    let sent: Vec<u8> = (0..50_000u32).map(|i| (i % 251) as u8).collect();
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        let transfer = queue.recv(soon()).unwrap();
        assert_eq!(transfer.key(), b"/file");
        let mut sending = transfer.accept(sent.len() as u64).unwrap();
        sending.write_all(&sent).unwrap();
        assert_eq!(sending.finish().unwrap(), sent.len() as u64);
    });
    let reply = ask(&ends, ends.pool.lease(soon()).unwrap(), b"/file").unwrap();
    assert!(matches!(&reply, Reply::Found(body) if body.size() == Size::Known(50_000)));
    assert!(body_of(reply) == expected, "wrong bytes");
    sender.join().unwrap();
    assert_all_idle(&ends);
}

fn streams_arrive<B: Backing>(ends: Ends<B>) {
    for len in [0usize, 1, 1023, 1024, 1025, 4096, 10_000] {
        let queue = Arc::clone(&ends.queue);
        let sender = thread::spawn(move || {
            let mut sending = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
            sending.write_all(&vec![7; len]).unwrap();
            sending.finish().unwrap()
        });
        let reply = ask(&ends, ends.pool.lease(soon()).unwrap(), b"stream").unwrap();
        assert!(matches!(&reply, Reply::Found(body) if body.size() == Size::Unknown));
        assert_eq!(body_of(reply), vec![7; len]);
        assert_eq!(sender.join().unwrap(), len as u64);
    }
    assert_all_idle(&ends);
}

fn refusals_arrive<B: Backing>(ends: Ends<B>) {
    for why in [Refusal::NotFound, Refusal::Failed, Refusal::Invalid, Refusal::other(65_535)] {
        let expected = why.clone();
        let queue = Arc::clone(&ends.queue);
        let sender = thread::spawn(move || queue.recv(soon()).unwrap().refuse(why).unwrap());
        let reply = ask(&ends, ends.pool.lease(soon()).unwrap(), b"none").unwrap();
        assert!(matches!(reply, Reply::Refused(found) if found == expected));
        sender.join().unwrap();
    }
    assert_all_idle(&ends);
}

fn a_reply_that_is_late_can_be_waited_for_again<B: Backing>(ends: Ends<B>) {
    let (request, mut asked) = ends.pool.lease(soon()).unwrap().request("late").unwrap();
    ends.requester.send(request, soon()).unwrap();
    for _ in 0..2 {
        let error = asked.wait(shortly()).unwrap_err();
        assert!(matches!(error, Error::Timeout(Awaited::Reply)), "{error:?}");
    }
    ends.queue.recv(soon()).unwrap().refuse(Refusal::Failed).unwrap();
    (0..2).for_each(|_| asked.wait(soon()).unwrap());
    assert!(matches!(asked.reply(soon()).unwrap(), Reply::Refused(Refusal::Failed)));
}

fn metadata_arrives<B: Backing>(ends: Ends<B>) {
    let queue = Arc::clone(&ends.queue);
    let sender = thread::spawn(move || {
        let transfer = queue.recv(soon()).unwrap();
        transfer.accept_with(0, &"image/png".to_owned()).unwrap().finish().unwrap();
        let too_much = vec![0; shmferry::protocol::METADATA_LIMIT + 1];
        let refused = queue.recv(soon()).unwrap().accept_with(0, &too_much);
        assert!(matches!(refused, Err(Error::Misuse(Misuse::MetadataTooLong { .. }))));
    });
    let Reply::Found(body) = ask(&ends, ends.pool.lease(soon()).unwrap(), b"a").unwrap() else {
        panic!()
    };
    assert_eq!(body.metadata::<String>().unwrap(), "image/png");
    assert!(matches!(body.metadata::<()>(), Err(Error::Peer(_))));
    drop(body);
    let aborted = ask(&ends, ends.pool.lease(soon()).unwrap(), b"b");
    assert!(matches!(aborted, Err(Error::Aborted)), "{aborted:?}");
    sender.join().unwrap();
}

fn keys_are_bytes_up_to_the_limit<B: Backing>(ends: Ends<B>) {
    let longest = vec![0xff; KEY_LIMIT];
    let keys = [b"".to_vec(), b"/a b\0c".to_vec(), longest.clone()];
    for key in &keys {
        let (queue, expected) = (Arc::clone(&ends.queue), key.clone());
        let sender = thread::spawn(move || {
            let transfer = queue.recv(soon()).unwrap();
            assert_eq!(transfer.key(), expected);
            transfer.refuse(Refusal::NotFound).unwrap();
        });
        ask(&ends, ends.pool.lease(soon()).unwrap(), key).unwrap();
        sender.join().unwrap();
    }
    let too_long = [&longest[..], b"x"].concat();
    let refused = ends.pool.lease(soon()).unwrap().request(too_long);
    assert!(matches!(refused, Err(Error::Misuse(Misuse::KeyTooLong { len: 4097, limit: 4096 }))));
    assert_all_idle(&ends);
}

fn many_workers_serve_many_askers<B: Backing>(ends: Ends<B>) {
    const ASKERS: usize = 8;
    const EACH: usize = 250;
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let queue = Arc::clone(&ends.queue);
            thread::spawn(move || {
                let mut served = 0;
                loop {
                    match queue.recv(soon()) {
                        Ok(transfer) => {
                            let body = transfer.key().repeat(100);
                            let mut sending = transfer.accept(body.len() as u64).unwrap();
                            sending.write_all(&body).unwrap();
                            served += 1;
                        }
                        Err(Error::Closed) => return served,
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    thread::scope(|scope| {
        for asker in 0..ASKERS {
            let ends = &ends;
            scope.spawn(move || {
                for i in 0..EACH {
                    let key = format!("/{asker}/{i}");
                    let reply =
                        ask(ends, ends.pool.lease(soon()).unwrap(), key.as_bytes()).unwrap();
                    assert_eq!(body_of(reply), key.as_bytes().repeat(100));
                }
            });
        }
    });
    ends.queue.close();
    let served: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
    assert_eq!(served, ASKERS * EACH);
    assert_all_idle(&ends);
    assert_eq!(ends.pool.stats().retired, 0);
}

fn an_empty_queue_times_out<B: Backing>(ends: Ends<B>) {
    assert!(matches!(ends.queue.recv(shortly()), Err(Error::Timeout(Awaited::Request))));
}

fn an_unanswered_request_times_out_and_goes_stale<B: Backing>(ends: Ends<B>) {
    let (request, transfer) = ends.pool.lease(soon()).unwrap().request("old").unwrap();
    ends.requester.send(request, soon()).unwrap();
    assert!(matches!(transfer.reply(shortly()), Err(Error::Timeout(Awaited::Reply))));
    assert_all_idle(&ends);

    // The late sender's step fails and writes nothing (rule P1), and the next request is served.
    let late = ends.queue.recv(soon()).unwrap();
    assert!(matches!(late.accept(1), Err(Error::Stale)));
    let queue = Arc::clone(&ends.queue);
    let sender =
        thread::spawn(move || queue.recv(soon()).unwrap().accept(0).unwrap().finish().unwrap());
    assert_eq!(body_of(ask(&ends, ends.pool.lease(soon()).unwrap(), b"new").unwrap()), b"");
    sender.join().unwrap();
}

fn a_dropped_sender_aborts<B: Backing>(ends: Ends<B>) {
    let queue = Arc::clone(&ends.queue);
    let sender = thread::spawn(move || {
        drop(queue.recv(soon()).unwrap()); // before accepting
        let mut sending = queue.recv(soon()).unwrap().accept(10_000).unwrap();
        sending.next_slot(soon()).unwrap().send(b"only this").unwrap();
    });
    let reply = ask(&ends, ends.pool.lease(soon()).unwrap(), b"a");
    assert!(matches!(reply, Err(Error::Aborted)), "{reply:?}");
    let Reply::Found(mut body) = ask(&ends, ends.pool.lease(soon()).unwrap(), b"b").unwrap() else {
        panic!()
    };
    // What was filled is still delivered; then the abort is told, and the end is no `Ok(0)`.
    let mut first = [0; 9];
    body.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"only this");
    let error = body.read(&mut first).unwrap_err();
    assert!(matches!(error.get_ref().unwrap().downcast_ref(), Some(Error::Aborted)), "{error}");
    drop(body);
    sender.join().unwrap();
    assert_all_idle(&ends);
}

fn a_panicking_sender_aborts<B: Backing>(ends: Ends<B>) {
    let queue = Arc::clone(&ends.queue);
    let sender = thread::spawn(move || {
        let _sending = queue.recv(soon()).unwrap().accept(1).unwrap();
        panic!("meant to be seen in the test's output");
    });
    let reply = ask(&ends, ends.pool.lease(soon()).unwrap(), b"a");
    assert!(matches!(reply, Err(Error::Aborted)), "{reply:?}");
    assert!(sender.join().is_err());
}

fn a_dropped_receiver_cancels<B: Backing>(ends: Ends<B>) {
    let queue = Arc::clone(&ends.queue);
    let sender = thread::spawn(move || {
        let mut sending = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
        loop {
            if let Err(error) = sending.next_slot(soon()).and_then(|slot| slot.send(b"more")) {
                return error;
            }
        }
    });
    let Reply::Found(mut body) = ask(&ends, ends.pool.lease(soon()).unwrap(), b"a").unwrap() else {
        panic!()
    };
    assert_eq!(body.next_chunk(soon()).unwrap().unwrap().len(), 4);
    drop(body);
    let error = sender.join().unwrap();
    assert!(matches!(error, Error::Cancelled), "{error}");
    // The segment can be leased again, without having been replaced: its sender left it.
    let leases: Vec<_> = (0..4).map(|_| ends.pool.lease(soon()).unwrap()).collect();
    assert_eq!(ends.pool.stats().retired, 0);
    drop(leases);
}

fn an_unsent_request_is_told<B: Backing>(ends: Ends<B>) {
    let (request, transfer) = ends.pool.lease(soon()).unwrap().request("lost").unwrap();
    let waiting = thread::spawn(move || transfer.reply(Deadline::NEVER));
    drop(request);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Misuse(Misuse::NeverSent))));
    assert_all_idle(&ends);
}

fn closing_wakes_every_worker<B: Backing>(ends: Ends<B>) {
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let queue = Arc::clone(&ends.queue);
            thread::spawn(move || queue.recv(Deadline::NEVER).map(drop))
        })
        .collect();
    ends.queue.close();
    for worker in workers {
        assert!(matches!(worker.join().unwrap(), Err(Error::Closed)));
    }
    assert!(matches!(ends.queue.recv(soon()), Err(Error::Closed)));
}

fn a_dropped_queue_ends_what_it_held<B: Backing>(ends: Ends<B>) {
    let (request, transfer) = ends.pool.lease(soon()).unwrap().request("a").unwrap();
    ends.requester.send(request, soon()).unwrap();
    let Ends { pool, requester, queue, _dir } = ends;
    queue.close();
    drop(queue);
    // Told by a queue that ends, or by its end, whichever came first.
    match transfer.reply(Deadline::NEVER) {
        Ok(Reply::Refused(Refusal::Leaving)) | Err(Error::Disconnected | Error::Aborted) => {}
        reply => panic!("{reply:?}"),
    }

    // A request that cannot be sent comes back whole.
    let (request, transfer) = pool.lease(soon()).unwrap().request("b").unwrap();
    let SendError { request, error } = requester.send(request, shortly()).unwrap_err();
    assert!(matches!(error, Error::Closed | Error::Timeout(Awaited::Server)), "{error}");
    assert_eq!(request.key(), b"b");
    drop((request, transfer));
    assert_eq!(pool.stats().idle, 4);
}

/// Every segment is back, the sender being off it.
fn assert_all_idle<B: Backing>(ends: &Ends<B>) {
    let leases: Vec<_> = (0..4).map(|_| ends.pool.lease(soon()).unwrap()).collect();
    drop(leases);
    let stats = ends.pool.stats();
    assert_eq!((stats.idle, stats.quarantined, stats.retired), (4, 0, 0));
}
