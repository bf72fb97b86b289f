//! `getfile bench`: measures a server under load, if wished against a plain copy loop.

use std::{
    array,
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Component, Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::value_parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    Address, Client, Connection, Failure,
    protocol::{Dialect, ParsedRequest, Reply, check_path, encode_reply, parse_request},
};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    connection: Connection,
    /// What to ask for: one path a line, asked for in turn
    #[arg(short, long, value_name = "FILE")]
    workload: PathBuf,
    /// Clients that ask at the same time
    #[arg(short, long, default_value_t = 8, value_parser = value_parser!(u64).range(1..=1024))]
    threads: u64,
    /// Requests in total, one connection each; per round with --against-unix
    #[arg(short, long, default_value_t = 1000, value_parser = value_parser!(u64).range(1..))]
    requests: u64,
    /// Write a row for each request: path, status, bytes, microseconds
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// A file that is not found is no failure
    #[arg(long)]
    allow_missing: bool,
    /// Measure also, in alternating rounds, a plain copy loop that serves the files beneath ROOT
    /// over a Unix socket
    #[arg(long, value_name = "ROOT")]
    against_unix: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct ServeOptions {
    #[arg(long, default_value_t = Dialect::Spec)]
    dialect: Dialect,
    root: PathBuf,
}

/// Measures and prints the report. True if every request was answered as hoped.
pub fn run(options: &Options) -> Result<bool, String> {
    let paths = read_workload(&options.workload)?;
    let mut sides = vec![Side::new("server", Client::resolve(&options.connection)?)];
    // Before the work: a wrong name should not cost an hour's measurements.
    let csv = options.csv.as_deref().map(|path| File::create(path).map_err(because("write", path)));
    let csv = csv.transpose()?;
    // Each client holds a descriptor, and the server to compare with two for it. Too few will show.
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let plain = options.against_unix.as_deref();
    let plain =
        plain.map(|root| PlainServer::start(root, options.connection.dialect)).transpose()?;
    if let Some(plain) = &plain {
        let address = Address::Unix(plain.socket.clone());
        sides.push(Side::new("unix", Client { connection: &options.connection, address }));
    }
    for _ in 0..if plain.is_some() { 3 } else { 1 } {
        for side in &mut sides {
            let measured = side.measure(&paths, options);
            measured.map_err(|error| format!("cannot start the clients: {error}"))?;
        }
    }
    drop(plain);

    let mut report: String = sides.iter().map(Side::report).collect();
    if let [server, unix] = &*sides {
        let (server, unix) = (server.medians(), unix.medians());
        let [requests, bytes, latency] = array::from_fn(|figure| server[figure] / unix[figure]);
        report += &format!(
            "server / unix: {requests:.3} in requests/s, {bytes:.3} in bytes/s, \
             {latency:.3} in median latency\n"
        );
    }
    let printed = io::stdout().write_all(report.as_bytes());
    printed.map_err(|error| format!("cannot print the report: {error}"))?;
    if let (Some(path), Some(file)) = (&options.csv, csv) {
        write_csv(file, &sides, &paths).map_err(because("write", path))?;
    }
    let tolerated = |status| status == "ok" || (status == "not_found" && options.allow_missing);
    Ok(sides.iter().flat_map(|side| &side.samples).all(|sample| tolerated(sample.status())))
}

fn read_workload(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let text = fs::read(path).map_err(because("read", path))?;
    let mut paths = Vec::new();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if !line.is_empty() {
            check_path(line).map_err(|why| format!("{}:{}: {why}", path.display(), index + 1))?;
            paths.push(line.to_vec());
        }
    }
    if paths.is_empty() { Err(format!("{}: no path in it", path.display())) } else { Ok(paths) }
}

/// A server, and what was measured of it.
struct Side<'a> {
    name: &'static str,
    client: Client<'a>,
    /// Of all rounds.
    samples: Vec<Sample>,
    rounds: Vec<Figures>,
}

/// Of one round: answered requests a second, bytes a second, median latency in seconds.
type Figures = [f64; 3];

/// One request.
struct Sample {
    /// Which of its round: it says which path.
    index: u64,
    /// The body's length.
    outcome: Result<u64, Failure>,
    /// From before connecting to the last byte of the body.
    latency: Duration,
}

impl Sample {
    fn status(&self) -> &'static str {
        match &self.outcome {
            Ok(_) => "ok",
            Err(Failure::Refused(Reply::FileNotFound)) => "not_found",
            Err(_) => "failed",
        }
    }
}

impl<'a> Side<'a> {
    fn new(name: &'static str, client: Client<'a>) -> Self {
        Self { name, client, samples: Vec::new(), rounds: Vec::new() }
    }

