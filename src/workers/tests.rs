//! Places, panics and the end of a worker pool.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// A worker pool fed by a channel; dropping the sender ends it.
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
    assert!(!results.recv_timeout(Duration::from_secs(30)).unwrap(), "the fast one comes first");
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

/// Otherwise a process that joins and exits would leave what a queue removes in its drop.
#[test]
fn whoever_has_joined_finds_everything_dropped() {
    struct Late(Arc<AtomicUsize>);
    impl Drop for Late {
        fn drop(&mut self) {
            thread::sleep(Duration::from_millis(20)); // so that a `join` that does not wait fails
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
