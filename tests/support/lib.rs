//! Support for tests that run the real programs: processes under a watchdog, a place for their
//! files and sockets, and a raw GETFILE client.
//!
//! ```ignore
//! use shmferry_test_support::{Answer, Place, Signal};
//!
//! let place = Place::new();
//! place.write("files/a", b"hello");
//! let cache = place.simplecached(["-c", "files"]).listening();
//! let proxy = place.webproxy(["-n", "2"]).listening();
//! assert_eq!(proxy.get("/a"), Answer::Ok(b"hello".to_vec()));
//! proxy.signal(Signal::TERM);
//! proxy.finish().assert_code(0);
//! ```
//!
//! Nothing here asserts a maximum time: every wait ends with its event, or fails the test after
//! [`WATCHDOG`].

pub mod raw;
pub mod watchdog;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mqueue::{MQ_OFlag, mq_close, mq_open};
use nix::sys::stat::Mode;
use rustix::process::{Pid, geteuid, kill_process};
use shmferry::Server;
use tempfile::TempDir;

pub use rustix::process::Signal;

/// The longest any step may take, even on a busy machine. A program that lives longer is killed.
pub const WATCHDOG: Duration = Duration::from_secs(180);

/// No arguments.
pub const PLAIN: [&str; 0] = [];

/// More than the buffers of a socket, so that a client that does not read stalls the transfer.
pub const LARGE: usize = 32 << 20;

// ---------------------------------------------------------------- places

/// How the two programs reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A Unix socket and memfds.
    Unix,
    /// A POSIX message queue and named segments.
    Mq,
}

