//! The rings under loom: clients and workers as they ship, by `ci/loom.sh`.
//!
//! Real are the ring, its cursors and `NEED_WAKEUP`, the workers' loop with the whole wake policy,
//! and the count of a client's requests under way. Replaced are the memory (`mapping_model.rs`),
//! the epoll (a list of [`Event`]s), and the processor numbers, so that no worker spins: each
//! checks the rings once. Some workers take a request and never return, like one held up by a slow
//! client: a request left to such a worker alone would be lost.

use std::sync::Arc;

use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::error::Result;
use crate::peer::{Link, Registration};
use crate::segment::Words;
use crate::sync::Deadline;
use crate::sync::atomic::{Acquire, AtomicBool, Relaxed, Release};

use super::ring::{Posted, Poster, RING_WORDS, Taker};
use super::wake_policy::{Attended, WakePolicy, Watched, WorkSource, next_entry, rest_at_limit};

/// The events that workers sleep for: each wakes one of them.
#[derive(Default)]
struct Events {
    list: Mutex<Vec<Event>>,
    comes: Condvar,
}

/// What a worker finds when it wakes.
enum Event {
    /// A client's wakeup for its ring.
    Message(Arc<Ring>),
    WakeOne,
}

impl Events {
    fn tell(&self, event: Event) {
        self.list.lock().unwrap().push(event);
        self.comes.notify_one();
    }

    fn wait(&self) -> Event {
        let mut list = self.list.lock().unwrap();
        loop {
            match list.pop() {
                Some(event) => return event,
                None => list = self.comes.wait(list).unwrap(),
            }
        }
    }
}

struct Ring {
    poster: Poster,
    taker: Taker,
    taking: Mutex<()>,
    link: Arc<Link>,
    resting: AtomicBool,
    /// True once the server has hung up on the client; changed under `taking`.
    over: AtomicBool,
    /// The in-flight limit.
    bound: usize,
}

impl Watched for Ring {
    fn has_work(&self) -> bool {
        !self.is_over() && !self.resting.load(Relaxed) && self.taker.has_entries()
    }

    fn arm(&self) -> bool {
        self.taker.arm() && self.has_work()
    }

    fn disarm(&self) {
        self.taker.disarm();
    }

    fn is_at_rest(&self) -> bool {
        self.link.is_below(1)
    }

    fn client_cpu(&self) -> u32 {
        self.taker.client_cpu()
    }

    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    fn begin_rest(&self) {
        self.resting.store(true, Relaxed);
    }

    fn end_rest(&self) -> bool {
        self.resting.swap(false, Relaxed)
    }
}

struct Shared {
    rings: Vec<Arc<Ring>>,
    wake_policy: WakePolicy<Ring>,
    events: Events,
}

fn shared(rings: usize) -> Arc<Shared> {
    bounded(rings, usize::MAX)
}

fn bounded(rings: usize, bound: usize) -> Arc<Shared> {
    let ring = |_| {
        let words = Words::zeroed(RING_WORDS);
        let poster = Poster::new(words.clone());
        let (taker, link) = (Taker::new(words), Arc::new(Link::within()));
        let (resting, over) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Ring { poster, taker, taking: Mutex::new(()), link, resting, over, bound })
    };
    let rings = (0..rings).map(ring).collect();
    Arc::new(Shared { rings, wake_policy: WakePolicy::new(), events: Events::default() })
}

/// A worker: each request that it takes counts as under way until it is dropped.
struct Worker(Arc<Shared>);

impl WorkSource for Worker {
    type Ring = Ring;
    type Event = Event;
    type Request = (u64, Registration);

    fn take(&self, ring: &Arc<Ring>) -> Result<Option<Self::Request>> {
        let request = {
            let _one_at_a_time = ring.taking.lock().unwrap();
            let Some(entry) = next_entry(&**ring, &ring.taker)? else { return Ok(None) };
            ring.taker.advance();
            assert_eq!(entry.key(), entry.generation.to_ne_bytes(), "an entry of two requests");
            (entry.generation, ring.link.count())
        };
        let shared = Arc::clone(&self.0);
        ring.clone().limit(shared);
        Ok(Some(request))
    }

    fn sleep(&self, _: Deadline) -> Result<Option<Event>> {
        Ok(match self.0.events.wait() {
            Event::WakeOne => None,
            event => Some(event),
        })
    }

