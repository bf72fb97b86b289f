//! Many transfers at once, into memory and on to TCP as a proxy does: throughput, latency, fairness, processor
//! time, context switches and memory, by the number of clients.
//!
//! `cargo bench --bench concurrency`; with `-- --write DIRECTORY`, `concurrency.md` and its plot are
//! written there; with `-- --only WORD`, which can be given several times, methods with that in
//! their names and the anchors are measured; with `-- --rounds COUNT`, so many rounds. Each server
//! is another process; the clients are threads of this one. Methods are interleaved, round by
//! round.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::slice;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use shmferry::channel::{Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::loan::Loan;
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool, SharedByte};
use shmferry::workers::WorkerPool;
use shmferry::{Deadline, Incoming, Server};

mod processor;

const CLIENTS: [usize; 4] = [1, 4, 16, 64];
const ROUNDS: usize = 5;
/// How long each method is measured in a round, or for one fetch of each client.
const SPAN: Duration = Duration::from_millis(300);
/// The files: the first is fetched in every way, the second on to TCP only, by a few.
const FILES: [Content; 2] =
    [Content { name: "file", len: 1 << 20 }, Content { name: "large", len: 100 << 20 }];
const BUFFER: usize = 256 << 10;
/// Jobs at work at once in our server.
const WORKERS: usize = 8;
const METHODS: [&str; 8] =
    [LOCAL, SENDFILE, MAPPED, STREAMED, "shmferry, message queue", SEALED, AS_A_FILE, FIRST];
const LOCAL: &str = "local pread";
const SENDFILE: &str = "Unix socket, sendfile";
const MAPPED: &str = "file, kept and mapped";
const STREAMED: &str = "shmferry, socket";
const SEALED: &str = "shmferry, lent, sealed";
const AS_A_FILE: &str = "shmferry, lent, as a file";
const FIRST: &str = "shmferry, lent, first request";

/// A file that all clients fetch.
#[derive(Clone, Copy, PartialEq)]
struct Content {
    name: &'static str,
    len: u64,
}

/// What is measured at a time.
#[derive(Clone, Copy, PartialEq)]
struct Setting {
    file: usize,
    to_tcp: bool,
    clients: usize,
}

impl Setting {
    fn all() -> Vec<Setting> {
        let of = |file: usize, to_tcp: bool| {
            move |clients: &usize| Setting { file, to_tcp, clients: *clients }
        };
        let small = [false, true].into_iter().flat_map(|tcp| CLIENTS.iter().map(of(0, tcp)));
        small.chain([4, 64].iter().map(of(1, true))).collect()
    }

    fn len(&self) -> u64 {
        FILES[self.file].len
    }

    /// Fewer for the large file, whose fetches take long.
    fn rounds(&self, most: usize) -> usize {
        if self.file == 0 { most } else { most.min(3) }
    }

    fn takes(&self, method: &str) -> bool {
        self.file == 0 || [LOCAL, SENDFILE, MAPPED, STREAMED, SEALED, AS_A_FILE].contains(&method)
    }
}

