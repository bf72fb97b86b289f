//! Whether a peer's process has ended.

use crate::sync::Deadline;

/// A peer's process, by pidfd. Without one (an old kernel, a peer in a foreign pid namespace) it
/// never counts as ended, and its segments are retired instead. If the pid was reused before this
/// was opened, it refers to a living process, which is safe.
#[derive(Default)]
pub(super) struct PeerProcess {
    #[cfg(target_os = "linux")]
    pidfd: Option<std::os::fd::OwnedFd>,
}

#[cfg(target_os = "linux")]
impl PeerProcess {
    pub(super) fn open(pid: Option<u32>) -> PeerProcess {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        PeerProcess { pidfd: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) }
    }

    pub(super) fn wait_ended(&self, deadline: Deadline) -> bool {
        use rustix::event::PollFlags;
        let Some(pidfd) = &self.pidfd else { return false };
        crate::sync::wait_ready(pidfd, PollFlags::IN, deadline).unwrap_or(false)
    }
}

#[cfg(not(target_os = "linux"))]
impl PeerProcess {
    pub(super) fn wait_ended(&self, _deadline: Deadline) -> bool {
        false
    }
}
