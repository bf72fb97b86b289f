//! Hostile peers: real processes that map the segments and do as they like, beside an honest one that is
//! served all the while.
//!
//! The other processes are this test's own executable, run again with a role in its environment.
//!
//! Not with the `raw_sync` parker, which trusts what a peer writes into its event: see its documentation.
#![cfg(not(feature = "raw-sync"))]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use shmferry::channel::{RequestQueue, Requester, Seqpacket};
use shmferry::error::{Awaited, Rejection};
use shmferry::protocol::Reply;
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::workers::WorkerPool;
use shmferry::{Deadline, Error, Fault, Refusal};
use shmferry_test_support::raw::*;
use shmferry_test_support::watchdog::watchdog;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let limit = soon();
    while !is_so() {
        assert!(!limit.has_passed(), "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    /// A word as an attacker would choose it: an extreme one, or any.
    fn word(&mut self) -> u32 {
        let any = self.next() as u32;
        [any, 0, 1, 2, u32::MAX, 1 << 31, (1 << 31) - 1, any % 5000][self.below(8)]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sock");
    (dir, path)
}

// ---------------------------------------------------------------- other processes

fn say(what: &str) {
    println!("says {what}");
}

/// Waits until the parent nudges us.
fn be_nudged() {
    assert_eq!(std::io::stdin().read(&mut [0]).unwrap(), 1, "the parent has ended");
}

/// Not a test of its own: what the other process runs.
#[test]
fn other_process() {
    let Ok(role) = env::var(ROLE) else { return };
    let path = PathBuf::from(env::var_os(PATH).unwrap());
    // A panic in any thread, caught or not, is seen.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    match role.as_str() {
        "server" => serve(Seqpacket::new(&path)),
        "server of another user's, too" => serve(Seqpacket::new(&path).allow_user(NOBODY)),
        "hostile client" => hostile_client(&path),
        "hostile server" => hostile_server(&path),
        "deaf server" => {
            let _listener = Door::at(&path);
            say("ready");
            be_nudged();
        }
        role => panic!("unknown role {role:?}"),
    }
}

// ---------------------------------------------------------------- honest peers

/// Another user than root.
const NOBODY: u32 = 65_534;

/// The most clients that our server has: fewer than come at once.
const MAX_CLIENTS: usize = 128;

/// An honest server: answers keys that are lengths, two at a time, until it is told to end.
fn serve(server: Seqpacket) {
    let server = server.max_segments(8).max_bytes(8 << 20).max_clients(MAX_CLIENTS as u32);
    let queue = Arc::new(server.bind().unwrap());
    let taking = Arc::clone(&queue);
    let next = move || match taking.recv(Deadline::NEVER) {
        Ok(transfer) => Some(transfer),
        Err(Error::Closed) => None,
        Err(error) => panic!("{error}"), // a client's misbehaviour is never an error here
    };
    let workers = WorkerPool::start("server", 2, next, |transfer| {
        let len = std::str::from_utf8(transfer.key()).ok().and_then(|key| key.parse().ok());
        let outcome = match len.filter(|len| *len <= 1 << 20) {
            None => transfer.refuse(Refusal::Invalid),
            Some(len) => transfer.accept(len as u64).and_then(|mut sending| {
                let sent = sending.write_all(&pattern(len));
                sent.map_err(|error| *error.into_inner().unwrap().downcast::<Error>().unwrap())?;
                sending.finish().map(drop)
            }),
        };
        match outcome {
            Ok(()) => {}
            Err(
                Error::Peer(_)
                | Error::Stale
                | Error::Cancelled
                | Error::Disconnected
                | Error::Timeout(_),
            ) => {}
            Err(error) => panic!("{error:?}"),
        }
    });
    say("ready");
    be_nudged();
    queue.close();
    assert!(workers.unwrap().join(soon()), "a worker hangs");
    say("ended");
}

fn pool() -> SegmentPool<Memfd> {
    SegmentPool::builder().segments(2).segment_len(4096).slots(2).create().unwrap()
}

/// Asks for so many bytes, and compares all of them.
#[track_caller]
fn ask(requester: &impl Requester<Memfd>, pool: &SegmentPool<Memfd>, len: usize) {
    let (request, transfer) = pool.lease(soon()).unwrap().request(len.to_string()).unwrap();
    requester.send(request, soon()).unwrap();
    let Reply::Found(mut body) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).unwrap();
    assert!(bytes == pattern(len), "wrong bytes");
}