fn main() -> io::Result<()> {
    if let Ok(role) = env::var("SHMFERRY_BENCH_ROLE") {
        return serve(&role, &env::current_dir()?);
    }
    let dir = tempfile::tempdir()?;
    let contents = FILES.map(|file| (0..file.len).map(|i| ((i * 31) >> 5) as u8).collect());
    for (file, bytes) in FILES.iter().zip::<&[Vec<u8>; 2]>(&contents) {
        fs::write(dir.path().join(file.name), bytes)?;
    }
    let rounds = option("--rounds").next().map_or(ROUNDS, |count| count.parse().expect("a number"));
    let only: Vec<String> = option("--only").collect();
    let is_wanted = |name: &&str| {
        let is_named = only.is_empty() || only.iter().any(|word| name.contains(word));
        is_named || [LOCAL, SENDFILE].contains(name)
    };
    let drain = Other::start("drain", dir.path())?;
    let drain_port = fs::read_to_string(dir.path().join("port"))?.parse().expect("a port");
    let mut contenders = Vec::new();
    for name in METHODS.into_iter().filter(is_wanted) {
        contenders.push(Contender::start(name, dir.path())?);
    }
    for contender in &contenders {
        for (file, bytes) in contents.iter().enumerate() {
            let setting = Setting { file, to_tcp: true, clients: 1 };
            if setting.takes(contender.name) {
                let mut seen = Vec::new();
                contender.client()?.fetch(file, &mut Sink::Verify(&mut seen))?;
                assert!(seen == *bytes, "{}: wrong bytes", contender.name);
            }
        }
    }
    let mut cells = Vec::new();
    for setting in Setting::all() {
        let mut row: Row = BTreeMap::new();
        for _ in 0..setting.rounds(rounds) {
            for contender in contenders.iter().filter(|one| setting.takes(one.name)) {
                let drain = setting.to_tcp.then_some(drain_port);
                let cell = row.entry(contender.name).or_default();
                cell.rounds.push(contender.measure(setting, drain)?);
            }
        }
        cells.push((setting, row));
    }
    let memory: Vec<_> = contenders
        .iter()
        .map(|contender| (contender.name, peak(&contender.server.0.id().to_string())))
        .collect();
    let text = report(rounds, &cells, &memory);
    print!("{text}");
    if let Some(directory) = option("--write").next() {
        fs::write(Path::new(&directory).join("concurrency.md"), text)?;
        fs::write(Path::new(&directory).join("concurrency.svg"), plot(&cells))?;
    }
    contenders.into_iter().for_each(|contender| contender.server.end());
    drain.end();
    Ok(())
}

/// The values of a command-line option, as often as it is given.
fn option(name: &'static str) -> impl Iterator<Item = String> {
    env::args().zip(env::args().skip(1)).filter(move |pair| pair.0 == name).map(|pair| pair.1)
}

// ---------------------------------------------------------------- measuring

/// One method with its server.
struct Contender {
    name: &'static str,
    server: Other,
    way: Way,
}