/// Makes two tests of each of these functions, which take a [`Transport`]: `unix::NAME` and
/// `mq::NAME`.
#[macro_export]
macro_rules! over_both {
    ($($test:ident,)*) => {
        mod unix {
            $(#[test] fn $test() { super::$test($crate::Transport::Unix) })*
        }
        mod mq {
            $(#[test] fn $test() { super::$test($crate::Transport::Mq) })*
        }
    };
}

/// A temporary directory of one test: its files, its sockets, the working directory of its
/// programs. Its drop also asserts that no queue is left.
pub struct Place {
    transport: Transport,
    /// The name of the queue, with its slash.
    queue: String,
    dir: TempDir,
    /// The files that the test itself made.
    ours: Mutex<BTreeSet<String>>,
}

impl Place {
    /// A place whose programs use a Unix socket.
    pub fn new() -> Place {
        Place::over(Transport::Unix)
    }

    pub fn over(transport: Transport) -> Place {
        static PLACES: AtomicUsize = AtomicUsize::new(0);
        let number = PLACES.fetch_add(1, Ordering::Relaxed);
        let queue = format!("/shmferry-test-{}-{number}", std::process::id());
        Place { transport, queue, dir: TempDir::new().unwrap(), ours: Mutex::default() }
    }

    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// A path in this directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and makes missing directories.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        lock(&self.ours).insert(name.split('/').next().unwrap().to_owned());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The address of the cache: a socket in a directory of its own, which the cache makes, or a
    /// queue with a name of its own.
    pub fn cache_address(&self) -> String {
        match self.transport {
            Transport::Unix => format!("unix:{}", self.path("run/cache.sock").display()),
            Transport::Mq => format!("mq:{}", self.queue),
        }
    }

    /// The name of the queue; only for [`Transport::Mq`].
    pub fn queue(&self) -> &str {
        assert_eq!(self.transport, Transport::Mq);
        &self.queue
    }

    /// Whether a cache has left nothing at [`cache_address`](Self::cache_address).
    pub fn is_swept(&self) -> bool {
        match self.transport {
            Transport::Unix => !self.path("run").exists(),
            Transport::Mq => self.queue_files().is_empty() && !queue_exists(&self.queue),
        }
    }

    /// Adds a process to those that were run in here.
    pub fn is_run_in_by(&self, pid: u32) {
        lock(&SPAWNED).push((self.dir.path().to_owned(), pid as i32));
    }

    /// The names in shared memory of all pools whose owners were run in here.
    pub fn names_left(&self) -> Vec<String> {
        let stems: Vec<String> = lock(&SPAWNED)
            .iter()
            .filter(|(place, _)| *place == self.dir.path())
            .map(|(_, pid)| format!("shmferry-{pid}-"))
            .collect();
        let mut names = names_in(SHARED_MEMORY.as_ref());
        names.retain(|name| stems.iter().any(|stem| name.starts_with(stem)));
        names
    }

    /// The queue's files in `/dev/shm`.
    pub fn queue_files(&self) -> Vec<PathBuf> {
        let stem = format!("shmferry-queue-{}-{}.", geteuid().as_raw(), &self.queue[1..]);
        let mut names = names_in(SHARED_MEMORY.as_ref());
        names.retain(|name| name.starts_with(&stem));
        names.into_iter().map(|name| Path::new(SHARED_MEMORY).join(name)).collect()
    }

    /// Runs a program in here, with this directory as its runtime directory, and a minimal
    /// environment. `RUST_LOG` is `info`; to change that, or anything else, spawn a
    /// [`command`](Self::command).
    pub fn run(&self, name: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::spawn(self.command(name).args(args))
    }

    /// A program to be run in here.
    pub fn command(&self, name: &str) -> Command {
        self.prepared(Command::new(path_of(name)))
    }

    /// As [`command`](Self::command), under a resource limit, in the syntax of the shell's
    /// `ulimit`.
    pub fn command_limited(&self, limit: &str, name: &str) -> Command {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &format!("ulimit {limit} && exec \"$@\""), "sh"]).arg(path_of(name));
        self.prepared(shell)
    }

    /// As [`command`](Self::command), with system calls failing by these injections of `strace`.
    /// Where `strace` is missing, or may not trace, the program does not run.
    pub fn command_failing(&self, injections: &[&str], name: &str) -> Command {
        let mut shell = Command::new("/bin/sh");
        let calls: Vec<_> =
            injections.iter().map(|injection| injection.split(':').next().unwrap()).collect();
        let injections: String =
            injections.iter().map(|injection| format!(" -e inject={injection}")).collect();
        let strace =
            format!("strace -D -f -qq -o /dev/null -e trace={}{injections}", calls.join(","));
        shell.args(["-c", &format!("exec {strace} \"$@\""), "sh"]).arg(path_of(name));
        let mut command = self.prepared(shell);
        command.env("ASAN_OPTIONS", "detect_leaks=0"); // fails under a tracer
        command
    }

    fn prepared(&self, mut command: Command) -> Command {
        command.current_dir(self.dir.path()).env_clear();
        command.env("RUST_LOG", "info").env("RUST_BACKTRACE", "1");
        command.env("XDG_RUNTIME_DIR", self.dir.path());
        command
    }

    /// Runs `simplecached` at [`cache_address`](Self::cache_address).
    pub fn simplecached(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::spawn(
            self.command("simplecached").args(["--listen", &self.cache_address()]).args(args),
        )
    }

    /// Runs `webproxy` on a free port of 127.0.0.1, with the cache at
    /// [`cache_address`](Self::cache_address).
    pub fn webproxy(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        let cache = self.cache_address();
        Program::spawn(self.command("webproxy").args(LOOPBACK).args(["--cache", &cache]).args(args))
    }

    /// Runs `webproxy` on a free port of 127.0.0.1, with no other arguments.
    pub fn bare_webproxy(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        Program::spawn(self.command("webproxy").args(LOOPBACK).args(args))
    }

    /// Terminates these programs, one after the other. Asserts that all exit successfully, and that
    /// no program run in here has left anything.
    #[track_caller]
    pub fn wind_up<const N: usize>(&self, programs: [Program; N]) -> [Exit; N] {
        let exits = programs.map(Program::terminate);
        for exit in &exits {
            assert!(!exit.stderr.contains("panicked"), "{}", exit.stderr);
        }
        self.assert_nothing_left();
        exits
    }

    /// Asserts that nothing is left of the programs run in here: no process, no shared memory, no
    /// queue, no file and no directory. Leftovers of killed ones are their successors' to remove.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let here = self.dir.path().canonicalize().unwrap();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let at = fs::read_link(process.path().join("cwd"));
            assert!(at.is_err() || at.unwrap() != here, "a process is left: {:?}", process.path());
        }
        assert!(self.is_swept(), "left of {}: {:?}", self.cache_address(), self.queue_files());
        // A program of another test that starts may be removing leftovers at this moment.
        wait_until("nothing of these programs was left in /dev/shm", || {
            self.names_left().is_empty()
        });
        let mut names = names_in(&here);
        names.retain(|name| !lock(&self.ours).contains(name));
        assert!(names.is_empty(), "left behind: {names:?}");
    }
}

