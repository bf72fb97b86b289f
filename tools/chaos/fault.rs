//! The faults: drawn by the dice, carried out, and undone.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use super::Result;
use super::chance::Dice;
use super::limits::Squeeze;
use super::memory::Filler;
use super::program::wait_until;
use super::record::Group;
use super::strace::{Failure, Tracer};
use super::theatre::{LATE, POOL_LEN, ROLES, Role, Theatre};
use super::users::Silent;
use super::weather::Weather;

/// What is done to the programs.
pub enum Fault {
    Kill(Role),
    KillBoth,
    Terminate(Role),
    /// Asks the cache to end, and starts its successor at once.
    Succeed,
    /// Stops it, and lets it go on.
    Stop(Role, Duration),
    StopBoth(Duration),
    /// Stops the one, and kills the other meanwhile.
    StopAndKill(Role),
    /// Has calls of a running program fail.
    Inject(Role, Failure),
    /// Has calls fail from a successor's first on.
    InjectAtStart(Role, Failure),
    /// Has no thread be spawned, while clients come.
    NoThreads(Role, Failure),
    /// Leaves a program the descriptors that it has.
    NoDescriptors(Role, Duration),
    /// Leaves a successor so many bytes of shared memory.
    FillAtStart(Role, u64),
    /// Leaves a proxy that many while its segments are retired.
    FillWhileStopped(u64),
}

/// Who is spared for the time being, so that it grows old.
pub type Spared = Option<Role>;

impl Fault {
    /// As the dice have it.
    pub fn draw(dice: &mut Dice, spared: Spared, timeout: Duration) -> Fault {
        let role = dice.pick(&ROLES);
        let mortal = match spared {
            Some(Role::Proxy) => Role::Cache,
            Some(Role::Cache) => Role::Proxy,
            None => role,
        };
        let moment = match dice.roll(4) {
            0 => timeout + Duration::from_millis(500 + dice.roll(3000)),
            _ => Duration::from_millis(dice.roll(400)),
        };
        let left = dice.pick(&[0, 4096, 70_000, POOL_LEN / 2, POOL_LEN - 5000, POOL_LEN + 100_000]);
        let kind = dice.roll(130);
        let span = Duration::from_millis(300 + dice.roll(1500));
        let failure = Failure::draw(dice, if (82..90).contains(&kind) { mortal } else { role });
        match kind {
            0..18 => Fault::Kill(mortal),
            18..22 if spared.is_none() => Fault::KillBoth,
            18..30 => Fault::Terminate(mortal),
            30..48 => Fault::Stop(role, moment),
            48..51 => Fault::StopBoth(moment),
            51..55 => Fault::StopAndKill(mortal),
            55..82 => Fault::Inject(role, failure),
            82..90 => Fault::InjectAtStart(mortal, failure),
            90..97 => Fault::FillAtStart(mortal, left),
            97..100 => Fault::FillWhileStopped(left),
            100..112 if mortal == Role::Cache => Fault::Succeed,
            100..120 => Fault::NoDescriptors(role, span),
            _ => Fault::NoThreads(role, Failure::of_threads(span)),
        }
    }

    /// What it is counted as.
    pub fn kind(&self, timeout: Duration) -> String {
        let length = |moment: &Duration| {
            if *moment > timeout { "past the time-out" } else { "for a moment" }
        };
        match self {
            Fault::Kill(role) => format!("kill {role:?}"),
            Fault::KillBoth => "kill both".to_owned(),
            Fault::Terminate(role) => format!("restart {role:?}"),
            Fault::Succeed => "a successor at once".to_owned(),
            Fault::NoThreads(role, _) => format!("{role:?}: no threads"),
            Fault::NoDescriptors(role, _) => format!("{role:?}: no descriptors"),
            Fault::Stop(role, moment) => format!("stop {role:?} {}", length(moment)),
            Fault::StopBoth(moment) => format!("stop both {}", length(moment)),
            Fault::StopAndKill(role) => format!("kill {role:?}, the other stopped"),
            Fault::Inject(role, failure) => format!("{role:?}: {}", failure.name()),
            Fault::InjectAtStart(role, failure) => {
                format!("{role:?}, starting: {}", failure.name())
            }
            Fault::FillAtStart(role, _) => format!("no memory for a starting {role:?}"),
            Fault::FillWhileStopped(_) => "no memory for replaced segments".to_owned(),
        }
    }

