//! A watchdog for tests: aborts the whole run if a test hangs, and prints its name.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Much longer than any test takes.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Watches the test that made it, until it is dropped.
pub struct Watchdog {
    _ended: mpsc::Sender<()>,
}

/// Ends the whole test run if this test hangs.
pub fn watchdog() -> Watchdog {
    let (_ended, ended) = mpsc::channel();
    let test = thread::current().name().unwrap_or("?").to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{test} hangs");
            std::process::abort();
        }
    });
    Watchdog { _ended }
}