    /// Runs one round.
    fn measure(&mut self, paths: &[Vec<u8>], options: &Options) -> io::Result<()> {
        let next = AtomicU64::new(0);
        let ask_in_turn = || {
            let mut buffer = vec![0; 128 << 10];
            let mut samples = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= options.requests {
                    return samples;
                }
                let started = Instant::now();
                let body = self.client.request(path_of(index, paths), &mut buffer);
                let outcome = body.and_then(|body| body.copy_to(|_| Ok(())));
                samples.push(Sample { index, outcome, latency: started.elapsed() });
            }
        };
        let started = Instant::now();
        let mut samples = thread::scope(|scope| {
            let spawn = |_| thread::Builder::new().spawn_scoped(scope, ask_in_turn);
            let threads: Vec<_> = (0..options.threads).map(spawn).collect::<io::Result<_>>()?;
            let samples = threads.into_iter().flat_map(|thread| match thread.join() {
                Ok(samples) => samples,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            io::Result::Ok(samples.collect::<Vec<_>>())
        })?;
        let seconds = started.elapsed().as_secs_f64();
        samples.sort_unstable_by_key(|sample| sample.index);
        let latencies = latencies(&samples);
        let bytes: u64 = samples.iter().flat_map(|sample| &sample.outcome).sum();
        let median = percentile(&latencies, 50).as_secs_f64();
        self.rounds.push([latencies.len() as f64 / seconds, bytes as f64 / seconds, median]);
        self.samples.append(&mut samples);
        Ok(())
    }

    /// Of each figure, over the rounds.
    fn medians(&self) -> Figures {
        array::from_fn(|figure| {
            let mut values: Vec<_> = self.rounds.iter().map(|round| round[figure]).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        })
    }

    fn report(&self) -> String {
        let mut counts = BTreeMap::from([("ok", 0), ("not_found", 0), ("failed", 0)]);
        let mut failures = BTreeMap::<String, u64>::new();
        for sample in &self.samples {
            *counts.entry(sample.status()).or_default() += 1;
            if let (Err(failure), "failed") = (&sample.outcome, sample.status()) {
                *failures.entry(failure.to_string()).or_default() += 1;
            }
        }
        let [requests, bytes, _] = self.medians();
        let latencies = latencies(&self.samples);
        let [min, p50, p90, p99, max] =
            [0, 50, 90, 99, 100].map(|percent| percentile(&latencies, percent).as_micros());
        let mut report = format!(
            "{}: {} ok, {} not found, {} failed\n  \
             {requests:.1} requests/s, {:.2} MiB/s ({bytes:.0} bytes/s)\n  \
             latency in us: min {min}, p50 {p50}, p90 {p90}, p99 {p99}, max {max}\n",
            self.name,
            counts["ok"],
            counts["not_found"],
            counts["failed"],
            bytes / f64::from(1 << 20),
        );
        if self.rounds.len() > 1 {
            let rounds: Vec<_> =
                self.rounds.iter().map(|round| format!("{:.1}", round[0])).collect();
            report += &format!("  medians of rounds with {} requests/s\n", rounds.join(", "));
        }
        for (failure, times) in failures.iter().take(5) {
            report += &format!("  {times} times: {failure}\n");
        }
        report
    }
}

fn path_of(index: u64, paths: &[Vec<u8>]) -> &[u8] {
    &paths[(index % paths.len() as u64) as usize]
}

/// The latencies of answered requests, in order: a refused connection is no speed.
fn latencies(samples: &[Sample]) -> Vec<Duration> {
    let answered = samples.iter().filter(|sample| sample.status() != "failed");
    let mut latencies: Vec<_> = answered.map(|sample| sample.latency).collect();
    latencies.sort_unstable();
    latencies
}

/// The least of `sorted` that so many percent do not exceed (nearest rank); zero if there is none.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// Writes a row for each request; with several sides it ends with the one that was asked.
fn write_csv(file: File, sides: &[Side], paths: &[Vec<u8>]) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let several = sides.len() > 1;
    writeln!(file, "path,status,bytes,microseconds{}", if several { ",side" } else { "" })?;
    for side in sides {
        let end = if several { format!(",{}", side.name) } else { String::new() };
        for sample in &side.samples {
            let bytes = match sample.outcome {
                Ok(bytes) | Err(Failure::Length { received: bytes, .. }) => bytes,
                Err(_) => 0,
            };
            file.write_all(&quoted(path_of(sample.index, paths)))?;
            writeln!(file, ",{},{bytes},{}{end}", sample.status(), sample.latency.as_micros())?;
        }
    }
    file.flush()
}

