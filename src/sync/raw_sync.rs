//! The parker of systems without a futex: a thread sleeps on a `raw_sync` event in shared memory.
//!
//! An event is a pthread mutex, a condition variable, and a flag that a wake raises and a sleeper
//! takes down. Whenever a sleeper wakes, and that is at least once a second, it looks at the word
//! and the deadline that it was given: only these two count.
//!
//! # Limits
//! - No promise after a peer was killed, or while one is stopped, in the midst of a wake or a
//!   sleep: it may hold the mutex, for which others wait without a deadline. A pool does not use
//!   again what a killed peer has used ([`Parker::SURVIVES_KILL`]).
//! - A wall clock that is set back prolongs sleeps, unless a wake ends them.
//! - `raw_sync` 0.1.5 adds a duration to the clock's nanoseconds without a carry, and such waits
//!   fail at once. So a sleep lasts a whole second, or ends before the clock's second does; one
//!   that is to be shorter hears no wake in the last millisecond of a second.
//! - A peer that writes rubbish into the event can end this process, as a broken mutex does.
//!
//! # No wake is missed
//! A wake changes the word, then raises the flag; a sleeper compares the word, then waits for the
//! flag. Both handle the flag under the mutex. If the sleeper has that first, it is asleep when it
//! is signalled. If the waker has it first, the sleeper finds the flag up, or took it down in a
//! wait before (a semaphore has one sleeper at a time): then it had the mutex after the waker, and
//! its next comparison sees the changed word.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{io, ptr, thread};

use ::raw_sync::Timeout;
use ::raw_sync::events::{Event, EventImpl, EventInit, EventState};
use ::raw_sync::locks::{LockInit, Mutex};

use super::Deadline;
use super::atomic::{Acquire, AtomicU32, Relaxed};

/// Words of memory for the event: it takes 96 bytes on x86-64 Linux, 120 on macOS.
const WORDS: usize = 30;

const SECOND: Duration = Duration::from_secs(1);

/// A sleep ends so long before the clock's second does: `raw_sync` reads the clock after us.
const MARGIN: Duration = Duration::from_millis(1);

/// Where sleepers of one semaphore are kept. `raw_sync` has a `&mut` to the event in each thread
/// inside it: the compiler sees C calls there and no more, but Rust's rules are broken.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Parker {
    /// Not zero once there is an event: `event` is then touched through `raw_sync` only (R1).
    made: AtomicU32,
    event: UnsafeCell<[u64; WORDS]>,
}

// SAFETY: `event` is reached through `raw_sync` only (R1), whose mutex and condition variable are
// made to be shared between threads, and between processes.
unsafe impl Sync for Parker {}

impl Parker {
    /// Part of the layout version: sleepers on a futex would not hear this parker's wakes.
    pub(crate) const KIND: u32 = 1;

    /// What a process that was killed has used may be in any state, and is not used again.
    pub(crate) const SURVIVES_KILL: bool = false;

    /// Makes the event where it will stay, before anybody else can reach it.
    pub(crate) fn initialise(&self) {
        assert!(Event::size_of(Some(self.memory())) <= size_of_val(&self.event));
        // SAFETY: the memory is large enough, aligned for the C types, initialised, and nobody
        // else's yet (the caller). The parker is not moved from here on.
        let made = unsafe { Event::new(self.memory(), true) }.is_ok();
        self.made.store(made.into(), Relaxed);
    }

    /// Whether there is an event. Without one, sleepers look at their word every millisecond.
    pub(crate) fn is_sound(&self) -> bool {
        self.made.load(Relaxed) != 0
    }

    /// Sleeps while `word` holds `expected`, until a wake or the deadline.
    pub(crate) fn park(
        &self,
        word: &AtomicU32,
        expected: u32,
        deadline: Deadline,
    ) -> io::Result<()> {
        while word.load(Acquire) == expected && !deadline.has_passed() {
            let left = deadline.remaining().unwrap_or(SECOND);
            let slice = if left < SECOND { left.min(rest_of_the_second()) } else { SECOND };
            let start = Instant::now();
            // Its error does not tell "timed out" from "failed".
            let woken = self.event().is_some_and(|event| event.wait(Timeout::Val(slice)).is_ok());
            if !woken && start.elapsed() < slice.max(MARGIN) / 2 {
                thread::sleep(left.min(MARGIN)); // there was no sleep: not again at once
            }
        }
        Ok(())
    }

    /// Wakes the thread, of whatever process, that sleeps on `word`.
    pub(crate) fn unpark_all(&self, _word: &AtomicU32) {
        if let Some(event) = self.event() {
            let _ = event.set(EventState::Signaled); // if it fails, the sleep ends by itself
        }
    }

    fn event(&self) -> Option<Box<dyn EventImpl>> {
        self.is_sound().then_some(())?;
        // SAFETY: an event was made here (R1), and begins with its mutex.
        let (mutex, _) = unsafe { Mutex::from_existing(self.memory(), ptr::null_mut()) }.ok()?;
        let _guard = mutex.lock().ok()?;
        // SAFETY: as above. It reads flags that change under the mutex only, which we hold.
        unsafe { Event::from_existing(self.memory()) }.ok().map(|(event, _)| event)
    }

    fn memory(&self) -> *mut u8 {
        self.event.get().cast()
    }
}

/// How long a sleep can be that ends before the clock's second does.
fn rest_of_the_second() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (SECOND - Duration::from_nanos(since.subsec_nanos().into())).saturating_sub(MARGIN)
}

#[cfg(test)]
#[path = "raw_sync/tests.rs"]
mod tests;
