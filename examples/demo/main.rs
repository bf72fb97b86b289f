//! The main job in one command: builds and starts both programs, fetches files through them, checks
//! every byte, tells how it went, and leaves nothing behind.
//!
//! `cargo run --release --example demo`, and `-- --stay` to keep it running.

mod running;
mod samples;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use running::Running;
use samples::Sample;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Start simplecached and webproxy, fetch files through them, and check every byte.
#[derive(Parser)]
struct Options {
    /// Keep both programs running, until interrupted
    #[arg(long)]
    stay: bool,
}

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let programs = build()?;
    let dir = tempfile::Builder::new().prefix("shmferry-demo-").tempdir().map_err(|e| e.to_string())?;
    let samples = samples::make(&dir.path().join("files"))?;
    let manifest = manifest(dir.path(), &samples)?;
    let socket = dir.path().join("run/cache.sock");
    let address = format!("unix:{}", socket.display());

    let mut cache = Running::start(
        Command::new(programs.join("simplecached")).arg("-c").arg(&manifest).args(["--listen", &address]),
    )?;
    println!("simplecached (process {}) {}", cache.pid(), cache.ready()?);
    let mut proxy = Running::start(
        Command::new(programs.join("webproxy")).args(["-p", "0", "--cache", &address, "-z", "524288"]),
    )?;
    let chosen = proxy.ready()?;
    println!("webproxy     (process {}) {chosen}\n", proxy.pid());
    let port = port_of(&chosen)?;

    let getfile = programs.join("getfile");
    println!("{:<28} {:>12} {:>10}   what came", "file", "bytes", "ms");
    for sample in &samples {
        println!("{}", fetch(&getfile, port, sample, &dir.path().join("fetched"))?);
    }
    println!("{}", fetch_missing(&getfile, port)?);

    if options.stay {
        stay(&getfile, port, &samples)?;
    }
    let ends = [proxy.end()?, cache.end()?];
    println!("\nwebproxy     {}\nsimplecached {}", ends[0], ends[1]);
    if socket.parent().is_some_and(Path::exists) {
        return Err(format!("{} is still there", socket.display()));
    }
    dir.close().map_err(|error| format!("cannot remove the demo's files: {error}"))?;
    println!("\nevery byte as it was; both programs ended, and nothing is left behind");
    Ok(())
}

/// Builds the programs in the profile that the demo itself was built in; says where they are.
fn build() -> Result<PathBuf> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    let programs = here.parent().ok_or("the demo has no directory")?.to_owned();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    build.args(["--example", "simplecached", "--example", "webproxy", "--example", "getfile"]);
    if programs.components().any(|part| part.as_os_str() == "release") {
        build.arg("--release");
    }
    // What `cargo run` says of this package would have some dependencies' build scripts run anew.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            build.env_remove(name);
        }
    }
    let built = build.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    if built.success() { Ok(programs) } else { Err("the programs do not build".to_owned()) }
}

fn manifest(dir: &Path, samples: &[Sample]) -> Result<PathBuf> {
    let path = dir.join("locals.txt");
    let lines: String = samples.iter().map(|s| format!("{} {}\n", s.key, s.path.display())).collect();
    fs::write(&path, lines).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// The port in a line such as `listening on [::]:25362: …`.
fn port_of(line: &str) -> Result<u16> {
    let address = line.split("listening on ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let port = address.map(|a| a.trim_end_matches([':', ','])).and_then(|a| a.rsplit(':').next());
    port.and_then(|port| port.parse().ok()).ok_or_else(|| format!("no port in {line:?}"))
}

/// Fetches one file with `getfile`, compares it, and says how that went.
fn fetch(getfile: &Path, port: u16, sample: &Sample, to: &Path) -> Result<String> {
    let start = Instant::now();
    let fetched = Command::new(getfile)
        .args(["-s", "localhost", "-p", &port.to_string(), "-o"])
        .arg(to)
        .arg(&sample.key)
        .output()
        .map_err(|error| format!("cannot run getfile: {error}"))?;
    let took = start.elapsed();
    if !fetched.status.success() {
        return Err(format!("{}: {}", sample.key, String::from_utf8_lossy(&fetched.stderr).trim()));
    }
    let what = sample.check(to)?;
    Ok(format!("{:<28} {:>12} {:>10.1}   {what}", sample.key, sample.len(), took.as_secs_f64() * 1e3))
}

fn fetch_missing(getfile: &Path, port: u16) -> Result<String> {
    let mut command = Command::new(getfile);
    command.args(["-s", "localhost", "-p", &port.to_string(), "-o", "-", "/no/such/file"]);
    let fetched = command.output().map_err(|error| format!("cannot run getfile: {error}"))?;
    if fetched.status.success() {
        return Err("a file that does not exist was served".to_owned());
    }
    let told = String::from_utf8_lossy(&fetched.stderr);
    Ok(format!("{:<28} {:>12} {:>10}   refused, as it should be: {}", "/no/such/file", "-", "-", told.trim()))
}

fn stay(getfile: &Path, port: u16, samples: &[Sample]) -> Result<()> {
    let key = &samples[0].key;
    println!("\nstill running; fetch by hand, in another terminal:");
    println!("  {} -p {port} -o - {key}", getfile.display());
    println!("  printf 'GETFILE GET {key}\\r\\n\\r\\n' | nc localhost {port}");
    println!("interrupt with Ctrl-C to end");
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| error.to_string())?;
    signals.forever().next();
    Ok(())
}

/// How long a program may take to come up or to end.
const PATIENCE: Duration = Duration::from_secs(20);
