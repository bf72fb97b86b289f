//! Ways to wake a task, or a thread, when another process has posted a semaphore in shared memory.
//!
//! `cargo bench --manifest-path benches/peers/Cargo.toml --bench wake`; with `-- --rounds COUNT`, so
//! many rounds; with `-- --only WORD`, which can be given several times, the ways with that in their
//! names, and the thread, are measured. Three quarters of a minute. The crate has no part in it: the
//! bare mechanisms are compared. The poster is another process; where it waits for an answer, it is a
//! thread blocked on a futex, whatever the waiters do. The ways take turns, round by round.

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::runtime::{Builder, Runtime};

use shared::{By, Job, MOST, Peer, Ran, Shared};
use ways::{Connection, Ring, Waitv, Way};

#[path = "../../processor.rs"]
mod processor;
mod shared;
mod ways;

const ROUNDS: usize = 7;
/// How long each way is measured in a round, and how long before that it runs unmeasured.
const SPAN: Duration = Duration::from_millis(100);
const WARM_UP: Duration = Duration::from_millis(15);
/// How long waiters are left alone, in a few rounds.
const IDLE: Duration = Duration::from_secs(1);
const IDLE_ROUNDS: usize = 3;
/// What the poster does between round trips, so that it finds the waiter asleep.
const WORK: Duration = Duration::from_micros(30);
const BURST: usize = 32;
/// A state that takes longer to come will not come.
const PATIENCE: Duration = Duration::from_secs(10);

const NAMES: [&str; 4] = [THREAD, CONNECTION, WAITV, RING];
const THREAD: &str = "thread, futex";
const CONNECTION: &str = "connection";
const WAITV: &str = "futex_waitv thread";
const RING: &str = "io_uring futex";

/// What is measured at a time.
struct Setting {
    title: &'static str,
    waiters: usize,
    /// Threads that run the tasks; the first way has none, but a thread for each waiter.
    runtime: usize,
    place: Where,
    does: Does,
}

/// The processors that the two processes run on. To wake a sleeper whose processor is idle takes
/// several times as long, so that where the kernel puts the two would decide.
enum Where {
    Same,
    Own,
    Any,
}

enum Does {
    /// One post, one answer.
    Trips,
    /// So many posts before the answers are awaited.
    Bursts(usize),
    Idle,
}

const SETTINGS: [Setting; 10] = [
    trips("One waiter, runtime of one thread, both processes on one processor", 1, Where::Same),
    trips("One waiter, runtime of one thread, each process on its own processor", 1, Where::Own),
    trips("One waiter, runtime of two threads", 2, Where::Any),
    bursts("64 waiters, one post at a time, all on one processor", 64, 1, Where::Same),
    bursts("64 waiters, one post at a time", 64, 1, Where::Any),
    bursts("64 waiters, bursts of 32", 64, BURST, Where::Any),
    bursts("256 waiters, one post at a time, all on one processor", 256, 1, Where::Same),
    bursts("256 waiters, one post at a time", 256, 1, Where::Any),
    bursts("256 waiters, bursts of 32", 256, BURST, Where::Any),
    Setting {
        title: "256 waiters, no posts for a second",
        waiters: 256,
        runtime: 2,
        place: Where::Any,
        does: Does::Idle,
    },
];

const fn trips(title: &'static str, runtime: usize, place: Where) -> Setting {
    Setting { title, waiters: 1, runtime, place, does: Does::Trips }
}

const fn bursts(title: &'static str, waiters: usize, burst: usize, place: Where) -> Setting {
    Setting { title, waiters, runtime: 2, place, does: Does::Bursts(burst) }
}

/// What one way did in one round; processor time in seconds.
struct Round {
    ran: Option<Ran>,
    /// Of the waiters' process.
    waiters: f64,
    /// Of the poster's, without its work.
    poster: f64,
}

impl Round {
    /// Wake-ups a second.
    fn speed(&self) -> f64 {
        self.of_ran(|ran| f64::from(ran.posts) / ran.took)
    }

