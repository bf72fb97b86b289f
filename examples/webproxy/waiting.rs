//! The connections that are slow to ask: the oldest are cut when they are too many.
//!
//! Each of them takes a descriptor, and a thread of the pool that waits for it; there are only so
//! many of both. Without a limit, silent connections keep a client that asks from being heard until
//! they time out.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
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
    streams: Mutex<BTreeMap<Key, Arc<TcpStream>>>,
}

/// Whether it has begun its request, and a number that grows: the smallest is the oldest.
type Key = (bool, u64);

impl Waiting {
    /// Allows for half of the pool's threads, and half of the descriptors where those are fewer:
    /// the other half is for replies.
    pub fn new() -> Waiting {
        let allowed = getrlimit(Resource::Nofile).current.map(usize::try_from);
        let descriptors = allowed.and_then(Result::ok).unwrap_or(usize::MAX);
        Waiting { limit: WorkerPool::THREAD_LIMIT.min(descriptors) / 2, streams: Mutex::default() }
    }

    /// Counts a connection until what is returned is dropped. Cuts an older one if they are too
    /// many.
    pub fn enter(&self, stream: &Arc<TcpStream>, has_begun: bool) -> Entry<'_> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let mut streams = self.lock();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        streams.insert((has_begun, number), Arc::clone(stream));
        if streams.len() > self.limit {
            // Of the larger group: silent ones alone cut none that has begun.
            let begun = streams.range((true, 0)..).count();
            let oldest =
                streams.range((begun * 2 > streams.len(), 0)..).next().map(|(key, _)| *key);
            if let Some(stream) = oldest.and_then(|key| streams.remove(&key)) {
                debug!("cutting a client that has not finished its request, to make room");
                // Its thread reads what has arrived, and then an end. Fails only if it has left.
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
        Entry { waiting: self, number }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<TcpStream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut streams = self.waiting.lock();
        if let Some(stream) = streams.remove(&(false, self.number)) {
            streams.insert((true, self.number), stream);
        }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut streams = self.waiting.lock();
        streams.remove(&(false, self.number));
        streams.remove(&(true, self.number));
    }
}
