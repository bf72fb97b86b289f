//! The fair semaphore in every interleaving, with tasks and threads, by `ci/loom.sh`.

use std::task::Poll;

use loom::thread;

use super::*;
use crate::sync::task_model::run;

/// Without a permit left: the caller has the only one.
fn taken() -> Arc<FairSemaphore> {
    let semaphore = Arc::new(FairSemaphore::new(1));
    assert!(semaphore.try_enter());
    semaphore
}

/// Each who waits; they all leave as soon as they have entered.
fn spawn(
    semaphore: &Arc<FairSemaphore>,
    enter: impl FnOnce(&FairSemaphore) -> bool + 'static,
) -> thread::JoinHandle<()> {
    let semaphore = Arc::clone(semaphore);
    thread::spawn(move || {
        if enter(&semaphore) {
            semaphore.leave();
        }
    })
}

fn as_thread(semaphore: &FairSemaphore) -> bool {
    semaphore.enter(Deadline::NEVER)
}

fn as_task(semaphore: &FairSemaphore) -> bool {
    let mut place = Place::default();
    run(|task| match semaphore.poll_enter(&mut place, task) {
        true => Poll::Ready(true),
        false => Poll::Pending,
    })
}

/// As a task that is polled once more by another runtime before it sleeps.
fn as_moved_task(semaphore: &FairSemaphore) -> bool {
    let mut place = Place::default();
    if semaphore.poll_enter(&mut place, Waker::noop()) {
        return true;
    }
    run(|task| match semaphore.poll_enter(&mut place, task) {
        true => Poll::Ready(true),
        false => Poll::Pending,
    })
}

/// A task that tries so often, and gives up.
fn as_impatient_task(semaphore: &FairSemaphore, tries: u32) -> bool {
    let mut place = Place::default();
    let has_entered = (0..tries).any(|_| semaphore.poll_enter(&mut place, Waker::noop()));
    semaphore.give_up(&mut place);
    has_entered
}

fn all_permits_are_back(semaphore: &FairSemaphore) {
    assert_eq!(semaphore.waiting(), 0);
    assert!(semaphore.try_enter(), "a permit is lost");
    assert!(!semaphore.try_enter(), "a permit too many");
}

fn model(waiters: [fn(&FairSemaphore) -> bool; 2]) {
    crate::protocol::model::model(move || {
        let semaphore = taken();
        let waiting = waiters.map(|enter| spawn(&semaphore, enter));
        semaphore.leave();
        waiting.into_iter().for_each(|waiter| waiter.join().unwrap());
        all_permits_are_back(&semaphore);
    });
}

#[test]
fn a_task_and_a_thread_take_turns() {
    model([as_task, as_thread]);
}

#[test]
fn two_tasks_take_turns() {
    model([as_task, as_moved_task]);
}

#[test]
fn a_task_that_gives_up_passes_its_turn_on_to_a_thread() {
    model([|semaphore| as_impatient_task(semaphore, 1), as_thread]);
}

#[test]
fn a_task_that_gives_up_passes_its_turn_on_to_a_task() {
    model([|semaphore| as_impatient_task(semaphore, 2), as_task]);
}
