//! A program that the demo has started: its words, and its end.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, Result};

/// Killed when dropped, so that a failing demo leaves no process behind.
pub struct Running {
    name: String,
    child: Child,
    /// What it logs, line by line; disconnected at its end.
    log: Receiver<String>,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Running> {
        let name = command.get_program().to_string_lossy().rsplit('/').next().unwrap_or("?").to_owned();
        // Its own group: an interrupt at the terminal is the demo's to pass on.
        std::os::unix::process::CommandExt::process_group(command, 0);
        let mut child = command
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {name}: {error}"))?;
        let (lines, log) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
                    if lines.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Running { name, child, log })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it listens; returns what it says of that.
    pub fn ready(&mut self) -> Result<String> {
        self.line_with("listening on ")
    }

    /// Asks it to end; returns what it says last.
    pub fn end(&mut self) -> Result<String> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).map_err(|error| error.to_string())?;
        let summary = self.line_with("requests=")?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(summary) } else { Err(format!("{} ended with {status}", self.name)) }
    }

    /// The next line that has `word` in it, from that word on.
    fn line_with(&mut self, word: &str) -> Result<String> {
        let limit = Instant::now() + PATIENCE;
        let mut last = String::new();
        loop {
            let line = self.log.recv_timeout(limit.saturating_duration_since(Instant::now()));
            let line =
                line.map_err(|_| format!("{} did not come to say {word:?}; last: {last}", self.name))?;
            match line.find(word) {
                Some(at) => return Ok(line[at..].to_owned()),
                None => last = line,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