    /// How long such a part of the round trips took at most.
    fn time(&self, percent: usize) -> f64 {
        self.of_ran(|ran| ran.times[ran.times.len() * percent / 100])
    }

    fn calls(&self) -> f64 {
        self.of_ran(|ran| f64::from(ran.calls) / f64::from(ran.posts))
    }

    fn of_ran(&self, of: impl Fn(&Ran) -> f64) -> f64 {
        self.ran.as_ref().map_or(0.0, of)
    }

    /// Processor time of both, for a wake-up.
    fn both(&self) -> f64 {
        (self.waiters + self.poster) / self.of_ran(|ran| f64::from(ran.posts))
    }
}

fn main() -> io::Result<()> {
    let shared = Shared::new();
    let kind = SocketType::SEQPACKET;
    let (here, there) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let peer = Peer::start(shared, &there);
    let processors = sched_getaffinity(None)?;
    let bench = Bench { shared, socket: here, peer, processors };
    let rounds = option("--rounds").next().map_or(ROUNDS, |count| count.parse().expect("a number"));
    let only: Vec<String> = option("--only").collect();
    let is_wanted = |name: &&str| {
        *name == THREAD || only.is_empty() || only.iter().any(|word| name.contains(word))
    };
    let names: Vec<&str> =
        NAMES.into_iter().filter(is_wanted).filter(|name| is_there(name)).collect();
    println!("{}", head(rounds));
    for setting in &SETTINGS {
        let is_idle = matches!(setting.does, Does::Idle);
        bench.place(&setting.place)?;
        let rounds = if is_idle { rounds.min(IDLE_ROUNDS) } else { rounds };
        let mut results: Vec<Vec<Round>> = names.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds {
            // Each round begins with another.
            for i in (0..names.len()).map(|i| (i + round) % names.len()) {
                results[i].push(bench.measure(names[i], setting)?);
            }
        }
        print!("{}", table(setting, &names, &results));
    }
    bench.peer.end();
    Ok(())
}

/// The values of a command-line option, as often as it is given.
fn option(name: &'static str) -> impl Iterator<Item = String> {
    env::args().zip(env::args().skip(1)).filter(move |pair| pair.0 == name).map(|pair| pair.1)
}

/// Whether the kernel has what it takes; if not, says so.
fn is_there(name: &str) -> bool {
    let is_there = match name {
        WAITV => Waitv::is_there(),
        RING => Ring::is_there(),
        _ => true,
    };
    if !is_there {
        println!("{name}: left out, this kernel lacks it or forbids it\n");
    }
    is_there
}

// ---------------------------------------------------------------- measuring

struct Bench {
    shared: &'static Shared,
    /// The waiters' end of the connection.
    socket: OwnedFd,
    peer: Peer,
    /// Those that this process may use.
    processors: CpuSet,
}

impl Bench {
    /// Of this process, the thread that calls: those that it starts are where it is.
    fn place(&self, place: &Where) -> io::Result<()> {
        let mut usable = (0..CpuSet::MAX_CPU).filter(|one| self.processors.is_set(*one));
        let first = usable.next().expect("a processor");
        let last = usable.next_back().unwrap_or(first);
        let only = |one| {
            let mut set = CpuSet::new();
            set.set(one);
            set
        };
        let (waiters, poster) = match place {
            Where::Same => (only(first), only(first)),
            Where::Own => (only(first), only(last)),
            Where::Any => (self.processors, self.processors),
        };
        sched_setaffinity(None, &waiters)?;
        self.peer.keep_on(&poster)
    }

    fn measure(&self, name: &'static str, setting: &Setting) -> io::Result<Round> {
        let by = if name == CONNECTION { By::Message } else { By::Futex };
        let waiters = Waiters::start(name, self, setting)?;
        let round = match setting.does {
            Does::Idle => {
                // What is left of the start is not theirs.
                thread::sleep(WARM_UP);
                let before = self.costs();
                thread::sleep(IDLE);
                let after = self.costs();
                Round { ran: None, waiters: after.0 - before.0, poster: after.1 - before.1 }
            }
            Does::Trips => self.run(by, 1, 1, WORK),
            Does::Bursts(burst) => self.run(by, setting.waiters, burst, Duration::ZERO),
        };
        waiters.end(self, by);
        Ok(round)
    }

