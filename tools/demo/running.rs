//! A program that the demo has started: its words, and its end.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use rustix::process::{Signal, kill_process};

use super::child::{self, Child, GLANCE, Interrupt};
use super::{Result, TIMEOUT};

/// Ended when dropped, so that a failing demo leaves no process behind.
pub struct Running {
    name: String,
    child: Child,
    /// What it logs, line by line; disconnected at its end.
    log: Receiver<String>,
    interrupt: Interrupt,
}

impl Running {
    pub fn start(program: &Path, args: &[&OsStr], interrupt: &Interrupt) -> Result<Running> {
        interrupt.check()?;
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = child::command(program)?;
        // Its own group: an interrupt at the terminal is the demo's to pass on.
        command
            .args(args)
            .process_group(0)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let child = Child::spawn(&mut command, interrupt);
        let mut child = child.map_err(|error| format!("cannot start {name}: {error}"))?;
        let (lines, log) = mpsc::channel();
        if let Some(stderr) = child.process.stderr.take() {
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
                    if lines.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Running { name, child, log, interrupt: interrupt.clone() })
    }

    pub fn pid(&self) -> u32 {
        self.child.process.id()
    }

    /// Waits until it listens; returns what it says of that.
    pub fn ready(&mut self) -> Result<String> {
        self.line_with("listening on ")
    }

    /// Asks it to end; returns what it says last, from `word` on.
    pub fn end(&mut self, word: &str) -> Result<String> {
        kill_process(self.child.pid(), Signal::TERM).map_err(|error| error.to_string())?;
        let summary = self.line_with(word)?;
        let status = self.child.wait()?;
        if status.success() {
            Ok(summary)
        } else {
            Err(format!("{} ended with {status}", self.name))
        }
    }

    /// The next line that has `word` in it, from that word on.
    fn line_with(&mut self, word: &str) -> Result<String> {
        let limit = Instant::now() + TIMEOUT;
        let mut last = String::new();
        loop {
            self.interrupt.check()?;
            match self.log.recv_timeout(GLANCE) {
                Ok(line) => match line.find(word) {
                    Some(at) => return Ok(line[at..].to_owned()),
                    None => last = line,
                },
                Err(RecvTimeoutError::Timeout) if Instant::now() < limit => {}
                Err(_) => {
                    return Err(format!(
                        "{} did not come to say {word:?}; last: {last}",
                        self.name
                    ));
                }
            }
        }
    }
}
