//! Forty-eight pools on one cache at once, in threads and in processes: no request may vanish.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use shmferry::Address;

use super::asker::{self, Asked, Asker, LONG, Outcome};
use super::crowd::Stage;
use super::member::{self, GO, HELD, HOLD, RUSH, Told, WALK};
use super::program::TIMEOUT;
use super::record::{Group, lock};
use super::weather::Weather;
use super::{Result, told};

/// Pools that are threads of this process, and as many that are processes.
const EACH: u64 = 24;

/// Segments of all pools.
pub const SEGMENTS: usize = 2 * EACH as usize * asker::SEGMENTS as usize;

/// Names in shared memory that all pools take, where segments have names: one more for each pool.
pub const NAMES: usize = SEGMENTS + 2 * EACH as usize;

/// How soon to look again.
const GLANCE: Duration = Duration::from_millis(5);

/// How long what a process tells may be under way.
const TELLING: Duration = Duration::from_millis(300);

/// All of them.
pub struct Pools {
    stage: Arc<Stage>,
    rushes: Arc<AtomicBool>,
    accounts: Vec<Arc<Account>>,
    threads: Vec<JoinHandle<()>>,
    members: Vec<Member>,
}

/// A pool that is a process.
struct Member {
    process: Child,
    stdin: Option<ChildStdin>,
    /// A message for each time that it was held; disconnected at its end.
    held: Receiver<()>,
    listener: JoinHandle<()>,
}

/// What has become of one pool's requests.
#[derive(Default)]
struct Account {
    /// Requests that a thread has begun.
    begun: Arc<AtomicU64>,
    told: Mutex<Told>,
    /// Those that did not go well, by their cause.
    failed: Mutex<BTreeMap<String, u64>>,
    last_answer: Mutex<Option<Instant>>,
}

impl Pools {
    /// Has them come, and ask until the run is over.
    pub fn gather(stage: &Arc<Stage>, address: &str) -> Result<Pools> {
        let account = |_| Arc::new(Account::default());
        let accounts: Vec<_> = (0..2 * EACH).map(account).collect();
        let mut pools = Pools {
            stage: Arc::clone(stage),
            rushes: Arc::default(),
            accounts,
            threads: Vec::new(),
            members: Vec::new(),
        };
        let parsed: Address = address.parse().map_err(told("the cache's address"))?;
        for number in 0..EACH {
            let account = Arc::clone(&pools.accounts[number as usize]);
            let begun = Arc::clone(&account.begun);
            let asker = Asker::new(parsed.clone(), stage.seed, number, begun);
            let (stage, rushes) = (Arc::clone(stage), Arc::clone(&pools.rushes));
            pools.threads.push(thread::spawn(move || ask(&stage, asker, &account, &rushes)));
        }
        for number in EACH..2 * EACH {
            let account = Arc::clone(&pools.accounts[number as usize]);
            pools.members.push(Member::start(stage, address, number, account)?);
        }
        Ok(pools)
    }

    /// Holds back those that are processes; the threads are at the stage's gate.
    pub fn hold_back(&mut self) -> bool {
        self.members.iter_mut().for_each(|member| member.say(HOLD));
        self.members.iter().all(|member| member.held.recv_timeout(TIMEOUT).is_ok())
    }

    pub fn let_in(&mut self) {
        self.members.iter_mut().for_each(|member| member.say(GO));
    }

    /// Whether all are to ask with hardly a pause.
    pub fn rush(&mut self, rushes: bool) {
        self.rushes.store(rushes, SeqCst);
        let word = if rushes { RUSH } else { WALK };
        self.members.iter_mut().for_each(|member| member.say(word));
    }

    /// Whether each has had an answer since then: it is connected to the cache of that time.
    pub fn all_answered_since(&self, since: Instant) -> bool {
        self.accounts.iter().all(|account| lock(&account.last_answer).is_some_and(|at| at > since))
    }