    fn run(&self, by: By, waiters: usize, burst: usize, work: Duration) -> Round {
        let run = |span| self.shared.order(Job::Run { by, waiters, burst, work, span });
        run(WARM_UP);
        let before = self.costs();
        run(SPAN);
        let after = self.costs();
        let ran = self.shared.result();
        let poster = after.1 - before.1 - ran.worked;
        Round { waiters: after.0 - before.0, poster, ran: Some(ran) }
    }

    /// Processor seconds of this process and of the poster's, so far.
    fn costs(&self) -> (f64, f64) {
        (processor::seconds(std::process::id()), processor::seconds(self.peer.id()))
    }
}

/// Threads or tasks, each of which answers for its word as often as that is posted.
struct Waiters {
    count: usize,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Waiters {
    /// Returns when all of them wait.
    fn start(name: &'static str, bench: &Bench, setting: &Setting) -> io::Result<Waiters> {
        let (shared, count) = (bench.shared, setting.waiters);
        let is_over = Arc::new(AtomicBool::new(false));
        if name == THREAD {
            let start = |word: usize| {
                let is_over = Arc::clone(&is_over);
                thread::spawn(move || {
                    loop {
                        shared.words[word].wait(None);
                        if is_over.load(Relaxed) {
                            return;
                        }
                        shared.answer();
                    }
                })
            };
            let threads: Vec<_> = (0..count).map(start).collect();
            await_state(|| {
                shared.words[..count].iter().all(|word| word.sleepers.load(Relaxed) != 0)
            });
            return Ok(Waiters { count, is_over, threads });
        }
        let runtime = runtime(setting.runtime)?;
        let way: Arc<dyn Way> = {
            // What waits for descriptors belongs to the runtime.
            let _inside = runtime.enter();
            match name {
                CONNECTION => Connection::start(shared, &bench.socket, count)?,
                WAITV => Waitv::start(shared, count),
                _ => Ring::start(shared, count)?,
            }
        };
        let task = |word: usize| {
            let (way, is_over) = (Arc::clone(&way), Arc::clone(&is_over));
            runtime.spawn(async move {
                loop {
                    ways::wait(&*way, shared, word).await;
                    if is_over.load(Relaxed) {
                        return;
                    }
                    shared.answer();
                }
            })
        };
        let tasks: Vec<_> = (0..count).map(task).collect();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                for task in tasks {
                    task.await.expect("no panic");
                }
            });
        });
        await_state(|| (0..count).all(|word| way.is_registered(word)));
        Ok(Waiters { count, is_over, threads: vec![thread] })
    }

    /// Leaves the words as they were at first.
    fn end(self, bench: &Bench, by: By) {
        self.is_over.store(true, Relaxed);
        bench.shared.order(Job::Release { by, waiters: self.count });
        await_state(|| self.threads.iter().all(JoinHandle::is_finished));
        self.threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        bench.shared.needs_message.0.store(0, Relaxed);
        for word in &bench.shared.words[..MOST] {
            assert!(word.count.load(Relaxed) == 0, "a permit that nobody took");
            assert!(word.sleepers.load(Relaxed) == 0, "a sleeper that is none");
        }
    }
}

fn runtime(threads: usize) -> io::Result<Runtime> {
    match threads {
        1 => Builder::new_current_thread().enable_io().build(),
        _ => Builder::new_multi_thread().worker_threads(threads).enable_io().build(),
    }
}

fn await_state(is_there: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_there() {
        assert!(begin.elapsed() < PATIENCE, "waiters neither sleep nor end: a wake-up was lost");
        thread::yield_now();
    }
}

// ---------------------------------------------------------------- the report

