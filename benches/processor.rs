//! The processor time that a process has used, all its threads together, also those that have ended.

/// In seconds; zero for a process that is gone.
pub fn seconds(process: u32) -> f64 {
    let mut clock = 0;
    // SAFETY: writes a clock's number to the variable, and nothing else.
    let found = unsafe { libc::clock_getcpuclockid(process as libc::pid_t, &mut clock) };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time to the variable, and nothing else.
    if found != 0 || unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return 0.0;
    }
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
