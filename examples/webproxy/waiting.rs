//! The connections that are slow to ask: the oldest are cut when they are too many.
//!
//! Each of them takes a descriptor, and a thread of the crew that waits for it; there are only so
//! many of both. Without a limit, silent connections keep a client that asks from being heard until
//! they time out.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use shmferry::workers::WorkerPool;
use tracing::debug;

/// How long a connection may take over its request before it is counted: one that has just come is
/// not cut before its request can arrive.
pub const GRACE: Duration = Duration::from_millis(250);

/// The connections whose requests are not finished [`GRACE`] after they came.
pub struct Waiting {
    /// The most of them.
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Of the next connection. They grow: the smallest is the oldest.
    number: u64,
    /// Those that have said nothing.
    silent: BTreeMap<u64, Arc<TcpStream>>,
    /// Those that have begun a request.
    begun: BTreeMap<u64, Arc<TcpStream>>,
}

impl Waiting {
    /// Allows for half of the crew's threads, and half of the descriptors where those are fewer:
    /// the other half is for replies.
    pub fn new() -> Waiting {
        let allowed = getrlimit(Resource::Nofile).current.map(usize::try_from);
        let descriptors = allowed.and_then(Result::ok).unwrap_or(usize::MAX);
        Waiting { limit: WorkerPool::THREAD_LIMIT.min(descriptors) / 2, inner: Mutex::default() }
    }

    /// Counts a connection until what is returned is dropped. Cuts an older one if they are too
    /// many.
    pub fn enter(&self, stream: &Arc<TcpStream>, has_begun: bool) -> Entry<'_> {
        let mut inner = self.lock();
        let number = inner.number;
        inner.number += 1;
        let group = if has_begun { &mut inner.begun } else { &mut inner.silent };
        group.insert(number, Arc::clone(stream));
        if inner.silent.len() + inner.begun.len() > self.limit {
            inner.cut_one();
        }
        Entry { waiting: self, number }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Cuts the oldest of the larger group: silent ones alone cut none that has begun.
    fn cut_one(&mut self) {
        let most_are_silent = self.silent.len() >= self.begun.len();
        let group = if most_are_silent { &mut self.silent } else { &mut self.begun };
        let Some((_, stream)) = group.pop_first() else { return };
        debug!("cutting a client that has not finished its request, to make room");
        // Its thread reads what has arrived, and then an end. Fails only if the client has left.
        let _ = stream.shutdown(Shutdown::Read);
    }
}

/// A connection that is counted.
pub struct Entry<'a> {
    waiting: &'a Waiting,
    number: u64,
}

impl Entry<'_> {
    /// It has begun its request.
    pub fn has_begun(&self) {
        let mut inner = self.waiting.lock();
        if let Some(stream) = inner.silent.remove(&self.number) {
            inner.begun.insert(self.number, stream);
        }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut inner = self.waiting.lock();
        inner.silent.remove(&self.number);
        inner.begun.remove(&self.number);
    }
}
