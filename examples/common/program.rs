//! What both programs do as processes: logs, limits, signals, and their end.

use std::io::{self, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{fmt, fs};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shmferry::{Address, Deadline};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use tracing::{debug, info, level_filters::LevelFilter, warn};
use tracing_subscriber::EnvFilter;

/// How long running transfers may go on after the first signal, unless the program says otherwise.
const GRACE: Duration = Duration::from_secs(5);

/// How soon a second signal is noticed.
const GLANCE: Duration = Duration::from_millis(20);

/// Said of a program that a signal has ended early.
const STOPPED: &str = "stopped by a signal before it listened";

/// Why a program ends without having served: `None` when a signal came before it listened.
pub type Quit = Option<String>;

/// Runs a program: a failure is one line on standard error and exit code 1.
pub fn run(name: &str, program: impl FnOnce(Stop) -> Result<(), Quit>) -> ExitCode {
    let prepared = prepare().map_err(|error| Some(format!("cannot start: {error}")));
    match prepared.and_then(program) {
        Ok(()) => {}
        Err(None) => info!("{STOPPED}"),
        Err(Some(message)) => {
            // With standard error gone there is nobody left to tell; the exit code still says it.
            let _ = writeln!(io::stderr(), "{name}: {message}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn prepare() -> io::Result<Stop> {
    // First of all: a signal from here on ends the program in order.
    let signals = Signals::new(signals_that_end()?)?;
    // Past the limit on file sizes, memfds included, a call then fails and ends nothing.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;

    tracing_subscriber::fmt()
        .with_env_filter(filter(&std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default()))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();

    // A descriptor for each client and each segment: the usual soft limit is soon reached.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    Stop::listen(signals)
}

/// What `RUST_LOG` asks for. The HTTP client's crates, which log several lines a request at
/// `debug`, log warnings at most, unless it names them.
fn filter(asked: &str) -> EnvFilter {
    let asked = if asked.trim().is_empty() { "info" } else { asked };
    // The level of all that no directive names; without one, those log nothing.
    let level = asked.split(',').rev().find_map(|it| it.trim().parse::<LevelFilter>().ok());
    let most = level.unwrap_or(LevelFilter::OFF).min(LevelFilter::WARN);
    // Of two directives for one name, the later counts.
    EnvFilter::builder().parse_lossy(format!("ureq={most},rustls={most},{asked}"))
}

/// `SIGINT`, `SIGTERM` and `SIGHUP`, without those that are ignored: `nohup` ignores `SIGHUP`, a
/// shell that runs a job in the background `SIGINT`. A handler would undo that.
pub fn signals_that_end() -> io::Result<Vec<i32>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let ignored = ignored.ok_or_else(|| io::Error::other("no SigIgn in /proc/self/status"))?;
    Ok([SIGINT, SIGTERM, SIGHUP].into_iter().filter(|n| ignored >> (n - 1) & 1 == 0).collect())
}

/// The [signals that end](signals_that_end) the program.
///
/// Until [`hold`](Self::hold) they end it wherever it is.
pub struct Stop {
    signals: Receiver<()>,
    is_held: Arc<Mutex<bool>>,
    /// How long running transfers may go on after the first of them.
    pub grace: Duration,
}

impl Stop {
    fn listen(mut signals: Signals) -> io::Result<Stop> {
        let (sender, received) = mpsc::channel();
        let stop = Stop { signals: received, is_held: Arc::default(), grace: GRACE };
        let is_held = Arc::clone(&stop.is_held);
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for _ in signals.forever() {
                // Locked to the end of the process: `hold` does not return any more.
                let is_held = is_held.lock().unwrap_or_else(PoisonError::into_inner);
                if !*is_held {
                    info!("{STOPPED}");
                    process::exit(0);
                }
                let _ = sender.send(()); // fails only at the end of the program
            }
        })?;
        Ok(stop)
    }

    /// From here on, a signal ends the program only where it looks for one: it makes what would
    /// outlive the process.
    pub fn hold(&self) {
        *self.is_held.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Whether to go on with the start, or else `Err(None)`.
    pub fn check(&self) -> Result<(), Quit> {
        if self.signals.try_recv().is_ok() { Err(None) } else { Ok(()) }
    }

    /// Waits for the first of them.
    pub fn wait(&self) {
        let _ = self.signals.recv(); // its sender lives as long as the process
        debug!("stopping");
    }

    /// Lets those finish who take no more jobs: within the grace time, and unless a second signal
    /// comes. `finished` waits for them, and says whether they have.
    pub fn wind_down(&self, finished: impl Fn(Deadline) -> bool) -> bool {
        let grace = Deadline::after(self.grace);
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

/// Lets one line a second through, of those that report a lasting failure, and counts the others.
#[derive(Default)]
pub struct Pace(Mutex<(Option<Instant>, u64)>);

impl Pace {
    /// Logs a line, if it may be written now, and how many were held back.
    pub fn warn(&self, line: impl fmt::Display) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, held_back) = &mut *state;
        if last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
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

/// Parses a time-out on the command line: up to a day, which every deadline and every socket option
/// can hold.
pub fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err("expected a number of seconds from 0.001 to 86400".to_owned()),
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
    let digits = &text[..text.len() - usize::from(shift > 0)];
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a number of bytes: expected one such as 4096, 512k, 64M or 1G".to_owned());
    }
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
    count.ok_or_else(|| "not below 2^64 bytes".to_owned())
}
