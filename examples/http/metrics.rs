//! How it goes, for Prometheus.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::{Metric, Registry};
use shmferry::segment::PoolStats;

/// The content type of what [`Metrics::render`] gives.
pub const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Numbers since the start.
pub struct Metrics {
    pub requests: Family<[(&'static str, String); 1], Counter>,
    pub seconds: Histogram,
    pub hits: Counter,
    pub lent: Counter,
    pub streamed: Counter,
    pub bytes: Counter,
    idle: Gauge,
    quarantined: Gauge,
    retired: Counter<u64, AtomicU64>,
    registry: Registry,
}

impl Metrics {
    pub fn new() -> Metrics {
        let mut all = Registry::with_prefix("shmferry_http");
        let seconds = Histogram::new(exponential_buckets(0.000_1, 4.0, 10));
        all.register("latency_seconds", "From request to head of answer", seconds.clone());
        Metrics {
            requests: add(&mut all, "requests", "Requests, by status of the answer"),
            seconds,
            hits: add(&mut all, "hits", "Requests that the cache had something for"),
            lent: add(&mut all, "lent", "Bodies that the cache lent"),
            streamed: add(&mut all, "streamed", "Bodies that came through segments"),
            bytes: add(&mut all, "bytes", "Bytes of files sent"),
            idle: add(&mut all, "segments_idle", "Segments at rest"),
            quarantined: add(
                &mut all,
                "segments_quarantined",
                "Segments not yet left by the cache",
            ),
            retired: add(&mut all, "segments_retired", "Segments that were replaced"),
            registry: all,
        }
    }

    /// All of it, as text.
    pub fn render(&self, pool: &PoolStats) -> String {
        self.idle.set(pool.idle as i64);
        self.quarantined.set(pool.quarantined as i64);
        self.retired.inner().store(pool.retired, Relaxed);
        let mut text = String::new();
        let _ = encode(&mut text, &self.registry); // a `String` takes everything
        text
    }

    /// The sums, in one line.
    pub fn summary(&self) -> String {
        let Metrics { hits, lent, streamed, bytes, .. } = self;
        let [hits, lent, streamed, bytes] = [hits, lent, streamed, bytes].map(Counter::get);
        format!("hits={hits} lent={lent} streamed={streamed} bytes={bytes}")
    }
}

fn add<M: Metric + Clone + Default>(all: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    all.register(name, help, metric.clone());
    metric
}
