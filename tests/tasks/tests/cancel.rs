//! Futures that are dropped at each of their polls: the other side is told, every segment comes
//! back, and no answer reaches another request.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use futures_core::Stream;
use proptest::prelude::*;
use shmferry::channel::InProcess;
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::tokio::{BodyStream, Client, Incoming, Outgoing, Server};
use shmferry::{Deadline, Error, ServeError, Size};
use shmferry_tasks::{Alive, Driven, Spot, asked, back, counts, key, noise, on_threads, until};
use shmferry_test_support::watchdog::watchdog;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

const SEGMENTS: u32 = 2;
const SLOT: usize = 2048;
/// More than a segment has room for.
const LARGE: usize = 50_000;
const SIZES: [usize; 5] = [0, 1, SLOT, 4 * SLOT, LARGE];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Tasks,
    Threads,
    TasksWithin,
    ThreadsWithin,
}

const KINDS: [Kind; 4] = [Kind::Tasks, Kind::Threads, Kind::TasksWithin, Kind::ThreadsWithin];

/// How handlers ended, by key.
#[derive(Clone, Default)]
struct Ends(Arc<EndsInner>);

#[derive(Default)]
struct EndsInner {
    begun: AtomicUsize,
    ended: AtomicUsize,
    how: Mutex<HashMap<Vec<u8>, Result<(), Error>>>,
}

impl Ends {
    fn begin(&self) {
        self.0.begun.fetch_add(1, SeqCst);
    }

    fn end(&self, key: Vec<u8>, how: Result<(), Error>) {
        self.0.how.lock().unwrap().insert(key, how);
        self.0.ended.fetch_add(1, SeqCst);
    }

    fn of(&self, key: &str) -> Option<Result<(), String>> {
        let how = self.0.how.lock().unwrap();
        how.get(key.as_bytes()).map(|how| how.as_ref().copied().map_err(|e| format!("{e:?}")))
    }

    fn are_all_over(&self) -> bool {
        self.0.begun.load(SeqCst) == self.0.ended.load(SeqCst)
    }
}

/// A client, and a server of some kind, which answers keys with noise.
struct Pair {
    client: Client,
    ends: Ends,
    segments: u32,
    /// One for each key so far.
    seed: usize,
    _serving: Box<dyn std::any::Any>,
    _spot: Spot,
}

impl Pair {
    fn of(kind: Kind) -> Pair {
        Pair::with(kind, SEGMENTS, 4, SLOT)
    }

    fn with(kind: Kind, segments: u32, slots: u32, slot_len: usize) -> Pair {
        let spot = Spot::new();
        let (ends, queue) = (Ends::default(), InProcess::bounded(2 * segments as usize));
        let builder = shmferry::Client::builder()
            .segments(segments)
            .segment_len(u64::from(slots) * slot_len as u64)
            .slots(slots);
        let within = matches!(kind, Kind::TasksWithin | Kind::ThreadsWithin);
        let client = if within {
            builder.in_process_tokio(&queue).unwrap()
        } else {
            builder.connect_tokio(spot.address.as_path()).unwrap()
        };
        let serving: Box<dyn std::any::Any> = match kind {
            Kind::Tasks | Kind::TasksWithin => {
                let server = match kind {
                    Kind::Tasks => Server::bind(spot.address.as_path()).unwrap(),
                    _ => Server::in_process(queue),
                };
                let ends = ends.clone();
                let server = server.on_error(|_| {}).serve(move |request| {
                    let ends = ends.clone();
                    ends.begin();
                    async move {
                        let key = request.key().to_vec();
                        let bytes = asked(&key).unwrap();
                        let how = request.send_bytes(&bytes).await;
                        ends.end(key, how);
                        Ok::<(), Error>(())
                    }
                });
                Box::new(server.unwrap())
            }
            Kind::Threads | Kind::ThreadsWithin => {
                let server = match kind {
                    Kind::Threads => shmferry::Server::bind(spot.address.as_path()).unwrap(),
                    _ => shmferry::Server::with(queue),
                };
                let ends = ends.clone();
                let server = server.on_error(|_| {}).serve(segments as usize + 1, move |request| {
                    ends.begin();
                    let key = request.key().to_vec();
                    let how = request.send_bytes(&asked(&key).unwrap());
                    ends.end(key, how);
                    Ok::<(), Error>(())
                });
                Box::new(server.unwrap())
            }
        };
        Pair { client, ends, segments, seed: 0, _serving: serving, _spot: spot }
    }

    /// A key that was never asked for.
    fn key(&mut self, len: usize) -> (String, Vec<u8>) {
        self.seed += 1;
        (key(self.seed, len), noise(self.seed, len))
    }

