//! Closes peer-supplied descriptors on a background thread: `close` can block (SO_LINGER, FUSE).
//!
//! A descriptor that a peer sent can be a socket with SO_LINGER, or a file of a file system that
//! the peer itself serves. Unread messages hold such descriptors too, and are closed with their
//! connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicUsize;
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage};

use crate::process::Counted;

#[cfg(test)]
mod tests;

/// How many may be under way before no more peers are accepted.
const MOST: usize = 64;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Whether too many descriptors are being closed: no peer should be accepted that could add to
/// them.
pub(crate) fn is_behind() -> bool {
    Counted::count(&UNDER_WAY) >= MOST
}

/// A socket that may have unread messages of a peer; closed in the background.
pub(crate) struct Socket(Option<OwnedFd>);

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Socket {
        Socket(Some(fd))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Some(fd) => fd.as_fd(),
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        close(self.0.take().into_iter().collect());
    }
}

/// The most descriptors in one message (`SCM_MAX_FD`). With less room, the kernel closes the rest
/// itself, on the thread that reads.
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// Descriptors that came with a message; closed in the background.
pub(crate) struct ReceivedFds(pub(crate) Vec<OwnedFd>);

impl ReceivedFds {
    pub(crate) fn of(control: &mut RecvAncillaryBuffer<'_>) -> ReceivedFds {
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        ReceivedFds(rights.flatten().collect())
    }
}

impl Drop for ReceivedFds {
    fn drop(&mut self) {
        close(std::mem::take(&mut self.0));
    }
}

fn close(fds: Vec<OwnedFd>) {
    if fds.is_empty() {
        return;
    }
    let under_way = Counted::among(&UNDER_WAY);
    let closing = move || {
        drop(fds);
        drop(under_way);
    };
    // If no thread can be started, the closure is dropped here, and closes them.
    let _ = thread::Builder::new().name("shmferry-close".to_owned()).spawn(closing);
}