    fn attend(&self, event: Event) -> Result<Attended<Ring, Self::Request>> {
        let Event::Message(ring) = event else { unreachable!("`sleep` keeps the others") };
        Ok(Attended { ring: Some(ring), request: None })
    }

    fn wake_one(&self) {
        self.0.events.tell(Event::WakeOne);
    }

    fn is_look_due(&self) -> bool {
        false
    }

    fn check_open(&self) -> Result<()> {
        Ok(())
    }
}

impl Ring {
    /// Applies the in-flight limit, as the queue does after it has taken a request.
    fn limit(self: Arc<Self>, shared: Arc<Shared>) {
        if rest_at_limit(&*self, &self.link, self.bound) {
            let (link, bound) = (Arc::clone(&self.link), self.bound);
            link.when_below(bound, move || {
                shared.wake_policy.resume(&self, || shared.events.tell(Event::WakeOne));
            });
        }
    }
}

impl Shared {
    /// Posts a request to a ring, as soon as there is room, and sends the wakeup if needed.
    fn post(&self, ring: usize, generation: u64) {
        let ring = &self.rings[ring];
        let number = loop {
            match ring.poster.post(0, generation, true, &generation.to_ne_bytes()) {
                Some(number) => break number,
                None => thread::yield_now(),
            }
        };
        if let Posted::MustWake(need_wakeup) = ring.poster.follow(number, true) {
            self.events.tell(Event::Message(Arc::clone(ring)));
            ring.poster.lower(need_wakeup);
        }
    }

    /// Posts a request, and fails to send the wakeup.
    fn post_in_vain(&self, generation: u64) {
        let ring = &self.rings[0];
        let number = ring.poster.post(0, generation, true, &generation.to_ne_bytes()).unwrap();
        let _ = ring.poster.follow(number, true);
    }

    /// Takes one request, as a worker does, and ends it at once.
    fn recv(self: &Arc<Self>) -> u64 {
        let worker = Worker(Arc::clone(self));
        self.wake_policy.recv(&worker, Deadline::NEVER).unwrap().0
    }
}

/// Runs `body` in every interleaving; says how many there were.
fn model(most_preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let runs = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    // More take hours with four threads.
    builder.preemption_bound = builder.preemption_bound.map(|bound| bound.min(most_preemptions));
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        body();
    });
    println!("{} interleavings", runs.load(Relaxed));
}

fn spawn<T: 'static>(
    shared: &Arc<Shared>,
    run: impl FnOnce(&Arc<Shared>) -> T + 'static,
) -> thread::JoinHandle<T> {
    let shared = Arc::clone(shared);
    thread::spawn(move || run(&shared))
}

#[test]
fn two_requests_one_worker_each() {
    model(3, || {
        let shared = shared(1);
        let workers = [(); 2].map(|()| spawn(&shared, |shared| shared.recv()));
        shared.post(0, 1);
        shared.post(0, 2);
        let mut taken = workers.map(|worker| worker.join().unwrap());
        taken.sort();
        assert_eq!(taken, [1, 2]);
    });
}

#[test]
fn two_threads_of_one_client() {
    model(3, || {
        let shared = shared(1);
        let posters =
            [1, 2].map(|generation| spawn(&shared, move |shared| shared.post(0, generation)));
        let taken = [shared.recv(), shared.recv()];
        assert!(taken == [1, 2] || taken == [2, 1], "{taken:?}");
        posters.into_iter().for_each(|poster| poster.join().unwrap());
    });
}

#[test]
fn a_knock_that_fails_costs_nobody_else_anything() {
    model(3, || {
        let shared = shared(1);
        let posters = [
            spawn(&shared, |shared| shared.post_in_vain(1)),
            spawn(&shared, |shared| shared.post(0, 2)),
        ];
        // The later client finds `NEED_WAKEUP` still raised, and its wakeup serves both requests.
        while shared.recv() != 2 {}
        posters.into_iter().for_each(|poster| poster.join().unwrap());
    });
}

#[test]
fn two_clients_one_of_them_active() {
    model(2, || {
        let shared = shared(2);
        let twice = spawn(&shared, |shared| vec![shared.recv(), shared.recv()]);
        let once = spawn(&shared, |shared| vec![shared.recv()]);
        let other = spawn(&shared, |shared| shared.post(1, 3));
        (1..=2).for_each(|generation| shared.post(0, generation));
        other.join().unwrap();
        let mut taken = [twice.join().unwrap(), once.join().unwrap()].concat();
        taken.sort();
        assert_eq!(taken, [1, 2, 3]);
    });
}