    /// Nothing is under way any more, and what is asked now is answered rightly, in every segment.
    async fn assert_whole(&mut self, what: &str) {
        let segments = self.segments as usize;
        until(&format!("{what}: all segments are back"), || back(self.client.stats()) == segments)
            .await;
        until(&format!("{what}: all handlers are over"), || self.ends.are_all_over()).await;
        let mut bodies = Vec::new();
        for _ in 0..segments {
            let (key, bytes) = self.key(3 * SLOT);
            bodies.push((self.client.get(key).await.unwrap(), bytes));
        }
        for (body, bytes) in bodies {
            assert!(body.read_all().await.unwrap() == bytes, "{what}: other bytes");
        }
        let are_back = || back(self.client.stats()) == segments;
        until(&format!("{what}: all segments are back again"), are_back).await;
    }

    /// The handler of this key was told that nobody reads any more.
    async fn assert_told(&self, key: &str, what: &str) {
        until(&format!("{what}: the handler is over"), || self.ends.of(key).is_some()).await;
        let how = self.ends.of(key).unwrap();
        let how = how.expect_err(what);
        assert!(["Cancelled", "Stale", "Disconnected"].contains(&&*how), "{what}: {how}");
    }
}

fn next(stream: &mut BodyStream) -> impl Future<Output = Option<shmferry::Result<bytes::Bytes>>> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context))
}

#[test]
fn a_get_is_dropped_at_each_of_its_polls() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut pair = Pair::of(kind);
            for count in counts() {
                let what = format!("{kind:?}, {count} polls");
                let (key, bytes) = pair.key(LARGE);
                let client = pair.client.clone();
                let mut get = Driven::new(async move { client.get(key).await });
                let body = get.polled(count).await;
                drop(get);
                if let Some(body) = body {
                    assert!(body.unwrap().read_all().await.unwrap() == bytes, "{what}");
                    break;
                }
                pair.assert_whole(&what).await;
            }
        });
    }
}

#[test]
fn a_body_is_dropped_at_each_poll_of_read_all() {
    let _watchdog = watchdog();
    for (kind, len) in KINDS.into_iter().flat_map(|kind| SIZES.map(|len| (kind, len))) {
        on_threads(2, async {
            let mut pair = Pair::of(kind);
            for count in counts() {
                let what = format!("{kind:?}, {len} bytes, {count} polls");
                let (key, bytes) = pair.key(len);
                let body = pair.client.get(&key).await.unwrap();
                let mut reading = Driven::new(body.read_all());
                let read = reading.polled(count).await;
                drop(reading);
                if let Some(read) = read {
                    assert!(read.unwrap() == bytes, "{what}");
                    break;
                }
                if count == 0 && len == LARGE {
                    pair.assert_told(&key, &what).await;
                }
                pair.assert_whole(&what).await;
            }
        });
    }
}

#[test]
fn reads_that_are_dropped_take_nothing() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut pair = Pair::of(kind);
            for at_once in [1000, SLOT, 3 * SLOT] {
                let (key, bytes) = pair.key(LARGE);
                let mut body = pair.client.get(key).await.unwrap();
                let mut read = Vec::new();
                for count in (0..4).cycle() {
                    let mut buffer = vec![0; at_once];
                    let mut reading = Driven::new(body.read(&mut buffer));
                    let Some(len) = reading.polled(count).await else { continue };
                    drop(reading);
                    match len.unwrap() {
                        0 => break,
                        len => read.extend_from_slice(&buffer[..len]),
                    }
                }
                drop(body);
                assert!(read == bytes, "{kind:?}, {at_once} bytes at once");

                let (key, bytes) = pair.key(LARGE);
                let mut stream = pair.client.get(key).await.unwrap().into_stream();
                let mut read = Vec::new();
                for count in (0..4).cycle() {
                    let mut reading = Driven::new(next(&mut stream));
                    match reading.polled(count).await {
                        None => continue,
                        Some(None) => break,
                        Some(Some(piece)) => read.extend_from_slice(&piece.unwrap()),
                    }
                }
                assert!(read == bytes, "{kind:?}, as a stream");
                pair.assert_whole(&format!("{kind:?}")).await;
            }
        });
    }
}

