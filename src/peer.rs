//! The other process: who it is, and whether it is alive. Its death is an event, not polled (rule
//! P7).
//!
//! Each connection has a [`Link`], with which segments in use are registered. When the connection
//! hangs up, the process's one watcher thread severs the link. That poisons all that is registered,
//! and so wakes every waiter at once.

use std::fmt;

#[cfg(target_os = "linux")]
mod background_close;
#[cfg(target_os = "linux")]
mod credentials;
mod link;
// Under loom, processes are threads.
#[cfg_attr(loom, path = "peer/pidfd_model.rs")]
mod pidfd;
#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests;
#[cfg(target_os = "linux")]
mod watcher;

#[cfg(target_os = "linux")]
pub(crate) use link::Signal;
pub(crate) use link::{Link, Poison, Registration};
#[cfg(any(feature = "tokio", loom))]
pub(crate) use link::{Work, Working};
#[cfg(target_os = "linux")]
pub(crate) use {
    background_close::{MOST_DESCRIPTORS, ReceivedFds, Socket, is_behind},
    credentials::untaken,
    watcher::{Watch, on_hang_up},
};

/// This system has no pidfds: a peer never counts as ended.
#[cfg(all(unix, not(target_os = "linux")))]
pub(crate) fn untaken(_: std::os::fd::BorrowedFd<'_>) -> Option<u64> {
    None
}

/// The process at the other end of a connection, as the kernel identified it when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its process id; `None` for a process without a number in our pid namespace.
    pub pid: Option<u32>,
    /// The user it ran as.
    pub uid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid} of user {}", self.uid),
            None => write!(f, "a process of user {}", self.uid),
        }
    }
}
