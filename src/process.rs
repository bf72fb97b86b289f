//! Distinguishes a process from its `fork` children, without a system call.
//!
//! A child of `fork` has a copy of everything: pools, transfers, queues, and every static. But the
//! memory, sockets, names and locks behind them still belong to its parent, and the threads that
//! served them do not exist in the child. So each object that acts outside of its process keeps its
//! [`Origin`]: its calls fail in a child, and its `Drop` releases only what is the child's own
//! there (descriptors, mappings, heap).
//!
//! That check comes before anything else, locks included: a lock that another thread of the parent
//! held at the moment of the fork is never released in the child.
//!
//! Children are counted by a `pthread_atfork` handler. A child made without the C library's `fork`
//! (by `_Fork`, or the bare system call `clone`) is not detected. `vfork` and `posix_spawn` are no
//! problem: their child only executes another program.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use crate::error::Misuse;

#[cfg(all(test, unix, not(loom)))]
mod tests;

/// The number of this process: 1 in the process that first needed it, one more in each child.
static GENERATION: AtomicU32 = AtomicU32::new(UNKNOWN);

/// No number is assigned yet, and the handler is not registered.
const UNKNOWN: u32 = 0;
const FIRST: u32 = 1;
/// The handler could not be registered: the pid is used instead of the number, by a system call
/// each time.
const ASK: u32 = u32::MAX;

/// The process that made something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    generation: u32,
    pid: u32,
}

impl Origin {
    /// This process.
    pub(crate) fn here() -> Origin {
        Origin { generation: generation(), pid: std::process::id() }
    }

    /// Whether that is this process; `false` in a child forked from it.
    #[inline]
    pub(crate) fn is_here(self) -> bool {
        // In the `ASK` mode, `generation` is a pid, and so never equal to `ASK`.
        self.generation == GENERATION.load(Ordering::Relaxed) || self.is_here_by_pid()
    }

    /// The slow path, where the number is not known.
    #[cold]
    fn is_here_by_pid(self) -> bool {
        GENERATION.load(Ordering::Relaxed) == ASK && self.pid == std::process::id()
    }

    /// # Errors
    /// [`Misuse::Forked`] in a child that was forked from it.
    #[inline]
    pub(crate) fn check(self) -> Result<(), Misuse> {
        if self.is_here() { Ok(()) } else { Err(Misuse::Forked { made_by: self.pid }) }
    }

    /// Its pid, in its own pid namespace.
    pub(crate) fn pid(self) -> u32 {
        self.pid
    }
}

/// The number of this process. Registers the handler before the first is assigned.
fn generation() -> u32 {
    match GENERATION.load(Ordering::Acquire) {
        UNKNOWN => {
            let first = if count_forks() { FIRST } else { ASK };
            // Of two concurrent threads, the first decides for both.
            let order = (Ordering::AcqRel, Ordering::Acquire);
            let _ = GENERATION.compare_exchange(UNKNOWN, first, order.0, order.1);
            generation()
        }
        ASK => std::process::id(),
        number => number,
    }
}

/// Registers the handler that counts each child; `false` if the system refuses. Registering it
/// twice is harmless.
fn count_forks() -> bool {
    // SAFETY: the handler takes nothing, does not unwind, and does nothing but load and store an
    // atomic, which is allowed between a fork and an exec. Of a library that is unloaded, the
    // system removes the handlers first.
    #[cfg(unix)]
    return unsafe { libc::pthread_atfork(None, None, Some(forked)) } == 0;
    // This system has no `fork`.
    #[cfg(not(unix))]
    return true;
}

/// Runs in each child, before `fork` returns there. No other thread exists yet.
#[cfg(unix)]
unsafe extern "C" fn forked() {
    let number = GENERATION.load(Ordering::Relaxed);
    if number != UNKNOWN && number != ASK {
        let next = number + 1;
        GENERATION.store(if next == ASK { FIRST } else { next }, Ordering::Relaxed);
    }
}

/// A static with a fresh value in each process. Never waits for a lock.
pub(crate) struct PerProcess<T: 'static> {
    current: AtomicPtr<Entry<T>>,
}

struct Entry<T> {
    origin: Origin,
    value: T,
}

impl<T: Default + Send + Sync> PerProcess<T> {
    pub(crate) const fn new() -> PerProcess<T> {
        PerProcess { current: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The value of this process, made now if there is none yet.
    pub(crate) fn get(&self) -> &'static T {
        loop {
            let found = self.current.load(Ordering::Acquire);
            if let Some(value) = Self::value_here(found) {
                return value;
            }
            let made =
                Box::into_raw(Box::new(Entry { origin: Origin::here(), value: T::default() }));
            let order = (Ordering::AcqRel, Ordering::Acquire);
            if self.current.compare_exchange(found, made, order.0, order.1).is_err() {
                // SAFETY: made by `into_raw` above, and not shared.
                drop(unsafe { Box::from_raw(made) });
            }
        }
    }

    /// The value of this process, if it was ever asked for here.
    #[cfg_attr(not(feature = "posix-mq"), allow(dead_code))]
    pub(crate) fn get_if_made(&self) -> Option<&'static T> {
        Self::value_here(self.current.load(Ordering::Acquire))
    }

    fn value_here(entry: *mut Entry<T>) -> Option<&'static T> {
        // SAFETY: null, or an entry that `get` has put there whole (Acquire, Release). Such an
        // entry is never freed nor changed: what a child replaces stays in memory, as any static
        // does.
        let entry = unsafe { entry.as_ref::<'static>() }?;
        entry.origin.is_here().then_some(&entry.value)
    }
}

/// A value that only the process that made it may drop, because its drop takes locks. A child leaks
/// it.
#[derive(Clone, Debug)]
pub(crate) struct Own<T> {
    value: ManuallyDrop<T>,
    origin: Origin,
}

impl<T> Own<T> {
    pub(crate) fn new(value: T) -> Own<T> {
        Own { value: ManuallyDrop::new(value), origin: Origin::here() }
    }

    pub(crate) fn origin(this: &Own<T>) -> Origin {
        this.origin
    }
}

impl<T> Deref for Own<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if self.origin.is_here() {
            // SAFETY: nothing else drops it, and it is not used after this.
            unsafe { ManuallyDrop::drop(&mut self.value) }
        }
    }
}

/// Counts one object of this process in a static, while it lives. A child counts from zero.
///
/// The upper half of the word is the number of the process that counted. So a child that drops its
/// parent's objects does not reduce its own count.
#[derive(Debug)]
pub(crate) struct Counted {
    all: &'static AtomicUsize,
    tag: usize,
}

const HALF: u32 = usize::BITS / 2;
const COUNT: usize = (1 << HALF) - 1;

impl Counted {
    pub(crate) fn among(all: &'static AtomicUsize) -> Counted {
        let tag = tag();
        let one_more = |word: usize| Some(if word & !COUNT == tag { word + 1 } else { tag | 1 });
        let _ = all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        Counted { all, tag }
    }

    /// The number of counted objects.
    pub(crate) fn count(all: &AtomicUsize) -> usize {
        let word = all.load(Ordering::Relaxed);
        if word & !COUNT == tag() { word & COUNT } else { 0 }
    }

    /// The number of counted objects, including this one.
    pub(crate) fn all(&self) -> usize {
        Self::count(self.all)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let one_less = |word: usize| (word & !COUNT == self.tag).then(|| word - 1);
        // Fails in a child of `fork` that counts its own by now.
        let _ = self.all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
    }
}

fn tag() -> usize {
    (generation() as usize) << HALF
}