/// What all clients of a method share.
enum Way {
    Local(PathBuf),
    Sendfile(PathBuf),
    Mapped([&'static [u8]; FILES.len()]),
    Socket(Shared<Memfd>),
    Queue(Shared<Named>),
    /// By the front door, with what reads a lent file rather than a slice.
    Lent {
        client: shmferry::Client,
        is_read: bool,
    },
}

type Shared<B> = Arc<(SegmentPool<B>, Box<dyn Requester<B>>)>;

/// What one method did in one round.
struct Round {
    /// Bytes a second, all clients together.
    speed: f64,
    /// Seconds of each fetch, sorted.
    times: Vec<f64>,
    /// Fetches of the slowest client, as a part of the mean.
    slowest: f64,
    /// Processor seconds a GiB, here and in the server.
    processor: f64,
    /// Processor seconds of the server a fetch.
    server: f64,
    /// Context switches a fetch, here and in the server.
    switches: f64,
}

#[derive(Default)]
struct Cell {
    rounds: Vec<Round>,
}

/// What each method did, by name.
type Row = BTreeMap<&'static str, Cell>;

impl Contender {
    fn start(name: &'static str, dir: &Path) -> io::Result<Contender> {
        let place = dir.join(name.replace([' ', ','], "-"));
        fs::create_dir(&place)?;
        let server = Other::start(name, &place)?;
        let way = match name {
            LOCAL => Way::Local(dir.to_owned()),
            SENDFILE => Way::Sendfile(place.join("socket")),
            MAPPED => Way::Mapped([map(dir, 0)?, map(dir, 1)?]),
            SEALED | AS_A_FILE | FIRST => {
                // As much memory as the other pools have: what is lent needs a segment, but no slots.
                let client = shmferry::Client::builder()
                    .segments(64)
                    .segment_len(256 << 10)
                    .connect(place.join("queue").as_path())?;
                Way::Lent { client, is_read: name == AS_A_FILE }
            }
            STREAMED => {
                let pool = SegmentPool::builder().create()?;
                let requester = Seqpacket::new(place.join("queue")).requester(&pool)?;
                Way::Socket(Arc::new((pool, Box::new(requester))))
            }
            _ => {
                let pool = SegmentPool::builder().create()?;
                let requester = PosixMq::new(queue_name(server.0.id()))?.requester(&pool);
                Way::Queue(Arc::new((pool, Box::new(requester))))
            }
        };
        Ok(Contender { name, server, way })
    }

    fn client(&self) -> io::Result<Box<dyn Client>> {
        Ok(match &self.way {
            Way::Local(dir) => Box::new(Local(open(dir)?, vec![0; BUFFER])),
            Way::Mapped(files) => Box::new(Mapped(*files)),
            Way::Lent { client, is_read } => {
                let buffer = vec![0; if *is_read { BUFFER } else { 0 }];
                Box::new(FrontDoor { client: client.clone(), buffer })
            }
            Way::Sendfile(path) => Box::new(Stream(UnixStream::connect(path)?, vec![0; BUFFER])),
            Way::Socket(shared) => Box::new(Ours(Arc::clone(shared))),
            Way::Queue(shared) => Box::new(Ours(Arc::clone(shared))),
        })
    }

    fn measure(&self, setting: Setting, drain: Option<u16>) -> io::Result<Round> {
        let Setting { file, clients, .. } = setting;
        // Both sides' threads live whenever costs are looked at: those of the dead are not to be had.
        let barrier = Barrier::new(clients + 1);
        let client = || {
            let ready = self.client().and_then(|mut client| {
                client.fetch(file, &mut Sink::Touch)?;
                let Some(port) = drain else { return Ok((client, Sink::Touch)) };
                let stream = TcpStream::connect(("127.0.0.1", port))?;
                // Where `copy_to` uses `sendfile`.
                stream.set_nonblocking(self.name.starts_with("shmferry"))?;
                Ok((client, Sink::Tcp(stream)))
            });
            barrier.wait();
            barrier.wait();
            let fetched = ready.and_then(|(mut client, mut sink)| {
                let (begin, mut times) = (Instant::now(), Vec::new());
                while begin.elapsed() < SPAN {
                    let start = Instant::now();
                    client.fetch(file, &mut sink)?;
                    times.push(start.elapsed().as_secs_f64());
                }
                Ok((times, client))
            });
            barrier.wait();
            barrier.wait();
            fetched.map(|(times, _)| times)
        };
        let (fetches, took, before, after) = thread::scope(|scope| {
            let threads: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
            barrier.wait();
            let (before, begin) = (self.costs(), Instant::now());
            barrier.wait();
            barrier.wait();
            let (took, after) = (begin.elapsed().as_secs_f64(), self.costs());
            barrier.wait();
            let fetches: io::Result<Vec<_>> =
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
            fetches.map(|fetches| (fetches, took, before, after))
        })?;
        let slowest = fetches.iter().map(Vec::len).min().unwrap_or(0) as f64;
        let mut times = fetches.concat();
        times.sort_unstable_by(f64::total_cmp);
        let count = times.len() as f64;
        Ok(Round {
            speed: count * setting.len() as f64 / took,
            slowest: slowest / (count / clients as f64),
            times,
            processor: (after.processor - before.processor)
                / (count * setting.len() as f64 / (1u64 << 30) as f64),
            server: (after.server - before.server) / count,
            switches: switches(&before.switches, &after.switches) as f64 / count,
        })
    }

    fn costs(&self) -> Costs {
        let server = self.server.0.id();
        let mut switches = switches_of("self");
        switches.extend(switches_of(&server.to_string()));
        let server = processor::seconds(server);
        Costs { processor: processor::seconds(std::process::id()) + server, server, switches }
    }
}

/// What was spent so far.
struct Costs {
    /// Processor seconds of this process and the server.
    processor: f64,
    /// Of the server.
    server: f64,
    /// Of both.
    switches: Switches,
}

/// Context switches so far, by thread.
type Switches = BTreeMap<OsString, u64>;

/// How many there were meanwhile. A thread that has ended takes what it had since with it.
fn switches(before: &Switches, after: &Switches) -> u64 {
    // A number may be another thread's by now.
    after
        .iter()
        .map(|(thread, count)| count.saturating_sub(*before.get(thread).unwrap_or(&0)))
        .sum()
}

fn switches_of(process: &str) -> Switches {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of = |status: &str| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    let switches = threads.filter_map(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        Some((thread.file_name(), of(&status)))
    });
    switches.collect()
}

/// The most memory that a process had resident, in MiB.
fn peak(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) >> 10
}