fn head(rounds: usize) -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let processors = thread::available_parallelism().map_or(0, usize::from);
    let kernel = Command::new("uname").arg("-r").output().map(|output| output.stdout);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "# Waking a task from another process\n\n\
        | | |\n| --- | --- |\n\
        | processor | {}, {processors} seen |\n| kernel | {} |\n| load at the start | {} |\n\
        | rounds | {rounds} of {} ms (idle: {} of {} s), the ways in turn |\n\n\
        Medians over the rounds; in brackets the least and the most; `× thread` is the median of the\n\
        ratios by round to `{THREAD}`, where each waiter is a blocked thread. One waiter: a post and\n\
        its answer, after the poster has worked for {} µs. Many: tasks on a runtime of two threads, posted\n\
        in random order, all of a burst answered before the next. Processor time is that of the waiters'\n\
        process and of the poster's, the latter without its work. `calls` are the poster's system calls\n\
        to wake, by post.",
        cpu.trim_start_matches([' ', '\t', ':']),
        String::from_utf8_lossy(&kernel.unwrap_or_default()).trim(),
        load.trim(),
        SPAN.as_millis(),
        rounds.min(IDLE_ROUNDS),
        IDLE.as_secs(),
        WORK.as_micros(),
    )
}

fn table(setting: &Setting, names: &[&str], results: &[Vec<Round>]) -> String {
    let columns: &[&str] = match setting.does {
        Does::Trips => &["p50 (µs)", "× thread", "p99 (µs)", "× thread"],
        Does::Bursts(_) => &["wake-ups/s", "× thread"],
        Does::Idle => &["waiters, µs of processor time", "poster, µs"],
    };
    let each: &[&str] = match setting.does {
        Does::Idle => &[],
        _ => &["waiters, µs a wake-up", "poster, µs a wake-up", "both, × thread", "calls a post"],
    };
    let columns = [&["way"], columns, each].concat();
    let mut text = format!(
        "\n### {}\n\n| {} |\n|{}\n",
        setting.title,
        columns.join(" | "),
        " --- |".repeat(columns.len())
    );
    let thread = &results[0];
    for (name, rounds) in names.iter().zip(results) {
        let micros = |of: &dyn Fn(&Round) -> f64| in_micros(median(rounds.iter().map(of)));
        let against = |of: &dyn Fn(&Round) -> f64| {
            format!("{:.2}", median(rounds.iter().zip(thread).map(|(one, by)| of(one) / of(by))))
        };
        let mut cells = vec![(*name).to_owned()];
        match setting.does {
            Does::Trips => {
                for percent in [50, 99] {
                    let time = |round: &Round| round.time(percent);
                    cells.extend([spread(rounds, time, in_micros), against(&time)]);
                }
            }
            Does::Bursts(_) => {
                let speed = spread(rounds, Round::speed, |speed| format!("{speed:.0}"));
                cells.extend([speed, against(&Round::speed)]);
            }
            Does::Idle => {
                cells.extend([micros(&|round| round.waiters), micros(&|round| round.poster)]);
            }
        }
        if !matches!(setting.does, Does::Idle) {
            let posts = |round: &Round| round.of_ran(|ran| f64::from(ran.posts));
            cells.extend([
                micros(&|round| round.waiters / posts(round)),
                micros(&|round| round.poster / posts(round)),
                against(&Round::both),
                format!("{:.2}", median(rounds.iter().map(Round::calls))),
            ]);
        }
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

/// The median; in brackets, the least and the most.
fn spread(rounds: &[Round], of: impl Fn(&Round) -> f64, text: impl Fn(f64) -> String) -> String {
    let figures = || rounds.iter().map(&of);
    let (least, most) = (figures().fold(f64::MAX, f64::min), figures().fold(0.0, f64::max));
    format!("{} ({}–{})", text(median(figures())), text(least), text(most))
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = of.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn in_micros(seconds: f64) -> String {
    match seconds * 1e6 {
        few if few < 10.0 => format!("{few:.2}"),
        some if some < 100.0 => format!("{some:.1}"),
        many => format!("{many:.0}"),
    }
}
