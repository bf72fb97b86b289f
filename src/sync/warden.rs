//! A thread that rings for sleepers whose event has kept them longer than it should.
//!
//! `raw_sync` sleeps by the wall clock, which can be set back, and locks a mutex again at the end,
//! which a stopped process may hold. Neither knows a deadline, and the sleeper itself can do nothing
//! about it. So each has itself watched while it sleeps. There is one such thread in a process, made
//! for the first sleeper; it looks every [`TICK`] while anybody sleeps, and otherwise waits.
//!
//! The invariant that both blocks rest on:
//! - **W1** An address in an [`Entry`] is that of a parker that is borrowed, by the call of
//!   [`watched`] that put it there and takes it off before it returns, holding the entry's lock.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::process::PerProcess;

use super::super::lock;
use super::Parker;

/// How often it looks.
const TICK: Duration = Duration::from_millis(250);

/// What it is to do. A child of `fork` has no such thread, and makes its own.
#[derive(Default)]
struct Warden {
    state: Mutex<State>,
    called: Condvar,
}

#[derive(Default)]
struct State {
    asleep: Vec<Arc<Entry>>,
    thread: Thread,
}

#[derive(Default, PartialEq)]
enum Thread {
    #[default]
    None,
    /// Waits for somebody to sleep.
    Idle,
    Looking,
}

struct Entry {
    due: Instant,
    /// `None` once it has left. The lock is held while the warden rings, and so is a sleeper that
    /// would leave; never the list's, so that a ring that hangs holds up nobody else.
    parker: Mutex<Option<Address>>,
}

struct Address(NonNull<Parker>);

// SAFETY: it is used for a shared reference only (W1), and parkers are `Sync`.
unsafe impl Send for Address {}

static WARDEN: PerProcess<Warden> = PerProcess::new();

/// Runs `sleep`, which should be over when it is `due`; if it is not, the parker is rung.
pub(super) fn watched<T>(parker: &Parker, due: Instant, sleep: impl FnOnce() -> T) -> T {
    struct Leaving(&'static Warden, Arc<Entry>);
    impl Drop for Leaving {
        fn drop(&mut self) {
            *lock(&self.1.parker) = None;
            lock(&self.0.state).asleep.retain(|entry| !Arc::ptr_eq(entry, &self.1));
        }
    }
    let warden = WARDEN.get();
    let entry = Arc::new(Entry { due, parker: Mutex::new(Some(Address(parker.into()))) });
    let _leaving = Leaving(warden, Arc::clone(&entry));
    let mut state = lock(&warden.state);
    state.asleep.push(entry);
    match state.thread {
        Thread::Looking => {}
        Thread::Idle => {
            state.thread = Thread::Looking;
            warden.called.notify_one();
        }
        // Without memory for a thread, the next sleeper tries again.
        Thread::None => {
            let spawned =
                thread::Builder::new().name("shmferry-warden".into()).spawn(|| look(warden));
            state.thread = if spawned.is_ok() { Thread::Looking } else { Thread::None };
        }
    }
    drop(state);
    sleep()
}

fn look(warden: &'static Warden) {
    loop {
        thread::sleep(TICK);
        let mut state = lock(&warden.state);
        if state.asleep.is_empty() {
            state.thread = Thread::Idle;
            let called = warden.called.wait_while(state, |state| state.thread == Thread::Idle);
            drop(called.unwrap_or_else(PoisonError::into_inner));
            continue;
        }
        let now = Instant::now();
        let late: Vec<_> = state.asleep.iter().filter(|entry| entry.due <= now).cloned().collect();
        drop(state);
        late.iter().for_each(|entry| entry.ring());
    }
}

impl Entry {
    fn ring(&self) {
        if let Some(Address(parker)) = &*lock(&self.parker) {
            // SAFETY: alive as long as we hold the lock (W1).
            unsafe { parker.as_ref() }.ring();
        }
    }
}
