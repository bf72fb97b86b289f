//! What both programs do as processes: logs, limits, signals, and their end.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use shmferry::{Address, Deadline};
use signal_hook::consts::SIGXFSZ;
use signal_hook::iterator::Signals;
use tracing::level_filters::LevelFilter;
use tracing::{debug, info, warn};
use tracing_subscriber::EnvFilter;

use super::signals;

/// How long running transfers may go on after the first signal.
const GRACE: Duration = Duration::from_secs(5);

/// How soon a second signal is noticed.
const GLANCE: Duration = Duration::from_millis(20);

/// Said at the end of a program that a signal has ended early.
const STOPPED: &str = "stopped by a signal before it listened";

/// Why a program ends without having served.
#[derive(Debug)]
pub enum Quit {
    /// A signal came before it listened.
    Stopped,
    /// It cannot start; says why.
    Failed(String),
}

impl From<String> for Quit {
    fn from(why: String) -> Self {
        Quit::Failed(why)
    }
}

/// Runs a program: a failure is one line on standard error and exit code 1.
pub fn run(name: &str, program: impl FnOnce(Stop) -> Result<(), Quit>) -> ExitCode {
    let prepared = prepare().map_err(|error| Quit::Failed(format!("cannot start: {error}")));
    match prepared.and_then(program) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Quit::Stopped) => {
            info!("{STOPPED}");
            ExitCode::SUCCESS
        }
        Err(Quit::Failed(message)) => {
            // With standard error gone there is nobody left to tell; the exit code still says it.
            let _ = writeln!(io::stderr(), "{name}: {message}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> io::Result<Stop> {
    // First of all: a signal from here on ends the program in order.
    let signals = Signals::new(signals::that_end()?)?;
    // Past the limit on file sizes, memfds included, a call then fails and ends nothing.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;

    tracing_subscriber::fmt()
        .with_env_filter(filter(&std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default()))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();

    // A descriptor for each client and each segment: the usual soft limit is soon reached.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    Stop::listen(signals)
}

/// What `RUST_LOG` asks for. The HTTP client's crates, which log several lines a request at `debug`,
/// log warnings at most, unless it names them.
fn filter(asked: &str) -> EnvFilter {
    let asked = if asked.trim().is_empty() { "info" } else { asked };
    // The level of all that no directive names; without one, those log nothing.
    let level = asked.split(',').rev().find_map(|it| it.trim().parse::<LevelFilter>().ok());
    let most = level.unwrap_or(LevelFilter::OFF).min(LevelFilter::WARN);
    // Of two directives for one name, the later counts.
    EnvFilter::builder().parse_lossy(format!("ureq={most},rustls={most},{asked}"))
}

/// `SIGINT`, `SIGTERM` and `SIGHUP`, which ask the program to end, unless its starter ignores them.
///
/// Until [`hold`](Self::hold) they end it wherever it is.
pub struct Stop {
    signals: Receiver<()>,
    is_held: Arc<Mutex<bool>>,
}

impl Stop {
    /// Signals that have come already count, too.
    fn listen(mut signals: Signals) -> io::Result<Stop> {
        let (sender, received) = mpsc::channel();
        let is_held = Arc::new(Mutex::new(false));
        let stop = Stop { signals: received, is_held: Arc::clone(&is_held) };
        let wait = move || {
            for _ in signals.forever() {
                // Held on to: nothing begins that would outlive the process, once it ends here.
                let is_held = is_held.lock().unwrap_or_else(PoisonError::into_inner);
                if !*is_held {
                    info!("{STOPPED}");
                    process::exit(0);
                }
                // Fails only when the program is about to end.
                let _ = sender.send(());
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
        Ok(stop)
    }

    /// Before the first step that makes what outlives the process: from here on, a signal ends the
    /// program only where it looks for one.
    pub fn hold(&self) {
        *self.is_held.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Between two steps of the start-up: whether to go on.
    ///
    /// # Errors
    /// [`Quit::Stopped`] when one of the signals has come.
    pub fn check(&self) -> Result<(), Quit> {
        if self.signals.try_recv().is_ok() { Err(Quit::Stopped) } else { Ok(()) }
    }

    /// Waits for the first of them.
    pub fn wait(&self) {
        // Its sender lives as long as the process.
        let _ = self.signals.recv();
        debug!("stopping");
    }

    /// Lets those finish who take no more jobs: within the grace time, and unless a second signal
    /// comes. `finished` waits for them, and says whether they have.
    pub fn wind_down(&self, finished: impl Fn(Deadline) -> bool) -> bool {
        let grace = Deadline::after(GRACE);
        while !finished(grace.min(Deadline::after(GLANCE))) {
            if grace.has_passed() || self.signals.try_recv().is_ok() {
                warn!("leaving with transfers under way");
                return false;
            }
        }
        true
    }
}

/// Where the cache is: where both programs meet unless told otherwise.
pub fn cache_address(asked: Option<&Address>) -> Result<Address, String> {
    let address = asked.map_or_else(|| Address::of_user("simplecached"), |asked| Ok(asked.clone()));
    address.map_err(|error| format!("there is no default address: {error}"))
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

/// Lets one line a second through, of those that report a lasting failure, and counts the others.
#[derive(Default)]
pub struct Pace(Mutex<(Option<Instant>, u64)>);

impl Pace {
    /// Logs a line, if it may be written now, and how many were held back.
    pub fn warn(&self, line: impl fmt::Display) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, held_back) = &mut *state;
        if last.is_some_and(|last| last.elapsed() < PACE) {
            *held_back += 1;
            return;
        }
        *last = Some(Instant::now());
        match std::mem::take(held_back) {
            0 => warn!("{line}"),
            more => warn!("{line}, and {more} more times since the last such line"),
        }
    }
}

/// The least time between two lines that a [`Pace`] lets through.
const PACE: Duration = Duration::from_secs(1);

/// The least and the most that a time-out may be, in seconds: a day, which every deadline and every
/// socket option can hold.
const TIMEOUTS: (f64, f64) = (0.001, 86_400.0);

/// Parses a time-out on the command line.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let (least, most) = TIMEOUTS;
    match text.parse::<f64>() {
        Ok(seconds) if (least..=most).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("expected a number of seconds from {least} to {most}")),
    }
}

/// Parses a number of bytes on the command line: plain, or with a binary unit.
pub fn bytes(text: &str) -> Result<u64, String> {
    let shift = match text.as_bytes().last() {
        Some(b'k' | b'K') => 10,
        Some(b'm' | b'M') => 20,
        Some(b'g' | b'G') => 30,
        _ => 0,
    };
    let digits = if shift > 0 { &text[..text.len() - 1] } else { text };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a number of bytes: expected one such as 4096, 512k, 64M or 1G".to_owned());
    }
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
    count.ok_or_else(|| "not below 2^64 bytes".to_owned())
}
