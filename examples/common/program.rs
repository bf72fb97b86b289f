//! What both programs do as processes: logs, limits, signals, and their end.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use shmferry::{Crew, Deadline};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use tracing::{debug, warn};
use tracing_subscriber::EnvFilter;

/// How long running transfers may go on after the first signal.
const GRACE: Duration = Duration::from_secs(5);

/// How soon a second signal is noticed.
const GLANCE: Duration = Duration::from_millis(20);

/// Runs a program: a failure is one line on standard error and exit code 1.
pub fn run(name: &str, program: impl FnOnce(Stop) -> Result<(), String>) -> ExitCode {
    let outcome = prepare().map_err(|error| format!("cannot start: {error}")).and_then(program);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // With standard error gone there is nobody left to tell; the exit code still says it.
            let _ = writeln!(io::stderr(), "{name}: {message}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> io::Result<Stop> {
    let filter = EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy();
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .init();

    // A descriptor for each client and each segment: the usual soft limit is soon reached.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    // Past the limit on file sizes, memfds included, a call then fails where it would end the process.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    Ok(Stop(Signals::new([SIGINT, SIGTERM])?))
}

/// `SIGINT` and `SIGTERM`, which ask the program to end.
pub struct Stop(Signals);

impl Stop {
    /// Waits for the first of them.
    pub fn wait(&mut self) {
        self.0.forever().next();
        debug!("stopping");
    }

    /// Lets a crew that takes no more jobs finish those it has: within the grace time, and unless a
    /// second signal comes. Returns whether it has.
    pub fn wind_down(&mut self, crew: &Crew) -> bool {
        let grace = Deadline::after(GRACE);
        while !crew.join(grace.min(Deadline::after(GLANCE))) {
            if grace.has_passed() || self.0.pending().next().is_some() {
                warn!("leaving with transfers under way");
                return false;
            }
        }
        true
    }
}

/// Counts for the summary.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.load(Ordering::Relaxed).fmt(f)
    }
}

/// Parses a time-out on the command line.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => Err("must be more than zero".to_owned()),
        other => other.map_err(|error| error.to_string()),
    }
}
