//! The one thread of a process that learns of hang-ups, and runs the calls registered for them.
//!
//! A child of `fork` does not have the thread, and shares the epoll instance with its parent. It
//! makes new ones, and leaves the parent's alone.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::process::{Origin, PerProcess};
use crate::sync::lock;

#[cfg(test)]
mod tests;

/// Calls `then`, once, on the watcher thread, when the other end of a socket or FIFO hangs up.
/// Dropping the returned [`Watch`] cancels that.
pub(crate) fn on_hang_up<F: AsFd + Send + Sync + 'static>(
    end: Arc<F>,
    then: impl FnOnce() + Send + 'static,
) -> Result<Watch> {
    let watcher = Watcher::of_this_process()?;
    let token = {
        let mut calls = lock(&watcher.calls);
        calls.next += 1;
        let token = calls.next;
        calls.waiting.insert(token, Box::new(then));
        token
    };
    let watch = Watch { end, token, watcher, origin: Origin::here() };
    let events = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
    epoll::add(&watcher.epoll, &watch.end, epoll::EventData::new_u64(token), events)
        .map_err(Error::os("watching a connection"))?;
    Ok(watch)
}

/// Keeps a connection watched.
pub(crate) struct Watch {
    end: Arc<dyn AsFd + Send + Sync>,
    token: u64,
    watcher: &'static Watcher,
    origin: Origin,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            return;
        }
        lock(&self.watcher.calls).waiting.remove(&self.token);
        // Fails only if it was never added; then there is nothing to delete.
        let _ = epoll::delete(&self.watcher.epoll, &self.end);
    }
}

/// The thread's epoll, and the calls that it runs.
struct Watcher {
    epoll: OwnedFd,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, Box<dyn FnOnce() + Send>>,
}

/// The watcher of one process.
#[derive(Default)]
struct Post {
    watcher: OnceLock<Watcher>,
    starting: Mutex<()>,
}

impl Watcher {
    fn of_this_process() -> Result<&'static Watcher> {
        static POST: PerProcess<Post> = PerProcess::new();
        let Post { watcher: cell, starting } = POST.get();
        if let Some(watcher) = cell.get() {
            return Ok(watcher);
        }
        let _one_at_a_time = lock(starting);
        if let Some(watcher) = cell.get() {
            return Ok(watcher);
        }
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::os("epoll_create1"))?;
        let watching = epoll.try_clone().map_err(Error::os("dup"))?;
        // The thread finds the watcher in its cell: it is there before a connection can be
        // registered.
        thread::Builder::new()
            .name("shmferry-watch".to_owned())
            .spawn(move || watch(&watching, || cell.get()))
            .map_err(Error::os("starting the watcher thread"))?;
        Ok(cell.get_or_init(|| Watcher { epoll, calls: Mutex::default() }))
    }
}

fn watch(epoll: &OwnedFd, watcher: impl Fn() -> Option<&'static Watcher>) {
    let mut events = Vec::with_capacity(64);
    loop {
        events.clear();
        match epoll::wait(epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => unreachable!("epoll_wait on an epoll of our own: {errno}"),
        }
        for event in &events {
            let call = watcher().and_then(|w| lock(&w.calls).waiting.remove(&event.data.u64()));
            // Not under the lock, because the call may drop watches.
            if let Some(call) = call {
                call();
            }
        }
    }
}
