//! The main job in one command: builds and starts both programs, fetches files through them, checks
//! every byte, tells how it went, and leaves nothing behind.
//!
//! `cargo run --release --bin demo`, and `-- --stay` to keep it running.

mod child;
mod running;
mod samples;

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use child::{Child, Interrupt};
use clap::{Parser, Subcommand};
use running::Running;
use samples::Sample;
use shmferry_examples::program::signals_that_end;

/// Start simplecached and webproxy, fetch files through them, and check every byte.
#[derive(Parser)]
struct Options {
    /// Keep both programs running, and a web server before the cache, until interrupted
    #[arg(long)]
    stay: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// Become a program that ends with the demo
    #[command(name = child::PART, hide = true)]
    ChildOf {
        parent: u32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        program: Vec<OsString>,
    },
}

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match &options.part {
        Some(Part::ChildOf { parent, program }) => {
            child::become_child(*parent, program).map(|never: Infallible| match never {})
        }
        None => interruptible(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With standard error gone there is nobody left to tell; the exit code still says it.
            let _ = writeln!(io::stderr(), "demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the demo. A signal has it clear up, and then ends it as if it had not been caught.
fn interruptible(options: &Options) -> Result<()> {
    let interrupt =
        Interrupt::install().map_err(|error| format!("cannot catch signals: {error}"))?;
    let outcome = run(options, &interrupt);
    if let (Err(_), Some(signal)) = (&outcome, interrupt.signal()) {
        let ended = signal_hook::low_level::emulate_default_handler(signal);
        ended.map_err(|error| format!("cannot end by the signal {signal}: {error}"))?;
    }
    outcome
}

fn run(options: &Options, interrupt: &Interrupt) -> Result<()> {
    tell("building what is not built yet")?;
    let programs = build(options.stay, interrupt)?;
    let dir =
        tempfile::Builder::new().prefix("shmferry-demo-").tempdir().map_err(|e| e.to_string())?;
    let samples = samples::make(&dir.path().join("files"), interrupt)?;
    let manifest = manifest(dir.path(), &samples)?;
    let socket = dir.path().join("run/cache.sock");
    let address = format!("unix:{}", socket.display());

    let args = ["-c".as_ref(), manifest.as_os_str(), "--listen".as_ref(), address.as_ref()];
    let mut cache = Running::start(&programs.join("simplecached"), &args, interrupt)?;
    tell(&format!("simplecached (process {}) {}", cache.pid(), cache.ready()?))?;
    let args = ["-p", "0", "--listen", HOST, "--cache", &address, "-z", "524288"];
    let args = args.map(AsRef::as_ref);
    let mut proxy = Running::start(&programs.join("webproxy"), &args, interrupt)?;
    let chosen = proxy.ready()?;
    tell(&format!("webproxy     (process {}) {chosen}\n", proxy.pid()))?;

    let getfile = GetFile { program: programs.join("getfile"), port: port_of(&chosen)?, interrupt };
    tell(&format!("{:<28} {:>12} {:>10}   what came", "file", "bytes", "ms"))?;
    for sample in &samples {
        tell(&getfile.fetch(sample, &dir.path().join("fetched"))?)?;
    }
    tell(&getfile.fetch_missing()?)?;

    if options.stay {
        let listen = format!("{HOST}:0");
        let args = ["--listen", &listen, "--cache", &address].map(AsRef::as_ref);
        let mut web = Running::start(&programs.join(WEB), &args, interrupt)?;
        let web_port = port_of(&web.ready()?)?;
        getfile.explain(&samples[0].key, web_port)?;
        interrupt.wait();
        web.end("hits=")?;
    }
    let ends = [proxy.end("requests=")?, cache.end("requests=")?];
    tell(&format!("\nwebproxy     {}\nsimplecached {}", ends[0], ends[1]))?;
    if socket.parent().is_some_and(Path::exists) {
        return Err(format!("{} is still there", socket.display()));
    }
    dir.close().map_err(|error| format!("cannot remove the demo's files: {error}"))?;
    tell("\nevery byte as it was; both programs ended, and nothing is left behind")?;
    tell("to see the pictures in a browser: cargo run --release --bin demo -- --stay")
}

/// Prints a line. Where there is no one to read it any more, the demo ends, and clears up.
fn tell(line: &str) -> Result<()> {
    writeln!(io::stdout(), "{line}").map_err(|error| format!("cannot print: {error}"))
}

/// Builds the programs in the profile that the demo itself was built in; says where they are.
fn build(with_web: bool, interrupt: &Interrupt) -> Result<PathBuf> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    let programs = here.parent().ok_or("the demo has no directory")?.to_owned();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = child::command(cargo.as_ref())?;
    build.args([
        "build",
        "--quiet",
        "--manifest-path",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"),
    ]);
    build.args(["--bin", "simplecached", "--bin", "webproxy", "--bin", "getfile"]);
    if with_web {
        build.args(["--bin", WEB]);
    }
    if programs.components().any(|part| part.as_os_str() == "release") {
        build.arg("--release");
    }
    // What `cargo run` says of this package would have some dependencies' build scripts run anew.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            build.env_remove(name);
        }
    }
    let mut built = Child::spawn(&mut build, interrupt)
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if built.wait()?.success() { Ok(programs) } else { Err("the programs do not build".to_owned()) }
}

