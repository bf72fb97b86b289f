//! Hostile peers: other processes of a test, and raw access to segments, rings and connections, by
//! which they break the rules.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::wait_until;

/// Another process in a role; killed at the latest when dropped.
pub struct Other {
    pub child: Child,
    stdin: ChildStdin,
    says: BufReader<ChildStdout>,
}

pub const ROLE: &str = "SHMFERRY_TEST_ROLE";
pub const PATH: &str = "SHMFERRY_TEST_PATH";

impl Other {
    pub fn start(role: &str, path: &Path) -> Other {
        Other::start_as(role, path, None)
    }

    pub fn start_as(role: &str, path: &Path, uid: Option<u32>) -> Other {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "other_process", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(PATH, path).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Other { child, stdin, says: BufReader::new(stdout) }
    }

    /// The next thing that it says; `None` once it has ended.
    pub fn hear(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.says.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some((_, said)) = line.split_once("says ") {
                return Some(said.trim().to_owned());
            }
        }
    }

    /// The next thing that it says.
    #[track_caller]
    pub fn said(&mut self) -> String {
        self.hear().expect("it goes on")
    }

    /// Has it do something; what it says of that.
    #[track_caller]
    pub fn order(&mut self, what: &str) -> String {
        self.tell(what);
        self.said()
    }

    /// Has it do something, and does not wait.
    pub fn tell(&mut self, what: &str) {
        writeln!(self.stdin, "{what}").unwrap();
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    #[track_caller]
    pub fn wait_for(&mut self, word: &str) {
        while self.hear().expect("it goes on") != word {}
    }

    /// Tells it to go on.
    pub fn nudge(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }

    pub fn of_proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }

    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// How many mappings of memfds there are.
    pub fn mappings(&self) -> usize {
        self.of_proc("maps").lines().filter(|line| line.contains("/memfd:")).count()
    }

    /// Bytes of its own that are resident.
    pub fn memory(&self) -> u64 {
        let status = self.of_proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// Where the words are, as `docs/protocol.md` has them.
pub const TURN: usize = 128;
pub const STATUS: usize = 256;
pub const METADATA_LEN: usize = 260;
pub const SIZE: usize = 264;
pub const SENDER_CPU: usize = 276;
pub const LOAN: usize = 280;
pub const LOAN_START: usize = 288;
pub const METADATA: usize = 296;
pub const FILLED: usize = 1408;
pub const FREE: usize = 1536;
pub const SLEEPERS: usize = 4; // after either
pub const CANCELLED: usize = 1664;
pub const RECEIVER_CPU: usize = 1672;
pub const CHUNKS: usize = 1792;
pub const HEADER: usize = 4096;

pub const OFFERED: u64 = 1;
pub const ACCEPTED: u64 = 2;
pub const ANNOUNCED: u64 = 3;
pub const FINISHED: u64 = 4;
pub const LAST: u32 = 1 << 31;

/// Of the segments' layout, and of the messages.
pub const VERSION: u32 = 3;

/// The words of a ring of requests.
pub const POSTED: usize = 0;
pub const TAKEN: usize = 128;
pub const NEED_WAKEUP: usize = 256;
pub const CLIENT_ASKS: usize = 16_768;
pub const SERVER_ASKS: usize = 16_896;
pub const ENTRY: usize = 384;
pub const ENTRIES: u64 = 64;
pub const RING_LEN: usize = 20_480;

/// A segment, or a ring, mapped by hand, with no rules.
#[derive(Clone, Copy)]
pub struct Memory {
    pub base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is never unmapped, and it is reached through atomics only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn map(fd: impl AsFd, len: usize) -> Memory {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses fresh addresses.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) }.unwrap();
        Memory { base: base.cast(), len }
    }

    pub fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len);
        // SAFETY: inside the mapping, which lives for ever, and aligned.
        unsafe { AtomicU32::from_ptr(self.base.add(at).cast()) }
    }

    pub fn long(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len);
        // SAFETY: inside the mapping, which lives for ever, and aligned.
        unsafe { AtomicU64::from_ptr(self.base.add(at).cast()) }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, which lives for ever.
            unsafe { AtomicU8::from_ptr(self.base.add(at + i)) }.store(*byte, SeqCst);
        }
    }

    pub fn wake(&self, at: usize) {
        let _ = rustix::thread::futex::wake(
            self.word(at),
            rustix::thread::futex::Flags::empty(),
            i32::MAX as u32,
        );
    }

    pub fn post(&self, at: usize) {
        self.word(at).fetch_add(1, SeqCst);
        self.wake(at);
    }

    /// Puts a request into a ring as an honest client does, or, with a wild key length, as none does.
    pub fn put(&self, index: u32, generation: u64, key_len: u32, key: &[u8]) {
        let posted = self.long(POSTED).load(SeqCst);
        let entry = ENTRY + (posted % ENTRIES) as usize * 256;
        self.long(entry).store(generation, SeqCst);
        self.long(entry + 8).store(u64::from(index) | u64::from(key_len) << 32, SeqCst);
        self.write(entry + 16, key);
        self.long(POSTED).store(posted.wrapping_add(1), SeqCst);
    }

    /// Reads a request out of a ring.
    pub fn entry(&self, number: u64) -> (u32, u64, Vec<u8>) {
        let entry = ENTRY + (number % ENTRIES) as usize * 256;
        let word = self.long(entry + 8).load(SeqCst);
        let key = (0..(word as usize >> 32) & !(1 << 31))
            .map(|i| self.long(entry + 16 + i / 8 * 8).load(SeqCst).to_ne_bytes()[i % 8]);
        (word as u32, self.long(entry).load(SeqCst), key.collect())
    }
}