/// Somebody who is served well all the while.
struct Bystander {
    served: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Bystander {
    fn of(path: &Path) -> Bystander {
        let (served, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (path, count, end) = (path.to_owned(), Arc::clone(&served), Arc::clone(&over));
        let thread = thread::spawn(move || {
            let pool = pool();
            let requester = Seqpacket::new(&path).requester(&pool).unwrap();
            while !end.load(SeqCst) {
                let round = count.fetch_add(1, SeqCst);
                ask(&requester, &pool, round * 37 % 20_000);
            }
            assert_eq!(pool.stats().retired, 0, "an honest server was late");
        });
        Bystander { served, over, thread: Some(thread) }
    }

    /// Waits until some more transfers have come through.
    #[track_caller]
    fn is_served(&self) {
        let before = self.served.load(SeqCst);
        wait_until("the bystander was served", || {
            self.served.load(SeqCst) > before + 2 || self.thread.as_ref().unwrap().is_finished()
        });
        assert!(!self.thread.as_ref().unwrap().is_finished(), "the bystander failed");
    }

    fn leave(mut self) -> usize {
        self.over.store(true, SeqCst);
        self.thread.take().unwrap().join().unwrap();
        self.served.load(SeqCst)
    }
}

/// Writes to a word of a ring.
fn spoil_ring(memory: &Memory, random: &mut Random) {
    let words =
        [POSTED, TAKEN, NEED_WAKEUP, CLIENT_ASKS, SERVER_ASKS, 8 * random.below(RING_LEN / 8)];
    let at = words[random.below(words.len())];
    let near = memory.long(at).load(SeqCst).wrapping_add(random.next() % 5).wrapping_sub(2);
    memory.long(at).store([near, random.next(), 0, 1, u64::MAX][random.below(5)], SeqCst);
}

/// Writes to a shared word of its choice, and wakes whoever sleeps there.
fn spoil(memory: &Memory, random: &mut Random) {
    match random.below(8) {
        0 => {
            let generation = [memory.long(TURN).load(SeqCst) >> 8, random.next()][random.below(2)];
            let phase = [random.next() % 8, random.next() % 256][random.below(2)];
            memory.long(TURN).store(generation << 8 | phase, SeqCst);
        }
        1 => memory.word(FILLED).store(random.word(), SeqCst),
        2 => memory.word(FREE).store(random.word(), SeqCst),
        3 => memory.word([FREE, FILLED][random.below(2)] + SLEEPERS).store(random.word(), SeqCst),
        4 => memory.word(CANCELLED).store(random.word() % 2, SeqCst),
        5 => memory.word([RECEIVER_CPU, SENDER_CPU][random.below(2)]).store(random.word(), SeqCst),
        6 => memory.word(CHUNKS + 4 * random.below(512)).store(random.word(), SeqCst),
        _ => {
            memory.word([STATUS, METADATA_LEN][random.below(2)]).store(random.word(), SeqCst);
            memory.long(SIZE).store([random.next(), u64::MAX, 9][random.below(3)], SeqCst);
        }
    }
    memory.wake([FREE, FILLED][random.below(2)]);
}

const POOL: u64 = 77;

fn hello(slots: u32, slot_len: u32) -> Vec<u8> {
    let numbers = [
        &VERSION.to_le_bytes()[..],
        &POOL.to_le_bytes(),
        &slots.to_le_bytes(),
        &slot_len.to_le_bytes(),
        &[0; 4 + 8 + 4], // it takes no loans
    ];
    [&[1][..], b"shmferry", &numbers.concat()].concat()
}

fn segment(index: u32) -> Vec<u8> {
    [&[2][..], &index.to_le_bytes()].concat()
}

fn retire(index: u32) -> Vec<u8> {
    [&[3][..], &index.to_le_bytes()].concat()
}

fn request(index: u32, generation: u64, key: &str) -> Vec<u8> {
    [&[4][..], &index.to_le_bytes(), &generation.to_le_bytes(), &[0], key.as_bytes()].concat()
}

/// Hands a ring over; knocks.
const RING: &[u8] = &[6];
const KNOCK: &[u8] = &[7];

/// The geometry that the hostile client has.
const SLOTS: u32 = 2;
const SLOT_LEN: u32 = 2048;
const LEN: usize = HEADER + 2 * 4096;
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

fn memfd(len: u64, flags: MemfdFlags) -> OwnedFd {
    let flags = flags | MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("hostile", flags).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// A segment as it should be, but not sealed.
fn unsealed(index: u32) -> OwnedFd {
    let fd = memfd(LEN as u64, MemfdFlags::empty());
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, LEN as u64).unwrap();
    let numbers = [VERSION, 4096, SLOTS, SLOT_LEN].map(u32::to_ne_bytes).concat();
    let header = [&b"shmferry"[..], &numbers, &POOL.to_ne_bytes(), &index.to_ne_bytes()].concat();
    rustix::io::pwrite(&fd, &header, 0).unwrap();
    fd
}

fn sealed(fd: OwnedFd, seals: SealFlags) -> OwnedFd {
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// A segment as it should be.
fn proper(index: u32) -> OwnedFd {
    sealed(unsealed(index), SEALS)
}

// ---------------------------------------------------------------- the hostile client

/// A client that has introduced itself with one segment.
struct Client {
    line: Line,
    fd: OwnedFd,
    memory: Memory,
    generation: u64,
}

impl Client {
    fn of(path: &Path) -> Client {
        let line = Line::to(path);
        let fd = proper(0);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        line.say(&segment(0), &[fd.as_fd()]);
        let memory = Memory::map(&fd, LEN);
        Client { line, fd, memory, generation: 0 }
    }

    /// Opens a generation as an honest receiver does.
    fn offer(&mut self) {
        self.generation += 1;
        self.memory.word(STATUS).store(0, SeqCst);
        self.memory.word(FILLED).store(0, SeqCst);
        self.memory.word(FREE).store(SLOTS, SeqCst);
        self.memory.word(CANCELLED).store(0, SeqCst);
        self.memory.long(TURN).store(self.generation << 8 | OFFERED, SeqCst);
    }

    /// Asks, if the server still listens to us.
    fn try_ask(&mut self, key: &str) -> bool {
        self.offer();
        self.line.try_say(&request(0, self.generation, key), &[])
    }

    /// Asks and receives as it should be.
    fn behave(&mut self, len: usize) {
        self.offer();
        self.line.say(&request(0, self.generation, &len.to_string()), &[]);
        let mut received = 0;
        for slot in (0..SLOTS as usize).cycle() {
            wait_until("a slot was filled", || self.memory.word(FILLED).load(SeqCst) > 0);
            self.memory.word(FILLED).fetch_sub(1, SeqCst);
            let chunk = self.memory.word(CHUNKS + 4 * slot).load(SeqCst);
            received += (chunk & !LAST) as usize;
            if chunk & LAST != 0 {
                break;
            }
            self.memory.post(FREE);
        }
        assert_eq!(received, len);
        let finished = self.generation << 8 | FINISHED;
        wait_until("the sender left", || self.memory.long(TURN).load(SeqCst) == finished);
    }
}

const PROTOCOL: u32 = 6;
const RESOURCES: u32 = 7;
const TOO_MANY_SEGMENTS: u32 = 3;
const TOO_MANY_BYTES: u32 = 4;

type Deed = (&'static str, fn(&Path, &mut Vec<Box<dyn Send>>));

/// What the client does, one after the other. What is to last is put aside.
const DEEDS: [Deed; 14] = [
    ("stalls", stalls),
    ("gibberish", gibberish),
    ("messages cut short", cut_short),
    ("descriptors of all kinds", descriptors_of_all_kinds),
    ("descriptors in heaps", descriptors_in_heaps),
    ("descriptors that do not close", descriptors_that_do_not_close),
    ("memory that goes", memory_that_goes),
    ("requests for nothing", requests_for_nothing),
    ("words one by one", words_one_by_one),
    ("words all the time", words_all_the_time),
    ("segments in and out", segments_in_and_out),
    ("rings that are none", rings_that_are_none),
    ("rings that lie", rings_that_lie),
    ("connections", connections),
];

fn hostile_client(path: &Path) {
    let mut lasting = Vec::new();
    for (name, deed) in DEEDS {
        deed(path, &mut lasting);
        say(name);
        be_nudged();
    }
    say("all done");
    be_nudged();
}

/// Asks for more than the slots hold, on many connections, and frees nothing, for the rest of the test.
fn stalls(path: &Path, lasting: &mut Vec<Box<dyn Send>>) {
    for _ in 0..40 {
        let mut client = Client::of(path);
        assert!(client.try_ask("100000"));
        wait_until("it was served", || client.memory.word(FILLED).load(SeqCst) == SLOTS);
        // It may still be read from: but no more than a few of these are taken up.
        while client.generation < 1000
            && client.line.try_say(&request(0, client.generation, "9"), &[])
        {
            client.generation += 1;
        }
        lasting.push(Box::new(client));
    }
}

fn gibberish(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let mut random = Random(11);
    for _ in 0..300 {
        let line = Line::to(path);
        if random.below(2) == 0 {
            line.say(&hello(SLOTS, SLOT_LEN), &[]);
        }
        for _ in 0..random.below(5) {
            let len = [random.below(40), random.below(5000), random.below(60_000)][random.below(3)];
            let mut bytes = random.bytes(len.max(1));
            bytes[0] = random.below(8) as u8;
            line.try_say(&bytes, &[]);
        }
        line.try_say(&[[9][..].to_vec(), vec![]][random.below(2)], &[]); // unknown, or empty
        line.last_words();
    }
}

fn cut_short(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let fd = proper(0);
    let messages = [hello(SLOTS, SLOT_LEN), segment(0), retire(0), request(0, 1, "")];
    for (i, message) in messages.iter().enumerate() {
        for len in 1..message.len() {
            let line = Line::to(path);
            if i > 0 {
                line.say(&hello(SLOTS, SLOT_LEN), &[]);
            }
            line.say(&message[..len], &[fd.as_fd()][..i % 2]);
            assert_eq!(line.last_words(), Some(PROTOCOL), "{len} of message {i}");
        }
    }
}

/// What is told of the segment that this descriptor is handed over for.
fn hand_over(path: &Path, fd: &impl AsFd) -> Option<u32> {
    let line = Line::to(path);
    line.say(&hello(SLOTS, SLOT_LEN), &[]);
    line.say(&segment(0), &[fd.as_fd()]);
    line.try_say(&[9], &[]); // so that it ends even if that was taken
    line.last_words()
}

fn descriptors_of_all_kinds(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    use rustix::event::{EventfdFlags, epoll, eventfd};
    let len = LEN as u64;
    let (pipe, _inlet) = std::io::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let open = |path: &str, flags| rustix::fs::open(path, flags, Mode::empty()).unwrap();
    let file = tempfile::tempfile().unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len).unwrap();
    let again = proper(0);
    let read_only = open(&format!("/proc/self/fd/{}", again.as_raw_fd()), OFlags::RDONLY);
    let wrong: Vec<(&str, OwnedFd)> = vec![
        ("a pipe", pipe.into()),
        ("a socket", socket.into()),
        ("a listening socket", listener.into()),
        ("an eventfd", eventfd(0, EventfdFlags::empty()).unwrap()),
        ("an epoll", epoll::create(epoll::CreateFlags::empty()).unwrap()),
        ("a directory", open("/", OFlags::RDONLY)),
        ("a path", open("/", OFlags::PATH)),
        ("a device", open("/dev/null", OFlags::RDWR)),
        ("a device of memory", open("/dev/zero", OFlags::RDWR)),
        ("a process's memory", open("/proc/self/mem", OFlags::RDONLY)),
        ("a file", file.into()),
        ("a memfd that is not sealed", unsealed(0)),
        ("a memfd that could shrink", sealed(unsealed(0), SealFlags::GROW | SealFlags::SEAL)),
        ("an empty memfd", sealed(memfd(0, MemfdFlags::empty()), SEALS)),
        ("a short memfd", sealed(memfd(len - 1, MemfdFlags::empty()), SEALS)),
        ("a long memfd", sealed(memfd(1 << 50, MemfdFlags::empty()), SEALS)),
        ("a hollow memfd", sealed(memfd(len, MemfdFlags::empty()), SEALS)),
        ("another's segment", proper(1)),
        ("a memfd sealed against writing", sealed(unsealed(0), SEALS | SealFlags::WRITE)),
        (
            "a memfd sealed against further writing",
            sealed(unsealed(0), SEALS | SealFlags::FUTURE_WRITE),
        ),
        ("a memfd to be read only", read_only),
    ];
    for (what, fd) in &wrong {
        let told = hand_over(path, fd);
        assert!(matches!(told, Some(PROTOCOL | RESOURCES)), "{what}: {told:?}");
    }
    // Without huge pages to be had, their memfds can at least be made, and sealed.
    let flags = MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("huge", flags) {
        Ok(huge) => {
            rustix::fs::ftruncate(&huge, 2 << 20).unwrap();
            assert_eq!(hand_over(path, &sealed(huge, SEALS)), Some(PROTOCOL));
        }
        Err(errno) => eprintln!("not tried: a memfd of huge pages ({errno})"),
    }
    // The connection itself, and an end of another connection to the same server.
    let (line, second) = (Line::to(path), Line::to(path));
    line.say(&hello(SLOTS, SLOT_LEN), &[]);
    line.say(&segment(0), &[line.0.as_fd()]);
    assert_eq!(line.last_words(), Some(PROTOCOL));
    assert_eq!(hand_over(path, &second.0), Some(PROTOCOL));
}

fn descriptors_in_heaps(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    // Several in one message.
    let fd = proper(0);
    for count in [2, 3, 100, 253] {
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        line.say(&segment(0), &vec![fd.as_fd(); count]);
        assert_eq!(line.last_words(), Some(PROTOCOL), "{count} descriptors");
    }
    // Beside messages that need none.
    for message in [hello(SLOTS, SLOT_LEN), request(0, 1, "1"), retire(5), vec![9]] {
        for _ in 0..20 {
            let line = Line::to(path);
            if message[0] != 1 {
                line.say(&hello(SLOTS, SLOT_LEN), &[]);
            }
            line.say(&message, &[fd.as_fd()]);
            line.try_say(&[9], &vec![fd.as_fd(); 253]);
            line.last_words();
        }
    }
    // Hundreds, one a message, as fast as it goes.
    for _ in 0..5 {
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        for index in 0..300 {
            line.say(&segment(index), &[proper(index).as_fd()]);
        }
        assert_eq!(line.last_words(), Some(TOO_MANY_SEGMENTS));
    }
    // The same one, again and again.
    let line = Line::to(path);
    line.say(&hello(SLOTS, SLOT_LEN), &[]);
    (0..2).for_each(|_| line.say(&segment(0), &[fd.as_fd()]));
    assert_eq!(line.last_words(), Some(PROTOCOL));
    // Claims beyond the policy cost nothing: they are turned away before anything is mapped.
    let line = Line::to(path);
    line.say(&hello(512, 1 << 30), &[]);
    line.say(&segment(0), &[fd.as_fd()]);
    assert_eq!(line.last_words(), Some(TOO_MANY_BYTES));
}

/// A socket that lingers, whose last descriptor makes whoever closes it wait, and its other end.
fn quarantined() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    while (&socket).write(&[0; 65_536]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(120))).unwrap();
    (socket, listener.accept().unwrap().0) // which reads nothing
}

fn descriptors_that_do_not_close(path: &Path, lasting: &mut Vec<Box<dyn Send>>) {
    for round in 0..16 {
        let (socket, other) = quarantined();
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        match round % 3 {
            0 => line.say(&segment(0), &[socket.as_fd()]),
            1 => line.say(&segment(0), &[socket.as_fd(); 30]),
            // It is hung up on before that is read.
            _ => [&[9][..], &segment(0)]
                .iter()
                .for_each(|message| line.say(message, &[socket.as_fd()])),
        }
        thread::spawn(|| drop(socket)); // the last one is the server's, mostly
        lasting.push(Box::new((line, other)));
    }
}

fn memory_that_goes(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    // We leave at every point: before, while and after the bytes come.
    for round in 0..100 {
        let mut client = Client::of(path);
        if round % 4 > 0 {
            client.try_ask("50000");
        }
        if round % 4 == 2 {
            wait_until("it began", || client.memory.word(FILLED).load(SeqCst) > 0);
        }
    }
    // It cannot be shortened, but its pages can be given back, the header's too.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for _ in 0..50 {
        let mut client = Client::of(path);
        client.behave(1000);
        assert_eq!(rustix::fs::ftruncate(&client.fd, 0), Err(Errno::PERM));
        rustix::fs::fallocate(&client.fd, punch, 0, LEN as u64).unwrap();
        client.behave(10_000);
        client.try_ask("50000");
        wait_until("it began", || client.memory.word(FILLED).load(SeqCst) > 0);
        rustix::fs::fallocate(&client.fd, punch, 0, LEN as u64).unwrap();
        client.memory.word(FREE).store(1000, SeqCst);
        client.memory.wake(FREE);
    }
}

