//! A crew of worker threads that lend their places while they wait for somebody.
//!
//! A fixed number of threads serves badly when some of them are stuck with slow clients, and a
//! thread for each job lets everything run at once. A [`WorkerPool`] bounds the jobs that are *at work*
//! and not those that wait: around everything that blocks on somebody else, a worker [`blocking`]s its
//! place to the next job, and takes a place again, in order of arrival, before it goes on.
//!
//! The waits of this crate (for a lease, a reply, a slot, a sink) lend by themselves.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::process::Origin;
use crate::sync::{Deadline, FairSemaphore, lock};

/// Threads that take jobs and do them, at most so many at once.
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
///         blocking(|| std::thread::yield_now()); // anything that waits for somebody else
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
    /// The most threads a crew grows to, at work and waiting together. Jobs beyond that stay where
    /// they are, with whoever `next` takes them from.
    pub const THREAD_LIMIT: usize = 4096;

    /// Starts with one thread, and adds more as they are needed.
    ///
    /// `next` blocks until there is a job; it holds no place meanwhile, and one thread at least is
    /// in it whenever the limit allows. A thread that the system refuses is tried again, after a
    /// pause of 10 to 100 ms, for as long as none is in `next`. `None` means that no more jobs will
    /// come, and so does a panic.
    /// `work` does a job in one of `places` places; a panic in it ends that job only. Dropping the
    /// crew lets its threads go on.
    ///
    /// # Errors
    /// When the system refuses the first thread, or that which starts others after a refusal.
    ///
    /// # Panics
    /// If `places` is zero.
    pub fn start<J>(
        name: &str,
        places: usize,
        next: impl Fn() -> Option<J> + Send + Sync + 'static,
        work: impl Fn(J) + Send + Sync + 'static,
    ) -> io::Result<WorkerPool> {
        assert!(places > 0, "a workers needs a place to work in");
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            origin: Origin::here(),
            places: Arc::new(FairSemaphore::new(places)),
            spares: places,
            threads: Mutex::new(Threads {
                threads: 0,
                at_next: 0,
                over: false,
                was_refused: false,
            }),
            ended: Condvar::new(),
            refused: Condvar::new(),
            refusals: AtomicU64::new(0),
        });
        let orders = Arc::new(Orders { shared: Arc::clone(&shared), next, work });
        spawn_starter(&orders)?;
        if let Err(error) = spawn_worker(&orders) {
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

    /// Waits until `next` has said `None`, every job is done, and `next` and `work` are dropped
    /// with all that they hold; `false` when the deadline came first, and at once in a child of
    /// `fork`, which has none of the crew's threads. Does not itself end anything.
    pub fn join(&self, deadline: Deadline) -> bool {
        if !self.shared.origin.is_here() {
            return false;
        }
        let mut threads = lock(&self.shared.threads);
        while threads.threads > 0 {
            if deadline.has_passed() {
                return false;
            }
            threads = match deadline.remaining() {
                None => self.shared.ended.wait(threads).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    self.shared
                        .ended
                        .wait_timeout(threads, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
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

/// Runs `wait`, which blocks on somebody else, while this thread's place in its [`WorkerPool`] is lent to
/// another. Takes a place again before it returns. On a thread of no crew it only runs `wait`.
pub fn blocking<T>(wait: impl FnOnce() -> T) -> T {
    // Taken out for the time being, so that a wait within the wait does not lend twice.
    let Some((place, origin)) = PLACE.with_borrow_mut(Option::take) else { return wait() };
    if !origin.is_here() {
        return wait(); // the place, and whoever waits for it, are in the process that forked
    }
    place.leave();
    let _back_to_work = OnDrop(|| {
        if !origin.is_here() {
            return; // forked within the wait
        }
        place.enter(Deadline::NEVER);
        PLACE.set(Some((Arc::clone(&place), origin)));
    });
    wait()
}

thread_local! {
    /// Where this thread's place is to be given back; `None` when it holds none.
    static PLACE: RefCell<Option<(Arc<FairSemaphore>, Origin)>> = const { RefCell::new(None) };
}

struct Shared {
    name: String,
    /// The process that the threads are in. One of them that forks ends alone in the child.
    origin: Origin,
    places: Arc<FairSemaphore>,
    /// How many threads may wait for a job before one goes home.
    spares: usize,
    threads: Mutex<Threads>,
    ended: Condvar,
    /// Told when a thread was refused, and when it is over.
    refused: Condvar,
    refusals: AtomicU64,
}

struct Threads {
    threads: usize,
    /// Threads in `next`.
    at_next: usize,
    /// `next` has said `None`.
    over: bool,
    /// No thread was at `next`, and the system refused one.
    was_refused: bool,
}

struct Orders<N, W> {
    shared: Arc<Shared>,
    next: N,
    work: W,
}

/// How long to leave a system that refuses threads alone, at first and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(100)];

/// Starts the thread that starts others where a worker was refused one. Workers do not wait for that:
/// they have jobs. It holds on to nothing that `next` and `work` hold.
fn spawn_starter<J, N, W>(orders: &Arc<Orders<N, W>>) -> io::Result<()>
where
    N: Fn() -> Option<J> + Send + Sync + 'static,
    W: Fn(J) + Send + Sync + 'static,
{
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
            // Counted as a thread of the crew while it holds the orders: `join` waits for it.
            lock(&shared.threads).threads += 1;
            let held = orders.upgrade();
            if let Some(orders) = &held {
                spawn_if_none_is_at_next(orders);
            }
            drop(held);
            threads = lock(&shared.threads);
            threads.threads -= 1;
            shared.ended.notify_all();
        }
    };
    thread::Builder::new().name("shmferry-starter".to_owned()).spawn(start).map(drop)
}

/// Has a thread wait for the next job, if none does. If the system refuses one, the starter tries again.
fn spawn_if_none_is_at_next<J, N, W>(orders: &Arc<Orders<N, W>>)
where
    N: Fn() -> Option<J> + Send + Sync + 'static,
    W: Fn(J) + Send + Sync + 'static,
{
    let shared = &orders.shared;
    let is_needed = {
        let threads = lock(&shared.threads);
        threads.at_next == 0 && !threads.over && threads.threads < WorkerPool::THREAD_LIMIT
    };
    if is_needed && spawn_worker(orders).is_err() {
        shared.refusals.fetch_add(1, Relaxed);
        // Taken back by the starter alone: a worker that finds one at `next` may have seen another's
        // attempt, which fails next.
        lock(&shared.threads).was_refused = true;
        shared.refused.notify_all();
    }
}

fn spawn_worker<J, N, W>(orders: &Arc<Orders<N, W>>) -> io::Result<()>
where
    N: Fn() -> Option<J> + Send + Sync + 'static,
    W: Fn(J) + Send + Sync + 'static,
{
    let shared = &orders.shared;
    {
        let mut threads = lock(&shared.threads);
        threads.threads += 1;
        threads.at_next += 1;
    }
    let worker_orders = Arc::clone(orders);
    let spawned =
        thread::Builder::new().name(shared.name.clone()).spawn(move || serve(worker_orders));
    if spawned.is_err() {
        let mut threads = lock(&shared.threads);
        threads.threads -= 1;
        threads.at_next -= 1;
    }
    spawned.map(drop)
}

fn serve<J, N, W>(orders: Arc<Orders<N, W>>)
where
    N: Fn() -> Option<J> + Send + Sync + 'static,
    W: Fn(J) + Send + Sync + 'static,
{
    let shared = Arc::clone(&orders.shared);
    // Whatever ends this thread, the roll says so.
    let _home = OnDrop(|| {
        if !shared.origin.is_here() {
            return;
        }
        let mut threads = lock(&shared.threads);
        threads.threads -= 1;
        drop(threads);
        shared.ended.notify_all();
    });
    let orders = orders; // dropped before that: whoever joins may end the process
    loop {
        let job = panic::catch_unwind(AssertUnwindSafe(|| (orders.next)())).unwrap_or(None);
        if !shared.origin.is_here() {
            return;
        }
        let is_over = {
            let mut threads = lock(&shared.threads);
            threads.at_next -= 1;
            threads.over |= job.is_none();
            threads.over
        };
        if is_over {
            shared.refused.notify_all(); // ends the starter
        }
        let Some(job) = job else { return };
        spawn_if_none_is_at_next(&orders);
        at_work(&shared, || (orders.work)(job));
        if !shared.origin.is_here() {
            return;
        }

        let mut threads = lock(&shared.threads);
        if threads.over || threads.at_next >= shared.spares {
            return;
        }
        threads.at_next += 1;
    }
}

/// Runs `job` in a place. A panic has been reported by the panic hook, and its unwinding has ended
/// whatever the job held; it must not take the thread along.
fn at_work(shared: &Shared, job: impl FnOnce()) {
    shared.places.enter(Deadline::NEVER);
    PLACE.set(Some((Arc::clone(&shared.places), shared.origin)));
    let _ = panic::catch_unwind(AssertUnwindSafe(job));
    PLACE.set(None);
    if shared.origin.is_here() {
        shared.places.leave();
    }
}

/// Runs its closure when it goes out of scope, unwinding included.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(30))
    }

    /// A crew fed by a channel; dropping the sender ends it.
    fn workers<J: Send + 'static>(
        places: usize,
        work: impl Fn(J) + Send + Sync + 'static,
    ) -> (mpsc::Sender<J>, WorkerPool) {
        let (jobs, inbox) = mpsc::channel();
        let inbox = Mutex::new(inbox);
        (jobs, WorkerPool::start("test", places, move || lock(&inbox).recv().ok(), work).unwrap())
    }

    #[test]
    fn no_more_at_work_than_places() {
        static AT_WORK: AtomicUsize = AtomicUsize::new(0);
        let (jobs, workers) = workers(3, |()| {
            assert!(AT_WORK.fetch_add(1, Ordering::SeqCst) < 3);
            thread::yield_now();
            AT_WORK.fetch_sub(1, Ordering::SeqCst);
        });
        (0..500).for_each(|_| jobs.send(()).unwrap());
        drop(jobs);
        assert!(workers.join(soon()));
        assert_eq!(AT_WORK.load(Ordering::SeqCst), 0, "an assertion in a job failed");
    }

    #[test]
    fn waiting_jobs_starve_nobody() {
        let (release, gate) = mpsc::channel::<()>();
        let (done, results) = mpsc::channel();
        let gate = Mutex::new(gate);
        let (jobs, workers) = workers(2, move |stalls: bool| {
            if stalls {
                blocking(|| lock(&gate).recv().unwrap());
            }
            done.send(stalls).unwrap();
        });
        (0..6).for_each(|_| jobs.send(true).unwrap());
        jobs.send(false).unwrap();
        assert!(
            !results.recv_timeout(Duration::from_secs(30)).unwrap(),
            "the fast one comes first"
        );
        (0..6).for_each(|_| release.send(()).unwrap());
        drop(jobs);
        assert!(workers.join(soon()));
        assert_eq!(results.iter().filter(|stalls| *stalls).count(), 6);
    }

    #[test]
    fn a_panic_ends_one_job_and_gives_its_place_back() {
        let (done, results) = mpsc::channel();
        let (jobs, workers) = workers(1, move |n: u32| {
            if n == 0 {
                blocking(|| panic!("meant to be seen in the test's output"));
            }
            done.send(n).unwrap();
        });
        (0..3).for_each(|n| jobs.send(n).unwrap());
        drop(jobs);
        assert!(workers.join(soon()));
        let mut done: Vec<_> = results.iter().collect();
        done.sort(); // two threads may take them, and either be the first in the place
        assert_eq!(done, [1, 2]);
    }

    /// Or a process that joins and ends leaves behind what a queue removes when it is dropped.
    #[test]
    fn whoever_has_joined_finds_everything_dropped() {
        struct Late(Arc<AtomicUsize>);
        impl Drop for Late {
            fn drop(&mut self) {
                thread::sleep(Duration::from_millis(20)); // so that whoever does not wait is seen
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let dropped = Arc::new(AtomicUsize::new(0));
        let (held_by_next, held_by_work) = (Late(Arc::clone(&dropped)), Late(Arc::clone(&dropped)));
        let next = move || {
            let _ = &held_by_next;
            None::<()>
        };
        let work = move |()| {
            let _ = &held_by_work;
        };
        assert!(WorkerPool::start("test", 1, next, work).unwrap().join(soon()));
        assert_eq!(dropped.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn join_respects_its_deadline() {
        let (jobs, workers) = workers(1, |()| {});
        assert!(!workers.join(Deadline::after(Duration::from_millis(1))));
        drop(jobs);
        assert!(workers.join(soon()));
    }
}
