//! The `demo` program, interrupted at every stage: both of its programs end, and its files go.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::FileType;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use shmferry_examples::program::signals_that_end;
use shmferry_test_support::{names_in, path_of, wait_until};
use tempfile::TempDir;

/// What shows that the demo has come so far.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// It waits for cargo, which does not end by itself.
    Building,
    /// Its directory is there, the files are being written.
    Writing,
    /// It has said this on standard output.
    Said(&'static str),
}

const STAGES: [Stage; 6] = [
    Stage::Building,
    Stage::Writing,
    Stage::Said("simplecached (process "),
    Stage::Said("webproxy     (process "),
    Stage::Said("/pictures/mandelbrot.png"),
    Stage::Said("interrupt with Ctrl-C to end"),
];

/// As from the terminal, to the whole group, or to the demo alone.
#[derive(Clone, Copy, Debug)]
enum To {
    Group,
    Demo,
}

#[test]
fn an_interrupted_demo_ends_its_programs_and_removes_its_files() {
    let all = [(Signal::INT, To::Group), (Signal::TERM, To::Demo), (Signal::HUP, To::Demo)];
    let heeded = signals_that_end().unwrap();
    for stage in STAGES {
        for (signal, to) in all {
            if !heeded.contains(&signal.as_raw()) {
                println!("left out: {signal:?}, which is ignored in this process and its children");
                continue;
            }
            let mut demo = Demo::start();
            demo.wait_for(stage);
            demo.signal(signal, to);
            let status = demo.end();
            let told = format!("{signal:?} to {to:?} at {stage:?}: {status}\n{}", demo.said());
            match stage {
                Stage::Said("interrupt with Ctrl-C to end") => assert!(status.success(), "{told}"),
                _ => assert_eq!(status.signal(), Some(signal.as_raw()), "{told}"),
            }
            assert_eq!(demo.living(), Vec::<i32>::new(), "processes are left; {told}");
            let left = names_in(demo.temporary.path());
            assert!(left.is_empty(), "{left:?} is left; {told}");
        }
    }
}

#[test]
fn a_killed_demo_takes_its_programs_with_it() {
    for stage in STAGES {
        let mut demo = Demo::start();
        demo.wait_for(stage);
        demo.signal(Signal::KILL, To::Demo);
        demo.end();
        wait_until(&format!("the programs ended after {stage:?}"), || demo.living().is_empty());
    }
}

#[test]
fn the_demo_listens_on_the_loopback_address_only() {
    let mut demo = Demo::start();
    demo.wait_for(Stage::Said("webproxy     (process "));
    let said = demo.said();
    let line = said.lines().find(|line| line.starts_with("webproxy ")).unwrap();
    assert!(line.contains(" listening on 127.0.0.1:"), "{line}");
}

#[test]
fn a_demo_that_stays_shows_its_pictures_to_browsers() {
    let mut demo = Demo::start();
    demo.wait_for(Stage::Said("interrupt with Ctrl-C to end"));
    let said = demo.said();
    let url = said.lines().find_map(|line| line.trim().strip_prefix("http://")).unwrap();
    let (host, path) = url.split_once('/').unwrap();
    let mut connection = TcpStream::connect(host).unwrap();
    write!(connection, "GET /{path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200 OK\r\n"), "{}", answer[..80].escape_ascii());
    let begin = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    assert!(answer[begin..].starts_with(b"\x89PNG"), "a picture");
}

/// A demo that is running in a group of its own, with a temporary directory of its own.
struct Demo {
    child: Child,
    stdout: Arc<Mutex<String>>,
    temporary: TempDir,
    /// Beside the temporary directory: what the stand-in for cargo says that it was called by.
    other: TempDir,
}

impl Demo {
    /// Starts it with a stand-in for cargo: the programs are built already. The stand-in says that
    /// it runs, and reads from a pipe until [`wait_for`](Self::wait_for) writes to that.
    fn start() -> Demo {
        // Those of another package are built with all tests, not with this one alone.
        let _ = ["simplecached", "webproxy", "shmferry-http"].map(path_of);
        let temporary = TempDir::new().unwrap();
        let other = TempDir::new().unwrap();
        let cargo = other.path().join("cargo");
        let pipe = other.path().join("go");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, 0o600.into(), 0).unwrap();
        let script = "#!/bin/sh\n: > \"${0%/*}/called\"\nread go < \"${0%/*}/go\"\n";
        // By another process, so that none of ours holds it open for writing when it is run.
        let written = Command::new("/bin/sh")
            .args(["-c", "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", script])
            .arg(&cargo)
            .status();
        assert!(written.unwrap().success());
        let mut child = Command::new(env!("CARGO_BIN_EXE_demo"))
            .arg("--stay")
            .env("TMPDIR", temporary.path())
            .env("CARGO", &cargo)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        thread::spawn({
            let stdout = Arc::clone(&stdout);
            move || {
                for line in lines.map_while(Result::ok) {
                    *stdout.lock().unwrap() += &(line + "\n");
                }
            }
        });
        Demo { child, stdout, temporary, other }
    }

    fn wait_for(&mut self, stage: Stage) {
        wait_until("cargo was called", || self.other.path().join("called").exists());
        if let Stage::Building = stage {
            return;
        }
        fs::write(self.other.path().join("go"), "go\n").unwrap();
        wait_until(&format!("it came to {stage:?}"), || {
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended:\n{}", self.said());
            match stage {
                Stage::Said(words) => self.said().contains(words),
                _ => !names_in(self.temporary.path()).is_empty(),
            }
        });
    }

    fn signal(&self, signal: Signal, to: To) {
        let pid = Pid::from_child(&self.child);
        match to {
            To::Group => kill_process_group(pid, signal).unwrap(),
            To::Demo => kill_process(pid, signal).unwrap(),
        }
    }

    fn end(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the demo ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    fn said(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    /// The demo and all that it has started: their environment has its temporary directory.
    fn living(&self) -> Vec<i32> {
        let mark = format!("TMPDIR={}", self.temporary.path().display());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let ours = processes.filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let environment = fs::read(process.path().join("environ")).ok()?;
            let mut entries = environment.split(|byte| *byte == 0);
            entries.any(|entry| entry == mark.as_bytes()).then_some(pid)
        });
        ours.collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.living() {
            // Fails only on one that has just ended.
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        wait_until("all are gone", || self.living().is_empty());
    }
}
