//! Order of arrival.

use super::*;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[test]
fn those_who_wait_are_served_in_order() {
    let fair_semaphore = Arc::new(FairSemaphore::new(1));
    assert!(fair_semaphore.try_enter());
    let (served, order) = mpsc::channel();
    let threads: Vec<_> = (0..8)
        .map(|i| {
            let (fair_semaphore, served) = (Arc::clone(&fair_semaphore), served.clone());
            let thread = thread::spawn({
                let fair_semaphore = Arc::clone(&fair_semaphore);
                move || {
                    assert!(fair_semaphore.enter(Deadline::after(Duration::from_secs(30))));
                    served.send(i).unwrap();
                    fair_semaphore.leave();
                }
            });
            while fair_semaphore.waiting() < i + 1 {
                thread::yield_now();
            }
            thread
        })
        .collect();
    assert!(!fair_semaphore.try_enter());
    fair_semaphore.leave();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(order.try_iter().collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    assert!(fair_semaphore.try_enter());
}

#[test]
fn one_who_gives_up_leaves_the_line() {
    let fair_semaphore = FairSemaphore::new(0);
    assert!(!fair_semaphore.enter(Deadline::after(Duration::from_millis(1))));
    assert_eq!(fair_semaphore.waiting(), 0);
    fair_semaphore.leave();
    assert!(fair_semaphore.enter(Deadline::NEVER));
}