    /// All there is to know of it.
    pub fn told(&self, timeout: Duration) -> String {
        let more = match self {
            Fault::Stop(_, moment) | Fault::StopBoth(moment) => format!("{moment:?}"),
            Fault::NoDescriptors(_, span) => format!("{span:?}"),
            Fault::Inject(_, failure)
            | Fault::InjectAtStart(_, failure)
            | Fault::NoThreads(_, failure) => {
                format!("{failure:?}")
            }
            Fault::FillAtStart(_, left) | Fault::FillWhileStopped(left) => {
                format!("{left} bytes left")
            }
            _ => return self.kind(timeout),
        };
        format!("{}: {more}", self.kind(timeout))
    }

    pub fn needs_strace(&self) -> bool {
        matches!(self, Fault::Inject(..) | Fault::InjectAtStart(..) | Fault::NoThreads(..))
    }

    /// What a request may suffer by it.
    pub fn weather(&self) -> Weather {
        if let Fault::Succeed = self { Weather::Orderly } else { Weather::Trouble }
    }

    /// Whether those who ask the cache themselves may notice.
    pub fn reaches_cache(&self) -> bool {
        match self {
            Fault::Kill(role)
            | Fault::Terminate(role)
            | Fault::Stop(role, _)
            | Fault::Inject(role, _)
            | Fault::InjectAtStart(role, _)
            | Fault::NoThreads(role, _)
            | Fault::NoDescriptors(role, _) => *role == Role::Cache,
            Fault::KillBoth | Fault::Succeed | Fault::StopBoth(_) | Fault::StopAndKill(_) => true,
            // It is their memory, too.
            Fault::FillAtStart(..) | Fault::FillWhileStopped(_) => true,
        }
    }

    /// How soon the service must be back once it is undone.
    pub fn late(&self) -> Duration {
        // Longer, and it would be the silent clients' time-outs that end it.
        if let Fault::NoThreads(..) = self { Duration::from_secs(2) } else { LATE }
    }

    pub fn needs_own_memory(&self) -> bool {
        matches!(self, Fault::FillAtStart(..) | Fault::FillWhileStopped(..))
    }