fn requests_for_nothing(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let mut client = Client::of(path);
    for round in 0..300u64 {
        client.line.say(&request(round as u32 + 1, round, "10"), &[]); // no such segment
    }
    client.offer();
    for generation in
        [0, client.generation - 1, client.generation + 1, u64::MAX, 1 << 56, (1 << 56) - 1]
    {
        client.line.say(&request(0, generation, "10"), &[]); // no such generation
    }
    for phase in [0, ACCEPTED, ANNOUNCED, FINISHED, 7, 8, 255] {
        client.generation += 1;
        client.memory.long(TURN).store(client.generation << 8 | phase, SeqCst);
        client.line.say(&request(0, client.generation, "10"), &[]); // nothing is offered
    }
    // All of that was passed over, and the connection lives.
    client.behave(10_000);
    for key in ["", "x", "99999999999999999999", "\0", &"k".repeat(4096)] {
        client.offer();
        client.line.say(&request(0, client.generation, key), &[]);
        let refused = client.generation << 8 | 5;
        wait_until("it was refused", || client.memory.long(TURN).load(SeqCst) == refused);
    }
    // The same request many times: one is taken up.
    client.offer();
    (0..8).for_each(|_| client.line.say(&request(0, client.generation, "0"), &[]));
    let finished = client.generation << 8 | FINISHED;
    wait_until("one was answered", || client.memory.long(TURN).load(SeqCst) == finished);
    assert_eq!(client.memory.word(FILLED).load(SeqCst), 1);
    client.behave(1);
}

