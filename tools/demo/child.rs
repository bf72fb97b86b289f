//! Processes that end when the demo does, however it ends, and waits that a signal cuts short.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{self, Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::{Result, TIMEOUT, signals_that_end};

/// How soon a signal is noticed.
pub const GLANCE: Duration = Duration::from_millis(20);

/// The signal that has asked the demo to end, if any.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// From now on such signals are noted, and end nothing by themselves.
    pub fn install() -> io::Result<Interrupt> {
        let noted = Arc::new(AtomicUsize::new(0));
        for signal in signals_that_end()? {
            signal_hook::flag::register_usize(signal, Arc::clone(&noted), signal as usize)?;
        }
        Ok(Interrupt(noted))
    }

    pub fn signal(&self) -> Option<i32> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }

    /// An error once there was a signal: to be called between the steps of all that takes long.
    pub fn check(&self) -> Result<()> {
        self.signal().map_or(Ok(()), |_| Err("interrupted".to_owned()))
    }

    /// Waits for a signal, and takes it: it counts as answered.
    pub fn wait(&self) {
        while self.0.swap(0, Ordering::SeqCst) == 0 {
            thread::sleep(GLANCE);
        }
    }
}

/// What the demo calls itself with, to become one of its children.
pub const PART: &str = "child-of";

/// A command for a process that gets `SIGTERM` when this one ends, even by `kill -9`. The demo
/// itself is run, and [becomes](become_child) the program. Only to be spawned by the main thread:
/// the kernel sends the signal when the thread ends that has spawned it.
pub fn command(program: &Path) -> Result<Command> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(this);
    command.args([PART, &std::process::id().to_string()]).arg(program);
    Ok(command)
}

/// Becomes `program`, to get `SIGTERM` when the parent ends. Returns only when it cannot.
pub fn become_child(parent: u32, program: &[OsString]) -> Result<Infallible> {
    process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| error.to_string())?;
    if parent_id() != parent {
        return Err("the demo ended while it started a program".to_owned());
    }
    let [program, args @ ..] = program else { return Err("no program to become".to_owned()) };
    let error = Command::new(program).args(args).exec();
    Err(format!("cannot run {}: {error}", program.display()))
}

/// A child that is asked to end when dropped, and killed if it does not.
pub struct Child {
    pub process: std::process::Child,
    interrupt: Interrupt,
}

impl Child {
    pub fn spawn(command: &mut Command, interrupt: &Interrupt) -> io::Result<Child> {
        Ok(Child { process: command.spawn()?, interrupt: interrupt.clone() })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Waits for its end, or for a signal.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            let ended = self.process.try_wait().map_err(|error| error.to_string())?;
            // First, for an interrupt from the terminal may have ended it, too.
            self.interrupt.check()?;
            match ended {
                Some(status) => return Ok(status),
                None => glance(self.pid()).map_err(|error| error.to_string())?,
            }
        }
    }
}

/// Waits for the end of a child, up to [`GLANCE`].
fn glance(pid: Pid) -> io::Result<()> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let span = Timespec { tv_sec: 0, tv_nsec: GLANCE.as_nanos() as i64 };
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&span)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let end = Instant::now() + TIMEOUT;
        // Fails only if it has ended already, as does `kill` below.
        let _ = kill_process(self.pid(), Signal::TERM);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < end {
            if glance(self.pid()).is_err() {
                break;
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
