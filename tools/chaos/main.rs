//! Chaos: simplecached, webproxy and their clients, while whatever can go wrong goes wrong.
//!
//! `cargo build --release`, then
//! `cargo run --release --bin chaos -- --seconds 60 --transport mq`. Decisions are at random, and
//! the same again for the same `--seed`; when each comes to pass is up to the machine.

mod asker;
mod census;
mod chance;
mod client;
mod crowd;
mod fault;
mod files;
mod gate;
mod limits;
mod member;
mod memory;
mod pools;
mod program;
mod record;
mod strace;
mod tasks;
mod theatre;
mod users;
mod weather;

use std::fmt::Display;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use chance::Dice;
use clap::{Parser, Subcommand, ValueEnum};
use crowd::Stage;
use fault::{Fault, Spared};
use files::Files;
use record::Group;
use shmferry_tools::getfile;
use theatre::{LATE, ROLES, Role, Theatre};
use users::Users;

/// Kill, stop, starve and confuse the programs, and check that every byte stays right.
#[derive(Parser)]
struct Options {
    /// How long
    #[arg(long, value_name = "COUNT", default_value_t = 60)]
    seconds: u64,
    /// Repeats the decisions of an earlier run [default: other ones each time]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// What the requests travel by
    #[arg(long, default_value = "unix")]
    transport: Transport,
    /// Has the cache answer with tasks instead of threads; over a Unix socket only
    #[arg(long)]
    tasks: bool,
    /// The time-out of both programs
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    timeout: u64,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// Be one of the pools that ask the cache
    #[command(hide = true)]
    Member(member::Options),
    /// Be a cache that answers with tasks
    #[command(hide = true)]
    Tasks(tasks::Options),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Transport {
    /// A Unix socket
    Unix,
    /// A POSIX message queue, with named segments
    Mq,
}

type Result<T> = std::result::Result<T, String>;

/// Tells what was tried when it failed.
fn told<E: Display>(what: &str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

fn main() -> ExitCode {
    let options = Options::parse();
    match options.part {
        Some(Part::Member(options)) => return member::run(options),
        Some(Part::Tasks(options)) => return tasks::run(options),
        None => {}
    }
    if options.tasks && options.transport == Transport::Mq {
        eprintln!(
            "chaos: tasks cannot wait for a message queue: --tasks goes with --transport unix"
        );
        return ExitCode::FAILURE;
    }
    let own_memory = memory::move_in();
    if let Err(error) = limits::raise() {
        eprintln!("chaos: {error}");
        return ExitCode::FAILURE;
    }
    let seed = options.seed.unwrap_or_else(|| u64::from(std::process::id()) ^ now_in_seconds());
    let kind = if options.tasks { " --tasks" } else { "" };
    println!("chaos: {:?}{kind}, {} s, --seed {seed}", options.transport, options.seconds);
    match run(&options, seed, own_memory) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error}; --seed {seed}");
            ExitCode::FAILURE
        }
    }
}

fn now_in_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// Whether nothing was wrong.
fn run(options: &Options, seed: u64, own_memory: bool) -> Result<bool> {
    let here = std::env::current_exe().map_err(told("finding the programs"))?;
    let programs = here.parent().ok_or("no directory of programs")?;
    let dir = tempfile::Builder::new()
        .prefix("shmferry-chaos-")
        .tempdir()
        .map_err(told("a directory"))?;
    let files = Files::make(dir.path().join("files"), seed)?;
    let stage = Arc::new(Stage::new(seed, Duration::from_secs(options.timeout), files));
    let mut theatre =
        Theatre::open(Arc::clone(&stage), dir.path(), programs, options.transport, own_memory)?;
    if options.tasks {
        theatre.serve_by_tasks(&here);
    }
    let traces = strace::Tracer::is_possible() && !options.tasks;
    if options.tasks {
        println!("left out: system calls that fail, because the runtime panics at some of them");
    } else if !traces {
        println!("left out: system calls that fail, because strace is not there or may not trace");
    }
    if !own_memory {
        println!("left out: full shared memory, because a mount namespace cannot be had");
    }
    stop_when_asked(&stage)?;

    ROLES.into_iter().try_for_each(|role| theatre.start(role))?;
    theatre.await_service("the start", LATE, &mut Dice::of(seed, START, 0))?;
    theatre.gather_pools()?;
    let mut threads = crowd::gather(&stage);
    threads.push(shift_files(&stage));
    threads.push(watch_the_machine(&stage));
    threads.push(tell_every_minute(&stage));
    let ended = trouble(&mut theatre, Duration::from_secs(options.seconds), traces);
    stage.record.end();
    theatre.let_in();
    if let Err(error) = ended {
        stage.record.failed("the run broke off", &error);
    }
    let stuck = threads
        .into_iter()
        .map(thread::JoinHandle::join)
        .filter(std::result::Result::is_err)
        .count();
    if stuck > 0 {
        stage.record.failed("chaos itself", "one of its threads panicked");
    }
    theatre.close()?;

    println!("\n{}\n{}", stage.record.line(), stage.record.summary());
    if stage.record.has_failures() {
        println!("the last decisions:\n{}", stage.record.decisions());
        let tasks = if options.tasks { " --tasks" } else { "" };
        println!("FAILED; to repeat: --transport {:?}{tasks} --seed {seed}", options.transport);
    } else {
        println!("nothing was wrong; seed {seed}");
    }
    Ok(!stage.record.has_failures())
}

