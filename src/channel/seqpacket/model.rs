//! The rings under loom: posters and workers as they ship, by `ci/loom.sh`.
//!
//! Real are the ring, its cursors and its bell, and the lookout. Replaced are the memory
//! (`mapping_model.rs`), the epoll (a [`Doorway`]), and the processor numbers, so that nobody spins:
//! whoever looks looks once. A worker that has taken a request is never seen again, as one that a slow
//! client holds up, so that a request left to it alone would be lost.

use std::sync::Arc;

use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::segment::Words;

use super::lookout::{Lookout, Watched};
use super::ring::{Posted, Poster, RING_WORDS, Taker};

/// What workers sleep at: each event wakes one of them.
#[derive(Default)]
struct Doorway {
    events: Mutex<Vec<Event>>,
    comes: Condvar,
}

/// What a worker finds when it wakes.
#[derive(Clone)]
enum Event {
    Knock(Arc<Ring>),
    Nudge,
}

impl Doorway {
    fn tell(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        self.comes.notify_one();
    }

    fn wait(&self) -> Event {
        let mut events = self.events.lock().unwrap();
        loop {
            match events.pop() {
                Some(event) => return event,
                None => events = self.comes.wait(events).unwrap(),
            }
        }
    }
}

struct Ring {
    poster: Poster,
    taker: Taker,
    taking: Mutex<()>,
}

impl Ring {
    fn take(&self) -> Option<u64> {
        let _one_at_a_time = self.taking.lock().unwrap();
        let entry = self.taker.peek().unwrap()?;
        self.taker.advance();
        assert_eq!(entry.key(), entry.generation.to_ne_bytes(), "an entry of two requests");
        Some(entry.generation)
    }
}

impl Watched for Ring {
    fn has_work(&self) -> bool {
        self.taker.has_entries()
    }

    fn arm(&self) -> bool {
        self.taker.arm()
    }

    fn disarm(&self) {
        self.taker.disarm();
    }

    fn is_at_rest(&self) -> bool {
        true
    }

    fn client_cpu(&self) -> u32 {
        self.taker.client_cpu()
    }
}

struct Shared {
    rings: Vec<Arc<Ring>>,
    lookout: Lookout<Ring>,
    doorway: Doorway,
}

fn shared(rings: usize) -> Arc<Shared> {
    let ring = |_| {
        let words = Words::zeroed(RING_WORDS);
        let poster = Poster::new(words.clone());
        Arc::new(Ring { poster, taker: Taker::new(words), taking: Mutex::new(()) })
    };
    let rings = (0..rings).map(ring).collect();
    Arc::new(Shared { rings, lookout: Lookout::new(), doorway: Doorway::default() })
}

impl Shared {
    /// Posts a request to a ring, as soon as there is room.
    fn post(&self, ring: usize, generation: u64) {
        let ring = &self.rings[ring];
        let number = loop {
            match ring.poster.post(0, generation, &generation.to_ne_bytes()) {
                Some(number) => break number,
                None => thread::yield_now(),
            }
        };
        if let Posted::MustKnock(bell) = ring.poster.follow(number, true) {
            self.doorway.tell(Event::Knock(Arc::clone(ring)));
            ring.poster.lower(bell);
        }
    }

    /// Posts a request, and fails to knock.
    fn post_in_vain(&self, generation: u64) {
        let ring = &self.rings[0];
        let number = ring.poster.post(0, generation, &generation.to_ne_bytes()).unwrap();
        let _ = ring.poster.follow(number, true);
    }

    /// Takes one request, as a worker does.
    fn recv(&self) -> u64 {
        let taken = loop {
            if let Some(ring) = self.lookout.find().or_else(|| self.lookout.look(|| false)) {
                if let Some(taken) = ring.take() {
                    break taken;
                }
                continue;
            }
            if !self.lookout.lie_down() {
                continue;
            }
            let event = self.doorway.wait();
            self.lookout.rise();
            if let Event::Knock(ring) = event {
                self.lookout.activate(&ring);
            }
        };
        if self.lookout.leave() {
            self.doorway.tell(Event::Nudge);
        }
        taken
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
    run: impl FnOnce(&Shared) -> T + 'static,
) -> thread::JoinHandle<T> {
    let shared = Arc::clone(shared);
    thread::spawn(move || run(&shared))
}

#[test]
fn two_requests_one_worker_each() {
    model(3, || {
        let shared = shared(1);
        let workers = [(); 2].map(|()| spawn(&shared, Shared::recv));
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
        let posters = [1, 2].map(|generation| spawn(&shared, move |shared| shared.post(0, generation)));
        let taken = [shared.recv(), shared.recv()];
        assert!(taken == [1, 2] || taken == [2, 1], "{taken:?}");
        posters.into_iter().for_each(|poster| poster.join().unwrap());
    });
}

#[test]
fn a_knock_that_fails_costs_nobody_else_anything() {
    model(3, || {
        let shared = shared(1);
        let posters =
            [spawn(&shared, |shared| shared.post_in_vain(1)), spawn(&shared, |shared| shared.post(0, 2))];
        // Whoever comes later finds what was posted in vain, or knocks for both.
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