// ---------------------------------------------------------------- clients

/// Where the bytes go.
enum Sink<'v> {
    /// One byte of each cache line is looked at.
    Touch,
    Tcp(TcpStream),
    Verify(&'v mut Vec<u8>),
}

impl Sink<'_> {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Touch => bytes.iter().step_by(64).copied().for_each(see),
            Sink::Tcp(stream) => stream.write_all(bytes)?,
            Sink::Verify(seen) => seen.extend(bytes),
        }
        Ok(())
    }
}

fn see(byte: u8) {
    black_box(byte);
}

trait Client: Send {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()>;
}

struct Local([File; FILES.len()], Vec<u8>);

/// All files of a directory.
fn open(dir: &Path) -> io::Result<[File; FILES.len()]> {
    let open = |file: &Content| File::open(dir.join(file.name));
    Ok([open(&FILES[0])?, open(&FILES[1])?])
}

impl Client for Local {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut at = 0;
        while at < FILES[file].len {
            let read = self.0[file].read_at(&mut self.1, at)?;
            sink.take(&self.1[..read])?;
            at += read as u64;
        }
        Ok(())
    }
}

struct Stream(UnixStream, Vec<u8>);

impl Client for Stream {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()> {
        self.0.write_all(&[file as u8])?;
        let mut left = FILES[file].len as usize;
        while left > 0 {
            let most = left.min(BUFFER);
            let read = self.0.read(&mut self.1[..most])?;
            sink.take(&self.1[..read])?;
            left -= read;
        }
        Ok(())
    }
}

/// Files that were mapped once: no request is left, only the reading.
struct Mapped([&'static [u8]; FILES.len()]);

fn map(dir: &Path, file: usize) -> io::Result<&'static [u8]> {
    let (fd, len) = (&open(dir)?[file], FILES[file].len as usize);
    let flags = MapFlags::SHARED | MapFlags::POPULATE;
    // SAFETY: fresh addresses, and nobody changes or shortens the files of this bench.
    let base = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, flags, fd, 0)? };
    // SAFETY: the mapping above, which this process keeps to its end.
    Ok(unsafe { slice::from_raw_parts(base.cast::<u8>(), len) })
}

impl Client for Mapped {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()> {
        sink.take(self.0[file])
    }
}

/// A client that is lent the files; reads them if it has a buffer.
struct FrontDoor {
    client: shmferry::Client,
    buffer: Vec<u8>,
}

impl Client for FrontDoor {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut body = self.client.get([file as u8])?;
        if let Sink::Tcp(stream) = sink {
            body.copy_to(&*stream)?;
        } else if self.buffer.is_empty() {
            // A first request may be streamed, when the account is full; then it is gathered.
            sink.take(&body.into_bytes()?)?;
        } else {
            while let read @ 1.. = body.read(&mut self.buffer)? {
                sink.take(&self.buffer[..read])?;
            }
        }
        Ok(())
    }
}

struct Ours<B: Backing>(Shared<B>);

impl<B: Backing> Client for Ours<B> {
    fn fetch(&mut self, file: usize, sink: &mut Sink<'_>) -> io::Result<()> {
        let (pool, requester) = &*self.0;
        let (request, transfer) = pool.lease(Deadline::NEVER)?.request([file as u8])?;
        requester.send(request, Deadline::NEVER).map_err(shmferry::Error::from)?;
        let Reply::Found(mut body) = transfer.reply(Deadline::NEVER)? else { panic!("refused") };
        if let Sink::Tcp(stream) = sink {
            body.copy_to(&*stream)?;
            return Ok(());
        }
        while let Some(chunk) = body.next_chunk(Deadline::NEVER)? {
            match sink {
                Sink::Verify(seen) => seen.extend(chunk.bytes().iter().map(SharedByte::read)),
                _ => chunk.bytes().iter().step_by(64).map(SharedByte::read).for_each(see),
            }
        }
        Ok(())
    }
}