#[test]
fn a_body_and_a_stream_are_dropped_in_the_middle() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut pair = Pair::of(kind);
            for pieces in 0..4 {
                let what = format!("{kind:?}, after {pieces} pieces");
                let (key, bytes) = pair.key(LARGE);
                let mut stream = pair.client.get(&key).await.unwrap().into_stream();
                let mut read = Vec::new();
                for _ in 0..pieces {
                    read.extend_from_slice(&next(&mut stream).await.unwrap().unwrap());
                }
                assert!(bytes.starts_with(&read), "{what}");
                drop(stream);
                pair.assert_told(&key, &what).await;

                let (key, bytes) = pair.key(LARGE);
                let mut body = pair.client.get(&key).await.unwrap();
                let mut read = vec![0; pieces * 1000];
                body.read_exact(&mut read).await.unwrap();
                assert!(bytes.starts_with(&read), "{what}");
                drop(body);
                pair.assert_told(&key, &what).await;
                pair.assert_whole(&what).await;
            }
        });
    }
}

#[test]
fn a_wait_for_a_segment_is_dropped_at_each_of_its_polls() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut pair = Pair::of(kind);
            for count in 0..6 {
                let what = format!("{kind:?}, {count} polls");
                let mut held = Vec::new();
                for _ in 0..SEGMENTS {
                    let (key, bytes) = pair.key(LARGE);
                    held.push((pair.client.get(key).await.unwrap(), bytes));
                }
                let client = pair.client.clone();
                let (key, _) = pair.key(5);
                let mut dropped = Driven::new({
                    let client = client.clone();
                    async move { client.get(key).await }
                });
                assert!(dropped.polled(count).await.is_none(), "{what}: there is no segment");
                let (key, bytes) = pair.key(5);
                let mut behind = Driven::new(async move { client.get(key).await });
                assert!(behind.polled(count).await.is_none(), "{what}: there is no segment");
                // Before its turn, or after it has been given a segment that it does not take.
                if count % 2 == 0 {
                    drop(dropped);
                    let (body, held) = held.pop().unwrap();
                    assert!(body.read_all().await.unwrap() == held, "{what}");
                } else {
                    let (body, held) = held.pop().unwrap();
                    assert!(body.read_all().await.unwrap() == held, "{what}");
                    drop(dropped);
                }
                let body = behind.polled(usize::MAX).await.unwrap();
                assert!(body.unwrap().read_all().await.unwrap() == bytes, "{what}");
                drop(held);
                pair.assert_whole(&what).await;
            }
        });
    }
}

#[test]
fn a_wait_for_an_absent_server_is_dropped_at_each_of_its_polls() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let builder = shmferry::Client::builder().segments(1).segment_len(1 << 14).slots(2);
        let client = builder.connect_tokio(spot.address.as_path()).unwrap();
        for count in 0..20 {
            let mut get = Driven::new(client.get(key(count, 100)));
            assert!(get.polled(count).await.is_none());
            drop(get);
            assert_eq!(client.stats().idle, 1, "{count} polls");
        }
        let _serving = spot.serve_tasks();
        let body = client.get(key(77, LARGE)).await.unwrap();
        assert!(body.read_all().await.unwrap() == noise(77, LARGE));
    });
}

#[test]
fn a_wait_for_an_answer_is_dropped_at_each_of_its_polls() {
    let _watchdog = watchdog();
    for within in [false, true] {
        on_threads(2, async {
            let (spot, queue) = (Spot::new(), InProcess::bounded(8));
            let builder = shmferry::Client::builder().segments(1).segment_len(1 << 14).slots(2);
            let (client, server) = if within {
                let client = builder.in_process_tokio(&queue).unwrap();
                (client, Server::in_process(queue))
            } else {
                let client = builder.connect_tokio(spot.address.as_path()).unwrap();
                (client, Server::bind(spot.address.as_path()).unwrap())
            };
            let (into, mut taken) = mpsc::unbounded_channel::<Incoming>();
            let _serving = server.on_error(|_| {}).serve(move |request| {
                into.send(request).unwrap();
                async { Ok::<(), Error>(()) }
            });
            for count in 0..40 {
                let what = format!("within: {within}, {count} polls");
                let mut get = Driven::new(client.get(key(count, LARGE)));
                assert!(get.polled(1).await.is_none(), "{what}");
                let request = taken.recv().await.unwrap();
                if count % 2 == 0 {
                    // It has been taken, and not accepted.
                    assert!(get.polled(count).await.is_none(), "{what}");
                    drop(get);
                    until(&what, || back(client.stats()) == 1).await;
                    let refused = request.accept(5u64).map(drop);
                    assert!(matches!(refused, Err(Error::Stale)), "{what}: {refused:?}");
                } else {
                    // It has been accepted, and nothing has been sent.
                    let mut outgoing = request.accept(LARGE as u64).unwrap();
                    assert!(get.polled(count).await.is_none(), "{what}");
                    drop(get);
                    let sent = outgoing.send(&noise(count, LARGE)).await;
                    assert!(matches!(sent, Err(Error::Cancelled)), "{what}: {sent:?}");
                    drop(outgoing);
                    until(&what, || back(client.stats()) == 1).await;
                }
            }
            let answered = tokio::spawn({
                let client = client.clone();
                async move { client.get(key(77, 9)).await?.read_all().await }
            });
            let request = taken.recv().await.unwrap();
            assert_eq!(request.key(), key(77, 9).as_bytes());
            request.send_bytes(&noise(77, 9)).await.unwrap();
            assert!(answered.await.unwrap().unwrap() == noise(77, 9));
        });
    }
}