/// One end of a connection, without rules.
pub struct Line(pub OwnedFd);

impl Line {
    /// Connects, waiting for room at the door.
    pub fn to(path: &Path) -> Line {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        let address = SocketAddrUnix::new(path).unwrap();
        wait_until("there was room at the door", || {
            match rustix::net::connect(&socket, &address) {
                Ok(()) => true,
                Err(Errno::AGAIN) => false,
                Err(errno) => panic!("{errno}"),
            }
        });
        Line(socket)
    }

    /// Sends if there is room, and somebody to hear it; whether it was sent.
    pub fn try_say(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(_) => true,
            Err(
                Errno::AGAIN | Errno::PIPE | Errno::CONNRESET | Errno::TOOMANYREFS | Errno::MSGSIZE,
            ) => false,
            Err(errno) => panic!("{errno}"),
        }
    }

    /// Sends, waiting for room; nobody there is as good.
    pub fn say(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        wait_until("there was room", || {
            self.try_say(bytes, fds) || self.poll(PollFlags::empty(), Duration::ZERO)
        });
    }

    pub fn poll(&self, events: PollFlags, timeout: Duration) -> bool {
        let timeout = timeout.try_into().unwrap();
        poll(&mut [PollFd::new(&self.0, events)], Some(&timeout)).unwrap() > 0
    }

    /// The next message, and a descriptor with it; `None` at the end.
    pub fn hear(&self) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        loop {
            assert!(
                self.poll(PollFlags::IN, Duration::from_secs(60)),
                "nothing was said, and nobody hung up"
            );
            let mut buffer = vec![0; 8192];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut buffer)];
            match rustix::net::recvmsg(&self.0, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(heard) if heard.bytes == 0 => return None,
                Ok(heard) => {
                    let fd = control.drain().find_map(|message| match message {
                        rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                        _ => None,
                    });
                    buffer.truncate(heard.bytes);
                    return Some((buffer, fd));
                }
                Err(Errno::CONNRESET | Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => panic!("{errno}"),
            }
        }
    }

    /// Waits until the other side hangs up; the code of its farewell.
    pub fn last_words(&self) -> Option<u32> {
        let mut code = None;
        while let Some((bytes, _)) = self.hear() {
            assert_eq!((bytes.len(), bytes[0]), (13, 5));
            code = Some(u32_at(&bytes, 1));
        }
        code
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
