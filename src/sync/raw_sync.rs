//! The parker of systems without a futex: a thread sleeps on a `raw_sync` event in shared memory.
//!
//! The event is a pthread mutex, a condition variable and a flag that a wake raises and a sleeper
//! takes down. All three can be left behind in any state by a process that is killed or stopped in
//! the midst of them, and `raw_sync` 0.1.5 adds faults of its own. The event is therefore no more
//! than an alarm clock. What counts is the caller's word and the caller's deadline: a sleeper looks
//! at both whenever it wakes, for whatever reason, and wakes once a second in any case.
//!
//! # What is contained, and how
//! 1. *Timed waits that fail at once.* `raw_sync` adds a duration to the wall clock's nanoseconds
//!    and does not carry; more than a second's worth is refused. Whole seconds never need a carry,
//!    so that is what a long sleep is made of, and a shorter one ends before the second does:
//!    [`Slice`]. A wait that comes back early for any reason, twice, is followed by a [`Pause`].
//! 2. *Mutexes that are never let go.* `set` locks without a deadline. So the mutex is tried first,
//!    for some 20 ms; if it cannot be had, its holder was killed or stopped inside, and the event is
//!    *jammed* for good: nobody enters it any more, sleepers look at the word every [`NAP`], and the
//!    pool replaces the segment. On Linux, whoever declares the jam unlocks the mutex once in its
//!    holder's place, for those who wait inside for it without a deadline: a sleeper of ours that
//!    the condition variable makes lock it again, or a `set` that found it free when it tried. That is
//!    no rare case: `raw_sync` signals with the mutex in its hands, and is often preempted there.
//! 3. *Condition variables that are never left.* glibc's, before 2.41, lets a signal wait for
//!    sleepers of an earlier group to leave, and the killed never do. It takes two sleepers, of
//!    which one is dead. A semaphore has one at a time; that a dead sender and its successor do not
//!    add up to two is what [`Parker::SURVIVES_KILL`] is for. And `rung` keeps it to one signal for
//!    a sleeper that does not come.
//! 4. *Sleeps that outlast their slice*, because the wall clock was set back, or a process that is
//!    stopped holds the mutex: the [`warden`] rings, within some 300 ms.
//!
//! # What is not
//! * A process that is killed or stopped while it holds the lock *inside* the condition variable,
//!   for a moment of each signal and of each wait that runs out, holds up whoever comes there next,
//!   for as long as it stays dead or stopped: a sleeper as well as a poster. Of 5,000 processes that
//!   were killed while they did nothing but post, 1,427 left the mutex locked, which is contained,
//!   and two left a sleeper behind that nothing could wake.
//! * A process that is killed or stopped inside the mutex between a poster's trying it and locking it
//!   holds up that poster, until another poster, or the warden, declares the jam.
//! * Elsewhere than on Linux, unlocking for another is not to be relied on, and is not done: there, a
//!   process that is killed or stopped while it holds the mutex keeps a sleeper that is inside.
//! * Deadlines of less than a slice are kept to what is said in 1 and 4: half a millisecond, if all
//!   is well, and otherwise some 300 ms. A deaf moment of up to a millisecond, at the end of a
//!   second, is in sleeps of less than one only.
//! * A peer that writes rubbish into the event can do to us whatever a broken mutex does, which
//!   includes ending this process. The futex parker has no such weakness: it keeps nothing here.
//! * `raw_sync` has several threads hold a `&mut` to the event at once, under its mutex or in their
//!   sleep. The compiler sees C calls there and no more; Rust's rules are broken all the same.
//! * A wake whose poster dies between `rung` and the signal comes up to a second late.
//!
//! # Orderings
//! `rung` is changed by read-modify-writes only, all `AcqRel`, so that each sees all that came
//! before any earlier one. Poster: change the word, `rung.swap(1)`; if that found 0, `set`. Sleeper:
//! `rung.swap(0)`, compare the word, `wait`. Take the last swap of a sleeper before it sleeps:
//! * If the poster's swap came before it, the sleeper sees the changed word, and does not sleep.
//! * If it came after and found 0, the poster calls `set`, and the flag that it raises stays until a
//!   sleeper takes it down, however late that one enters `wait`.
//! * If it came after and found 1, another poster's swap lies between the two and found 0. Its `set`
//!   ends this sleep, and the next `rung.swap(0)` comes after ours: the first case.
//!
//! One `set` wakes one sleeper. Should there ever be two, the other looks up when its slice ends.
//!
//! `jammed` only ever rises, and publishes nothing: `Relaxed`.
//!
//! # Memory
//! The invariants that every block rests on:
//! - **R1** `event` is `ROOM` bytes of shared or private memory, aligned for `u64`, that live and stay
//!   where they are as long as the `Parker`, which is never moved once it is initialised.
//! - **R2** [`Parker::initialise`] has run, once, before anybody else could reach the memory; an
//!   event was made there, or the parker has been jammed from the start.
//! - **R3** Nobody touches `event` but through `raw_sync`, and this process no more once it is jammed,
//!   but for threads that are inside already.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::raw_sync::Timeout;
use ::raw_sync::events::{Event, EventImpl, EventInit, EventState};
use ::raw_sync::locks::{LockImpl, LockInit, Mutex};

