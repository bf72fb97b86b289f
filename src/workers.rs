//! A pool of worker threads; while a worker blocks, its place at work is free for another.
//!
//! With a fixed number of threads, slow clients can occupy all of them; with one thread for each
//! job, the number of running jobs is not bounded. A [`WorkerPool`] bounds the jobs *at work*, and
//! not those that wait. A worker calls [`blocking`] around everything that blocks on another thread
//! or process: its place at work is free meanwhile. It takes a place again, in order of arrival,
//! before it goes on.
//!
//! The waits of this crate (for a lease, a reply, a slot, a sink) call it by themselves.

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::process::Origin;
pub use crate::sync::blocking;
use crate::sync::{Deadline, FairSemaphore, OnDrop, at_place, lock};

#[cfg(test)]
mod tests;

/// Threads that take jobs and do them, a bounded number at once.
///
/// ```
/// use shmferry::workers::{blocking, WorkerPool};
/// use shmferry::Deadline;
/// use std::sync::{Mutex, mpsc};
///
/// let (jobs, inbox) = mpsc::channel::<u32>();
/// let (done, results) = mpsc::channel();
/// let inbox = Mutex::new(inbox);
///
/// let workers = WorkerPool::start(
///     "squares",
///     2,
///     move || inbox.lock().unwrap().recv().ok(), // blocks; `None` ends the pool
///     move |n| {
///         blocking(|| std::thread::yield_now()); // anything that waits for another thread
///         done.send(n * n).unwrap();
///     },
/// )?;
/// (1..=3).for_each(|n| jobs.send(n).unwrap());
/// drop(jobs);
/// assert!(workers.join(Deadline::NEVER));
/// assert_eq!(results.iter().sum::<u32>(), 14);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct WorkerPool {
    shared: Arc<Shared>,
}

impl WorkerPool {
    /// The most threads of a pool, at work and waiting together. Further jobs are not taken from
    /// `next` until a thread is free.
    pub const THREAD_LIMIT: usize = 4096;