/// Whose dice they are.
const START: u64 = 1;
const FAULTS: u64 = 2;
const SHIFTS: u64 = 3;
const SEASONS: u64 = 4;

/// Every so many decisions are not for a fault: in calm times everything is judged.
const USERS: u64 = 8;

/// One fault after the other, until the time is over.
fn trouble(theatre: &mut Theatre, span: Duration, traces: bool) -> Result<()> {
    let stage = Arc::clone(&theatre.stage);
    let (seed, record, end) = (stage.seed, &stage.record, Instant::now() + span);
    let (mut number, mut season, mut season_end, mut spared) = (0, 0, 0, None);
    while Instant::now() < end && !record.is_over() {
        if number == season_end {
            let mut dice = Dice::of(seed, SEASONS, season);
            spared = dice.pick::<Spared>(&[Some(Role::Proxy), Some(Role::Cache), None]);
            season_end += 8 + dice.roll(60);
            season += 1;
        }
        let mut dice = Dice::of(seed, FAULTS, number);
        number += 1;
        let lull = Duration::from_millis(dice.roll(1200));
        if number % USERS == 0 {
            let users = Users::draw(&mut dice, seed + number / USERS, stage.timeout);
            record.decided(format!("{number}: {}", users.told()));
            record.count(Group::Faults, users.kind());
            users.act(theatre, &mut dice);
            continue;
        }
        let fault = Fault::draw(&mut dice, spared, stage.timeout);
        if (fault.needs_strace() && !traces)
            || (fault.needs_own_memory() && !theatre.has_own_memory)
        {
            continue;
        }
        thread::sleep(lull); // some time without a fault
        theatre.check_alive(false)?;
        record.begins(fault.weather(), fault.reaches_cache());
        record.decided(format!("{number}: {}", fault.told(stage.timeout)));
        record.count(Group::Faults, &fault.kind(stage.timeout));
        fault.carry_out(theatre)?;
        theatre.await_service(&fault.told(stage.timeout), fault.late(), &mut dice)?;
        if number % 5 == 0 {
            census::take(theatre)?;
        }
    }
    Ok(())
}

/// Truncates and replaces files all the time.
fn shift_files(stage: &Arc<Stage>) -> thread::JoinHandle<()> {
    let stage = Arc::clone(stage);
    thread::spawn(move || {
        let mut number = 0;
        while !stage.record.is_over() {
            let mut dice = Dice::of(stage.seed, SHIFTS, number);
            match stage.files.shift(&mut dice) {
                Ok(what) => stage.record.count(Group::Changes, what),
                Err(error) => stage.record.failed("chaos itself", &error),
            }
            thread::sleep(Duration::from_millis(dice.roll(200)));
            number += 1;
        }
    })
}

/// Measures how late the machine itself is: what it does to us, it does to the programs.
fn watch_the_machine(stage: &Arc<Stage>) -> thread::JoinHandle<()> {
    const BREATH: Duration = Duration::from_millis(20);
    let stage = Arc::clone(stage);
    thread::spawn(move || {
        while !stage.record.is_over() {
            let start = Instant::now();
            thread::sleep(BREATH);
            stage.record.hiccup(start.elapsed().saturating_sub(BREATH));
        }
    })
}

fn tell_every_minute(stage: &Arc<Stage>) -> thread::JoinHandle<()> {
    let stage = Arc::clone(stage);
    thread::spawn(move || {
        let mut next = Instant::now() + Duration::from_secs(60);
        while !stage.record.is_over() {
            if Instant::now() >= next {
                println!("{}", stage.record.line());
                next += Duration::from_secs(60);
            }
            thread::sleep(Duration::from_millis(100));
        }
    })
}

/// An interrupt ends the run early, and properly.
fn stop_when_asked(stage: &Arc<Stage>) -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(told("signals"))?;
    let stage = Arc::clone(stage);
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            stage.record.end();
        }
    });
    Ok(())
}
