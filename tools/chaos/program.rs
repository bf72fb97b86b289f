//! A program under test: how it is started, ended and watched.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::record::lock;
use super::{Result, told};

/// What no start and no end may take.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How soon to look again at what nobody announces.
const GLANCE: Duration = Duration::from_millis(2);

/// Lines of a program's log that are kept.
const KEPT: usize = 30;

/// The kind of a segment's descriptor.
const SEGMENT: &str = "shared memory";

/// What to start, and where.
pub struct Recipe {
    pub name: &'static str,
    pub path: PathBuf,
    pub args: Vec<String>,
    pub dir: PathBuf,
}

/// A running program. Killed when dropped.
pub struct Program {
    child: Child,
    said: Arc<Said>,
}

/// What it logs.
#[derive(Default)]
struct Said {
    log: Mutex<Log>,
    more: Condvar,
}

#[derive(Default)]
struct Log {
    last: VecDeque<String>,
    listening: Option<String>,
    panicked: bool,
    ended: bool,
}

/// What a program holds.
#[derive(Clone)]
pub struct Holdings {
    pub descriptors: usize,
    /// Those of shared memory among them, and of what tells of life beside it.
    pub segments: usize,
    pub threads: usize,
    pub mappings: usize,
    /// Bytes.
    pub resident: u64,
    /// What its descriptors are, by kind.
    pub kinds: BTreeMap<String, usize>,
}

impl Recipe {
    pub fn start(&self) -> Result<Program> {
        let mut command = Command::new(&self.path);
        command.args(&self.args);
        self.spawn(command)
    }

    /// Starts it in a process that stops before it becomes the program.
    pub fn start_stopped(&self) -> Result<Program> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).arg(&self.path).args(&self.args);
        let program = self.spawn(command)?;
        wait_until("it stopped", || program.state() == Some('T'))?;
        Ok(program)
    }

    fn spawn(&self, mut command: Command) -> Result<Program> {
        command
            .current_dir(&self.dir)
            .env_clear()
            .env("RUST_LOG", "info")
            .env("XDG_RUNTIME_DIR", &self.dir);
        // An interrupt at the terminal is not for it.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(told(self.name))?;
        let said = Arc::new(Said::default());
        if let Some(stderr) = child.stderr.take() {
            let said = Arc::clone(&said);
            thread::spawn(move || said.listen_to(BufReader::new(stderr)));
        }
        Ok(Program { child, said })
    }
}

impl Program {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        // Fails only on one that has ended, which shows soon enough.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Waits until it listens, and returns what it says of that; or until it has ended instead.
    pub fn listening(&mut self) -> Result<std::result::Result<String, ExitStatus>> {
        let end = Instant::now() + TIMEOUT;
        let mut log = lock(&self.said.log);
        while log.listening.is_none() && !log.ended && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            log = self.said.more.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match (&log.listening, log.ended) {
            (Some(line), _) => Ok(Ok(line.clone())),
            (None, true) => {
                drop(log);
                self.wait(TIMEOUT)?
                    .map(Err)
                    .ok_or("it closed its standard error, and lives".to_owned())
            }
            (None, false) => Err(format!("it neither listens nor ends: {:?}", log.last)),
        }
    }

    /// Waits for its end; `None` if it does not come in time.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + timeout;
        loop {
            match self.child.try_wait().map_err(told("waiting"))? {
                None if Instant::now() < end => thread::sleep(GLANCE),
                status => return Ok(status),
            }
        }
    }

    /// Its status if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn panicked(&self) -> bool {
        lock(&self.said.log).panicked
    }

    /// Its last words.
    pub fn last_words(&self) -> String {
        lock(&self.said.log).last.iter().map(|line| format!("\n    | {line}")).collect()
    }

    /// The state of its main thread.
    pub fn state(&self) -> Option<char> {
        state(self.pid())
    }

    /// Whether [`Signal::STOP`] has taken effect on all its threads, or it has none any more.
    pub fn is_stopped(&self) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid())) else { return true };
        tasks.flatten().all(|task| {
            let state = task.file_name().to_str().and_then(|tid| tid.parse().ok()).and_then(state);
            state.is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X'))
        })
    }

    pub fn holdings(&self) -> Option<Holdings> {
        let of = |file: &str| format!("/proc/{}/{file}", self.pid());
        let mut kinds = BTreeMap::new();
        for fd in fs::read_dir(of("fd")).ok()?.flatten() {
            let kind = fs::read_link(fd.path()).unwrap_or_default().to_string_lossy().into_owned();
            let kind = kind.split(['[', '(']).next().unwrap_or_default();
            let is_segment = ["/dev/shm/shmferry-", "/memfd:shmferry-"]
                .iter()
                .any(|start| kind.starts_with(start));
            let kind = if is_segment { SEGMENT } else { kind };
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        let status = fs::read_to_string(of("status")).ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let resident: u64 = resident.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(Holdings {
            descriptors: kinds.values().sum(),
            segments: kinds.get(SEGMENT).copied().unwrap_or(0),
            threads: fs::read_dir(of("task")).ok()?.count(),
            mappings: fs::read_to_string(of("maps")).ok()?.lines().count(),
            resident: resident << 10,
            kinds,
        })
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holdings { descriptors, threads, mappings, resident, kinds, .. } = self;
        let resident = resident >> 10;
        write!(
            f,
            "{threads} threads, {mappings} mappings, {resident} KiB, {descriptors} descriptors: {kinds:?}"
        )
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Said {
    fn listen_to(&self, stderr: impl BufRead) {
        for line in stderr.lines().map_while(std::result::Result::ok) {
            let mut log = lock(&self.log);
            log.panicked |= line.contains("panicked");
            if line.contains("listening on ") {
                log.listening = Some(line.clone());
            }
            log.last.push_back(line);
            if log.last.len() > KEPT {
                log.last.pop_front();
            }
            self.more.notify_all();
        }
        lock(&self.log).ended = true;
        self.more.notify_all();
    }
}

/// The state of a thread; it comes after the name, which is in parentheses.
fn state(tid: u32) -> Option<char> {
    fs::read_to_string(format!("/proc/{tid}/stat")).ok()?.rsplit(") ").next()?.chars().next()
}

/// The process that traces this one; 0 if none does.
pub fn tracer(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()
}

/// Waits for what nobody announces.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + TIMEOUT;
    while !holds() {
        if Instant::now() > end {
            return Err(format!("waited in vain until {what}"));
        }
        thread::sleep(GLANCE);
    }
    Ok(())
}

/// Processes that run in a directory.
pub fn living_in(dir: &Path) -> Vec<String> {
    let Ok(here) = dir.canonicalize() else { return Vec::new() };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let at_home =
        processes.filter(|p| fs::read_link(p.path().join("cwd")).is_ok_and(|at| at == here));
    at_home.map(|process| process.path().display().to_string()).collect()
}
