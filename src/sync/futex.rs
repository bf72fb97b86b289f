//! The Linux parker: a thread sleeps on a word of shared memory until another process wakes it.

use std::io;

use rustix::io::Errno;
use rustix::thread::futex;

use super::Deadline;
use super::atomic::AtomicU32;

/// The sleepers of one semaphore. The kernel finds them by the page and offset of the word itself,
/// so this is empty; other parkers keep state here, in shared memory.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Parker;

// Not `PRIVATE`: a private wake does not reach other processes.
const SHARED: futex::Flags = futex::Flags::empty();

impl Parker {
    /// Part of the layout version.
    pub(crate) const KIND: u32 = 0;

    /// The kernel forgets a sleeper that dies.
    pub(crate) const SURVIVES_KILL: bool = true;

    pub(crate) fn initialise(&self) {}

    pub(crate) fn is_sound(&self) -> bool {
        true
    }

    /// Sleeps while `word` holds `expected`, until a wake or the deadline. May wake spuriously; the
    /// caller reads the word again.
    pub(crate) fn park(
        &self,
        word: &AtomicU32,
        expected: u32,
        deadline: Deadline,
    ) -> io::Result<()> {
        match futex::wait(word, SHARED, expected, deadline.timespec().as_ref()) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Wakes every thread, of any process, that sleeps on `word`.
    pub(crate) fn unpark_all(&self, word: &AtomicU32) {
        // The call can fail only for an address that is not mapped, and `word` is a live reference.
        let woken = futex::wake(word, SHARED, i32::MAX as u32);
        debug_assert!(woken.is_ok(), "futex wake: {woken:?}");
    }
}
