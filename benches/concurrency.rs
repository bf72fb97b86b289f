//! Many transfers at once, into memory and on to TCP as a proxy does: throughput, latency, fairness, processor
//! time, context switches and memory, by the number of clients.
//!
//! `cargo bench --bench concurrency`; with `-- --write DIRECTORY`, `concurrency.md` and its plot are written there.
//! Each server is another process; the clients are threads of this one. Methods are interleaved, round by round.

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
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use shmferry::Deadline;
use shmferry::channel::{Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool, SharedByte};
use shmferry::workers::WorkerPool;

const CLIENTS: [usize; 4] = [1, 4, 16, 64];
const ROUNDS: usize = 5;
/// How long each method is measured in a round.
const SPAN: Duration = Duration::from_millis(300);
/// Bytes of the file that everybody fetches.
const LEN: u64 = 1 << 20;
const BUFFER: usize = 256 << 10;
/// Jobs at work at once in our server.
const WORKERS: usize = 8;
const METHODS: [&str; 4] = [LOCAL, SENDFILE, "shmferry, socket", "shmferry, message queue"];
const LOCAL: &str = "local pread";
const SENDFILE: &str = "Unix socket, sendfile";

fn main() -> io::Result<()> {
    if let Ok(role) = env::var("SHMFERRY_BENCH_ROLE") {
        return serve(&role, &env::current_dir()?);
    }
    let dir = tempfile::tempdir()?;
    let bytes: Vec<u8> = (0..LEN).map(|i| ((i * 31) >> 5) as u8).collect();
    fs::write(dir.path().join("file"), &bytes)?;
    let drain = Other::start("drain", dir.path())?;
    let drain_port = fs::read_to_string(dir.path().join("port"))?.parse().expect("a port");
    let mut contenders = Vec::new();
    for name in METHODS {
        contenders.push(Contender::start(name, dir.path())?);
    }
    for contender in &contenders {
        let mut seen = Vec::new();
        contender.client()?.fetch(&mut Sink::Verify(&mut seen))?;
        assert!(seen == bytes, "{}: wrong bytes", contender.name);
    }
    let mut cells = Vec::new();
    for to_tcp in [false, true] {
        for clients in CLIENTS {
            let mut row: Vec<Cell> = contenders.iter().map(|_| Cell::default()).collect();
            for _ in 0..ROUNDS {
                for (contender, cell) in contenders.iter().zip(&mut row) {
                    cell.rounds.push(contender.measure(clients, to_tcp.then_some(drain_port))?);
                }
            }
            cells.push((to_tcp, clients, row));
        }
    }
    let memory: Vec<_> =
        contenders.iter().map(|contender| peak(&contender.server.0.id().to_string())).collect();
    let text = report(&cells, &memory);
    print!("{text}");
    let mut arguments = env::args().skip_while(|argument| argument != "--write");
    if let Some(directory) = arguments.nth(1) {
        fs::write(Path::new(&directory).join("concurrency.md"), text)?;
        fs::write(Path::new(&directory).join("concurrency.svg"), plot(&cells))?;
    }
    contenders.into_iter().for_each(|contender| contender.server.end());
    drain.end();
    Ok(())
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
    Socket(Shared<Memfd>),
    Queue(Shared<Named>),
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
    /// Context switches a fetch, here and in the server.
    switches: f64,
}

#[derive(Default)]
struct Cell {
    rounds: Vec<Round>,
}

impl Contender {
    fn start(name: &'static str, dir: &Path) -> io::Result<Contender> {
        let place = dir.join(name.replace([' ', ','], "-"));
        fs::create_dir(&place)?;
        let server = Other::start(name, &place)?;
        let way = match name {
            LOCAL => Way::Local(dir.join("file")),
            SENDFILE => Way::Sendfile(place.join("socket")),
            "shmferry, socket" => {
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
            Way::Local(path) => Box::new(Local(File::open(path)?, vec![0; BUFFER])),
            Way::Sendfile(path) => Box::new(Stream(UnixStream::connect(path)?, vec![0; BUFFER])),
            Way::Socket(shared) => Box::new(Ours(Arc::clone(shared))),
            Way::Queue(shared) => Box::new(Ours(Arc::clone(shared))),
        })
    }