/// A client of threads or tasks, whose answers the test sends by hand.
struct ByHand {
    taken: mpsc::UnboundedReceiver<Incoming>,
    results: mpsc::UnboundedReceiver<Result<Vec<u8>, Error>>,
    /// Lets the client read, once for each permit.
    reads: Arc<Semaphore>,
    ask: Box<dyn Fn()>,
    idle: Box<dyn Fn() -> bool>,
    _serving: shmferry::tokio::Serving,
    _spot: Spot,
}

impl ByHand {
    fn of(kind: Kind) -> ByHand {
        let (spot, queue) = (Spot::new(), InProcess::bounded(8));
        let builder = shmferry::Client::builder().segments(1).segment_len(4 * SLOT as u64).slots(4);
        let within = matches!(kind, Kind::TasksWithin | Kind::ThreadsWithin);
        let reads = Arc::new(Semaphore::new(0));
        let (done, results) = mpsc::unbounded_channel();
        let asks = Arc::clone(&reads);
        type Parts = (Box<dyn Fn()>, Box<dyn Fn() -> bool>);
        let (ask, idle): Parts = if matches!(kind, Kind::Tasks | Kind::TasksWithin) {
            let client = if within {
                builder.in_process_tokio(&queue).unwrap()
            } else {
                builder.connect_tokio(spot.address.as_path()).unwrap()
            };
            let asking = client.clone();
            let ask = move || {
                let (client, reads, done) = (asking.clone(), Arc::clone(&asks), done.clone());
                tokio::spawn(async move {
                    let read = async {
                        let body = client.get("key").await?;
                        reads.acquire().await.unwrap().forget();
                        body.read_all().await
                    };
                    done.send(read.await).unwrap();
                });
            };
            (Box::new(ask), Box::new(move || back(client.stats()) == 1))
        } else {
            let client = if within {
                builder.in_process(&queue).unwrap()
            } else {
                builder.connect(spot.address.as_path()).unwrap()
            };
            let client = Arc::new(client);
            let asking = Arc::clone(&client);
            let ask = move || {
                let (client, reads, done) = (Arc::clone(&asking), Arc::clone(&asks), done.clone());
                let runtime = tokio::runtime::Handle::current();
                std::thread::spawn(move || {
                    let read = || {
                        let body = client.get("key")?;
                        runtime.block_on(reads.acquire()).unwrap().forget();
                        body.read_all()
                    };
                    done.send(read()).unwrap();
                });
            };
            (Box::new(ask), Box::new(move || back(client.stats()) == 1))
        };
        let server = if within {
            Server::in_process(queue)
        } else {
            Server::bind(spot.address.as_path()).unwrap()
        };
        let (into, taken) = mpsc::unbounded_channel();
        let serving = server.on_error(|_| {}).serve(move |request| {
            into.send(request).unwrap();
            async { Ok::<(), Error>(()) }
        });
        ByHand { taken, results, reads, ask, idle, _serving: serving.unwrap(), _spot: spot }
    }

    /// Has the client ask; its request.
    async fn request(&mut self) -> Incoming {
        (self.ask)();
        self.taken.recv().await.unwrap()
    }

    /// What the client reads, once it is let.
    async fn result(&mut self) -> Result<Vec<u8>, Error> {
        self.reads.add_permits(1);
        let result = self.results.recv().await.unwrap();
        let left = self.reads.available_permits(); // its `get` may have failed
        self.reads.forget_permits(left);
        result
    }

    async fn assert_aborted(&mut self, what: &str) {
        let result = self.result().await.map(|bytes| bytes.len());
        assert!(matches!(result, Err(Error::Aborted)), "{what}: {result:?}");
        until(what, || (self.idle)()).await;
    }
}