#[test]
fn a_ring_that_fills_up() {
    model(3, || {
        let shared = shared(1);
        let worker = spawn(&shared, |shared| [shared.recv(), shared.recv(), shared.recv()]);
        (1..=3).for_each(|generation| shared.post(0, generation));
        assert_eq!(worker.join().unwrap(), [1, 2, 3]);
    });
}

/// The answers to clients, which they wait for.
#[derive(Default)]
struct Answers {
    count: Mutex<u32>,
    comes: Condvar,
}

impl Answers {
    fn add(&self) {
        *self.count.lock().unwrap() += 1;
        self.comes.notify_all();
    }

    fn wait_for(&self, count: u32) {
        let mut seen = self.count.lock().unwrap();
        while *seen < count {
            seen = self.comes.wait(seen).unwrap();
        }
    }
}

/// More rings than can be active, and workers that may be preempted between finding and taking. The
/// client's next request must not depend on a worker that took its last one and does not return.
#[test]
fn clients_that_ask_again_once_they_are_answered() {
    model(2, || {
        let shared = shared(2);
        let answers = Arc::new(Answers::default());
        let workers = [(); 2].map(|()| {
            let answers = Arc::clone(&answers);
            spawn(&shared, move |shared| {
                for _ in 0..2 {
                    shared.recv();
                    answers.add();
                }
            })
        });
        shared.post(0, 1);
        answers.wait_for(1);
        shared.post(1, 2);
        shared.post(0, 3);
        answers.wait_for(3);
        shared.post(0, 4);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// A client at its in-flight limit: what it posts meanwhile is found when one of its requests ends,
/// although every worker sleeps by then.
#[test]
fn a_client_at_its_limit_is_served_on_when_a_request_of_it_ends() {
    model(3, || {
        let shared = bounded(1, 1);
        shared.post(0, 1);
        let worker = Worker(Arc::clone(&shared));
        let (first, under_way) = shared.wake_policy.recv(&worker, Deadline::NEVER).unwrap();
        assert_eq!(first, 1);
        let other = spawn(&shared, |shared| shared.recv());
        let ending = thread::spawn(move || drop(under_way));
        shared.post(0, 2);
        assert_eq!(other.join().unwrap(), 2);
        ending.join().unwrap();
    });
}

/// As before, and the ring is not active any more when the request ends: another has taken its
/// place.
#[test]
fn a_client_put_aside_at_its_limit_is_served_on() {
    model(3, || {
        let shared = bounded(2, 1);
        let worker = Worker(Arc::clone(&shared));
        shared.post(0, 1);
        let (first, under_way) = shared.wake_policy.recv(&worker, Deadline::NEVER).unwrap();
        shared.post(0, 2);
        shared.post(1, 3);
        assert_eq!((first, shared.recv()), (1, 3));
        let other = spawn(&shared, |shared| shared.recv());
        drop(under_way);
        assert_eq!(other.join().unwrap(), 2);
    });
}

/// A client sends what was not taken before a hang-up to another server. So no request may be taken
/// once the client can see the hang-up.
#[test]
fn what_was_not_taken_when_the_server_hung_up_never_is() {
    model(3, || {
        let shared = shared(1);
        let ring = Arc::clone(&shared.rings[0]);
        let is_closed = Arc::new(AtomicBool::new(false));
        let worker = spawn(&shared, |shared| {
            let taken = Worker(Arc::clone(shared)).take(&shared.rings[0]).unwrap();
            taken.is_some()
        });
        let server = {
            let (ring, is_closed) = (Arc::clone(&ring), Arc::clone(&is_closed));
            thread::spawn(move || {
                {
                    let _none_takes = ring.taking.lock().unwrap();
                    ring.over.store(true, Relaxed);
                }
                is_closed.store(true, Release); // the state of the socket, as the client sees it
            })
        };
        let number = ring.poster.post(0, 1, true, &1u64.to_ne_bytes()).unwrap();
        while !is_closed.load(Acquire) {
            thread::yield_now();
        }
        let was_taken = ring.poster.was_taken(number);
        server.join().unwrap();
        assert_eq!(worker.join().unwrap(), was_taken);
    });
}