use super::Deadline;
use super::atomic::{AcqRel, Acquire, AtomicU32, Relaxed};

mod warden;

/// Words of memory for the event: 96 bytes on x86-64 Linux, 120 on macOS. `raw_sync` counts the
/// mutex twice when it says how much it used, and that fits too.
const WORDS: usize = 30;
const ROOM: usize = WORDS * size_of::<u64>();

/// How often the mutex is tried before its holder is given up: at first at once, then every
/// [`TRY_PAUSE`]. Counted and not timed, so that a busy machine does not pass for a dead peer.
const TRIES: u32 = 32;
const TRIES_AT_ONCE: u32 = 12;
const TRY_PAUSE: Duration = Duration::from_millis(1);

/// How late a slice may end before the warden takes an interest.
const GRACE: Duration = Duration::from_millis(50);

/// How often a sleeper looks at its word where the event is jammed.
const NAP: Duration = Duration::from_millis(10);

/// Where sleepers of one semaphore are kept.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Parker {
    /// 1 from a wake until a sleeper takes note of it.
    rung: AtomicU32,
    /// Not zero once the event is given up.
    jammed: AtomicU32,
    event: UnsafeCell<[u64; WORDS]>,
}

// SAFETY: `event` is reached through `raw_sync` only (R3), whose mutex and condition variable are
// made to be shared between threads, and between processes.
unsafe impl Sync for Parker {}

impl Parker {
    /// Part of the layout version, since the other parker's sleepers would not hear this one's wakes.
    pub(crate) const KIND: u32 = 1;

    /// A process that is killed in its sleep, or while it wakes somebody, may leave the event in any
    /// state. What it has used is not to be used again.
    pub(crate) const SURVIVES_KILL: bool = false;

    /// Makes the event, before anybody else can reach it. Where the system refuses one, sleepers nap.
    pub(crate) fn initialise(&self) {
        let memory = self.memory();
        assert!(
            Event::size_of(Some(memory)) <= ROOM,
            "an event takes {}",
            Event::size_of(Some(memory))
        );
        // SAFETY: `memory` is valid for the `ROOM` bytes of R1, which the event fits into; the caller
        // keeps everybody else away. All of it is initialised, as zeroes at least, and any bytes are
        // a value of the C types that are made there.
        match unsafe { Event::new(memory, true) } {
            Ok((_, used)) => assert!(used <= ROOM, "an event has used {used} bytes"),
            Err(_) => self.jammed.store(1, Relaxed),
        }
    }

    /// Sleeps while `word` holds `expected`, until a wake or the deadline.
    pub(crate) fn park(
        &self,
        word: &AtomicU32,
        expected: u32,
        deadline: Deadline,
    ) -> io::Result<()> {
        let mut pause = Pause::NONE;
        loop {
            self.rung.swap(0, AcqRel);
            if word.load(Acquire) != expected || deadline.has_passed() {
                return Ok(());
            }
            pause.take(deadline);
            let Some(event) = self.enter() else {
                nap(NAP, deadline);
                continue;
            };
            match Slice::of(deadline.remaining(), wall_clock_nanos()) {
                Slice::Nap(rest) => thread::sleep(rest),
                Slice::Wait(slice) => {
                    let start = Instant::now();
                    // Its error does not tell "timed out" from "failed", and it may be woken for
                    // nothing: the word and the clocks say what happened.
                    let _ = self.wait(&*event, slice, start + slice + GRACE);
                    pause = if start.elapsed() < slice / 2 { pause.next() } else { Pause::NONE };
                }
            }
        }
    }

    /// Wakes a thread, of whatever process, that sleeps on `word`.
    pub(crate) fn unpark_all(&self, _word: &AtomicU32) {
        self.ring();
    }

    /// Waits for a wake, watched by the warden. Its result says nothing that can be relied on.
    fn wait(&self, event: &dyn EventImpl, slice: Duration, due: Instant) -> bool {
        warden::watched(self, due, || event.wait(Timeout::Val(slice)).is_ok())
    }