#[test]
fn an_answer_is_dropped_at_each_poll_of_send_and_of_finish() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut by_hand = ByHand::of(kind);
            let bytes = noise(1, LARGE);
            for count in 0..30 {
                let what = format!("{kind:?}, {count} polls");
                let mut outgoing = by_hand.request().await.accept(LARGE as u64).unwrap();
                let mut sending = Driven::new(outgoing.send(&bytes));
                assert!(sending.polled(count).await.is_none(), "{what}: more than its room");
                drop(sending);
                drop(outgoing);
                by_hand.assert_aborted(&what).await;
            }
            for count in 0..30 {
                let what = format!("{kind:?}, finish, {count} polls");
                let mut outgoing = by_hand.request().await.accept(Size::Unknown).unwrap();
                outgoing.send(&bytes[..4 * SLOT]).await.unwrap(); // all its room
                let mut finishing = Driven::new(outgoing.finish());
                assert!(finishing.polled(count).await.is_none(), "{what}: it has no slot");
                drop(finishing);
                by_hand.assert_aborted(&what).await;
            }
            let outgoing = by_hand.request().await;
            outgoing.send_bytes(b"right").await.unwrap();
            assert_eq!(by_hand.result().await.unwrap(), b"right");
        });
    }
}

#[test]
fn an_answer_is_dropped_at_each_poll_of_send_file() {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, noise(3, LARGE)).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    for kind in KINDS {
        on_threads(2, async {
            let mut by_hand = ByHand::of(kind);
            for count in 0..30 {
                // Not in the page cache, as far as that can be had: read on another thread.
                if count % 2 == 0 {
                    let dropped = rustix::fs::Advice::DontNeed;
                    rustix::fs::fadvise(&file, 0, None, dropped).unwrap();
                }
                let what = format!("{kind:?}, {count} polls");
                let outgoing = by_hand.request().await.accept(LARGE as u64).unwrap();
                let mut sending = Driven::new(outgoing.send_file(&file));
                assert!(sending.polled(count).await.is_none(), "{what}: more than its room");
                drop(sending);
                by_hand.assert_aborted(&what).await;
            }
        });
    }
}

#[test]
fn writes_that_are_dropped_send_nothing() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut by_hand = ByHand::of(kind);
            let bytes = noise(1, LARGE);
            let mut outgoing: Outgoing = by_hand.request().await.accept(LARGE as u64).unwrap();
            let (mut sent, mut fruitless) = (0, 0);
            for count in (0..4).cycle() {
                let end = bytes.len().min(sent + 3000);
                if sent == end {
                    break;
                }
                let mut writing = Driven::new(outgoing.write(&bytes[sent..end]));
                match writing.polled(count).await {
                    Some(written) => sent += written.unwrap(),
                    None => {
                        fruitless += 1;
                        if fruitless == 20 {
                            by_hand.reads.add_permits(1); // it goes on
                        }
                    }
                }
            }
            assert!(fruitless >= 20, "{kind:?}: no write was dropped for want of room");
            outgoing.shutdown().await.unwrap();
            assert!(by_hand.results.recv().await.unwrap().unwrap() == bytes, "{kind:?}");
        });
    }
}

#[test]
fn a_task_that_answers_is_aborted_wherever_it_is() {
    let _watchdog = watchdog();
    for kind in KINDS {
        on_threads(2, async {
            let mut by_hand = ByHand::of(kind);
            for round in 0..60 {
                let what = format!("{kind:?}, round {round}");
                let request = by_hand.request().await;
                let mut answers = JoinSet::new();
                answers.spawn(async move {
                    if round % 3 == 0 {
                        std::future::pending::<()>().await;
                    }
                    request.send_bytes(&noise(1, LARGE)).await
                });
                for _ in 0..round / 3 {
                    tokio::task::yield_now().await;
                }
                answers.abort_all();
                while let Some(ended) = answers.join_next().await {
                    assert!(ended.unwrap_err().is_cancelled(), "{what}");
                }
                by_hand.assert_aborted(&what).await;
            }
            by_hand.request().await.send_bytes(b"right").await.unwrap();
            assert_eq!(by_hand.result().await.unwrap(), b"right");
        });
    }
}

/// What is done to a pool and to those who wait for it.
#[derive(Clone, Debug)]
enum Act {
    Wait,
    Poll(usize),
    Drop(usize),
    GiveBack(usize),
    Try,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Wait),
        4 => (0usize..8).prop_map(Act::Poll),
        3 => (0usize..8).prop_map(Act::Drop),
        3 => (0usize..8).prop_map(Act::GiveBack),
        1 => Just(Act::Try),
    ]
}