impl Default for Place {
    fn default() -> Place {
        Place::new()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.transport == Transport::Mq {
            // A successor takes over the leftovers of killed programs, and removes them.
            let successor = Server::bind(format!("mq:{}", self.queue)).map(drop);
            if !thread::panicking() {
                successor.unwrap();
                assert!(
                    self.is_swept(),
                    "left of {}: {:?}",
                    self.cache_address(),
                    self.queue_files()
                );
                wait_until("the names of the killed were swept", || self.names_left().is_empty());
            }
        }
    }
}

/// The directory of named segments, and of the files beside queues.
pub const SHARED_MEMORY: &str = "/dev/shm";

/// Whether there is a queue of this name.
pub fn queue_exists(name: &str) -> bool {
    match mq_open(name, MQ_OFlag::O_RDONLY, Mode::empty(), None) {
        Ok(queue) => {
            mq_close(queue).unwrap();
            true
        }
        Err(errno) => {
            assert_eq!(errno, Errno::ENOENT, "{name}");
            false
        }
    }
}

/// All programs ever spawned: working directory and pid.
static SPAWNED: Mutex<Vec<(PathBuf, i32)>> = Mutex::new(Vec::new());

const LOOPBACK: [&str; 4] = ["-p", "0", "--listen", "127.0.0.1"];

/// The path of a program; panics if it was not built. The programs are built beside the directory
/// of the tests: `TARGET/PROFILE/deps/TEST-HASH`, `TARGET/PROFILE/NAME`.
pub fn path_of(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().with_file_name(name);
    assert!(
        program.exists(),
        "there is no {program:?}: run `cargo build` first, with the same profile as the tests"
    );
    program
}

// ---------------------------------------------------------------- programs

/// A running program. Killed when dropped, and when it outlives the [`WATCHDOG`].
pub struct Program {
    child: Arc<Mutex<Child>>,
    pid: Pid,
    said: Arc<Said>,
    /// Dropped with the program, which ends the watchdog thread.
    _leash: mpsc::Sender<()>,
}

/// The standard error of a program so far.
#[derive(Default)]
struct Said {
    text: Mutex<(String, Ended)>,
    more: Condvar,
}

type Ended = bool;

impl Program {
    /// Spawns a program; standard error is collected, the other streams are closed.
    pub fn spawn(command: &mut Command) -> Program {
        Program::spawn_for(command, WATCHDOG)
    }

    /// As [`spawn`](Self::spawn), for a program that may live longer or shorter.
    pub fn spawn_for(command: &mut Command, watchdog: Duration) -> Program {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_child(&child);
        if let Some(place) = command.get_current_dir() {
            lock(&SPAWNED).push((place.to_owned(), pid.as_raw_nonzero().get()));
        }
        let said = Arc::new(Said::default());
        thread::spawn({
            let (said, stderr) = (Arc::clone(&said), child.stderr.take().unwrap());
            move || said.listen_to(stderr)
        });
        let child = Arc::new(Mutex::new(child));
        let (leash, loose) = mpsc::channel();
        thread::spawn({
            let child = Arc::clone(&child);
            move || {
                if let Err(mpsc::RecvTimeoutError::Timeout) = loose.recv_timeout(watchdog) {
                    let _ = lock(&child).kill(); // does nothing after a `wait`
                }
            }
        });
        Program { child, pid, said, _leash: leash }
    }

    /// Waits until it reports that it is listening.
    pub fn listening(self) -> Program {
        self.wait_for("listening on ");
        self
    }