    /// Does it and undoes it: both programs run afterwards.
    pub fn carry_out(&self, theatre: &mut Theatre) -> Result<()> {
        let timeout = theatre.stage.timeout;
        match self {
            Fault::Kill(role) => {
                theatre.kill(*role);
                theatre.start(*role)
            }
            Fault::KillBoth => {
                ROLES.into_iter().for_each(|role| theatre.kill(role));
                ROLES.into_iter().try_for_each(|role| theatre.start(role))
            }
            Fault::Terminate(role) => {
                theatre.terminate(*role)?;
                theatre.start(*role)
            }
            Fault::Succeed => theatre.succeed(),
            Fault::NoThreads(role, failure) => {
                let Ok(tracer) = Tracer::attach(theatre.program(*role)?.pid(), failure) else {
                    return theatre.check_alive(false);
                };
                // Each that is let in takes a thread for as long as it says nothing.
                let stage = Arc::clone(&theatre.stage);
                let mut dice = Dice::of(stage.seed, SILENT, stage.whole());
                theatre.silent =
                    (0..MANY).filter_map(|_| Silent::connect(&stage, &mut dice)).collect();
                thread::sleep(failure.span);
                tracer.detach()?;
                theatre.check_alive(false)
            }
            Fault::NoDescriptors(role, span) => {
                let squeeze = Squeeze::of(theatre.program(*role)?)?;
                thread::sleep(*span);
                squeeze.map_or(Ok(()), Squeeze::release)?;
                theatre.check_alive(false)
            }
            Fault::Stop(role, moment) => {
                stop(theatre, *role)?;
                thread::sleep(*moment);
                go_on(theatre, *role)
            }
            Fault::StopBoth(moment) => {
                ROLES.into_iter().try_for_each(|role| stop(theatre, role))?;
                thread::sleep(*moment);
                ROLES.into_iter().try_for_each(|role| go_on(theatre, role))
            }
            Fault::StopAndKill(role) => {
                let other = if *role == Role::Proxy { Role::Cache } else { Role::Proxy };
                stop(theatre, other)?;
                theatre.kill(*role);
                theatre.start(*role)?;
                go_on(theatre, other)
            }
            Fault::Inject(role, failure) => {
                let pid = theatre.program(*role)?.pid();
                let tracer = Tracer::attach(pid, failure);
                // One that dies at once cannot be attached to.
                if let Ok(tracer) = tracer {
                    thread::sleep(failure.span);
                    tracer.detach()?;
                }
                theatre.check_alive(failure.is_deadly())
            }
            Fault::InjectAtStart(role, failure) => {
                theatre.kill(*role);
                let program = theatre.start_stopped(*role)?;
                let tracer = Tracer::attach(program.pid(), failure)?;
                program.signal(Signal::CONT);
                let came = theatre.take_on(*role, program)?;
                if came.is_ok() {
                    thread::sleep(failure.span);
                }
                tracer.detach()?;
                match came {
                    Ok(()) => theatre.check_alive(failure.is_deadly()),
                    Err((status, words)) => {
                        judge_refusal(theatre, *role, status, &words, failure.is_deadly());
                        theatre.start(*role)
                    }
                }
            }
            Fault::FillAtStart(role, left) => {
                theatre.kill(*role);
                let filler = Filler::leaving(*left)?;
                let came = theatre.start_unsure(*role)?;
                drop(filler);
                match came {
                    Ok(()) => Ok(()),
                    Err((status, words)) => {
                        judge_refusal(theatre, *role, status, &words, false);
                        theatre.start(*role)
                    }
                }
            }
            Fault::FillWhileStopped(left) => {
                let filler = Filler::leaving(*left)?;
                stop(theatre, Role::Cache)?;
                thread::sleep(timeout + Duration::from_millis(500));
                go_on(theatre, Role::Cache)?;
                drop(filler);
                Ok(())
            }
        }
    }
}

/// More silent clients than a program has threads to spare.
const MANY: u64 = 40;

/// Whose dice they are.
const SILENT: u64 = 5;

fn stop(theatre: &mut Theatre, role: Role) -> Result<()> {
    let program = theatre.program(role)?;
    program.signal(Signal::STOP);
    wait_until("it stopped", || program.is_stopped())
}

fn go_on(theatre: &mut Theatre, role: Role) -> Result<()> {
    theatre.program(role)?.signal(Signal::CONT);
    Ok(())
}

/// A program that could not start says why, and ends with code 1; one without memory may not even
/// come that far.
fn judge_refusal(
    theatre: &Theatre,
    role: Role,
    status: std::process::ExitStatus,
    words: &str,
    deadly: bool,
) {
    let record = &theatre.stage.record;
    record.count(Group::Checks, "starts refused");
    let is_honest = status.code() == Some(1) && !words.is_empty() && !words.contains("panicked");
    // What is not the program yet: the shell that becomes it, or its loader.
    let is_loader =
        words.contains("error while loading shared libraries") || words.contains("sh: ");
    if !is_honest && !is_loader && !deadly {
        record.failed("bad refusal", &format!("{role:?}: {status}{words}"));
    }
}