/// A field as RFC 4180 has it.
fn quoted(field: &[u8]) -> Vec<u8> {
    if !field.contains(&b',') && !field.contains(&b'"') {
        return field.to_vec();
    }
    let doubled = field.split(|byte| *byte == b'"').collect::<Vec<_>>().join(&b"\"\""[..]);
    [b"\"", &*doubled, b"\""].concat()
}

/// The server measured against: this program again, as a child. It lives until its standard input
/// closes, so it cannot outlive its parent, however that ends.
struct PlainServer {
    child: Child,
    socket: PathBuf,
}

impl PlainServer {
    fn start(root: &Path, dialect: Dialect) -> Result<Self, String> {
        let spawn = |program| {
            Command::new(program)
                .args(["serve-unix", "--dialect", &dialect.to_string(), "--"])
                .arg(root)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .process_group(0) // a Ctrl-C is for the parent; the child has to clean up
                .spawn()
        };
        let child = env::current_exe().and_then(spawn);
        let child = child.map_err(because("start a server for", root))?;
        let mut server = Self { child, socket: PathBuf::new() };
        // It says where it listens once it does; if it cannot, it says why on standard error.
        let mut socket = Vec::new();
        if let Some(stdout) = &mut server.child.stdout {
            let said = BufReader::new(stdout).read_until(b'\n', &mut socket);
            said.map_err(because("hear from the server for", root))?;
        }
        let socket =
            socket.strip_suffix(b"\n").ok_or("the server to compare with did not start")?;
        server.socket = PathBuf::from(OsStr::from_bytes(socket));
        Ok(server)
    }
}

impl Drop for PlainServer {
    fn drop(&mut self) {
        // Nothing to be done if these fail, and nothing to lose: it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
        let _ = self.socket.parent().map(fs::remove_dir);
    }
}

/// Serves the files beneath a directory on a socket in a fresh directory of its own, says where,
/// and ends with its standard input.
pub fn serve_unix(options: &ServeOptions) -> Result<bool, String> {
    serve_until_end_of_input(options).map_err(because("serve", &options.root))
}

fn serve_until_end_of_input(options: &ServeOptions) -> io::Result<bool> {
    if !options.root.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let private = Permissions::from_mode(0o700);
    let directory = tempfile::Builder::new().prefix("getfile-").permissions(private).tempdir()?;
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    let (root, dialect) = (Arc::<Path>::from(&*options.root), options.dialect);
    thread::Builder::new().spawn(move || {
        for stream in listener.incoming().flatten() {
            let root = root.clone();
            // Without a thread for it the connection closes; the client reports that.
            let _ = thread::Builder::new().spawn(move || answer(stream, &root, dialect));
        }
    })?;
    io::stdout().write_all(&[socket.as_os_str().as_bytes(), b"\n"].concat())?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    directory.close()?;
    Ok(true)
}

/// The plain copy loop: one buffer, which the header shares with the start of the file.
fn answer(mut stream: UnixStream, root: &Path, dialect: Dialect) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut filled = 0;
    let path = loop {
        match parse_request(&buffer[..filled]) {
            ParsedRequest::Complete { path } => break Some(path.to_vec()),
            ParsedRequest::Invalid(_) => break None,
            ParsedRequest::Incomplete => match stream.read(&mut buffer[filled..])? {
                0 => break None,
                read => filled += read,
            },
        }
    };
    let opened = path.map(|path| open_beneath(root, &path));
    let header = encode_reply(
        match &opened {
            None => Reply::Invalid,
            Some(Ok((_, len))) => Reply::Ok { len: *len },
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => Reply::FileNotFound,
            Some(Err(_)) => Reply::Error,
        },
        dialect,
    );
    let Some(Ok((mut file, mut left))) = opened else {
        return stream.write_all(&header);
    };
    buffer[..header.len()].copy_from_slice(&header);
    let mut filled = header.len();
    loop {
        let room = left.min((buffer.len() - filled) as u64) as usize;
        let read = file.read(&mut buffer[filled..filled + room])?;
        stream.write_all(&buffer[..filled + read])?;
        left -= read as u64;
        filled = 0;
        if left == 0 || read == 0 {
            return Ok(());
        }
    }
}

/// A regular file and its length.
fn open_beneath(root: &Path, path: &[u8]) -> io::Result<(File, u64)> {
    let path = Path::new(OsStr::from_bytes(path));
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.components().any(|part| part == Component::ParentDir) || !root.join(path).is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(root.join(path))?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

fn because(attempt: &str, path: &Path) -> impl FnOnce(io::Error) -> String {
    move |error| format!("cannot {attempt} {}: {error}", path.display())
}