/// Each word once, with each value that could hurt, in the middle of a transfer.
fn words_one_by_one(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let words =
        [FREE, FREE + SLEEPERS, FILLED, FILLED + SLEEPERS, CANCELLED, RECEIVER_CPU, STATUS, CHUNKS];
    let values = [0, 1, SLOTS + 1, u32::MAX, 1 << 31, (1 << 31) - 1, (1 << 31) + 1];
    for (word, value) in words.iter().flat_map(|word| values.map(|value| (*word, value))) {
        let mut client = Client::of(path);
        assert!(client.try_ask("50000"));
        wait_until("it began", || client.memory.word(FILLED).load(SeqCst) != 0);
        client.memory.word(word).store(value, SeqCst);
        [FREE, FILLED].iter().for_each(|at| client.memory.wake(*at));
        // Let go, so that it ends in one way or the other, or hang up.
        if value % 2 == 0 {
            client.memory.word(FREE).store(u32::MAX >> 1, SeqCst);
            client.memory.wake(FREE);
        }
    }
}

/// All words at random, by two threads, while requests come and go.
fn words_all_the_time(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    for seed in 1..=10 {
        let mut client = Client::of(path);
        let (memory, over) = (client.memory, AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random(seed);
                while !over.load(SeqCst) {
                    spoil(&memory, &mut random);
                }
            });
            let mut unheard = 0;
            let mut random = Random(seed + 100);
            while client.generation < 500 && unheard < 20 {
                unheard = if client.try_ask("20000") { 0 } else { unheard + 1 };
                (0..random.below(200)).for_each(|_| spoil(&memory, &mut random));
            }
            over.store(true, SeqCst);
        });
    }
}

/// Segments handed over and taken back, with requests on them, as fast as it goes.
fn segments_in_and_out(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let mut client = Client::of(path);
    let fds: Vec<OwnedFd> = (1..5).map(proper).collect();
    for _ in 0..300 {
        for (index, fd) in (1..).zip(&fds) {
            client.line.say(&segment(index), &[fd.as_fd()]);
            rustix::io::pwrite(fd, &(1u64 << 8 | OFFERED).to_ne_bytes(), TURN as u64).unwrap();
            rustix::io::pwrite(fd, &SLOTS.to_ne_bytes(), FREE as u64).unwrap();
            client.line.say(&request(index, 1, "100"), &[]);
        }
        (1..5).for_each(|index| client.line.say(&retire(index), &[]));
    }
    client.behave(10_000);
}

/// A ring as it should be, and no rules for what is in it.
fn ring() -> (OwnedFd, Memory) {
    let fd = memfd(RING_LEN as u64, MemfdFlags::empty());
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, RING_LEN as u64).unwrap();
    let memory = Memory::map(&fd, RING_LEN);
    (sealed(fd, SEALS), memory)
}