fn manifest(dir: &Path, samples: &[Sample]) -> Result<PathBuf> {
    let path = dir.join("locals.txt");
    let lines: String =
        samples.iter().map(|s| format!("{} {}\n", s.key, s.path.display())).collect();
    fs::write(&path, lines).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// The port in a line such as `listening on [::]:25362: …`.
fn port_of(line: &str) -> Result<u16> {
    let address =
        line.split("listening on ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let port = address.map(|a| a.trim_end_matches([':', ','])).and_then(|a| a.rsplit(':').next());
    port.and_then(|port| port.parse().ok()).ok_or_else(|| format!("no port in {line:?}"))
}

/// The client, and the proxy that it asks.
struct GetFile<'a> {
    program: PathBuf,
    port: u16,
    interrupt: &'a Interrupt,
}

impl GetFile<'_> {
    /// Runs it to its end; returns what it says on standard error.
    fn run(&self, output: &Path, path: &str) -> Result<(ExitStatus, String)> {
        let mut command = child::command(&self.program)?;
        command.args(["-s", HOST, "-p", &self.port.to_string(), "-o"]).arg(output).arg(path);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = Child::spawn(&mut command, self.interrupt)
            .map_err(|error| format!("cannot run getfile: {error}"))?;
        let status = child.wait()?;
        let mut said = String::new();
        if let Some(stderr) = &mut child.process.stderr {
            stderr.read_to_string(&mut said).map_err(|error| format!("getfile: {error}"))?;
        }
        Ok((status, said.trim().to_owned()))
    }

    /// Fetches one file, compares it, and says how that went.
    fn fetch(&self, sample: &Sample, to: &Path) -> Result<String> {
        let start = Instant::now();
        let (status, said) = self.run(to, &sample.key)?;
        let took = start.elapsed();
        if !status.success() {
            return Err(format!("{}: {said}", sample.key));
        }
        let what = sample.check(to)?;
        let took = took.as_secs_f64() * 1e3;
        Ok(format!("{:<28} {:>12} {took:>10.1}   {what}", sample.key, sample.len()))
    }

    fn fetch_missing(&self) -> Result<String> {
        let key = "/no/such/file";
        let (status, said) = self.run(Path::new("-"), key)?;
        if status.success() {
            return Err("a file that does not exist was served".to_owned());
        }
        Ok(format!("{key:<28} {:>12} {:>10}   refused, as it should be: {said}", "-", "-"))
    }

    fn explain(&self, key: &str, web_port: u16) -> Result<()> {
        let (program, port) = (self.program.display(), self.port);
        tell("\nstill running; in a browser:")?;
        tell(&format!("  http://{HOST}:{web_port}{key}"))?;
        tell("by hand, in another terminal:")?;
        tell(&format!("  {program} -s {HOST} -p {port} -o - {key}"))?;
        tell(&format!("  printf 'GETFILE GET {key}\\r\\n\\r\\n' | nc {HOST} {port}"))?;
        tell("interrupt with Ctrl-C to end")
    }
}

/// The web server.
const WEB: &str = "shmferry-http";

/// Where the proxy listens: for this machine alone.
const HOST: &str = "127.0.0.1";

/// How long a program may take to come up or to end.
const TIMEOUT: Duration = Duration::from_secs(20);
