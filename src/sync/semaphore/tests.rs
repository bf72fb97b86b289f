//! The semaphore between threads.

use super::*;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

fn placed(permits: u32) -> Arc<Semaphore> {
    let semaphore = Arc::new(Semaphore::with(permits));
    semaphore.initialise();
    semaphore
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn has_sleeper(semaphore: &Semaphore) -> bool {
    let limit = soon();
    while semaphore.sleepers.load(Relaxed) == 0 {
        assert!(!limit.has_passed(), "no thread went to sleep");
        thread::yield_now();
    }
    true
}

#[test]
fn permits_are_counted() {
    let s = placed(2);
    let first = s.try_wait().unwrap();
    let _second = s.try_wait().unwrap();
    assert!(matches!(s.try_wait(), Err(Interrupted::TimedOut)));
    s.post(first);
    assert!(s.try_wait().is_ok());
}

#[test]
fn a_wait_ends_at_its_deadline_and_not_before() {
    let s = placed(0);
    let start = Instant::now();
    let timeout = Duration::from_millis(50);
    assert!(matches!(s.wait(Deadline::after(timeout)), Err(Interrupted::TimedOut)));
    assert!(start.elapsed() >= timeout);
    assert_eq!(s.sleepers.load(Relaxed), 0);
}

#[test]
fn poison_wakes_a_sleeper_and_lets_permits_drain_first() {
    let s = placed(1);
    let drained = {
        let s = Arc::clone(&s);
        thread::spawn(move || {
            let _permit = s.wait(soon()).unwrap();
            s.wait(Deadline::NEVER)
        })
    };
    assert!(has_sleeper(&s));
    s.poison();
    assert!(matches!(drained.join().unwrap(), Err(Interrupted::Poisoned)));

    let s = placed(1);
    s.poison();
    assert!(s.wait(soon()).is_ok());
    assert!(matches!(s.wait(soon()), Err(Interrupted::Poisoned)));
    s.reset(1);
    assert!(s.wait(soon()).is_ok());
}

#[test]
fn a_post_wakes_a_sleeper() {
    let s = placed(1);
    let permit = s.try_wait().unwrap();
    let sleeper = {
        let s = Arc::clone(&s);
        thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
    };
    assert!(has_sleeper(&s));
    s.post(permit);
    sleeper.join().unwrap().unwrap();
}

#[test]
fn poison_wakes_a_sleeper_that_the_peer_has_denied() {
    let s = placed(0);
    let sleeper = {
        let s = Arc::clone(&s);
        thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
    };
    assert!(has_sleeper(&s));
    s.sleepers.store(0, Relaxed);
    s.poison();
    assert!(matches!(sleeper.join().unwrap(), Err(Interrupted::Poisoned)));
}

#[test]
fn two_threads_ping_pong_without_losing_a_wake() {
    let pair = Arc::new((placed(1), placed(0)));
    let other = {
        let pair = Arc::clone(&pair);
        thread::spawn(move || {
            for _ in 0..20_000 {
                pair.0.post(pair.1.wait(soon()).unwrap());
            }
        })
    };
    for _ in 0..20_000 {
        pair.1.post(pair.0.wait(soon()).unwrap());
    }
    other.join().unwrap();
}

#[test]
fn two_sleepers_both_get_a_permit() {
    let s = placed(2);
    let permits = [s.try_wait().unwrap(), s.try_wait().unwrap()];
    let sleepers = [(); 2].map(|()| {
        let s = Arc::clone(&s);
        thread::spawn(move || s.wait(Deadline::NEVER).map(drop))
    });
    assert!(has_sleeper(&s));
    permits.into_iter().for_each(|permit| s.post(permit));
    sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap().unwrap());
}
