//! Both programs together: started, replaced, asked whether they serve, and ended.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::chance::Dice;
use super::client::{Ending, WATCHDOG, private_address, probe};
use super::crowd::Stage;
use super::memory;
use super::pools::{self, Pools};
use super::program::{Program, Recipe, TIMEOUT, living_in};
use super::record::Group;
use super::users::Silent;
use super::{Result, Transport};

/// Segments in the proxy's pool: enough for all clients, dawdlers included.
pub const SEGMENTS: usize = 16;

/// The bytes of a segment's slots.
const SEGMENT_LEN: u64 = 256 << 10;

/// What all segments take, roughly.
pub const POOL_LEN: u64 = SEGMENTS as u64 * (SEGMENT_LEN + 8192);

/// Later than this after the end of a fault is a failure.
pub const LATE: Duration = Duration::from_secs(5);

/// How soon to ask again.
const GLANCE: Duration = Duration::from_millis(5);

/// One of the two programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Proxy,
    Cache,
}

pub const ROLES: [Role; 2] = [Role::Proxy, Role::Cache];

/// A living program, and its place in the order of its kind.
pub struct Actor {
    pub program: Program,
    /// Whole transfers when it came.
    pub whole_before: u64,
    pub since: Instant,
    pub baseline: Option<super::program::Holdings>,
    /// What it was made to suffer may have had it panic.
    pub excused: bool,
}

pub struct Theatre {
    pub stage: Arc<Stage>,
    dir: PathBuf,
    queue: String,
    /// Of the cache.
    address: String,
    transport: Transport,
    recipes: [Recipe; 2],
    actors: [Option<Actor>; 2],
    /// All that there ever were.
    pids: Vec<u32>,
    /// Those who ask the cache themselves, once they have come.
    pub pools: Option<Pools>,
    /// Connections that are to outlast a fault.
    pub silent: Vec<Silent>,
    pub has_own_memory: bool,
}