fn rings_that_are_none(path: &Path, _: &mut Vec<Box<dyn Send>>) {
    let turned_away = |messages: &[(&[u8], &[BorrowedFd<'_>])]| {
        let client = Client::of(path);
        messages.iter().for_each(|(bytes, fds)| client.line.say(bytes, fds));
        assert_eq!(client.line.last_words(), Some(PROTOCOL));
    };
    let (good, _) = ring();
    turned_away(&[(RING, &[])]);
    turned_away(&[(RING, &[good.as_fd(), good.as_fd()])]);
    turned_away(&[(RING, &[good.as_fd()]), (RING, &[good.as_fd()])]);
    turned_away(&[(KNOCK, &[])]);
    turned_away(&[(&[6, 0], &[good.as_fd()])]);
    let before_hello = Line::to(path);
    before_hello.say(RING, &[good.as_fd()]);
    assert_eq!(before_hello.last_words(), Some(PROTOCOL));
    for len in [0, 4096, RING_LEN as u64 - 1, RING_LEN as u64 + 4096] {
        let fd = memfd(len, MemfdFlags::empty());
        if len > 0 {
            rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len).unwrap();
        }
        turned_away(&[(RING, &[sealed(fd, SEALS).as_fd()])]);
    }
    let hollow = sealed(memfd(RING_LEN as u64, MemfdFlags::empty()), SEALS);
    turned_away(&[(RING, &[hollow.as_fd()])]);
    let shrinking = memfd(RING_LEN as u64, MemfdFlags::empty());
    rustix::fs::fallocate(&shrinking, FallocateFlags::empty(), 0, RING_LEN as u64).unwrap();
    turned_away(&[(RING, &[sealed(shrinking, SealFlags::GROW | SealFlags::SEAL).as_fd()])]);
    turned_away(&[(RING, &[fs::File::open("/dev/zero").unwrap().as_fd()])]);
}

fn rings_that_lie(path: &Path, lasting: &mut Vec<Box<dyn Send>>) {
    // Each of these is seen at the knock.
    let lie = |tell: fn(&Memory)| {
        let client = Client::of(path);
        let (fd, memory) = ring();
        client.line.say(RING, &[fd.as_fd()]);
        tell(&memory);
        client.line.say(KNOCK, &[]);
        assert_eq!(client.line.last_words(), Some(PROTOCOL));
    };
    lie(|ring| ring.long(POSTED).store(ENTRIES + 1, SeqCst));
    lie(|ring| ring.long(POSTED).store(u64::MAX, SeqCst));
    lie(|ring| ring.put(0, 1, 241, b""));
    lie(|ring| ring.put(0, 1, u32::MAX, b""));

    // Honest requests come through, whatever stands in the words that are not for the server to read, and
    // so do those for segments that do not exist.
    let mut client = Client::of(path);
    let (fd, memory) = ring();
    client.line.say(RING, &[fd.as_fd()]);
    for round in 0..500 {
        memory.long(TAKEN).store(round * 7919, SeqCst);
        memory.put(1 + round as u32, round, 3, b"100");
        client.offer();
        memory.put(0, client.generation, 1, b"0");
        memory.long(NEED_WAKEUP).store(round % 3, SeqCst);
        client.line.say(KNOCK, &[]);
        let finished = client.generation << 8 | FINISHED;
        wait_until("it was answered", || client.memory.long(TURN).load(SeqCst) == finished);
    }

    // Entries that change all the time, cursors too, and knocks in heaps.
    for seed in 1..=10 {
        let mut client = Client::of(path);
        let (fd, memory) = ring();
        client.line.say(RING, &[fd.as_fd()]);
        let mut random = Random(seed + 40);
        for _ in 0..2000 {
            client.offer();
            memory.put(random.below(3) as u32, client.generation, random.below(20) as u32, b"10");
            (0..random.below(3)).for_each(|_| spoil_ring(&memory, &mut random));
            if !client.line.try_say(KNOCK, &[]) {
                break; // turned away, as it should be, or not yet heard
            }
        }
    }

    // Full of requests for one segment, one of which can be served, and nothing is freed.
    let mut client = Client::of(path);
    let (fd, memory) = ring();
    client.line.say(RING, &[fd.as_fd()]);
    client.offer();
    (0..ENTRIES).for_each(|_| memory.put(0, client.generation, 6, b"100000"));
    client.line.say(KNOCK, &[]);
    wait_until("it was served", || client.memory.word(FILLED).load(SeqCst) == SLOTS);
    lasting.push(Box::new(client));
}

fn connections(path: &Path, lasting: &mut Vec<Box<dyn Send>>) {
    // Come and gone.
    for round in 0..1000 {
        let line = Line::to(path);
        if round % 3 == 0 {
            let _ = rustix::net::shutdown(&line.0, rustix::net::Shutdown::Write);
        }
    }
    // Come to stay, and silent.
    for _ in 0..300 {
        lasting.push(Box::new(Line::to(path)));
    }
    // Come to stay, having said a little.
    for _ in 0..20 {
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        lasting.push(Box::new(line));
    }
}

/// Lets a client of this user loose on a server, and looks after everybody else.
fn withstands(uid: Option<u32>) {
    let _watchdog = watchdog();
    let (dir, path) = place();
    let role = if uid.is_some() { "server of another user's, too" } else { "server" };
    let mut server = Other::start(role, &path);
    server.wait_for("ready");
    if uid.is_some() {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    }
    let bystander = Bystander::of(&path);
    bystander.is_served();
    let (descriptors, mappings, memory) =
        (server.descriptors(), server.mappings(), server.memory());

    let mut hostile = Other::start_as("hostile client", &path, uid);
    for (deed, _) in DEEDS {
        assert_eq!(hostile.hear().as_deref(), Some(deed), "it did not end as it should");
        bystander.is_served();
        // Newcomers are let in, too.
        let newcomer = pool();
        ask(&Seqpacket::new(&path).requester(&newcomer).unwrap(), &newcomer, 10_000);
        let now = server.descriptors();
        assert!(now <= descriptors + MAX_CLIENTS + 50, "{now} descriptors after {deed}");
        assert!(server.mappings() <= mappings + MAX_CLIENTS * 8);
        hostile.nudge();
    }
    hostile.wait_for("all done");
    let grown = server.memory().saturating_sub(memory);
    // About 6 MiB, the stacks of workers that are stalled; 90 under AddressSanitizer.
    assert!(grown < 192 << 20, "{grown} bytes more");
    drop(hostile);
    // All that it held is let go.
    bystander.is_served();
    wait_until("its descriptors were closed", || server.descriptors() <= descriptors);
    wait_until("its segments were unmapped", || server.mappings() <= mappings);
    println!("{} transfers meanwhile, {} KiB more memory", bystander.leave(), grown >> 10);
    server.nudge();
    server.wait_for("ended");
}

#[test]
fn a_hostile_client_harms_nobody() {
    withstands(None);
}

#[test]
fn a_hostile_client_of_another_user_harms_nobody() {
    if !rustix::process::getuid().is_root() {
        eprintln!("not run: only root can start a process of another user");
        return;
    }
    withstands(Some(NOBODY));
}

// ---------------------------------------------------------------- what a client can cost

/// A server that answers keys that are lengths, and takes so many of our segments from a client.
fn with_room_for(segments: usize, run: impl FnOnce(&Path)) {
    let _watchdog = watchdog();
    let (_dir, path) = place();
    let queue = Seqpacket::new(&path).max_bytes((segments * LEN) as u64).bind().unwrap();
    thread::scope(|scope| {
        struct Closing<'q>(&'q shmferry::channel::SeqpacketQueue);
        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let _closing = Closing(&queue); // however it ends, the server does
        scope.spawn(|| {
            while let Ok(transfer) = queue.recv(Deadline::NEVER) {
                let len: usize = std::str::from_utf8(transfer.key()).unwrap().parse().unwrap();
                // Waits for its client for as long as that is there.
                scope.spawn(move || {
                    let mut sending = transfer.accept(len as u64).unwrap();
                    sending.set_timeout(Duration::MAX);
                    let _ = sending.write_all(&pattern(len));
                });
            }
        });
        run(&path);
    });
}

/// Bytes of memory that a segment takes.
fn taken_by(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_blocks as u64 * 512
}

/// Asks for bytes over a segment, which is in its first generation.
fn ask_over(line: &Line, memory: &Memory, index: u32, len: usize) {
    memory.word(FREE).store(SLOTS, SeqCst);
    memory.long(TURN).store(1 << 8 | OFFERED, SeqCst);
    line.say(&request(index, 1, &len.to_string()), &[]);
}