    /// Waits until it has written a line with `part` in it; returns the line.
    pub fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + WATCHDOG;
        let mut text = lock(&self.said.text);
        loop {
            if let Some(line) = text.0.lines().find(|line| line.contains(part)) {
                return line.to_owned();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!text.1 && !left.is_zero(), "it never said {part:?}, but:\n{}", text.0);
            text =
                self.said.more.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything written to standard error so far.
    pub fn stderr(&self) -> String {
        lock(&self.said.text).0.clone()
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub fn is_running(&self) -> bool {
        lock(&self.child).try_wait().unwrap().is_none()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// Kills it, and waits until it is dead.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        self.finish();
    }

    /// Sends SIGTERM, and asserts that it exits successfully.
    pub fn terminate(self) -> Exit {
        self.signal(Signal::TERM);
        let exit = self.finish();
        exit.assert_code(0);
        exit
    }

    /// Waits for it to end.
    pub fn finish(self) -> Exit {
        let mut status = None;
        wait_until("the program ended", || {
            status = lock(&self.child).try_wait().unwrap();
            status.is_some()
        });
        wait_until("all was read that it said", || lock(&self.said.text).1);
        Exit { status: status.unwrap(), stderr: self.stderr() }
    }

    // ------------------------------------------------------------ /proc

    /// How many threads there are of this name; workers are named `proxy` and `shmferry-worker`.
    pub fn threads_named(&self, name: &str) -> usize {
        self.tasks("comm").iter().filter(|comm| comm.trim_end() == name).count()
    }

    /// Whether every thread sleeps.
    pub fn is_asleep(&self) -> bool {
        self.is_all_in('S')
    }

    /// Whether [`Signal::STOP`] has taken effect.
    pub fn is_stopped(&self) -> bool {
        self.is_all_in('T')
    }

    /// Whether every thread is in this state; it comes after the name, which is in parentheses.
    fn is_all_in(&self, state: char) -> bool {
        self.tasks("stat").iter().all(|stat| stat.rsplit(") ").next().unwrap().starts_with(state))
    }

    /// Whether every thread is traced.
    pub fn is_traced(&self) -> bool {
        self.tasks("status").iter().all(|status| !status.contains("TracerPid:\t0\n"))
    }

    fn tasks(&self, file: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        // A thread that ends meanwhile is skipped.
        tasks.filter_map(|task| fs::read_to_string(task.path().join(file)).ok()).collect()
    }

    /// How many descriptors are open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// How many segments are mapped. Loans are none.
    pub fn segments(&self) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let kinds = ["/memfd:shmferry-", "/dev/shm/shmferry-"];
        let names =
            maps.lines().filter_map(|line| kinds.iter().find_map(|kind| line.split_once(kind)));
        let names = names.map(|(_, name)| name).filter(|name| !name.starts_with("loan"));
        names.collect::<BTreeSet<_>>().len()
    }

    /// The peak of resident memory, in bytes, segments included.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    // ------------------------------------------------------------ webproxy

    /// The address that a `webproxy` reports; a wildcard address becomes 127.0.0.1.
    pub fn address(&self) -> SocketAddr {
        let line = self.wait_for("listening on ");
        let (_, rest) = line.split_once("listening on ").unwrap();
        let address = rest.split(": ").next().unwrap();
        let mut address: SocketAddr =
            address.parse().unwrap_or_else(|_| panic!("no address in {line:?}"));
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        address
    }

    pub fn connect(&self) -> Client {
        Client::to(self.address())
    }

    /// Asks a `webproxy` of the spec dialect for a path.
    pub fn get(&self, path: &str) -> Answer {
        Answer::parse(&self.ask(format!("GETFILE GET {path}\r\n\r\n")))
    }

    /// Asks a `webproxy` for a [`LARGE`] file, and waits for its beginning: the returned client
    /// keeps a segment in use from now on.
    pub fn stall(&self, path: &str) -> Stalled {
        let mut client = self.connect();
        client.request(path);
        Stalled::begin(client)
    }

    /// Asserts that a `webproxy` can lease this many segments at once, and that each transfers a
    /// [`LARGE`] file correctly.
    #[track_caller]
    pub fn assert_pool_is_whole(&self, segments: usize, path: &str, file: &[u8]) {
        let stalled: Vec<Stalled> = (0..segments).map(|_| self.stall(path)).collect();
        for client in stalled {
            client.resume().assert_whole(file);
        }
    }

    /// Sends these bytes to a `webproxy`, and returns the whole response.
    pub fn ask(&self, request: impl AsRef<[u8]>) -> Vec<u8> {
        let mut client = self.connect();
        client.send(request);
        client.read_all()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            eprintln!("---- process {} said:\n{}", child.id(), lock(&self.said.text).0);
        }
    }
}