    /// Starts with one thread, and adds more as they are needed.
    ///
    /// `next` blocks until there is a job; it takes no place at work, and at least one thread is in
    /// it whenever the limit allows. If a thread cannot be started, this is tried again after a
    /// pause of 10 to 100 ms, as long as none is in `next`. `None` means that no more jobs will
    /// come, and so does a panic. `work` does a job in one of `places` places; a panic in it ends
    /// that job only. Dropping the pool lets its threads go on.
    ///
    /// # Errors
    /// When the system refuses the first thread, or the one that retries refused threads.
    ///
    /// # Panics
    /// If `places` is zero.
    pub fn start<J>(
        name: &str,
        places: usize,
        next: impl Fn() -> Option<J> + Send + Sync + 'static,
        work: impl Fn(J) + Send + Sync + 'static,
    ) -> io::Result<WorkerPool> {
        assert!(places > 0, "workers need a place to work in");
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            origin: Origin::here(),
            spares: places,
            threads: Mutex::default(),
            ended: Condvar::new(),
            refused: Condvar::new(),
            refusals: AtomicU64::new(0),
        });
        let places = Arc::new(FairSemaphore::new(places));
        let round = move |took: &dyn Fn(bool) -> bool| {
            let job = panic::catch_unwind(AssertUnwindSafe(&next)).unwrap_or(None);
            if !took(job.is_some()) {
                return false;
            }
            let Some(job) = job else { return false };
            at_place(&places, || work(job));
            true
        };
        let orders = Arc::new(Orders { shared: Arc::clone(&shared), round: Box::new(round) });
        spawn_starter(&orders)?;
        if let Err(error) = orders.spawn_worker() {
            lock(&shared.threads).over = true;
            shared.refused.notify_all();
            return Err(error);
        }
        Ok(WorkerPool { shared })
    }

    /// How often the system has refused a thread so far.
    pub fn refusals(&self) -> u64 {
        self.shared.refusals.load(Relaxed)
    }

    /// Waits until `next` has returned `None`, every job is done, and `next` and `work` are dropped
    /// with all that they own. Returns `false` when the deadline came first, and at once in a child
    /// of `fork`, which has none of the pool's threads. Does not end the pool itself.
    pub fn join(&self, deadline: Deadline) -> bool {
        let Shared { origin, ended, .. } = &*self.shared;
        if !origin.is_here() {
            return false;
        }
        let mut threads = lock(&self.shared.threads);
        while threads.threads > 0 {
            threads = match deadline.remaining() {
                None => ended.wait(threads).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    let woken = ended.wait_timeout(threads, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }
}

impl fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerPool").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

struct Shared {
    name: String,
    /// The process that the threads are in. A worker that forks ends in the child.
    origin: Origin,
    /// How many threads may wait for a job; a thread beyond that ends.
    spares: usize,
    threads: Mutex<Threads>,
    ended: Condvar,
    /// Notified when a thread was refused, and when the pool is over.
    refused: Condvar,
    refusals: AtomicU64,
}

#[derive(Default)]
struct Threads {
    threads: usize,
    /// Threads in `next`.
    at_next: usize,
    /// `next` has returned `None`.
    over: bool,
    /// No thread was in `next`, and the system refused one.
    was_refused: bool,
}

/// The code that each thread of a pool runs; owns `next` and `work`.
struct Orders {
    shared: Arc<Shared>,
    round: Box<Round>,
}

/// Takes a job, calls its argument with whether there was one, and does it unless that returns
/// `false`. Returns whether there may be another.
type Round = dyn Fn(&dyn Fn(bool) -> bool) -> bool + Send + Sync;

impl Orders {
    fn spawn_worker(self: &Arc<Orders>) -> io::Result<()> {
        let shared = &self.shared;
        {
            let mut threads = lock(&shared.threads);
            threads.threads += 1;
            threads.at_next += 1;
        }
        let orders = Arc::clone(self);
        let spawned = thread::Builder::new().name(shared.name.clone()).spawn(|| serve(orders));
        if spawned.is_err() {
            let mut threads = lock(&shared.threads);
            threads.threads -= 1;
            threads.at_next -= 1;
        }
        spawned.map(drop)
    }

    /// Starts a thread to wait for the next job, if none waits. If the system refuses, the starter
    /// thread tries again.
    fn spawn_if_none_is_at_next(self: &Arc<Orders>) {
        let shared = &self.shared;
        let is_needed = {
            let threads = lock(&shared.threads);
            threads.at_next == 0 && !threads.over && threads.threads < WorkerPool::THREAD_LIMIT
        };
        if is_needed && self.spawn_worker().is_err() {
            shared.refusals.fetch_add(1, Relaxed);
            // Only the starter clears this: a worker that sees a thread in `next` may see another
            // worker's attempt, which is about to fail.
            lock(&shared.threads).was_refused = true;
            shared.refused.notify_all();
        }
    }

    /// Records that this thread has left `next`; `false` in a child of `fork`.
    fn took(self: &Arc<Orders>, is_job: bool) -> bool {
        let shared = &self.shared;
        if !shared.origin.is_here() {
            return false;
        }
        let is_over = {
            let mut threads = lock(&shared.threads);
            threads.at_next -= 1;
            threads.over |= !is_job;
            threads.over
        };
        if is_over {
            shared.refused.notify_all(); // ends the starter
        }
        if is_job {
            self.spawn_if_none_is_at_next();
        }
        true
    }
}

fn serve(orders: Arc<Orders>) {
    let shared = Arc::clone(&orders.shared);
    // Counts this thread out, even if it panics.
    let _ended = OnDrop(|| {
        if shared.origin.is_here() {
            lock(&shared.threads).threads -= 1;
            shared.ended.notify_all();
        }
    });
    let orders = orders; // dropped first: `join` may return after the count, and the process end
    while (orders.round)(&|is_job| orders.took(is_job)) && shared.origin.is_here() {
        let mut threads = lock(&shared.threads);
        if threads.over || threads.at_next >= shared.spares {
            return;
        }
        threads.at_next += 1;
    }
}

/// Starts the starter: the thread that retries the starting of refused workers, so that workers do
/// not wait for that. It does not keep `next` and `work` alive.
fn spawn_starter(orders: &Arc<Orders>) -> io::Result<()> {
    /// The pause before the next attempt after a refusal: first and longest.
    const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(100)];
    let (shared, orders) = (Arc::clone(&orders.shared), Arc::downgrade(orders));
    let start = move || {
        let mut pause = PAUSES[0];
        let mut threads = lock(&shared.threads);
        while !threads.over {
            if threads.at_next > 0 || !threads.was_refused {
                threads.was_refused = false;
                pause = PAUSES[0];
                threads = shared.refused.wait(threads).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(threads);
            thread::sleep(pause);
            pause = PAUSES[1].min(pause * 2);
            // Counted as a worker while it has the orders, so that `join` waits for it.
            lock(&shared.threads).threads += 1;
            if let Some(orders) = orders.upgrade() {
                orders.spawn_if_none_is_at_next();
            }
            threads = lock(&shared.threads);
            threads.threads -= 1;
            shared.ended.notify_all();
        }
    };
    thread::Builder::new().name("shmferry-starter".to_owned()).spawn(start).map(drop)
}