/// The check for holes guards against accidents. What stands in for missing pages here lies beyond
/// the segment's end: it counts as allocated, and the server pays for the pages when it maps them.
#[test]
fn memory_that_only_looks_allocated_costs_a_server_no_more_than_its_limit() {
    const ROOM: usize = 10;
    with_room_for(ROOM, |path| {
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        let hollow: Vec<_> = (0..=ROOM as u32)
            .map(|index| {
                let fd = memfd(LEN as u64, MemfdFlags::empty());
                let beyond = FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&fd, beyond, LEN as u64, LEN as u64).unwrap();
                let numbers = [VERSION, 4096, SLOTS, SLOT_LEN].map(u32::to_ne_bytes).concat();
                let header =
                    [&b"shmferry"[..], &numbers, &POOL.to_ne_bytes(), &index.to_ne_bytes()]
                        .concat();
                rustix::io::pwrite(&fd, &header, 0).unwrap();
                let fd = sealed(fd, SEALS);
                let before = taken_by(&fd);
                assert!(before < 2 * LEN as u64 && before >= LEN as u64, "{before}");
                (fd, before)
            })
            .collect();
        let paid = || hollow.iter().map(|(fd, before)| taken_by(fd) - before).sum::<u64>();
        for (index, (fd, _)) in (0..ROOM as u32).zip(&hollow) {
            line.say(&segment(index), &[fd.as_fd()]);
        }
        // The header was there already.
        let all = (ROOM * (LEN - HEADER)) as u64;
        wait_until("all were mapped", || paid() == all);

        // Pages that are given back later are paid for anew, one by one, and never twice at a time.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (index, (fd, _)) in (0..ROOM as u32).zip(&hollow) {
            let memory = Memory::map(fd, LEN);
            rustix::fs::fallocate(fd, punch, HEADER as u64, (LEN - HEADER) as u64).unwrap();
            ask_over(&line, &memory, index, 4096);
            wait_until("it was sent", || memory.long(TURN).load(SeqCst) == 1 << 8 | FINISHED);
            assert!(paid() <= all);
        }
        // One more is one too many.
        line.say(&segment(ROOM as u32), &[hollow[ROOM].0.as_fd()]);
        assert_eq!(line.last_words(), Some(TOO_MANY_BYTES));
        assert!(paid() <= (ROOM * LEN) as u64);
    });
}

/// It used to: what was retired counted no more, however long a transfer kept it mapped.
#[test]
fn segments_that_are_retired_while_they_are_held_cost_a_server_no_more_than_its_limit_again() {
    const ROOM: usize = 2;
    with_room_for(ROOM, |path| {
        let line = Line::to(path);
        line.say(&hello(SLOTS, SLOT_LEN), &[]);
        let mut mapped = 0;
        for index in 0..8 {
            let fd = proper(index);
            let memory = Memory::map(&fd, LEN);
            line.say(&segment(index), &[fd.as_fd()]);
            ask_over(&line, &memory, index, 50_000);
            line.say(&retire(index), &[]);
            let is_held = || memory.word(FILLED).load(SeqCst) == SLOTS;
            wait_until("it was taken or refused", || {
                is_held() || line.poll(PollFlags::IN, Duration::ZERO)
            });
            mapped += usize::from(is_held());
        }
        assert_eq!(line.last_words(), Some(TOO_MANY_BYTES));
        assert_eq!(mapped, ROOM + 1, "a full set that is retired, and one more");
    });
}

// ---------------------------------------------------------------- the hostile server

/// A listening socket of our own.
struct Door(OwnedFd);

impl Door {
    fn at(path: &Path) -> Door {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&socket, 16).unwrap();
        Door(socket)
    }
}

/// A request that has come in, and its segment.
struct Deal<'h> {
    line: &'h Line,
    memory: Memory,
    generation: u64,
    slots: usize,
    slot_len: usize,
}

impl Deal<'_> {
    fn enter(&self, phase: u64) {
        self.memory.long(TURN).store(self.generation << 8 | phase, SeqCst);
    }

    /// Does what an honest sender does before its first post.
    fn announce(&self, status: u32, size: u64, metadata_len: u32) {
        self.enter(ACCEPTED);
        self.memory.word(STATUS).store(status, SeqCst);
        self.memory.long(SIZE).store(size, SeqCst);
        self.memory.word(METADATA_LEN).store(metadata_len, SeqCst);
        self.enter(ANNOUNCED);
    }

    /// Hands over the slot with this in its length.
    fn chunk(&self, slot: usize, word: u32) {
        self.memory.word(CHUNKS + 4 * slot).store(word, SeqCst);
        self.memory.word(FREE).fetch_sub(1, SeqCst);
        self.memory.post(FILLED);
    }

    /// Sends these bytes, calling `between` before each chunk; `false` if the receiver cancelled.
    fn send(&self, bytes: &[u8], mut between: impl FnMut()) -> bool {
        let pieces = bytes.chunks(self.slot_len);
        let count = pieces.len();
        for (i, piece) in pieces.enumerate() {
            let slot = i % self.slots;
            wait_until("a slot was free", || self.memory.word(FREE).load(SeqCst) != 0);
            if self.memory.word(FREE).load(SeqCst) & LAST != 0 {
                self.enter(ABORTED);
                return false;
            }
            between();
            self.memory.write(HEADER + slot * self.slot_len.next_multiple_of(4096), piece);
            let last = if i + 1 == count { LAST } else { 0 };
            self.memory.word(CHUNKS + 4 * slot).store(piece.len() as u32 | last, SeqCst);
            self.memory.word(FREE).fetch_sub(1, SeqCst);
            self.memory.word(FILLED).fetch_add(1, SeqCst);
            if last != 0 {
                self.enter(FINISHED);
            }
            self.memory.wake(FILLED);
        }
        true
    }
}

const FOUND: u32 = 1;
const ABORTED: u64 = 6;
const UNKNOWN: u64 = u64::MAX;

/// Answers as the key says, one request after the other. Whoever is hung up on may connect again.
fn hostile_server(path: &Path) {
    let door = Door::at(path);
    let mut random = Random(5);
    say("ready");
    loop {
        let line = Line(rustix::net::accept(&door.0).unwrap());
        let (mut slots, mut slot_len) = (0, 0);
        let mut known = BTreeMap::new();
        let mut ring: Option<(Memory, u64)> = None;
        let mut bells = 2u64..;
        let mut asked = Vec::new();
        while let Some((message, fd)) = line.hear() {
            match message[0] {
                6 => ring = Some((Memory::map(fd.unwrap(), RING_LEN), 0)),
                7 => {
                    let (ring, taken) = ring.as_mut().expect("it knocks at a ring");
                    ring.long(NEED_WAKEUP).swap(bells.next().unwrap(), SeqCst);
                    while *taken < ring.long(POSTED).load(SeqCst) {
                        asked.push(ring.entry(*taken));
                        *taken += 1;
                        ring.long(TAKEN).store(*taken, SeqCst);
                    }
                }
                1 => {
                    (slots, slot_len) =
                        (u32_at(&message, 21) as usize, u32_at(&message, 25) as usize)
                }
                2 => {
                    let len = HEADER + slots * slot_len.next_multiple_of(4096);
                    known.insert(u32_at(&message, 1), Memory::map(fd.unwrap(), len));
                }
                3 => drop(known.remove(&u32_at(&message, 1)).unwrap()),
                4 => {
                    let generation = u64::from_le_bytes(message[5..13].try_into().unwrap());
                    asked.push((u32_at(&message, 1), generation, message[14..].to_vec()));
                }
                kind => panic!("a message of kind {kind}"),
            }
            // A segment that is asked for in the ring may still have to be heard of on the connection.
            let (now, later) = asked.into_iter().partition(|(index, ..)| known.contains_key(index));
            asked = later;
            let now: Vec<(u32, u64, Vec<u8>)> = now;
            let goes_on = now.into_iter().all(|(index, generation, key)| {
                let memory = known[&index];
                let deal = Deal { line: &line, memory, generation, slots, slot_len };
                let all: Vec<Memory> = known.values().copied().collect();
                let key = String::from_utf8(key).unwrap();
                if let ("ring words", Some((ring, taken))) = (&*key, &ring) {
                    // It has taken all that was put in: what stands there now keeps nobody from asking. (To
                    // say that it has taken what is still to come would: then nobody knocks.)
                    (0..1000).for_each(|_| spoil_ring(ring, &mut random));
                    ring.long(POSTED).store(0, SeqCst);
                    ring.long(TAKEN).store([1 << 40, *taken][random.below(2)], SeqCst);
                    ring.long(NEED_WAKEUP).swap(bells.next().unwrap(), SeqCst);
                }
                answer(&key, &deal, all, &mut random)
            });
            if !goes_on {
                break;
            }
        }
    }
}