impl Said {
    fn listen_to(&self, stderr: impl Read) {
        let mut stderr = BufReader::new(stderr);
        let mut line = Vec::new();
        while stderr.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            lock(&self.text).0.push_str(&String::from_utf8_lossy(&line));
            line.clear();
            self.more.notify_all();
        }
        lock(&self.text).1 = true;
        self.more.notify_all();
    }
}

/// The exit status of a program, and its standard error.
pub struct Exit {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Exit {
    pub fn assert_code(&self, code: i32) {
        assert_eq!(self.status.code(), Some(code), "{}: {}", self.status, self.stderr);
    }

    /// Asserts that it failed to start: with one line on standard error that contains all these
    /// parts.
    pub fn assert_failure(&self, parts: &[&str]) {
        self.assert_code(1);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        self.assert_said(parts);
    }

    /// Asserts that it refused its command line, with a message that contains all these parts.
    pub fn assert_usage_error(&self, parts: &[&str]) {
        self.assert_code(2);
        self.assert_said(parts);
    }

    #[track_caller]
    pub fn assert_said(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in:\n{}", self.stderr);
        }
    }

    /// A number from the summary that it prints at its end.
    pub fn count(&self, name: &str) -> u64 {
        let (_, summary) = self.stderr.rsplit_once("stopped: ").expect("it said how it went");
        let value =
            summary.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("no {name} in {summary}")).parse().unwrap()
    }
}

// ---------------------------------------------------------------- the client

/// A raw connection to a `webproxy`.
pub struct Client(pub TcpStream);

impl Client {
    pub fn to(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        stream.set_write_timeout(Some(WATCHDOG)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(stream)
    }

    /// Sends bytes; ignores errors, since the server may have closed the connection.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.write_all(bytes.as_ref());
    }

    /// Sends the request for a path.
    pub fn request(&mut self, path: &str) {
        self.send(format!("GETFILE GET {path}\r\n\r\n"));
    }

    /// Reads to the connection's end, a reset included. Panics if it is not closed.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut received = Vec::new();
        match self.0.read_to_end(&mut received) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error} after {} bytes", received.len()),
        }
        received
    }

    /// Reads exactly so many bytes.
    pub fn read_exactly(&mut self, len: usize) -> Vec<u8> {
        let mut received = vec![0; len];
        self.0.read_exact(&mut received).unwrap();
        received
    }

    /// Reads the reply of the spec dialect.
    pub fn answer(&mut self) -> Answer {
        Answer::parse(&self.read_all())
    }

    /// Sends no more.
    pub fn half_close(&self) {
        self.0.shutdown(Shutdown::Write).unwrap();
    }

    /// Closes the connection with a reset.
    pub fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.0, Some(Duration::ZERO)).unwrap();
    }

    /// Whether there is nothing to read now.
    pub fn hears_nothing(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let peeked = self.0.peek(&mut [0]);
        self.0.set_nonblocking(false).unwrap();
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether the server has read all that was sent.
    pub fn is_heard(&self) -> bool {
        let [us, them] = [self.0.local_addr(), self.0.peer_addr()].map(|address| {
            let SocketAddr::V4(address) = address.unwrap() else { panic!("not IPv4") };
            format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port())
        });
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        // Each side has a line: number, its address, the other's, state, bytes unsent:unread, ...
        let column = |from: &str, to: &str| {
            let line = |line: &&str| line.contains(&format!(" {from} {to} "));
            table.lines().find(line).map(|line| line.split_whitespace().nth(4).unwrap().to_owned())
        };
        let unsent = column(&us, &them).map(|queues| queues.split(':').next() == Some("00000000"));
        let unread = column(&them, &us).map(|queues| queues.split(':').nth(1) == Some("00000000"));
        (unsent, unread) == (Some(true), Some(true))
    }
}

/// A client that has read the beginning of its reply, and then stops reading.
pub struct Stalled {
    pub client: Client,
    start: Vec<u8>,
}

impl Stalled {
    /// Waits for the beginning.
    pub fn begin(mut client: Client) -> Stalled {
        let start = client.read_exactly(100);
        Stalled { client, start }
    }

