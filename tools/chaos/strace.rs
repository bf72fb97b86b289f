//! System calls that fail: `strace` attached to a program, and let go of again.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::chance::Dice;
use super::program::{TIMEOUT, tracer};
use super::theatre::Role;
use super::{Result, told};

/// Calls, errors that they may have in life, and who makes them, if not both.
const FAILURES: [(&str, &[&str], Option<Role>); 21] = [
    ("mmap", &["ENOMEM"], None),
    ("epoll_ctl", &["ENOMEM", "ENOSPC"], None),
    ("epoll_wait,epoll_pwait,epoll_pwait2", &["EINTR"], None),
    ("sendmsg", &["ENOMEM", "ENOBUFS", "EINTR", "ETOOMANYREFS"], None),
    ("recvmsg", &["ENOMEM", "EINTR"], None),
    ("sendto", &["ENOMEM", "ECONNRESET", "EINTR"], Some(Role::Proxy)),
    // Nothing else: the descriptor that signals come by never fails in life, and its reader panics then.
    ("recvfrom", &["EINTR"], Some(Role::Proxy)),
    ("accept4", &["EMFILE", "ENFILE", "ENOMEM", "ECONNABORTED", "EINTR"], None),
    ("pread64", &["EIO", "EINTR", "ENOMEM"], Some(Role::Cache)),
    ("openat2", &["EMFILE", "EIO", "ENOMEM", "EINTR", "EACCES"], Some(Role::Cache)),
    ("openat", &["EMFILE", "ENFILE", "ENOMEM", "EINTR"], None),
    ("memfd_create", &["EMFILE", "ENOMEM"], Some(Role::Proxy)),
    ("socket", &["EMFILE", "ENFILE", "ENOMEM"], Some(Role::Proxy)),
    ("mq_open", &["EMFILE", "ENOSPC", "ENOMEM"], None),
    ("mq_timedreceive", &["EINTR"], Some(Role::Cache)),
    ("mq_timedsend", &["EINTR"], Some(Role::Proxy)),
    ("fallocate", &["ENOSPC", "EINTR", "ENOMEM"], Some(Role::Proxy)),
    ("ftruncate", &["ENOSPC", "EINTR", "EIO"], None),
    ("clone3", &["EAGAIN", "ENOMEM"], None),
    ("futex", &["EINTR"], None),
    ("poll,ppoll", &["EINTR", "ENOMEM"], None),
];

/// Which call fails, how, and when.
#[derive(Clone, Debug)]
pub struct Failure {
    pub call: &'static str,
    errno: &'static str,
    when: When,
    /// For how long.
    pub span: Duration,
}

/// Which of the calls fail.
#[derive(Clone, Debug)]
enum When {
    /// This one.
    Once(u64),
    /// From the first to the last of these, so far apart.
    Some {
        first: u64,
        last: u64,
        apart: u64,
    },
    Always,
}

impl Failure {
    /// No thread can be had for so long.
    pub fn of_threads(span: Duration) -> Failure {
        Failure { call: "clone,clone3", errno: "EAGAIN", when: When::Always, span }
    }

    pub fn draw(dice: &mut Dice, role: Role) -> Failure {
        let of_role: Vec<_> = FAILURES
            .into_iter()
            .filter(|(.., whose)| whose.is_none_or(|whose| whose == role))
            .collect();
        let (call, errnos, _) = dice.pick(&of_role);
        let errno = dice.pick(errnos);
        let first = 1 + dice.roll(20);
        let (more, length, apart) = (dice.roll(3) > 0, dice.roll(60), 1 + dice.roll(8));
        let when = if more {
            When::Some { first, last: first + length, apart }
        } else {
            When::Once(first)
        };
        Failure { call, errno, when, span: Duration::from_millis(200 + dice.roll(1500)) }
    }

    pub fn name(&self) -> String {
        format!("{} in {}", self.errno, self.call)
    }

    /// Whether a program may die of it: the allocator, and the start of a thread, know no other way.
    pub fn is_deadly(&self) -> bool {
        self.call == "mmap"
    }

    fn expression(&self) -> String {
        let when = match self.when {
            When::Once(number) => number.to_string(),
            When::Some { first, last, apart } => format!("{first}..{last}+{apart}"),
            When::Always => "1+".to_owned(),
        };
        format!("inject={}:error={}:when={when}", self.call, self.errno)
    }
}

/// A tracer at work. Ends when dropped, and lets the program go on.
pub struct Tracer {
    strace: Child,
    of: u32,
}

impl Tracer {
    /// Whether there is one that works.
    pub fn is_possible() -> bool {
        let mut sleeper = match Command::new("/bin/sh").args(["-c", "kill -STOP $$"]).spawn() {
            Ok(sleeper) => sleeper,
            Err(_) => return false,
        };
        let probe =
            Failure { call: "futex", errno: "EINTR", when: When::Once(1), span: Duration::ZERO };
        let works = Tracer::attach(sleeper.id(), &probe).is_ok();
        // Fails only if it has ended.
        let _ = sleeper.kill();
        let _ = sleeper.wait();
        works
    }

    /// Has calls of this process fail from now on.
    pub fn attach(pid: u32, failure: &Failure) -> Result<Tracer> {
        let strace = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={}", failure.call)])
            .args(["-e", &failure.expression(), "-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(told("strace"))?;
        let mut tracer_of = Tracer { strace, of: pid };
        let end = Instant::now() + TIMEOUT;
        while tracer(pid) == Some(0) {
            let ended = tracer_of.strace.try_wait().map_err(told("strace"))?;
            if let Some(status) = ended {
                return Err(format!("strace ended with {status}"));
            }
            if Instant::now() > end {
                return Err("strace does not attach".to_owned());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(tracer_of)
    }

    /// Lets go of the process.
    pub fn detach(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let end = Instant::now() + TIMEOUT;
        // Fails only on one that has ended.
        let _ = kill_process(Pid::from_child(&self.strace), Signal::TERM);
        while self.strace.try_wait().map_err(told("strace"))?.is_none() {
            if Instant::now() > end {
                let _ = self.strace.kill();
                let _ = self.strace.wait();
                return Err("strace did not let go".to_owned());
            }
            thread::sleep(Duration::from_millis(1));
        }
        match tracer(self.of) {
            Some(0) | None => Ok(()),
            Some(tracer) => Err(format!("still traced by {tracer}")),
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Whoever wanted to know has called `detach`.
        let _ = self.end();
    }
}