    fn measure(&self, clients: usize, drain: Option<u16>) -> io::Result<Round> {
        // Both sides' threads live whenever costs are looked at: those of the dead are not to be had.
        let barrier = Barrier::new(clients + 1);
        let client = || {
            let ready = self.client().and_then(|mut client| {
                client.fetch(&mut Sink::Touch)?;
                let tcp = drain.map(|port| TcpStream::connect(("127.0.0.1", port))).transpose()?;
                Ok((client, tcp.map_or(Sink::Touch, Sink::Tcp)))
            });
            barrier.wait();
            barrier.wait();
            let fetched = ready.and_then(|(mut client, mut sink)| {
                let (begin, mut times) = (Instant::now(), Vec::new());
                while begin.elapsed() < SPAN {
                    let start = Instant::now();
                    client.fetch(&mut sink)?;
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
            speed: count * LEN as f64 / took,
            slowest: slowest / (count / clients as f64),
            times,
            processor: (after.0 - before.0) / (count * LEN as f64 / (1u64 << 30) as f64),
            switches: switches(&before.1, &after.1) as f64 / count,
        })
    }

    /// Processor seconds and context switches so far, of this process and the server.
    fn costs(&self) -> (f64, Switches) {
        let (mut ours, theirs) = (costs("self"), costs(&self.server.0.id().to_string()));
        ours.1.extend(theirs.1);
        (ours.0 + theirs.0, ours.1)
    }
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

fn costs(process: &str) -> (f64, Switches) {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // After the name in parentheses: user and system time are the 12th and 13th, in hundredths of a second.
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks =
        |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of = |status: &str| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    let switches = threads.filter_map(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        Some((thread.file_name(), of(&status)))
    });
    ((ticks(11) + ticks(12)) / 100.0, switches.collect())
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
    fn fetch(&mut self, sink: &mut Sink<'_>) -> io::Result<()>;
}

struct Local(File, Vec<u8>);

impl Client for Local {
    fn fetch(&mut self, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut at = 0;
        while at < LEN {
            let read = self.0.read_at(&mut self.1, at)?;
            sink.take(&self.1[..read])?;
            at += read as u64;
        }
        Ok(())
    }
}

struct Stream(UnixStream, Vec<u8>);

impl Client for Stream {
    fn fetch(&mut self, sink: &mut Sink<'_>) -> io::Result<()> {
        self.0.write_all(b"!")?;
        let mut left = LEN as usize;
        while left > 0 {
            let most = left.min(BUFFER);
            let read = self.0.read(&mut self.1[..most])?;
            sink.take(&self.1[..read])?;
            left -= read;
        }
        Ok(())
    }
}

struct Ours<B: Backing>(Shared<B>);

impl<B: Backing> Client for Ours<B> {
    fn fetch(&mut self, sink: &mut Sink<'_>) -> io::Result<()> {
        let (pool, requester) = &*self.0;
        let (request, transfer) = pool.lease(Deadline::NEVER)?.request("file")?;
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
        LOCAL => ready()?,
        SENDFILE => {
            let listener = UnixListener::bind(place.join("socket"))?;
            let file = File::open("../file")?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let file = file.try_clone().expect("a descriptor");
                    thread::spawn(move || send_by_sendfile(stream, &file));
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
        "shmferry, socket" => {
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

fn send_by_sendfile(mut stream: UnixStream, file: &File) {
    while stream.read(&mut [0]).is_ok_and(|read| read > 0) {
        let mut at = 0;
        while at < LEN {
            let left = (LEN - at) as usize;
            if rustix::fs::sendfile(stream.as_fd(), file, Some(&mut at), left).is_err() {
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
    let file = File::open("../file")?;
    let queue = Arc::new(queue);
    let taking = Arc::clone(&queue);
    let next = move || taking.recv(Deadline::NEVER).ok();
    let workers = WorkerPool::start("bench", WORKERS, next, move |transfer| {
        // A client that left early is no failure of ours.
        let _ = transfer.accept(LEN).and_then(|sending| sending.send_file(&file));
    })?;
    ready()?;
    until_told()?;
    queue.close();
    workers.join(Deadline::NEVER);
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
}

fn report(cells: &[(bool, usize, Vec<Cell>)], memory: &[u64]) -> String {
    let mut text = format!(
        "# Many transfers at once\n\n\
        For users who compare speeds.\n\n\
        Written by `cargo bench --bench concurrency -- --write docs`, from one run: a file of 1 MiB, {ROUNDS} rounds of\n\
        {} ms for each method and number of clients, interleaved; medians over the rounds. The clients are threads\n\
        of one process; shmferry: one pool of 8 segments of 2 MiB in 8 slots, {WORKERS} workers; the Unix socket: a connection\n\
        and a server thread for each client; the buffers have {} KiB. `slowest` is what the slowest client got, as a\n\
        part of the mean. Processor time and context switches are those of both processes (without the drain's).\n\n\
        ![throughput by clients](concurrency.svg)\n",
        SPAN.as_millis(),
        BUFFER >> 10,
    );
    for (to_tcp, clients, row) in cells {
        let to = if *to_tcp { "on to TCP" } else { "into memory" };
        let _ = write!(
            text,
            "\n### {clients} at once, {to}\n\n\
            | method | MiB/s | × local | × Unix socket | p50 (µs) | p99 (µs) | p99 / p50 | slowest | processor s/GiB | \
            switches a fetch |\n|{}\n",
            " --- |".repeat(10)
        );
        for (name, cell) in METHODS.iter().zip(row) {
            let against = |anchor: usize| {
                let pairs = row[anchor].rounds.iter().zip(&cell.rounds);
                median(pairs.map(|(anchor, ours)| ours.speed / anchor.speed))
            };
            let part = |part: usize| {
                cell.median(|round| round.times[round.times.len() * part / 100] * 1e6)
            };
            let _ = writeln!(
                text,
                "| {name} | {:.0} | {:.2} | {:.2} | {:.0} | {:.0} | {:.1} | {:.2} | {:.2} | {:.1} |",
                cell.median(|round| round.speed) / (1 << 20) as f64,
                against(0),
                against(1),
                part(50),
                part(99),
                part(99) / part(50),
                cell.median(|round| round.slowest),
                cell.median(|round| round.processor),
                cell.median(|round| round.switches),
            );
        }
    }
    text.push_str("\n### Most memory that a server had resident, segments included (MiB)\n\n| method | MiB |\n| --- | --- |\n");
    for (name, peak) in METHODS.iter().zip(memory).skip(1) {
        let _ = writeln!(text, "| {name} | {peak} |");
    }
    let _ = writeln!(
        text,
        "\nThe client process, all methods together, with two pools of 16 MiB and 64 threads with buffers: {} MiB.",
        peak("self")
    );
    text
}

/// Throughput by clients, into memory, a line for each method.
fn plot(cells: &[(bool, usize, Vec<Cell>)]) -> String {
    let [width, height, left, top] = [420.0, 300.0, 80.0, 20.0];
    let rows: Vec<_> = cells.iter().filter(|(to_tcp, ..)| !to_tcp).collect();
    let speeds =
        |method: usize| rows.iter().map(move |(_, _, row)| row[method].median(|round| round.speed));
    let most = (0..METHODS.len()).flat_map(speeds).fold(0.0, f64::max);
    let x = |i: usize| left + width * i as f64 / (CLIENTS.len() - 1) as f64;
    let y = |speed: f64| top + height * (1.0 - speed / most);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        left + width + 200.0,
        top + height + 40.0,
    );
    for part in 0..=4 {
        let speed = most * f64::from(part) / 4.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{1}\" y2=\"{1}\" stroke=\"#ddd\"/>\
             <text x=\"{2}\" y=\"{1}\" text-anchor=\"end\">{3:.0} MiB/s</text>",
            left + width,
            y(speed),
            left - 4.0,
            speed / (1 << 20) as f64,
        );
    }
    for (i, clients) in CLIENTS.iter().enumerate() {
        let (at, below) = (x(i), top + height + 18.0);
        let _ =
            writeln!(svg, "<text x=\"{at}\" y=\"{below}\" text-anchor=\"middle\">{clients}</text>");
    }
    for (i, name) in METHODS.iter().enumerate() {
        let colour = format!("hsl({}, 70%, 40%)", i * 360 / METHODS.len());
        let points: Vec<String> = speeds(i)
            .enumerate()
            .map(|(at, speed)| format!("{:.1},{:.1}", x(at), y(speed)))
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
