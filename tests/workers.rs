//! A crew's places: as many jobs at work as there are places, whatever else waits meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use shmferry::Deadline;
use shmferry::workers::{WorkerPool, blocking};
use shmferry_test_support::watchdog::watchdog;

const PLACES: usize = 2;

/// Counts those at work; whether there were ever more than places.
#[derive(Default)]
struct Count {
    at_work: AtomicUsize,
    too_many: AtomicBool,
}

impl Count {
    fn works(&self) {
        if self.at_work.fetch_add(1, SeqCst) >= PLACES {
            self.too_many.store(true, SeqCst);
        }
        thread::yield_now();
        self.at_work.fetch_sub(1, SeqCst);
    }
}

/// Has a crew do a thousand jobs, each of which works, waits, and works again.
fn work_and_wait(wait: impl Fn() + Send + Sync + 'static) {
    let _watchdog = watchdog();
    let count = Arc::new(Count::default());
    let (jobs, inbox) = mpsc::channel();
    let inbox = Mutex::new(inbox);
    let workers = WorkerPool::start("test", PLACES, move || inbox.lock().unwrap().recv().ok(), {
        let count = Arc::clone(&count);
        move |()| {
            count.works();
            blocking(&wait);
            count.works();
        }
    });
    let workers = workers.unwrap();
    (0..1000).for_each(|_| jobs.send(()).unwrap());
    drop(jobs);
    assert!(workers.join(Deadline::after(Duration::from_secs(60))));
    assert!(!count.too_many.load(SeqCst), "more at work than places");
}

#[test]
fn a_thread_that_has_waited_works_on_only_in_a_place() {
    work_and_wait(thread::yield_now);
}

#[test]
fn a_wait_within_a_wait_lends_one_place() {
    work_and_wait(|| blocking(thread::yield_now));
}