// ---------------------------------------------------------------- servers

/// A server process, until its standard input ends.
struct Other(Child);

impl Other {
    fn start(role: &str, place: &Path) -> io::Result<Other> {
        let mut command = Command::new(env::current_exe()?);
        command.env("SHMFERRY_BENCH_ROLE", role).current_dir(place);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        child.stdout.take().expect("piped").read_exact(&mut [0])?;
        Ok(Other(child))
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn queue_name(server: u32) -> String {
    format!("/shmferry-bench-{server}")
}

fn serve(role: &str, place: &Path) -> io::Result<()> {
    let ready = || io::stdout().write_all(b"!").and_then(|()| io::stdout().flush());
    let until_told = || io::copy(&mut io::stdin(), &mut io::sink()).map(drop);
    match role {
        LOCAL | MAPPED => ready()?,
        SENDFILE => {
            let listener = UnixListener::bind(place.join("socket"))?;
            let files = Arc::new(open(Path::new(".."))?);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let files = Arc::clone(&files);
                    thread::spawn(move || send_by_sendfile(stream, &*files));
                }
            });
            ready()?;
        }
        "drain" => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            fs::write(place.join("port"), listener.local_addr()?.port().to_string())?;
            thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    thread::spawn(move || {
                        let mut buffer = vec![0; BUFFER];
                        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
                    });
                }
            });
            ready()?;
        }
        SEALED => {
            let seal = |file: File| Loan::from_file(&file);
            return lend(place, seal, |asked, loan| asked.lend(loan), ready, until_told);
        }
        AS_A_FILE => {
            return lend(place, Loan::file, |asked, loan| asked.lend(loan), ready, until_told);
        }
        FIRST => {
            let seal_and_lend = |asked: Incoming, file: &File| asked.lend(&Loan::from_file(file)?);
            return lend(place, Ok, seal_and_lend, ready, until_told);
        }
        STREAMED => {
            return answer(Seqpacket::new(place.join("queue")).bind()?, ready, until_told);
        }
        _ => {
            return answer(
                PosixMq::new(queue_name(std::process::id()))?.bind()?,
                ready,
                until_told,
            );
        }
    }
    until_told()
}

fn send_by_sendfile(mut stream: UnixStream, files: &[File]) {
    let mut asked = [0];
    while stream.read(&mut asked).is_ok_and(|read| read > 0) {
        let file = usize::from(asked[0]);
        let mut at = 0;
        while at < FILES[file].len {
            let left = (FILES[file].len - at) as usize;
            if rustix::fs::sendfile(stream.as_fd(), &files[file], Some(&mut at), left).is_err() {
                return; // its client has seen enough
            }
        }
    }
}

fn answer<Q: RequestQueue + 'static>(
    queue: Q,
    ready: impl Fn() -> io::Result<()>,
    until_told: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    let files = open(Path::new(".."))?;
    let queue = Arc::new(queue);
    let taking = Arc::clone(&queue);
    let next = move || taking.recv(Deadline::NEVER).ok();
    let workers = WorkerPool::start("bench", WORKERS, next, move |transfer| {
        let file = usize::from(transfer.key()[0]);
        let sending = transfer.accept(FILES[file].len);
        // A client that left early is no failure of ours.
        let _ = sending.and_then(|sending| sending.send_file(&files[file]));
    })?;
    ready()?;
    until_told()?;
    queue.close();
    workers.join(Deadline::NEVER);
    Ok(())
}

/// Lends by the front door what each file was made into.
fn lend<T: Send + Sync + 'static>(
    place: &Path,
    make: impl Fn(File) -> shmferry::Result<T>,
    answer: impl Fn(Incoming, &T) -> shmferry::Result<()> + Send + Sync + 'static,
    ready: impl Fn() -> io::Result<()>,
    until_told: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    let files = open(Path::new(".."))?;
    let made: Vec<T> = files.into_iter().map(make).collect::<shmferry::Result<_>>()?;
    let server = Server::bind(place.join("queue").as_path())?;
    let serving = server.serve(WORKERS, move |asked| {
        let file = usize::from(asked.key()[0]);
        answer(asked, &made[file])
    })?;
    ready()?;
    until_told()?;
    serving.stop();
    serving.wait();
    Ok(())
}