/// `false` to hang up.
fn answer(key: &str, deal: &Deal<'_>, all: Vec<Memory>, random: &mut Random) -> bool {
    let limit = deal.slot_len as u32;
    match key {
        "honest" | "ring words" => {
            deal.announce(FOUND, 10_000, 0);
            deal.send(&pattern(10_000), || {});
        }
        "chunk too long" => {
            deal.announce(FOUND, UNKNOWN, 0);
            deal.chunk(0, limit + 1);
        }
        "longest chunk" => {
            deal.announce(FOUND, UNKNOWN, 0);
            deal.chunk(0, u32::MAX);
        }
        "sum too long" => {
            deal.announce(FOUND, u64::from(limit) + 1, 0);
            deal.chunk(0, limit);
            deal.chunk(1, 2 | LAST);
        }
        "early end" => {
            deal.announce(FOUND, 10_000, 0);
            deal.chunk(0, limit);
            deal.chunk(1, limit | LAST);
        }
        "no end" => {
            deal.announce(FOUND, 10, 0);
            deal.chunk(0, 10);
        }
        "empty chunks without end" => {
            deal.announce(FOUND, UNKNOWN, 0);
            deal.memory.word(CHUNKS).store(0, SeqCst);
            deal.memory.word(CHUNKS + 4).store(0, SeqCst);
            deal.memory.word(FILLED).store(u32::MAX >> 1, SeqCst);
            deal.memory.wake(FILLED);
        }
        "bytes without end" => {
            deal.announce(FOUND, UNKNOWN, 0);
            // Slots that were never freed are filled again.
            while deal.memory.word(FREE).load(SeqCst) & LAST == 0 {
                (0..deal.slots)
                    .for_each(|slot| deal.memory.word(CHUNKS + 4 * slot).store(limit, SeqCst));
                deal.memory.post(FILLED);
            }
            deal.enter(ABORTED);
        }
        "unknown status" => {
            deal.announce(77, 10, 0);
            deal.chunk(0, 10 | LAST);
        }
        "metadata too long" => {
            deal.announce(FOUND, 10, u32::MAX);
            deal.chunk(0, 10 | LAST);
        }
        "poison" => {
            deal.memory.word(FILLED).fetch_or(LAST, SeqCst);
            deal.memory.wake(FILLED);
        }
        "poison and a withdrawal" => {
            deal.enter(7);
            deal.memory.word(FILLED).fetch_or(LAST, SeqCst);
            deal.memory.wake(FILLED);
        }
        "permits and poison" => {
            deal.announce(FOUND, UNKNOWN, 0);
            (0..deal.slots).for_each(|slot| deal.memory.word(CHUNKS + 4 * slot).store(1, SeqCst));
            deal.memory.word(FILLED).store(LAST | 5, SeqCst);
            deal.memory.wake(FILLED);
        }
        "silence" => deal.enter(ACCEPTED),
        "impossible turn" => {
            deal.memory.long(TURN).store(random.next() | 8, SeqCst);
            deal.memory.word(FREE).store(random.word(), SeqCst);
        }
        "words of the announcement rewritten" => {
            deal.announce(FOUND, 50_000, 5);
            deal.memory.write(296, b"right");
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let mut begun = 0;
                let (over, memory) = (&over, deal.memory);
                deal.send(&pattern(50_000), || {
                    begun += 1;
                    // By the third chunk, at least one slot was freed, and so the reply was read.
                    if begun == deal.slots + 1 {
                        scope.spawn(move || {
                            let mut random = Random(3);
                            while !over.load(SeqCst) {
                                memory.word(STATUS).store(random.word(), SeqCst);
                                memory.long(SIZE).store(random.next(), SeqCst);
                                memory.word(METADATA_LEN).store(random.word(), SeqCst);
                                memory.word(SENDER_CPU).store(random.word(), SeqCst);
                                memory.write(296, b"wrong");
                            }
                        });
                    }
                });
                over.store(true, SeqCst);
            });
        }
        "words at random" => {
            deal.announce(FOUND, [UNKNOWN, 100, 100_000][random.below(3)], 0);
            for _ in 0..random.below(3000) {
                spoil(&deal.memory, random);
            }
        }
        "turns of idle segments" => {
            let idle: Vec<_> =
                all.iter().filter(|memory| memory.base != deal.memory.base).collect();
            for memory in idle {
                let generation = memory.long(TURN).load(SeqCst) >> 8;
                let phase = 1 + random.next() % 9;
                memory.long(TURN).store(((generation + random.next() % 3) << 8) | phase, SeqCst);
            }
            deal.announce(2, 0, 0);
            deal.memory.word(FILLED).fetch_add(1, SeqCst);
            deal.enter(5);
            deal.memory.wake(FILLED);
        }
        "babble" => {
            let fd = proper(0);
            for len in 1..50 {
                deal.line.try_say(&random.bytes(len * 40), &vec![fd.as_fd(); len]);
            }
            deal.announce(FOUND, 10_000, 0);
            deal.send(&pattern(10_000), || {});
        }
        "unknown farewell" => {
            deal.line.try_say(&[&[5][..], &250u32.to_le_bytes(), &[0; 8]].concat(), &[]);
            return false;
        }
        "babble and an end" => {
            deal.line.try_say(&random.bytes(60_000), &vec![proper(0).as_fd(); 253]);
            return false;
        }
        "words that do not close, and an end" => {
            for _ in 0..3 {
                let (socket, other) = quarantined();
                deal.line.try_say(&[9], &[socket.as_fd(); 20]);
                thread::spawn(|| drop(socket)); // the last one is the receiver's, mostly
                std::mem::forget(other);
            }
            return false;
        }
        "an end" => return false,
        "an end after a chunk" => {
            deal.announce(FOUND, UNKNOWN, 0);
            deal.chunk(0, 10);
            return false;
        }
        key => panic!("no such deed: {key}"),
    }
    true
}