/// One of those that are there.
fn pick<T>(from: &[T], number: usize) -> Option<usize> {
    (!from.is_empty()).then(|| number % from.len())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// Segments are leased in the order of arrival, none is leased twice, and none is lost.
    #[test]
    fn leases_that_are_waited_for_and_dropped(segments in 1u32..4, acts in prop::collection::vec(act(), 1..60)) {
        let pool = SegmentPool::<Memfd>::builder()
            .segments(segments).segment_len(4096).slots(1).create().unwrap();
        let (mut waits, mut leases) = (Vec::new(), Vec::new());
        for act in acts {
            match act {
                // With the number of waits before it that have been polled: its turn comes after
                // theirs.
                Act::Wait => waits.push((Driven::new(pool.lease_soon()), false)),
                Act::Poll(number) => {
                    let Some(at) = pick(&waits, number) else { continue };
                    let others = waits.iter().filter(|(_, waits)| *waits).count();
                    let (wait, has_waited) = &mut waits[at];
                    let is_new = !*has_waited;
                    match wait.poll() {
                        Poll::Ready(lease) => {
                            prop_assert!(leases.len() < segments as usize);
                            if is_new {
                                prop_assert!(others < segments as usize - leases.len(),
                                    "it came before those that waited");
                            } else {
                                prop_assert_eq!(wait.woken(), 1, "told once");
                            }
                            leases.push(lease.unwrap());
                            drop(waits.remove(at));
                        }
                        Poll::Pending => *has_waited = true,
                    }
                }
                Act::Drop(number) => {
                    let Some(at) = pick(&waits, number) else { continue };
                    drop(waits.remove(at));
                }
                Act::GiveBack(number) => {
                    let Some(at) = pick(&leases, number) else { continue };
                    drop(leases.remove(at));
                }
                Act::Try => {
                    let waiting = waits.iter().filter(|(_, waits)| *waits).count();
                    match pool.try_lease() {
                        Poll::Ready(lease) => {
                            prop_assert!(waiting < segments as usize - leases.len());
                            leases.push(lease.unwrap());
                        }
                        Poll::Pending => prop_assert!(waiting + leases.len() >= segments as usize),
                    }
                }
            }
        }
        leases.clear();
        // All who have waited were told, as far as segments go: the first of them.
        let told = waits.iter().filter(|(wait, waits)| *waits && wait.woken() > 0).count();
        let waiting = waits.iter().filter(|(_, waits)| *waits).count();
        prop_assert_eq!(told, waiting.min(segments as usize));
        waits.clear();
        let all: Vec<_> =
            (0..segments).map(|_| pool.lease(Deadline::after(Duration::ZERO)).unwrap()).collect();
        prop_assert!(pool.try_lease().is_pending());
        drop(all);
        prop_assert_eq!(pool.stats().idle, segments as usize);
    }
}

/// How far a request goes before it is dropped.
#[derive(Clone, Debug)]
struct Course {
    len: usize,
    gets: usize,
    reads: usize,
    way: u8,
}

fn course() -> impl Strategy<Value = Course> {
    let polls = || prop_oneof![2 => 0usize..8, 1 => 0usize..100, 2 => Just(usize::MAX)];
    let len = prop_oneof![Just(0), 1usize..100, 1usize..20_000, 100_000usize..200_000];
    (len, polls(), polls(), 0u8..3).prop_map(|(len, gets, reads, way)| Course {
        len,
        gets,
        reads,
        way,
    })
}

