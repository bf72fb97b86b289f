//! How it goes, for Prometheus.

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::{Metric, Registry};

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
    segments: Family<[(&'static str, &'static str); 1], Gauge>,
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
            segments: add(&mut all, "segments", "Segments, by state; retired: replaced so far"),
            registry: all,
        }
    }

    /// All of it, as text.
    pub fn render(&self, pool: &shmferry::segment::PoolStats) -> String {
        let set = |state, count| _ = self.segments.get_or_create(&[("state", state)]).set(count);
        set("idle", pool.idle as i64);
        set("quarantined", pool.quarantined as i64);
        set("retired", pool.retired as i64);
        let mut text = String::new();
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry); // a `String` takes everything
        text
    }

    /// The sums, in one line.
    pub fn summary(&self) -> String {
        let counters = [&self.hits, &self.lent, &self.streamed, &self.bytes];
        let [hits, lent, streamed, bytes] = counters.map(Counter::get);
        format!("hits={hits} lent={lent} streamed={streamed} bytes={bytes}")
    }
}

fn add<M: Metric + Clone + Default>(all: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    all.register(name, help, metric.clone());
    metric
}
