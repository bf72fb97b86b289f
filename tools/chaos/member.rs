//! One member of the crowd as a process of its own: an asker that obeys its standard input, and
//! tells its standard output how each request ended.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use shmferry::Address;

use super::asker::{Asked, Asker, Outcome};
use super::files::Files;
use super::gate::Gate;

/// What the parent says.
pub const HOLD: &str = "hold";
pub const GO: &str = "go";
pub const RUSH: &str = "rush";
pub const WALK: &str = "walk";

/// What a member answers to [`HOLD`], once it asks no more.
pub const HELD: &str = "held";

/// How often what went well is told.
const EVERY: Duration = Duration::from_millis(250);

/// No request takes so long.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    address: Address,
    #[arg(long)]
    seed: u64,
    #[arg(long)]
    number: u64,
}

/// What a member tells, one line each.
#[derive(Default)]
pub struct Told {
    /// Requests that a process has begun.
    pub asked: u64,
    pub answered: u64,
    pub refused: u64,
}

impl Told {
    fn line(&self) -> String {
        format!("tally {} {} {}", self.asked, self.answered, self.refused)
    }

    pub fn parse(line: &str) -> Option<Told> {
        let mut numbers = line.strip_prefix("tally ")?.split(' ').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Told { asked: next()?, answered: next()?, refused: next()? })
    }
}

/// A request that did not go well, or was late, as a line.
pub fn line_of(asked: &Asked) -> Option<String> {
    let (took, timeout) = (asked.took.as_millis(), asked.timeout.as_millis());
    match &asked.outcome {
        Outcome::Answered | Outcome::Refused if asked.is_late() => {
            Some(format!("late {took} {timeout} -"))
        }
        Outcome::Answered | Outcome::Refused => None,
        Outcome::Failed { cause, is_timeout, has_no_reply } => {
            let kind = match (is_timeout, has_no_reply) {
                (_, true) => "no-reply",
                (true, false) => "timeout",
                (false, false) => "failed",
            };
            Some(format!("{kind} {took} {timeout} {}", one_line(cause)))
        }
        Outcome::Wrong(what) => Some(format!("wrong {took} {timeout} {}", one_line(what))),
    }
}

/// What [`line_of`] has written.
pub fn parse(line: &str) -> Option<Asked> {
    let mut parts = line.splitn(4, ' ');
    let kind = parts.next()?;
    let mut millis = || Some(Duration::from_millis(parts.next()?.parse().ok()?));
    let (took, timeout) = (millis()?, millis()?);
    let text = parts.next()?.to_owned();
    let failed = |is_timeout, has_no_reply| Outcome::Failed {
        cause: text.clone(),
        is_timeout,
        has_no_reply,
    };
    let outcome = match kind {
        "no-reply" => failed(true, true),
        "timeout" => failed(true, false),
        "failed" => failed(false, false),
        "wrong" => Outcome::Wrong(text),
        "late" => Outcome::Answered,
        _ => return None,
    };
    Some(Asked { outcome, took, timeout })
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

/// Asks until standard input ends.
pub fn run(options: Options) -> ExitCode {
    let gate = Arc::new(Gate::default());
    let [over, rushes] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    thread::spawn({
        let (gate, over, rushes) = (Arc::clone(&gate), Arc::clone(&over), Arc::clone(&rushes));
        move || obey(&gate, &over, &rushes)
    });
    let files = Files::of(PathBuf::new(), options.seed);
    let begun = Arc::default();
    let mut asker = Asker::new(options.address, options.seed, options.number, Arc::clone(&begun));
    let (mut told, mut next) = (Told::default(), Instant::now());
    while !over.load(SeqCst) {
        let pause = gate.inside(|| {
            let (asked, pause) = asker.ask(&files, rushes.load(SeqCst));
            if let Some(asked) = asked {
                match asked.outcome {
                    Outcome::Answered => told.answered += 1,
                    Outcome::Refused => told.refused += 1,
                    Outcome::Failed { .. } | Outcome::Wrong(_) => {}
                }
                line_of(&asked).into_iter().for_each(|line| tell(&line));
            }
            if Instant::now() >= next {
                told.asked = begun.load(SeqCst);
                tell(&told.line());
                next = Instant::now() + EVERY;
            }
            pause
        });
        thread::sleep(pause); // thinking
    }
    told.asked = begun.load(SeqCst);
    tell(&told.line());
    ExitCode::SUCCESS
}

fn obey(gate: &Gate, over: &AtomicBool, rushes: &AtomicBool) {
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        match line.as_str() {
            HOLD if gate.hold_back(TIMEOUT) => tell(HELD),
            GO => gate.let_in(),
            RUSH | WALK => rushes.store(line == RUSH, SeqCst),
            _ => {}
        }
    }
    over.store(true, SeqCst);
    gate.let_in();
}

/// To a parent that may have gone: then standard input has ended, too.
fn tell(line: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