    /// Reads the rest.
    pub fn resume(mut self) -> Answer {
        let mut all = self.start;
        all.extend(self.client.read_all());
        Answer::parse(&all)
    }
}

/// A reply of the spec dialect, from its first byte to the connection's end.
#[derive(PartialEq, Eq)]
pub enum Answer {
    /// The whole file.
    Ok(Vec<u8>),
    /// The connection ended before the announced length.
    Short {
        announced: u64,
        received: Vec<u8>,
    },
    NotFound,
    Error,
    Invalid,
    /// Nothing at all.
    Nothing,
    /// None of these: not a valid reply.
    Nonsense(Vec<u8>),
}

impl Answer {
    /// Parses without the codec of the programs, so that an error in it is found.
    pub fn parse(bytes: &[u8]) -> Answer {
        match bytes {
            b"" => return Answer::Nothing,
            b"GETFILE FILE_NOT_FOUND\r\n\r\n" => return Answer::NotFound,
            b"GETFILE ERROR\r\n\r\n" => return Answer::Error,
            b"GETFILE INVALID\r\n\r\n" => return Answer::Invalid,
            _ => {}
        }
        let parsed = || -> Option<Answer> {
            let rest = bytes.strip_prefix(b"GETFILE OK ")?;
            let digits = rest.windows(4).position(|window| window == b"\r\n\r\n")?;
            let announced: u64 = str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
            let received = rest[digits + 4..].to_vec();
            match (received.len() as u64).cmp(&announced) {
                std::cmp::Ordering::Less => Some(Answer::Short { announced, received }),
                std::cmp::Ordering::Equal => Some(Answer::Ok(received)),
                std::cmp::Ordering::Greater => None,
            }
        };
        parsed().unwrap_or_else(|| Answer::Nonsense(bytes.to_vec()))
    }

    /// Asserts that it is this file, to the last byte.
    #[track_caller]
    pub fn assert_whole(&self, file: &[u8]) {
        assert!(self.is_honest(file) && matches!(self, Answer::Ok(_)), "{self:?}");
    }

    /// Asserts that it is the beginning of this file, and recognisably not all of it.
    #[track_caller]
    pub fn assert_short(&self, file: &[u8]) {
        assert!(self.is_honest(file) && matches!(self, Answer::Short { .. }), "{self:?}");
    }

    /// Whether it is a correct reply for an existing file: all of it, recognisably less of it, or a
    /// server error.
    pub fn is_honest(&self, file: &[u8]) -> bool {
        match self {
            Answer::Ok(body) => body == file,
            Answer::Short { announced, received } => {
                *announced == file.len() as u64 && file.starts_with(received)
            }
            Answer::Error => true,
            _ => false,
        }
    }
}

/// Without the bytes of long bodies.
impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = |bytes: &[u8]| {
            format!("{} bytes: {}", bytes.len(), bytes[..bytes.len().min(80)].escape_ascii())
        };
        match self {
            Answer::Ok(body) => write!(f, "Ok({})", head(body)),
            Answer::Short { announced, received } => {
                write!(f, "Short({announced}, {})", head(received))
            }
            Answer::NotFound => f.write_str("NotFound"),
            Answer::Error => f.write_str("Error"),
            Answer::Invalid => f.write_str("Invalid"),
            Answer::Nothing => f.write_str("Nothing"),
            Answer::Nonsense(bytes) => write!(f, "Nonsense({})", head(bytes)),
        }
    }
}

// ---------------------------------------------------------------- small things

/// Polls until a condition holds.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out before {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that differ from position to position, so that a mix-up is detected.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + index / 251 + index / 65_521) as u8).collect()
}

/// Random bytes, different for each seed: a mix-up within a file or between files is detected.
pub fn noise(seed: usize, len: usize) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| dice.next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// A random number generator, reproducible by its seed (SplitMix64).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: usize) -> Dice {
        Dice((seed as u64) << 32)
    }

    /// A number below `sides`.
    pub fn roll(&mut self, sides: usize) -> usize {
        (self.next() % sides as u64) as usize
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// The names in a directory, sorted.
pub fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn ok(body: impl AsRef<[u8]>) -> Answer {
    Answer::Ok(body.as_ref().to_vec())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
