//! The fair semaphore in every interleaving, with tasks and threads, by `ci/loom.sh`.

use std::task::Poll;

use loom::thread;

use super::*;
use crate::sync::atomic::{AtomicBool, Relaxed};
use crate::sync::task_model::run;

/// The semaphore of one permit, and whether one of those who wait has it.
struct Room {
    semaphore: FairSemaphore,
    is_taken: AtomicBool,
}

impl Room {
    /// The caller has the permit.
    fn taken() -> Arc<Room> {
        let room = Room { semaphore: FairSemaphore::new(1), is_taken: AtomicBool::new(false) };
        assert!(room.semaphore.try_enter());
        room.enters();
        Arc::new(room)
    }

    fn enters(&self) {
        assert!(!self.is_taken.swap(true, Relaxed), "two have the only permit");
    }

    fn leave(&self) {
        self.is_taken.store(false, Relaxed);
        self.semaphore.leave();
    }
}

/// One who waits, and leaves as soon as it has entered.
fn spawn(
    room: &Arc<Room>,
    enter: impl FnOnce(&FairSemaphore) -> bool + 'static,
) -> thread::JoinHandle<()> {
    let room = Arc::clone(room);
    thread::spawn(move || {
        if enter(&room.semaphore) {
            room.enters();
            room.leave();
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
        let room = Room::taken();
        let waiting = waiters.map(|enter| spawn(&room, enter));
        room.leave();
        waiting.into_iter().for_each(|waiter| waiter.join().unwrap());
        all_permits_are_back(&room.semaphore);
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
