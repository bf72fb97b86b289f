//! The signals that ask a program to end, without those that its starter has set to be ignored.

use std::fs;
use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// `SIGINT`, `SIGTERM` and `SIGHUP`, without those that are ignored: `nohup` ignores `SIGHUP`, a
/// shell that runs a job in the background `SIGINT`. A handler would undo that.
pub fn that_end() -> io::Result<Vec<i32>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let ignored = ignored.ok_or_else(|| io::Error::other("no SigIgn in /proc/self/status"))?;
    Ok([SIGINT, SIGTERM, SIGHUP].into_iter().filter(|n| ignored >> (n - 1) & 1 == 0).collect())
}