impl Theatre {
    pub fn open(
        stage: Arc<Stage>,
        dir: &Path,
        programs: &Path,
        transport: Transport,
        own: bool,
    ) -> Result<Theatre> {
        let queue = format!("shmferry-chaos-{}", std::process::id());
        let address = match transport {
            Transport::Unix => format!("unix:{}", dir.join("run/cache.sock").display()),
            Transport::Mq => format!("mq:/{queue}"),
        };
        let timeout = stage.timeout.as_secs_f64().to_string();
        let recipe = |name: &'static str, args: &[&str]| Recipe {
            name,
            path: programs.join(name),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            dir: dir.to_owned(),
        };
        let ip = private_address().to_string();
        let (segments, len) = (SEGMENTS.to_string(), SEGMENT_LEN.to_string());
        let proxy = [
            "-p",
            "0",
            "--listen",
            &ip,
            "-t",
            "6",
            "-n",
            &segments,
            "-z",
            &len,
            "--cache",
            &address,
            "--timeout",
            &timeout,
            // Little, so that loans come and go.
            "--mapped",
            "256k",
        ];
        let cache = [
            "-c",
            "files",
            "-t",
            "4",
            "--listen",
            &address,
            "--timeout",
            &timeout,
            "--loan-budget",
            "512k",
        ];
        let recipes = [recipe("webproxy", &proxy), recipe("simplecached", &cache)];
        for recipe in &recipes {
            if !recipe.path.exists() {
                return Err(format!(
                    "build the programs first, with `cargo build`: there is no {}",
                    recipe.path.display()
                ));
            }
        }
        Ok(Theatre {
            stage,
            dir: dir.to_owned(),
            queue,
            address,
            transport,
            recipes,
            actors: [None, None],
            pids: Vec::new(),
            pools: None,
            silent: Vec::new(),
            has_own_memory: own,
        })
    }

    /// From now on, the cache that is started is chaos itself, as a server of tasks.
    pub fn serve_by_tasks(&mut self, chaos: &Path) {
        let cache = &mut self.recipes[Role::Cache as usize];
        cache.path = chaos.to_owned();
        let budget = cache.args.iter().position(|arg| arg == "--loan-budget");
        cache.args.truncate(budget.unwrap_or(cache.args.len()));
        cache.args.insert(0, "tasks".to_owned());
    }

    /// Has those come who ask the cache themselves.
    pub fn gather_pools(&mut self) -> Result<()> {
        self.pools = Some(Pools::gather(&self.stage, &self.address)?);
        Ok(())
    }

    /// Holds all clients back; whether they came to an end.
    pub fn hold_back(&mut self) -> bool {
        let are_out = self.stage.gate.hold_back(2 * WATCHDOG);
        self.pools.as_mut().is_none_or(Pools::hold_back) && are_out
    }

    pub fn let_in(&mut self) {
        self.stage.gate.let_in();
        if let Some(pools) = &mut self.pools {
            pools.let_in();
        }
    }

    /// Whether all pools are to ask with hardly a pause.
    pub fn rush(&mut self, rushes: bool) {
        if let Some(pools) = &mut self.pools {
            pools.rush(rushes);
        }
    }

    pub fn actor(&mut self, role: Role) -> Result<&mut Actor> {
        self.actors[role as usize].as_mut().ok_or_else(|| format!("there is no {role:?}"))
    }

    pub fn program(&mut self, role: Role) -> Result<&mut Program> {
        self.actor(role).map(|actor| &mut actor.program)
    }

    // ------------------------------------------------------------ starts and ends

    /// Starts a program that must come up.
    pub fn start(&mut self, role: Role) -> Result<()> {
        let program = self.recipes[role as usize].start()?;
        match self.take_on(role, program)? {
            Ok(()) => Ok(()),
            Err((status, words)) => Err(format!("{role:?} did not start: {status}{words}")),
        }
    }

    /// Starts a program that stops before it begins.
    pub fn start_stopped(&mut self, role: Role) -> Result<Program> {
        self.recipes[role as usize].start_stopped()
    }

    pub fn start_unsure(
        &mut self,
        role: Role,
    ) -> Result<std::result::Result<(), (ExitStatus, String)>> {
        let program = self.recipes[role as usize].start()?;
        self.take_on(role, program)
    }

    /// Has a program act as soon as it listens. If it has ended instead, says how.
    pub fn take_on(
        &mut self,
        role: Role,
        mut program: Program,
    ) -> Result<std::result::Result<(), (ExitStatus, String)>> {
        self.pids.push(program.pid());
        match program.listening().map_err(|error| format!("{role:?}: {error}"))? {
            Err(status) => Ok(Err((status, program.last_words()))),
            Ok(line) => {
                if role == Role::Proxy {
                    self.stage.listens_at(port_of(&line)?);
                }
                self.actors[role as usize] = Some(Actor {
                    program,
                    whole_before: self.stage.whole(),
                    since: Instant::now(),
                    baseline: None,
                    excused: false,
                });
                Ok(Ok(()))
            }
        }
    }

    /// Asks the cache to end, and starts its successor while it still winds down: as soon as the
    /// address is to be had.
    pub fn succeed(&mut self) -> Result<()> {
        let Some(old) = self.actors[Role::Cache as usize].take() else { return Ok(()) };
        old.program.signal(Signal::TERM);
        let end = Instant::now() + TIMEOUT;
        loop {
            match self.start_unsure(Role::Cache)? {
                Ok(()) => break,
                Err((_, words)) if words.contains("is being served by") && Instant::now() < end => {
                    thread::sleep(10 * GLANCE);
                }
                Err((status, words)) => return Err(format!("no successor came: {status}{words}")),
            }
        }
        self.see_off(Role::Cache, old)
    }

    pub fn kill(&mut self, role: Role) {
        if let Some(actor) = self.actors[role as usize].take() {
            actor.program.signal(Signal::KILL);
            drop(actor); // waits
        }
    }

    /// Asks a program to end, and checks that it does.
    pub fn terminate(&mut self, role: Role) -> Result<()> {
        let Some(actor) = self.actors[role as usize].take() else { return Ok(()) };
        actor.program.signal(Signal::TERM);
        self.see_off(role, actor)
    }

    /// Waits for the end of one that was asked to.
    fn see_off(&self, role: Role, mut actor: Actor) -> Result<()> {
        let record = &self.stage.record;
        match actor.program.wait(TIMEOUT)? {
            Some(status) if status.success() => {}
            Some(status) => {
                record.failed(
                    "bad end",
                    &format!("{role:?}: {status}{}", actor.program.last_words()),
                );
            }
            None => record
                .failed("hang", &format!("{role:?} does not end{}", actor.program.last_words())),
        }
        Ok(())
    }

    /// Notes programs that have died by themselves, or panicked, and replaces them. With `excuse`, a
    /// death is to be expected.
    pub fn check_alive(&mut self, excuse: bool) -> Result<()> {
        for role in ROLES {
            let record = &self.stage.record;
            let actor = self.actors[role as usize].as_mut();
            if let Some(actor) = actor {
                actor.excused |= excuse;
                if let Some(status) = actor.program.ended() {
                    let words = actor.program.last_words();
                    if excuse {
                        record.count(Group::Checks, "deaths for lack of memory");
                    } else {
                        record.failed("death", &format!("{role:?}: {status}{words}"));
                    }
                    self.actors[role as usize] = None;
                } else if actor.program.panicked() && !actor.excused {
                    actor.excused = true; // once is enough
                    record.failed("panic", &format!("{role:?}{}", actor.program.last_words()));
                }
            }
            if self.actors[role as usize].is_none() {
                self.start(role)?;
            }
        }
        Ok(())
    }

    // ------------------------------------------------------------ service

    /// Asks for a small file until it comes, and notes how long that took: more than `late` is a
    /// failure.
    pub fn await_service(&mut self, after: &str, late: Duration, dice: &mut Dice) -> Result<()> {
        let start = Instant::now();
        let stage = Arc::clone(&self.stage);
        let file = stage.files.small(dice);
        let mut tries = 0;
        loop {
            tries += 1;
            let last = match probe(stage.address(), &stage.files, file) {
                Ending::Whole => break,
                Ending::Hang(place) => {
                    stage.record.failed("hang", &format!("a probe after {after}: {place}"));
                    "a hang"
                }
                Ending::Wrong(what) => {
                    stage.record.failed("wrong bytes", &format!("a probe after {after}: {what}"));
                    "a wrong reply"
                }
                Ending::Error => "an error",
                Ending::Short => "a short body",
                Ending::Refused => "nobody there",
                _ => "nothing",
            };
            if start.elapsed() > WATCHDOG {
                let states = ROLES.map(|role| {
                    let program = self.program(role);
                    program.map_or_else(
                        |error| error,
                        |p| {
                            let holdings = p.holdings().map(|holdings| holdings.to_string());
                            format!(
                                "{:?}, {}{}",
                                p.state(),
                                holdings.unwrap_or_default(),
                                p.last_words()
                            )
                        },
                    )
                });
                let told = format!("after {after}, {tries} tries, {last}; {}", states.join("; "));
                stage.record.failed("no service", &told);
                // So that the run can go on.
                ROLES.into_iter().for_each(|role| self.kill(role));
                ROLES.into_iter().try_for_each(|role| self.start(role))?;
                return Ok(());
            }
            self.check_alive(false)?;
            thread::sleep(GLANCE);
        }
        let took = start.elapsed();
        stage.record.returned(took, after);
        stage.record.count(Group::Checks, "returns of service");
        if took > late && stage.record.recent_hiccup() < late / 2 {
            stage.record.failed("late service", &format!("{took:?} after {after}, {tries} tries"));
        }
        self.silent.clear();
        stage.record.calm();
        Ok(())
    }

    // ------------------------------------------------------------ what is left

    /// Names in shared memory, of programs that live or not.
    pub fn names(&self) -> Vec<String> {
        memory::names(self.has_own_memory, &self.pids, &self.queue)
    }

    /// The most names that the living programs need: the segments, and what tells of life.
    pub fn names_needed(&self) -> usize {
        match self.transport {
            Transport::Unix => 0,
            Transport::Mq => SEGMENTS + 3 + pools::NAMES,
        }
    }

    /// Ends both programs, and checks that nothing is left.
    pub fn close(&mut self) -> Result<()> {
        self.pools.take().map_or(Ok(()), Pools::end)?;
        ROLES.into_iter().try_for_each(|role| self.terminate(role))?;
        let record = &self.stage.record;
        let left = |what: &str| record.failed("left behind", what);
        for process in living_in(&self.dir) {
            left(&process);
        }
        for name in self.names() {
            left(&format!("/dev/shm/{name}"));
        }
        if self.dir.join("run").exists() {
            left("the socket's directory");
        }
        let (read, mode) = (nix::mqueue::MQ_OFlag::O_RDONLY, nix::sys::stat::Mode::empty());
        match nix::mqueue::mq_open(format!("/{}", self.queue).as_str(), read, mode, None) {
            Err(nix::errno::Errno::ENOENT) => {}
            found => left(&format!("the queue: {found:?}")),
        }
        let strangers = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for entry in strangers.filter(|entry| entry.file_name() != "files") {
            left(&entry.path().display().to_string());
        }
        record.count(Group::Checks, "nothing left at the end");
        Ok(())
    }
}

/// The port in a line such as `listening on 127.0.0.1:25362: …`.
fn port_of(line: &str) -> Result<u16> {
    let address = line.split("listening on ").nth(1).and_then(|rest| rest.split(": ").next());
    let port =
        address.and_then(|address| address.rsplit(':').next()).and_then(|port| port.parse().ok());
    port.ok_or_else(|| format!("no port in {line:?}"))
}
