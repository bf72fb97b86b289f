//! Limits on descriptors: enough for chaos itself, and none to spare for a program under test.

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use super::program::Program;
use super::{Result, told};

/// As many for this process as it may have: hundreds of silent connections are its own, too.
pub fn raise() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).map_err(told("setrlimit"))
}

/// Leaves a program the descriptors that it has now, until [released](Squeeze::release).
pub struct Squeeze {
    pid: Pid,
    before: Rlimit,
}

impl Squeeze {
    /// `None` for a program that has just ended.
    pub fn of(program: &Program) -> Result<Option<Squeeze>> {
        let Some(holdings) = program.holdings() else { return Ok(None) };
        let pid =
            i32::try_from(program.pid()).ok().and_then(Pid::from_raw).ok_or("no process id")?;
        // Both programs raise their limit as far as they may, and inherit that from here.
        let maximum = getrlimit(Resource::Nofile).maximum;
        let squeeze = Squeeze { pid, before: Rlimit { current: maximum, maximum } };
        let left = Rlimit { current: Some(holdings.descriptors as u64), maximum };
        Ok(squeeze.set(left)?.then_some(squeeze))
    }

    /// Gives it back what it had.
    pub fn release(self) -> Result<()> {
        let before = Rlimit { ..self.before };
        self.set(before).map(drop)
    }

    /// Whether the program was still there.
    fn set(&self, limit: Rlimit) -> Result<bool> {
        match prlimit(Some(self.pid), Resource::Nofile, limit) {
            Ok(_) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(errno) => Err(told("prlimit")(errno)),
        }
    }
}