async fn follow(client: Client, key: String, bytes: Vec<u8>, course: Course) {
    let mut get = Driven::new(async move { client.get(key).await });
    let Some(body) = get.polled(course.gets).await else { return };
    let mut body = body.unwrap();
    let read: Option<Vec<u8>> = match course.way {
        0 => Driven::new(body.read_all()).polled(course.reads).await.map(Result::unwrap),
        1 => {
            let mut read = Vec::new();
            let all = Driven::new(body.read_to_end(&mut read)).polled(course.reads).await;
            all.map(|all| assert_eq!(all.unwrap(), read.len())).map(|()| read)
        }
        _ => {
            let mut stream = body.into_stream();
            let mut reading = Driven::new(async {
                let mut read = Vec::new();
                while let Some(piece) = next(&mut stream).await {
                    read.extend_from_slice(&piece.unwrap());
                }
                read
            });
            reading.polled(course.reads).await
        }
    };
    if let Some(read) = read {
        assert!(read == bytes, "other bytes, {course:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_is_dropped_wherever(
        kind in 0usize..4,
        segments in 1u32..4,
        slots in 1u32..6,
        slot_len in prop_oneof![Just(64usize), Just(1000), Just(4096)],
        courses in prop::collection::vec(course(), 1..12),
    ) {
        let _watchdog = watchdog();
        let kind = KINDS[kind];
        on_threads(2, async {
            let mut pair = Pair::with(kind, segments, slots, slot_len);
            let mut all = JoinSet::new();
            for course in courses {
                let (key, bytes) = pair.key(course.len);
                all.spawn(follow(pair.client.clone(), key, bytes, course));
            }
            while let Some(ended) = all.join_next().await {
                ended.unwrap();
            }
            pair.assert_whole(&format!("{kind:?}")).await;
        });
    }
}

// ---------------------------------------------------------------- handlers

/// A server whose handlers wait for something that does not come: before they answer, in the midst
/// of it, after it, or in a task of their own.
struct Patient {
    begun: Arc<AtomicUsize>,
    alive: Arc<AtomicUsize>,
    /// Keys of handlers that were told of as unwanted.
    unwanted: Arc<Mutex<Vec<String>>>,
    /// Lets those end that wait after their answer, and those in a task of their own.
    gate: Arc<Semaphore>,
    /// How many have come to their end.
    ended: Arc<AtomicUsize>,
    _serving: shmferry::tokio::Serving,
}

impl Patient {
    fn of(server: Server) -> Patient {
        let [begun, alive, ended] = [(); 3].map(|()| Arc::<AtomicUsize>::default());
        let (unwanted, gate) = (Arc::<Mutex<Vec<String>>>::default(), Arc::new(Semaphore::new(0)));
        let told = Arc::clone(&unwanted);
        let server = server.on_error(move |error| match error {
            ServeError::Unwanted { key, .. } => {
                told.lock().unwrap().push(String::from_utf8(key.to_vec()).unwrap());
            }
            error => panic!("{error}"),
        });
        let shared =
            (Arc::clone(&begun), Arc::clone(&alive), Arc::clone(&gate), Arc::clone(&ended));
        let serving = server.serve(move |request| {
            let (begun, alive, gate, ended) = shared.clone();
            let alive = Alive::among(&alive);
            begun.fetch_add(1, SeqCst);
            async move {
                let _alive = alive;
                let key = request.key().to_vec();
                match &*key {
                    b"before" => std::future::pending().await,
                    b"amidst" => {
                        let mut outgoing = request.accept(Size::Unknown)?;
                        outgoing.write_all(b"begun").await?;
                        outgoing.flush().await?;
                        std::future::pending().await
                    }
                    b"after" => {
                        request.send_bytes(b"all").await?;
                        gate.acquire().await.unwrap().forget();
                        ended.fetch_add(1, SeqCst);
                    }
                    b"of its own" => {
                        tokio::spawn(async move {
                            let _alive = _alive;
                            gate.acquire().await.unwrap().forget();
                            assert!(matches!(request.send_bytes(b"late").await, Err(Error::Stale)));
                            ended.fetch_add(1, SeqCst);
                        });
                    }
                    key => request.send_bytes(&asked(key).unwrap()).await?,
                }
                Ok::<(), Error>(())
            }
        });
        Patient { begun, alive, unwanted, gate, ended, _serving: serving.unwrap() }
    }

    fn unwanted(&self) -> Vec<String> {
        self.unwanted.lock().unwrap().clone()
    }

    async fn all_are_over(&self) {
        until("all handlers are over", || self.alive.load(SeqCst) == 0).await;
    }
}

/// A client of two segments, and a patient server, over a socket or within the process.
fn patient(is_within: bool, spot: &Spot) -> (Client, Patient) {
    let (queue, builder) = (InProcess::bounded(16), shmferry::Client::builder().segments(SEGMENTS));
    if is_within {
        let client = builder.in_process_tokio(&queue).unwrap();
        (client, Patient::of(Server::in_process(queue)))
    } else {
        let server = Patient::of(Server::bind(spot.address.as_path()).unwrap());
        (builder.connect_tokio(spot.address.as_path()).unwrap(), server)
    }
}

/// Asks, and gives up once the handler has begun.
async fn give_up(client: &Client, server: &Patient, key: &str) {
    let begun = server.begun.load(SeqCst);
    let get = tokio::spawn({
        let (client, key) = (client.clone(), key.to_owned());
        async move { client.get(key).await.map(drop) }
    });
    until("the handler has begun", || server.begun.load(SeqCst) > begun).await;
    get.abort();
    assert!(get.await.unwrap_err().is_cancelled());
}

/// More than the server takes of one client at a time.
const MANY: usize = 100;

#[test]
fn handlers_are_dropped_when_their_clients_give_up() {
    let _watchdog = watchdog();
    for is_within in [false, true] {
        on_threads(2, async {
            let spot = Spot::new();
            let (client, server) = patient(is_within, &spot);
            for _ in 0..MANY {
                give_up(&client, &server, "before").await;
            }
            server.all_are_over().await;
            assert_eq!(server.unwanted(), ["before"; MANY]);
            for seed in 0..4 {
                let body = client.get(key(seed, LARGE)).await.unwrap();
                assert!(body.read_all().await.unwrap() == noise(seed, LARGE));
            }
            for _ in 0..MANY {
                let mut body = client.get("amidst").await.unwrap();
                let mut read = [0; 5];
                body.read_exact(&mut read).await.unwrap();
                assert_eq!(&read, b"begun");
            }
            server.all_are_over().await;
            assert_eq!(server.unwanted()[MANY..], ["amidst"; MANY]);
        });
    }
}

#[test]
fn a_handler_goes_on_after_its_answer() {
    let _watchdog = watchdog();
    for is_within in [false, true] {
        on_threads(2, async {
            let spot = Spot::new();
            let (client, server) = patient(is_within, &spot);
            for _ in 0..4 {
                assert_eq!(client.get("after").await.unwrap().read_all().await.unwrap(), b"all");
            }
            // Their segments are used by others now, some of which are given up.
            for seed in 0..8 {
                give_up(&client, &server, "before").await;
                let body = client.get(key(seed, LARGE)).await.unwrap();
                assert!(body.read_all().await.unwrap() == noise(seed, LARGE));
            }
            drop(client);
            until("only they are left", || server.alive.load(SeqCst) == 4).await;
            server.gate.add_permits(4);
            server.all_are_over().await;
            assert_eq!(server.ended.load(SeqCst), 4);
            assert_eq!(server.unwanted(), ["before"; 8]);
        });
    }
}

/// At its limit, a client is not listened to: its handlers look for themselves.
#[test]
fn a_client_at_its_limit_is_seen_to_give_up() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (client, server) = patient(false, &spot);
        let limit = 2 * SEGMENTS as usize + 8;
        for _ in 1..limit {
            give_up(&client, &server, "of its own").await;
        }
        give_up(&client, &server, "before").await;
        until("it is dropped", || server.unwanted() == ["before"]).await;
        assert_eq!(server.alive.load(SeqCst), limit - 1);
        let body = client.get(key(1, LARGE)).await.unwrap();
        assert!(body.read_all().await.unwrap() == noise(1, LARGE));
        server.gate.add_permits(limit);
        server.all_are_over().await;
        assert_eq!(server.ended.load(SeqCst), limit - 1);
    });
}