// ---------------------------------------------------------------- the report

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = of.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

impl Cell {
    fn median(&self, of: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(of))
    }

    /// How much faster than another, by round.
    fn against(&self, other: &Cell) -> f64 {
        let pairs = self.rounds.iter().zip(&other.rounds);
        median(pairs.map(|(ours, theirs)| ours.speed / theirs.speed))
    }

    /// How long such a part of the fetches took at most, in microseconds.
    fn time(&self, percent: usize) -> f64 {
        self.median(|round| round.times[round.times.len() * percent / 100] * 1e6)
    }
}

fn report(rounds: usize, cells: &[(Setting, Row)], memory: &[(&str, u64)]) -> String {
    let mut text = format!(
        "# Many transfers at once\n\n\
        For users who compare speeds.\n\n\
        Written by `cargo bench --bench concurrency -- --write docs`, from one run: a file of 1 MiB, on to TCP also one of\n\
        100 MiB (3 rounds at most), {rounds} rounds of {} ms (or one fetch of each client) for each method and number of clients,\n\
        interleaved; medians over the rounds. The clients are threads of one process; shmferry: one pool of 8 segments\n\
        of 2 MiB in 8 slots (for what is lent 64 of 256 KiB), {WORKERS} workers; the Unix socket: a connection and a server thread for each client; the buffers have\n\
        {} KiB. On to TCP, `local pread` is `read` and `write` by one process. `{MAPPED}` has no request: the limit\n\
        of what is lent. `slowest` is what the slowest client got, as a part of the mean. Processor time and context\n\
        switches are those of both processes (without the drain's); then the server's alone.\n\n\
        ![throughput by clients](concurrency.svg)\n",
        SPAN.as_millis(),
        BUFFER >> 10,
    );
    for (setting, row) in cells {
        let len = if setting.file == 0 { "" } else { " of 100 MiB" };
        let to = if setting.to_tcp { "on to TCP" } else { "into memory" };
        let _ = write!(
            text,
            "\n### {} at once{len}, {to}\n\n\
            | method | MiB/s | × local | × Unix socket | p50 (µs) | p99 (µs) | p99 / p50 | slowest | processor s/GiB | \
            server µs a fetch | switches a fetch |\n|{}\n",
            setting.clients,
            " --- |".repeat(11)
        );
        for (name, cell) in METHODS.iter().filter_map(|name| row.get_key_value(name)) {
            let _ = writeln!(
                text,
                "| {name} | {:.0} | {:.2} | {:.2} | {:.0} | {:.0} | {:.1} | {:.2} | {:.2} | {:.1} | {:.1} |",
                cell.median(|round| round.speed) / (1 << 20) as f64,
                cell.against(&row[LOCAL]),
                cell.against(&row[SENDFILE]),
                cell.time(50),
                cell.time(99),
                cell.time(99) / cell.time(50),
                cell.median(|round| round.slowest),
                cell.median(|round| round.processor),
                cell.median(|round| round.server * 1e6),
                cell.median(|round| round.switches),
            );
        }
    }
    text.push_str("\n### Most memory that a server had resident, segments included (MiB)\n\n| method | MiB |\n| --- | --- |\n");
    for (name, peak) in memory.iter().skip(1) {
        let _ = writeln!(text, "| {name} | {peak} |");
    }
    let _ = writeln!(
        text,
        "\nThe client process, all methods together, with pools of 16 MiB and 64 threads with buffers: {} MiB.",
        peak("self")
    );
    loans(&mut text, cells);
    text
}

