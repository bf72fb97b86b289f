//! Real file contents between two real processes, by every method that a user could pick instead, in one run.
//!
//! `cargo bench --bench transfer`; with `-- --write DIRECTORY`, `benchmarks.md` and its plots are
//! written there; with `-- --only WORD`, which can be given several times, methods with that in
//! their names and the anchors are measured; with `-- --rounds COUNT`, so many rounds. A server
//! process has the files in its page cache; the client asks for one and must hold its bytes
//! readable. First every byte is compared; then, timed, one byte of each cache line is touched.
//! Methods without a copy are timed once more, without touching. Methods are interleaved, round by
//! round, so that whatever else the machine does meets all of them.

pub mod ours;
pub mod peers;
#[path = "../processor.rs"]
mod processor;
mod report;

use std::env;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use shmferry::segment::SharedByte;

/// Bytes of each file, and how often it is fetched in a round.
///
/// Often enough for a round to take milliseconds: a fetch of what is lent takes one microsecond, and
/// the first few find the server asleep, perhaps on the client's processor.
pub const FILES: [(u64, usize); 7] = [
    (1 << 10, 4000),
    (4 << 10, 4000),
    (16 << 10, 4000),
    (64 << 10, 4000),
    (1 << 20, 500),
    (16 << 20, 40),
    (256 << 20, 2),
];
const ROUNDS: usize = 7;
/// How often a file is handed over in a round without being touched.
const HANDED_OVER: usize = 4000;

/// What methods with a buffer of their own use: as much as one of our slots holds.
pub const BUFFER: usize = 256 << 10;

/// A way to get a file from the server process.
pub trait Client {
    /// Has `sink` see all bytes of a file, in order, where this process can read them.
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()>;

    /// Has a file readable, and touches none of it; `false` for a way that always copies.
    fn hand_over(&mut self, _file: usize) -> io::Result<bool> {
        Ok(false)
    }