    fn ring(&self) {
        let first = self.rung.swap(1, AcqRel) == 0;
        // Entered even if another has rung before: should that one have died inside, and a sleeper of
        // ours wait for the mutex, then this call is the one that notices.
        if let Some(event) = self.enter().filter(|_| first) {
            // It can fail only for a mutex that is none any more; then the sleeper's slice ends.
            let _ = event.set(EventState::Signaled);
        }
    }

    /// Whether the event is in use, and not given up.
    pub(crate) fn is_sound(&self) -> bool {
        self.jammed.load(Relaxed) == 0
    }

    /// The event, found with its mutex free; `None` if it is jammed.
    fn enter(&self) -> Option<Box<dyn EventImpl>> {
        if !self.is_sound() {
            return None;
        }
        // An event begins with its mutex.
        // SAFETY: a mutex was made here (R1, R2).
        let (mutex, _) = unsafe { Mutex::from_existing(self.memory(), ptr::null_mut()) }.ok()?;
        for attempt in 1..=TRIES {
            // No time at all, for there is no carry in adding that.
            let Ok(guard) = mutex.try_lock(Timeout::Val(Duration::ZERO)) else {
                if attempt <= TRIES_AT_ONCE {
                    thread::yield_now()
                } else {
                    thread::sleep(TRY_PAUSE)
                }
                continue;
            };
            // SAFETY: an event was made here (R1, R2). It looks at flags that change under the mutex,
            // which we hold.
            let event = unsafe { Event::from_existing(self.memory()) };
            drop(guard);
            match event {
                Ok((event, _)) => return Some(event),
                Err(_) => break, // no event any more
            }
        }
        self.jam(&*mutex);
        None
    }

    /// Gives the event up. The first to do so lets those out who are inside, as far as it can.
    fn jam(&self, mutex: &dyn LockImpl) {
        if self.jammed.swap(1, Relaxed) == 0 && cfg!(target_os = "linux") {
            // For glibc and musl, this kind of mutex is a word that is set to "free", and whoever
            // waits is woken; they do not ask who unlocks it. Should the holder go on one day and
            // unlock it again, then two threads may be inside at once, where they can lose a wake.
            let _ = mutex.release();
        }
    }

    fn memory(&self) -> *mut u8 {
        self.event.get().cast()
    }
}

/// One step of a sleep.
#[derive(Debug, PartialEq, Eq)]
enum Slice {
    /// By the event. Added to the wall clock without a carry, this stays a valid time.
    Wait(Duration),
    /// Past the end of the wall clock's second, deaf to wakes: a millisecond at most.
    Nap(Duration),
}

impl Slice {
    /// `raw_sync` reads the clock a little later than we do: so much is allowed for.
    const MARGIN: Duration = Duration::from_micros(500);

    /// The next step, with so much left until the deadline, and the wall clock so far into a second.
    fn of(left: Option<Duration>, nanos: u32) -> Slice {
        const SECOND: Duration = Duration::from_secs(1);
        // Overslept by the margin, at most, for a wait that the end of the second does not cut.
        let Some(left) = left.filter(|left| *left + Slice::MARGIN < SECOND) else {
            return Slice::Wait(SECOND);
        };
        let rest = SECOND.saturating_sub(Duration::from_nanos(nanos.into()));
        let safe = rest.saturating_sub(Slice::MARGIN);
        if left <= safe {
            Slice::Wait(left)
        } else if safe >= Slice::MARGIN {
            Slice::Wait(safe)
        } else {
            Slice::Nap(left.min(rest))
        }
    }
}

/// What follows a wait that came back early: nothing the first time, then more and more, so that an
/// event that does not let anybody sleep costs no processor.
#[derive(Clone, Copy)]
struct Pause(Duration);

impl Pause {
    const NONE: Pause = Pause(Duration::ZERO);
    const SHORTEST: Duration = Duration::from_micros(100);
    /// Stands for "early once".
    const ONCE: Duration = Duration::from_nanos(1);

    fn next(self) -> Pause {
        match self.0 {
            Duration::ZERO => Pause(Pause::ONCE),
            Pause::ONCE => Pause(Pause::SHORTEST),
            longer => Pause(NAP.min(longer * 2)),
        }
    }

    fn take(self, deadline: Deadline) {
        if self.0 > Pause::ONCE {
            nap(self.0, deadline);
        }
    }
}

/// Sleeps for so long, but not past the deadline.
fn nap(length: Duration, deadline: Deadline) {
    thread::sleep(deadline.remaining().map_or(length, |left| left.min(length)));
}

/// How far the wall clock is into its second.
fn wall_clock_nanos() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos())
}

#[cfg(test)]
#[path = "raw_sync/tests.rs"]
mod tests;
