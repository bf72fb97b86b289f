//! What happened: counts, the last decisions, and what went wrong.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::weather::{Weather, Weathers};

/// Decisions that are kept to be shown.
const KEPT: usize = 40;

/// Failures that are told in full.
const TOLD: usize = 50;

/// Shared by all threads of a run.
pub struct Record {
    start: Instant,
    counts: Mutex<BTreeMap<(Group, String), u64>>,
    decisions: Mutex<VecDeque<String>>,
    /// For clients of the proxy.
    pub weather: Weathers,
    /// For those who ask the cache themselves.
    pub cache_weather: Weathers,
    over: AtomicBool,
    failures: AtomicU64,
    worst_return: Mutex<Worst>,
    hiccups: Mutex<VecDeque<(Instant, Duration)>>,
    worst_hiccup: AtomicU64,
}

#[derive(Default)]
struct Worst {
    took: Duration,
    after: String,
    slow: u64,
    measured: u64,
}

/// What is counted together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    Transfers,
    /// Requests of those who ask the cache themselves.
    Pools,
    Faults,
    Changes,
    Checks,
    Failures,
}

impl Record {
    pub fn new() -> Record {
        Record {
            start: Instant::now(),
            counts: Mutex::default(),
            decisions: Mutex::default(),
            weather: Weathers::new(),
            cache_weather: Weathers::new(),
            over: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            worst_return: Mutex::default(),
            hiccups: Mutex::default(),
            worst_hiccup: AtomicU64::new(0),
        }
    }

    pub fn count(&self, group: Group, what: &str) {
        self.add(group, what, 1);
    }

    pub fn add(&self, group: Group, what: &str, n: u64) {
        *lock(&self.counts).entry((group, what.to_owned())).or_default() += n;
    }

    /// Notes a decision.
    pub fn decided(&self, what: String) {
        let mut decisions = lock(&self.decisions);
        decisions.push_back(format!("{:8.2} s  {what}", self.start.elapsed().as_secs_f64()));
        if decisions.len() > KEPT {
            decisions.pop_front();
        }
    }

    /// Something is wrong.
    pub fn failed(&self, kind: &str, what: &str) {
        self.count(Group::Failures, kind);
        if self.failures.fetch_add(1, SeqCst) < TOLD as u64 {
            let last = lock(&self.decisions).back().cloned().unwrap_or_default();
            println!(
                "FAILURE at {:.2} s: {kind}: {what}\n  the last decision: {last}",
                self.start.elapsed().as_secs_f64()
            );
        }
    }

    pub fn has_failures(&self) -> bool {
        self.failures.load(SeqCst) > 0
    }

    // ------------------------------------------------------------ trouble and calm

    /// Something begins; `reaches_cache` says whether those who ask the cache may notice.
    pub fn begins(&self, weather: Weather, reaches_cache: bool) {
        self.weather.set(weather);
        if reaches_cache {
            self.cache_weather.set(weather);
        }
    }

    /// It has ended, and the service has come back.
    pub fn calm(&self) {
        self.weather.set(Weather::Calm);
        self.cache_weather.set(Weather::Calm);
    }

    /// Whether nothing was amiss from `start` to now that could excuse a failure.
    pub fn was_calm_since(&self, start: Instant) -> bool {
        self.weather.worst_since(start) == Weather::Calm && !self.is_machine_late()
    }

    /// Whether the machine itself has been so late that time-outs are nobody's fault.
    pub fn is_machine_late(&self) -> bool {
        self.recent_hiccup() >= EXCUSE
    }

    pub fn is_over(&self) -> bool {
        self.over.load(SeqCst)
    }

    pub fn end(&self) {
        self.over.store(true, SeqCst);
    }

    // ------------------------------------------------------------ times

    /// The service has come back, so long after the end of this fault.
    pub fn returned(&self, took: Duration, after: &str) {
        let mut worst = lock(&self.worst_return);
        worst.measured += 1;
        worst.slow += u64::from(took > Duration::from_secs(1));
        if took > worst.took {
            (worst.took, worst.after) = (took, after.to_owned());
        }
    }

    /// The machine itself was late by this much.
    pub fn hiccup(&self, late: Duration) {
        self.worst_hiccup.fetch_max(late.as_millis() as u64, SeqCst);
        let mut hiccups = lock(&self.hiccups);
        hiccups.push_back((Instant::now(), late));
        // The last one stays: it tells since when nothing was measured.
        while hiccups.len() > 1 && hiccups.front().is_some_and(|(at, _)| at.elapsed() > RECENT) {
            hiccups.pop_front();
        }
    }

    /// The worst of late. That nothing has been measured for a while is one, too: whoever measures
    /// may wake up after those who ask.
    pub fn recent_hiccup(&self) -> Duration {
        let hiccups = lock(&self.hiccups);
        let silence = hiccups.back().map_or(Duration::ZERO, |(at, _)| at.elapsed());
        hiccups.iter().map(|(_, late)| *late).max().unwrap_or_default().max(silence)
    }

    // ------------------------------------------------------------ reports

    /// One line of counts.
    pub fn line(&self) -> String {
        let counts = lock(&self.counts);
        let sum =
            |group| counts.iter().filter(|((of, _), _)| *of == group).map(|(_, n)| n).sum::<u64>();
        let transfers = counts.iter().filter(|((of, _), _)| *of == Group::Transfers);
        let transfers: String = transfers.map(|((_, what), n)| format!(" {what}={n}")).collect();
        let worst = lock(&self.worst_return);
        format!(
            "{:6.0} s:{transfers} faults={} changes={} checks={} failures={} worst-return={:.2}s",
            self.start.elapsed().as_secs_f64(),
            sum(Group::Faults),
            sum(Group::Changes),
            sum(Group::Checks),
            sum(Group::Failures),
            worst.took.as_secs_f64()
        )
    }

    /// All counts.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let mut last = None;
        for ((group, what), n) in &*lock(&self.counts) {
            if last != Some(*group) {
                text += &format!("{group:?}\n");
                last = Some(*group);
            }
            text += &format!("  {what:<40} {n:>9}\n");
        }
        let worst = lock(&self.worst_return);
        text += &format!(
            "Return of service\n  measured {}, over 1 s {}, worst {:.3} s after: {}\n  worst lateness of the machine itself {} ms\n",
            worst.measured,
            worst.slow,
            worst.took.as_secs_f64(),
            worst.after,
            self.worst_hiccup.load(SeqCst),
        );
        for kind in ["wrong bytes", "vanished", "hang", "leak", "left behind"] {
            let n =
                lock(&self.counts).get(&(Group::Failures, kind.to_owned())).copied().unwrap_or(0);
            text += &format!("{kind}: {n}\n");
        }
        text
    }

    pub fn decisions(&self) -> String {
        lock(&self.decisions).iter().map(|decision| format!("  {decision}\n")).collect()
    }
}

/// How long lateness of the machine excuses what others are late with.
const RECENT: Duration = Duration::from_secs(15);

/// Lateness of the machine from which on it excuses.
const EXCUSE: Duration = Duration::from_millis(500);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
