//! The parker of systems without a futex: a thread sleeps on a `raw_sync` event in shared memory.
//!
//! An event is a pthread mutex, a condition variable, and a flag that a wake sets and a sleeper
//! clears. A sleeper wakes at least once a second, and then checks its word and its deadline: only
//! these two count.
//!
//! # Limits
//! - No guarantee after a peer was killed, or while it is stopped, in the middle of a wake or a
//!   sleep: it may hold the mutex, for which others wait without a deadline. A pool does not reuse
//!   a segment that a killed peer has used ([`Parker::SURVIVES_KILL`]).
//! - Setting the wall clock back prolongs sleeps, unless a wake ends them.
//! - `raw_sync` 0.1.5 adds a duration to the clock's nanoseconds without a carry, and such waits
//!   fail at once. So a sleep lasts a whole second, or ends before the clock's second does; a
//!   shorter one is not woken in the last millisecond of a second.
//! - A peer that corrupts the event can crash this process, through the broken mutex.
//!
//! # No wake is missed
//! A wake changes the word, then sets the flag; a sleeper compares the word, then waits for the
//! flag. Both use the flag under the mutex. If the sleeper locks it first, it is asleep when it is
//! signalled. If the waker locks it first, the sleeper finds the flag set, or cleared it in an
//! earlier wait (a semaphore has one sleeper at a time): then it locked the mutex after the waker,
//! and its next comparison sees the changed word.
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

/// A sleep ends this long before the clock's second does, because `raw_sync` reads the clock later.
const MARGIN: Duration = Duration::from_millis(1);

/// The sleepers of one semaphore. `raw_sync` has a `&mut` to the event in each thread inside it:
/// this breaks Rust's aliasing rules, although the compiler sees only C calls there.
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
    /// Part of the layout version: this parker's wakes do not reach sleepers on a futex.
    pub(crate) const KIND: u32 = 1;

    /// An event that a killed process has used may be in any state, and is not used again.
    pub(crate) const SURVIVES_KILL: bool = false;

    /// Makes the event in its final place, before any other thread or process can reach it.
    pub(crate) fn initialise(&self) {
        assert!(Event::size_of(Some(self.memory())) <= size_of_val(&self.event));
        // SAFETY: the memory is large enough, aligned for the C types, initialised, and not shared
        // yet (the caller). The parker is not moved from here on.
        let made = unsafe { Event::new(self.memory(), true) }.is_ok();
        self.made.store(made.into(), Relaxed);
    }

    /// Whether there is an event. Without one, sleepers read their word every millisecond.
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
            // Its error does not distinguish "timed out" from "failed".
            let woken = self.event().is_some_and(|event| event.wait(Timeout::Val(slice)).is_ok());
            if !woken && start.elapsed() < slice.max(MARGIN) / 2 {
                thread::sleep(left.min(MARGIN)); // there was no sleep: avoid a busy loop
            }
        }
        Ok(())
    }

    /// Wakes the thread, of any process, that sleeps on `word`.
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

/// How long a sleep can be so that it ends before the clock's second does.
fn rest_of_the_second() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (SECOND - Duration::from_nanos(since.subsec_nanos().into())).saturating_sub(MARGIN)
}

#[cfg(test)]
#[path = "raw_sync/tests.rs"]
mod tests;