    /// Waits for all to end, once the run is over, and adds up.
    pub fn end(mut self) -> Result<()> {
        let record = &self.stage.record;
        self.members.iter_mut().for_each(|member| member.stdin = None);
        let end = Instant::now() + TIMEOUT;
        for thread in self.threads {
            while !thread.is_finished() && Instant::now() < end {
                thread::sleep(GLANCE);
            }
            if !thread.is_finished() {
                record.failed("hang", "a thread with a pool does not end");
            } else if thread.join().is_err() {
                record.failed("chaos itself", "one of its pools panicked");
            }
        }
        for member in &mut self.members {
            let silence = member.held.recv_timeout(TIMEOUT);
            if silence != Err(RecvTimeoutError::Disconnected) {
                record.failed("hang", "a process with a pool does not end");
                let _ = member.process.kill(); // fails only if it has just ended
            }
            let status = member.process.wait().map_err(told("a process with a pool"))?;
            if !status.success() {
                record.failed("chaos itself", &format!("a process with a pool: {status}"));
            }
        }
        for member in self.members {
            if member.listener.join().is_err() {
                record.failed("chaos itself", "who listens to a pool panicked");
            }
        }
        let (mut asked, mut answered, mut refused, mut failed_in_all) = (0, 0, 0, 0);
        for account in &self.accounts {
            let told = lock(&account.told);
            let failed = lock(&account.failed);
            let begun = account.begun.load(SeqCst) + told.asked;
            asked += begun;
            answered += told.answered;
            refused += told.refused;
            failed_in_all += failed.values().sum::<u64>();
            failed
                .iter()
                .for_each(|(cause, n)| record.add(Group::Pools, &format!("failed: {cause}"), *n));
        }
        let counts = [("asked", asked), ("answered", answered), ("refused", refused)];
        counts.iter().for_each(|(what, n)| record.add(Group::Pools, what, *n));
        let sum = format!(
            "{asked} asked, {answered} answered + {refused} refused + {failed_in_all} failed"
        );
        println!("requests of pools: {sum}");
        record.count(Group::Checks, "requests of pools added up");
        if asked != answered + refused + failed_in_all {
            record.failed("vanished", &sum);
        }
        Ok(())
    }
}

/// Asks on a thread, until the run is over.
fn ask(stage: &Stage, mut asker: Asker, account: &Account, rushes: &AtomicBool) {
    while !stage.record.is_over() {
        let pause = stage.gate.inside(|| {
            let (asked, pause) = asker.ask(&stage.files, rushes.load(SeqCst));
            if let Some(asked) = asked {
                let mut told = lock(&account.told);
                match asked.outcome {
                    Outcome::Answered => told.answered += 1,
                    Outcome::Refused => told.refused += 1,
                    Outcome::Failed { .. } | Outcome::Wrong(_) => {}
                }
                drop(told);
                account.judge(stage, &asked, Duration::ZERO);
            }
            pause
        });
        thread::sleep(pause); // thinking
    }
}

impl Account {
    /// Notes how a request ended, `ago`, and whether that may be.
    fn judge(&self, stage: &Stage, asked: &Asked, ago: Duration) {
        let record = &stage.record;
        let now = Instant::now();
        let start = now.checked_sub(asked.took + ago).unwrap_or(now);
        let shown = || {
            format!("a pool's request, {:.2} s of {:?}", asked.took.as_secs_f64(), asked.timeout)
        };
        let is_late = record.is_machine_late();
        if asked.is_late() && !is_late {
            record.failed("past its deadline", &shown());
        }
        match &asked.outcome {
            Outcome::Answered | Outcome::Refused => *lock(&self.last_answer) = Some(now),
            Outcome::Wrong(what) => {
                *lock(&self.failed).entry(format!("wrong: {what}")).or_default() += 1;
                record.failed("wrong bytes", &format!("{what}; {}", shown()));
            }
            Outcome::Failed { cause, is_timeout, has_no_reply } => {
                *lock(&self.failed).entry(cause.clone()).or_default() += 1;
                let kind = match record.cache_weather.worst_since(start) {
                    _ if is_late => return,
                    Weather::Trouble => return,
                    // It had no time to wait for the successor.
                    Weather::Orderly if *is_timeout && asked.timeout < LONG => return,
                    Weather::Orderly => "failed in an orderly restart",
                    Weather::Calm if *has_no_reply => "vanished",
                    Weather::Calm => "failed in calm",
                };
                record.failed(kind, &format!("{cause}; {}", shown()));
            }
        }
    }

    /// Takes in what a process has told.
    fn listen(&self, stage: &Stage, line: &str) {
        if let Some(now) = Told::parse(line) {
            let mut told = lock(&self.told);
            if now.answered + now.refused > told.answered + told.refused {
                *lock(&self.last_answer) = Some(Instant::now());
            }
            *told = now;
        } else if let Some(asked) = member::parse(line) {
            self.judge(stage, &asked, TELLING);
        } else {
            stage.record.failed("chaos itself", &format!("a pool says {line:?}"));
        }
    }
}

impl Member {
    fn start(
        stage: &Arc<Stage>,
        address: &str,
        number: u64,
        account: Arc<Account>,
    ) -> Result<Member> {
        let this = std::env::current_exe().map_err(told("finding chaos"))?;
        let mut process = Command::new(this)
            .args(["member", "--address", address, "--seed", &stage.seed.to_string()])
            .args(["--number", &number.to_string()])
            .process_group(0) // an interrupt at the terminal is not for it
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(told("a process with a pool"))?;
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().ok_or("a process without an output")?;
        let (says_held, held) = mpsc::channel();
        let stage = Arc::clone(stage);
        let listener = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if line == HELD {
                    let _ = says_held.send(()); // nobody waits for it at the end
                } else {
                    account.listen(&stage, &line);
                }
            }
        });
        Ok(Member { process, stdin, held, listener })
    }

    /// To a process that may have ended: that shows soon enough.
    fn say(&mut self, word: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{word}");
        }
    }
}