/// What was wanted of loans, and what was reached.
fn loans(text: &mut String, cells: &[(Setting, Row)]) {
    text.push_str(
        "\n## Loans\n\n\
        Targets, and what this run reached: medians of the ratios by round.\n\n\
        | what | target | reached |\n| --- | --- | --- |\n",
    );
    let find = |to_tcp: bool, file: usize, clients: usize, name: &str| {
        let is_it = |setting: &Setting| *setting == Setting { file, to_tcp, clients };
        cells.iter().find(|(setting, _)| is_it(setting)).and_then(|(_, row)| row.get(name))
    };
    let mut row = |what: &str, target: &str, reached: Option<(f64, bool)>| {
        let reached = match reached {
            Some((figure, true)) => format!("{figure:.2}"),
            Some((figure, false)) => format!("{figure:.2} (missed)"),
            None => "not measured yet".to_owned(),
        };
        let _ = writeln!(text, "| {what} | {target} | {reached} |");
    };
    for clients in [4, 64] {
        let [sealed, local] = [SEALED, LOCAL].map(|name| find(false, 0, clients, name));
        let ratio = sealed.zip(local).map(|(sealed, local)| sealed.against(local));
        let what =
            format!("1 MiB into memory, {clients} clients, sealed: all together × local pread");
        row(&what, "≥ 1.5", ratio.map(|ratio| (ratio, ratio >= 1.5)));
        let ratio = sealed.map(|sealed| sealed.time(99) / sealed.time(50));
        let what = format!("1 MiB into memory, {clients} clients, sealed: p99 / p50");
        let (target, most) = if clients == 64 { ("≤ 5", 5.0) } else { ("none", f64::MAX) };
        row(&what, target, ratio.map(|ratio| (ratio, ratio <= most)));
    }
    for file in [0, 1] {
        for clients in [4, 64] {
            for name in [SEALED, AS_A_FILE] {
                let ways = [(STREAMED, "our own streaming", 1.15), (LOCAL, "read and write", 1.0)];
                for (other, other_name, target) in ways {
                    let [ours, theirs] = [name, other].map(|name| find(true, file, clients, name));
                    let ratio = ours.zip(theirs).map(|(ours, theirs)| ours.against(theirs));
                    let what = format!(
                        "{} MiB on to TCP, {clients} clients, {}: × {other_name}",
                        FILES[file].len >> 20,
                        name.trim_start_matches("shmferry, "),
                    );
                    row(&what, &format!("≥ {target}"), ratio.map(|ratio| (ratio, ratio >= target)));
                }
            }
        }
    }
}

/// Throughput by clients, into memory, a line for each method.
fn plot(cells: &[(Setting, Row)]) -> String {
    let [width, height, left, top] = [420.0, 300.0, 100.0, 20.0];
    /// Decimal logarithms of the least and the most MiB/s.
    const DECADES: (f64, f64) = (3.0, 6.0);
    let rows: Vec<&Row> =
        cells.iter().filter(|(setting, _)| !setting.to_tcp).map(|(_, row)| row).collect();
    let methods: Vec<_> = METHODS.iter().filter(|name| rows[0].contains_key(*name)).collect();
    let x = |i: usize| left + width * i as f64 / (CLIENTS.len() - 1) as f64;
    let y = |decade: f64| top + height * (DECADES.1 - decade) / (DECADES.1 - DECADES.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        left + width + 200.0,
        top + height + 40.0,
    );
    for decade in [3, 4, 5, 6] {
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{1}\" y2=\"{1}\" stroke=\"#ddd\"/>\
             <text x=\"{2}\" y=\"{1}\" text-anchor=\"end\">{3} MiB/s</text>",
            left + width,
            y(f64::from(decade)),
            left - 4.0,
            10u32.pow(decade),
        );
    }
    for (i, clients) in CLIENTS.iter().enumerate() {
        let (at, below) = (x(i), top + height + 18.0);
        let _ =
            writeln!(svg, "<text x=\"{at}\" y=\"{below}\" text-anchor=\"middle\">{clients}</text>");
    }
    for (i, name) in methods.iter().enumerate() {
        let colour = format!("hsl({}, 70%, 40%)", i * 360 / methods.len());
        let speed = |row: &&Row| row[**name].median(|round| round.speed) / (1 << 20) as f64;
        let points: Vec<String> = rows
            .iter()
            .map(speed)
            .enumerate()
            .map(|(at, speed)| format!("{:.1},{:.1}", x(at), y(speed.log10())))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            points.join(" "),
            left + width + 10.0,
            top + 14.0 * (i as f64 + 1.0),
        );
    }
    svg + "</svg>\n"
}
