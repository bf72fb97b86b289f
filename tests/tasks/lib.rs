//! What the tests of tasks share: places, contents, a server of either kind, futures driven by
//! hand.

mod driven;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

pub use driven::{Driven, counts};
use shmferry::{PoolStats, Refusal, Server, Serving};

/// Bytes that depend on their place and on `seed`.
pub fn noise(seed: usize, len: usize) -> Vec<u8> {
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(4)).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// A key that asks for `noise(seed, len)`.
pub fn key(seed: usize, len: usize) -> String {
    format!("{seed}:{len}")
}

/// What a key asks for; `None` for another.
pub fn asked(key: &[u8]) -> Option<Vec<u8>> {
    let (seed, len) = str::from_utf8(key).ok()?.split_once(':')?;
    Some(noise(seed.parse().ok()?, len.parse().ok()?))
}

/// Segments that are not in use. Those that were dropped before their sender had left are looked at
/// when they are next leased: also where the last byte was read just before it left.
pub fn back(stats: PoolStats) -> usize {
    stats.idle + stats.quarantined
}

/// Counts handlers that have not been dropped.
pub struct Alive(Arc<AtomicUsize>);

impl Alive {
    pub fn among(all: &Arc<AtomicUsize>) -> Alive {
        all.fetch_add(1, SeqCst);
        Alive(Arc::clone(all))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// A directory with an address in it.
pub struct Spot {
    _dir: tempfile::TempDir,
    pub address: PathBuf,
}

impl Spot {
    pub fn new() -> Spot {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("cache.sock");
        Spot { _dir: dir, address }
    }

    /// A server of threads, which answers keys with noise.
    pub fn serve_threads(&self) -> Serving {
        let server = Server::bind(self.address.as_path()).unwrap();
        server
            .serve(4, |request| match asked(request.key()) {
                Some(bytes) => request.send_bytes(&bytes),
                None => request.refuse(Refusal::NotFound),
            })
            .unwrap()
    }

    /// A server of tasks, which answers keys with noise.
    pub fn serve_tasks(&self) -> shmferry::tokio::Serving {
        serve_tasks(shmferry::tokio::Server::bind(self.address.as_path()).unwrap())
    }
}

impl Default for Spot {
    fn default() -> Spot {
        Spot::new()
    }
}

/// Answers keys with noise.
pub fn serve_tasks(server: shmferry::tokio::Server) -> shmferry::tokio::Serving {
    server
        .serve(|request| async move {
            match asked(request.key()) {
                Some(bytes) => request.send_bytes(&bytes).await,
                None => request.refuse(Refusal::NotFound),
            }
        })
        .unwrap()
}

/// Polls until it holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(std::time::Instant::now() < end, "{what}: not within a minute");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Runs it on this many threads of a runtime.
pub fn on_threads<T>(threads: usize, test: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(threads).enable_all().build().unwrap().block_on(test)
}