/// What the receiver makes of an answer. A refusal is no bytes.
fn outcome(
    requester: &impl Requester<Memfd>,
    pool: &SegmentPool<Memfd>,
    key: &str,
) -> Result<Vec<u8>, Error> {
    /// More than any body here has.
    const ENOUGH: usize = 1 << 20;
    let timeout = Duration::from_millis(200);
    let lease = pool.lease(soon()).expect("the pool keeps its capacity");
    let (request, transfer) = lease.request(key)?;
    requester.send(request, soon())?;
    let Reply::Found(mut body) = transfer.reply(Deadline::after(timeout))? else {
        return Ok(Vec::new());
    };
    let (size, metadata) = (body.size(), body.metadata::<Vec<u8>>().unwrap());
    body.set_timeout(timeout);
    let mut bytes = Vec::new();
    let read = (&mut body).take(ENOUGH as u64).read_to_end(&mut bytes);
    assert_eq!(
        (size, metadata),
        (body.size(), body.metadata::<Vec<u8>>().unwrap()),
        "read once, and kept"
    );
    match read {
        Ok(_) => Ok(bytes),
        Err(error) => Err(*error.into_inner().unwrap().downcast::<Error>().unwrap()),
    }
}

/// Whether it was told that the peer broke the protocol, and how.
fn broke(outcome: &Result<Vec<u8>, Error>, how: &str) -> bool {
    matches!(outcome, Err(Error::Peer(error)) if error.to_string().contains(how))
}

#[test]
fn a_hostile_server_harms_nobody() {
    let _watchdog = watchdog();
    let (dir, path) = place();
    let other = dir.path().join("other.sock");
    let mut honest = Other::start("server", &other);
    honest.wait_for("ready");
    let bystander = Bystander::of(&other);
    let mut server = Other::start("hostile server", &path);
    server.wait_for("ready");
    let pool = pool();
    let requester = Seqpacket::new(&path).requester(&pool).unwrap();
    let get = |key: &str| outcome(&requester, &pool, key);
    // Both segments can be had, and bytes go through.
    let whole = || {
        let leases = [pool.lease(soon()).unwrap(), pool.lease(soon()).unwrap()];
        drop(leases);
        (0..2).for_each(|_| assert!(get("honest").unwrap() == pattern(10_000)));
        let stats = pool.stats();
        assert_eq!((stats.segments, stats.idle + stats.quarantined), (2, 2));
    };
    whole();

    type Check = fn(&Result<Vec<u8>, Error>) -> bool;
    let deeds: [(&str, Check); 22] = [
        ("ring words", |r| matches!(r, Ok(bytes) if *bytes == pattern(10_000))),
        ("chunk too long", |r| broke(r, "a chunk of 2049 bytes in a slot of 2048")),
        ("longest chunk", |r| broke(r, "bytes in a slot of 2048")),
        ("sum too long", |r| broke(r, "2050 bytes of an announced 2049")),
        ("early end", |r| broke(r, "the end at 4096 bytes of an announced 10000")),
        ("no end", |r| broke(r, "the end at 10 bytes of an announced 10")),
        ("empty chunks without end", |r| broke(r, "an empty chunk")),
        ("bytes without end", |r| matches!(r, Ok(bytes) if bytes.len() == 1 << 20)),
        ("unknown status", |r| broke(r, "unknown status 77")),
        ("metadata too long", |r| broke(r, "metadata of")),
        ("poison", |r| broke(r, "poisoned without a cause")),
        ("poison and a withdrawal", |r| broke(r, "poisoned without a cause")),
        ("permits and poison", |r| matches!(r, Err(Error::Aborted))),
        ("silence", |r| matches!(r, Err(Error::Timeout(Awaited::Reply)))),
        ("impossible turn", |r| matches!(r, Err(Error::Timeout(Awaited::Reply)))),
        (
            "words of the announcement rewritten",
            |r| matches!(r, Ok(bytes) if *bytes == pattern(50_000)),
        ),
        ("babble", |r| matches!(r, Ok(bytes) if *bytes == pattern(10_000))),
        ("babble and an end", |r| matches!(r, Err(Error::Disconnected))),
        ("unknown farewell", |r| matches!(r, Err(Error::Rejected(Rejection::Protocol)))),
        ("words that do not close, and an end", |r| matches!(r, Err(Error::Disconnected))),
        ("an end", |r| matches!(r, Err(Error::Disconnected))),
        ("an end after a chunk", |r| matches!(r, Err(Error::Disconnected))),
    ];
    for (deed, is_right) in deeds {
        for _ in 0..3 {
            let outcome = get(deed);
            assert!(is_right(&outcome), "{deed}: {:?}", outcome.map(|bytes| bytes.len()));
            whole();
        }
        bystander.is_served();
    }

    let mut outcomes = BTreeMap::new();
    let mut note = |outcome: Result<Vec<u8>, Error>| {
        if let Err(error) = &outcome {
            assert!(matches!(error.fault(), Fault::Peer | Fault::Time), "{error:?}");
        }
        let kind = outcome.map_or_else(|error| format!("{error:?}"), |_| "bytes".to_owned());
        let kind = kind.split(|c: char| !c.is_alphabetic() && c != '(').next().unwrap();
        *outcomes.entry(kind.to_owned()).or_insert(0) += 1;
    };
    for _ in 0..100 {
        note(get("words at random"));
    }
    whole();
    // The turn of a segment is spoilt while it is leased: it cannot be used, and is not lost.
    for _ in 0..20 {
        let leased = pool.lease(soon()).unwrap();
        assert!(get("turns of idle segments").unwrap().is_empty());
        let refused = leased.request("honest").map(|_| Vec::new());
        assert!(broke(&refused, "an impossible phase"), "{refused:?}");
        assert!(get("honest").unwrap() == pattern(10_000));
    }
    whole();
    bystander.is_served();
    println!(
        "{outcomes:?}; {} segments retired; {} transfers meanwhile",
        pool.stats().retired,
        bystander.leave()
    );
}

#[test]
fn a_server_that_never_listens_costs_deadlines_only() {
    let _watchdog = watchdog();
    let (_dir, path) = place();
    let mut deaf = Other::start("deaf server", &path);
    deaf.wait_for("ready");
    let pool = pool();
    let requester = Seqpacket::new(&path).requester(&pool).unwrap();
    // It takes what fits into the connection, and then no more.
    let failed = (0..100_000).find_map(|_| {
        let (request, _transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
        requester.send(request, Deadline::after(Duration::from_millis(50))).err()
    });
    let error = failed.expect("a connection has a limit").error;
    assert!(matches!(error, Error::Timeout(Awaited::QueueRoom)), "{error:?}");
    assert_eq!((pool.stats().idle, pool.stats().retired), (2, 0));
    drop(deaf);
    let mut honest = Other::start("server", &path);
    honest.wait_for("ready");
    ask(&requester, &pool, 10_000);
}