    /// Others are timed now: a server that polls for requests stops until the next one.
    fn rest(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub type Sink<'s> = &'s mut dyn FnMut(Bytes<'_>);

/// Bytes that can be read, in private memory or in memory that the server shares.
pub enum Bytes<'b> {
    Private(&'b [u8]),
    Shared(&'b [SharedByte]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Bytes::Private(bytes) => bytes.len(),
            Bytes::Shared(bytes) => bytes.len(),
        }
    }

    /// One byte of each cache line.
    fn touch(&self) {
        match self {
            Bytes::Private(bytes) => bytes.iter().step_by(64).copied().for_each(see),
            Bytes::Shared(bytes) => bytes.iter().step_by(64).map(SharedByte::read).for_each(see),
        }
    }

    fn copy(&self) -> Vec<u8> {
        match self {
            Bytes::Private(bytes) => bytes.to_vec(),
            Bytes::Shared(bytes) => bytes.iter().map(SharedByte::read).collect(),
        }
    }
}

fn see(byte: u8) {
    black_box(byte);
}

/// A way, by name.
pub struct Method {
    pub name: &'static str,
    /// What runs in the server process, with the directory of the files.
    pub serve: fn(&Path) -> io::Result<()>,
    /// What runs here, beside that process.
    pub connect: fn(&Path, &mut Child) -> io::Result<Box<dyn Client>>,
}

pub fn methods() -> Vec<Method> {
    [peers::methods(), ours::methods()].into_iter().flatten().collect()
}

fn main() -> io::Result<()> {
    run("cargo bench --bench transfer -- --write docs", methods())
}

/// Times these methods, as this command does. The server processes are this program, run again.
pub fn run(command: &str, methods: Vec<Method>) -> io::Result<()> {
    if let Ok(name) = env::var("SHMFERRY_BENCH_ROLE") {
        let dir = env::current_dir()?;
        let method =
            methods.into_iter().find(|method| method.name == name).expect("a method's name");
        return (method.serve)(&dir);
    }
    let dir = tempfile::tempdir()?;
    furnish(dir.path())?;
    let mut contenders = Vec::new();
    let rounds = option("--rounds").next().map_or(ROUNDS, |count| count.parse().expect("a number"));
    let only: Vec<String> = option("--only").collect();
    let is_wanted = |name: &str| {
        let is_named = only.is_empty() || only.iter().any(|word| name.contains(word));
        is_named || report::ANCHORS.contains(&name)
    };
    for method in methods.into_iter().filter(|method| is_wanted(method.name)) {
        contenders.push(Contender::start(method, dir.path())?);
    }
    for contender in &mut contenders {
        contender.verify(dir.path())?;
    }
    println!("every method brings every byte; timing {rounds} rounds");
    for _ in 0..rounds {
        for file in 0..FILES.len() {
            for contender in &mut contenders {
                contender.time(file)?;
            }
            for contender in &mut contenders {
                contender.time_handing_over(file)?;
            }
        }
    }
    let finished: io::Result<Vec<report::Result>> =
        contenders.into_iter().map(Contender::finish).collect();
    let results = finished?;
    print!("{}", report::table(&results));
    if let Some(directory) = option("--write").next() {
        report::write(Path::new(&directory), command, &results)?;
    }
    Ok(())
}

/// The values of a command-line option, as often as it is given.
fn option(name: &'static str) -> impl Iterator<Item = String> {
    env::args()
        .zip(env::args().skip(1))
        .filter(move |(option, _)| option == name)
        .map(|pair| pair.1)
}

/// A method with its server process.
struct Contender {
    name: &'static str,
    client: Box<dyn Client>,
    server: Child,
    /// Seconds a fetch, of each file, by round.
    rounds: [Vec<f64>; FILES.len()],
    /// Processor seconds of the server for a fetch, of each file, by round.
    processor: [Vec<f64>; FILES.len()],
    /// Median seconds until a file was readable and not touched, by round, for some methods.
    handed_over: [Vec<f64>; FILES.len()],
    /// Every fetch of the smallest file, in seconds.
    smallest: Vec<f64>,
}

impl Contender {
    fn start(method: Method, dir: &Path) -> io::Result<Contender> {
        let place = dir.join(method.name.replace([' ', '+', ','], "-"));
        std::fs::create_dir(&place)?;
        let mut server = Command::new(env::current_exe()?)
            .env("SHMFERRY_BENCH_ROLE", method.name)
            .current_dir(&place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let client = (method.connect)(&place, &mut server)?;
        Ok(Contender {
            name: method.name,
            client,
            server,
            rounds: Default::default(),
            processor: Default::default(),
            handed_over: Default::default(),
            smallest: Vec::new(),
        })
    }

    fn verify(&mut self, dir: &Path) -> io::Result<()> {
        for (file, &(len, _)) in FILES.iter().enumerate() {
            let source = open(dir, file)?;
            let mut at = 0;
            let mut expected = Vec::new();
            self.client.fetch(file, &mut |bytes| {
                expected.resize(bytes.len(), 0);
                source.read_exact_at(&mut expected, at).expect("a file of our own");
                assert!(bytes.copy() == expected, "{}: wrong bytes at {at} of {len}", self.name);
                at += bytes.len() as u64;
            })?;
            assert_eq!(at, len, "{}: a file cut short", self.name);
        }
        self.client.rest()
    }

    fn time(&mut self, file: usize) -> io::Result<()> {
        let times = FILES[file].1;
        let mut seen = 0;
        let before = processor::seconds(self.server.id());
        let begin = Instant::now();
        for _ in 0..times {
            let start = Instant::now();
            self.client.fetch(file, &mut |bytes| {
                seen += bytes.len() as u64;
                bytes.touch();
            })?;
            if file == 0 {
                self.smallest.push(start.elapsed().as_secs_f64());
            }
        }
        self.rounds[file].push(begin.elapsed().as_secs_f64() / times as f64);
        assert_eq!(seen, FILES[file].0 * times as u64, "{}: a file cut short", self.name);
        self.client.rest()?;
        // A thread's time is accounted for when it sleeps, or at the next tick.
        thread::sleep(Duration::from_millis(1));
        let after = processor::seconds(self.server.id());
        self.processor[file].push((after - before) / times as f64);
        Ok(())
    }

    /// Times the way from the request to bytes that can be read. The method that others are held
    /// against fetches the smallest file instead, whichever is asked for.
    fn time_handing_over(&mut self, file: usize) -> io::Result<()> {
        let mut times = Vec::with_capacity(HANDED_OVER);
        for _ in 0..HANDED_OVER {
            let start = Instant::now();
            if self.name == report::STREAMED {
                self.client.fetch(0, &mut |bytes| bytes.touch())?;
            } else if !self.client.hand_over(file)? {
                return Ok(());
            }
            times.push(start.elapsed().as_secs_f64());
        }
        self.handed_over[file].push(report::median(&times));
        self.client.rest()
    }

    /// Lets the server end by itself, since its client is gone: so that it leaves nothing behind.
    fn finish(mut self) -> io::Result<report::Result> {
        drop(self.client);
        drop(self.server.stdin.take());
        self.server.wait()?;
        Ok(report::Result {
            name: self.name,
            rounds: self.rounds,
            processor: self.processor,
            handed_over: self.handed_over,
            smallest: self.smallest,
        })
    }
}

/// Makes the files, and has them in the page cache.
fn furnish(dir: &Path) -> io::Result<()> {
    for (file, &(len, _)) in FILES.iter().enumerate() {
        let mut state = 0x9e37_79b9_7f4a_7c15 ^ len;
        let mut out = io::BufWriter::with_capacity(1 << 20, File::create(path(dir, file))?);
        for _ in 0..len / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.write_all(&state.to_ne_bytes())?;
        }
        out.flush()?;
        io::copy(&mut open(dir, file)?, &mut io::sink())?;
    }
    Ok(())
}

fn path(dir: &Path, file: usize) -> PathBuf {
    dir.join(format!("file-{file}"))
}

fn open(dir: &Path, file: usize) -> io::Result<File> {
    File::open(path(dir, file))
}

/// All files, as a server has them open; its directory is beneath that of the files.
pub fn files_beside(place: &Path) -> io::Result<Vec<File>> {
    let dir = place.parent().expect("made beneath the files' directory");
    (0..FILES.len()).map(|file| open(dir, file)).collect()
}

/// Tells the client that the server is ready.
pub fn say_ready() -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(b"!")?;
    stdout.flush()
}

/// Waits until the server says so.
pub fn await_ready(server: &mut Child) -> io::Result<()> {
    let stdout = server.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut [0])
}

/// More than anything here takes.
const TIMEOUT: Duration = Duration::from_secs(60);