#[test]
fn a_thread_that_gives_up_has_the_handler_dropped() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let server = Patient::of(Server::bind(spot.address.as_path()).unwrap());
        let client = shmferry::Client::builder()
            .segments(SEGMENTS)
            .timeout(Duration::from_millis(1))
            .connect(spot.address.as_path())
            .unwrap();
        tokio::task::block_in_place(|| {
            for _ in 0..MANY {
                let reply = client.get("before");
                assert!(matches!(reply, Err(Error::Timeout(_))), "{reply:?}");
            }
        });
        server.all_are_over().await;
        assert!(server.unwanted().iter().all(|key| key == "before"));
    });
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("as it was told");
    }
}

#[test]
fn a_handler_that_panics_when_it_is_dropped_ends_nothing_else() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let queue = InProcess::bounded(4);
        let (begun, told) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (counted, tell) = (Arc::clone(&begun), Arc::clone(&told));
        let server = Server::in_process(queue.clone()).on_error(move |error| {
            tell.lock().unwrap().push(error.to_string());
        });
        let _serving = server.serve(move |request| {
            counted.fetch_add(1, SeqCst);
            async move {
                if let Some(bytes) = asked(request.key()) {
                    return request.send_bytes(&bytes).await;
                }
                let _bomb = Bomb;
                std::future::pending().await
            }
        });
        let builder = shmferry::Client::builder().segments(SEGMENTS);
        let client = builder.in_process_tokio(&queue).unwrap();
        for round in 1..4 {
            let get = tokio::spawn({
                let client = client.clone();
                async move { client.get("bomb").await.map(drop) }
            });
            until("the handler has begun", || begun.load(SeqCst) == 2 * round - 1).await;
            get.abort();
            until("the panic was told", || told.lock().unwrap().len() == round).await;
            let body = client.get(key(1, LARGE)).await.unwrap();
            assert!(body.read_all().await.unwrap() == noise(1, LARGE));
        }
        let told = told.lock().unwrap();
        assert!(
            told.iter().all(|error| error == "serving bomb panicked: as it was told"),
            "{told:?}"
        );
    });
}
