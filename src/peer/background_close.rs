//! Closes what a peer had a say in on a thread of its own: closing can block for as long as the peer likes.
//!
//! A descriptor that a peer sent can be a socket that lingers, or a file of a file system that the peer
//! itself serves. Messages that nobody read hold such descriptors, too, and are closed with their
//! connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicUsize;
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage};

use crate::process::Counted;

#[cfg(test)]
mod tests;

/// How many may be under way before no more peers are let in.
const MOST: usize = 64;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Whether so many descriptors are being closed that nobody should be let in who could add to them.
pub(crate) fn is_behind() -> bool {
    Counted::count(&UNDER_WAY) >= MOST
}

/// A socket that peers send messages to, read or not.
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

/// The most descriptors that the kernel lets one message carry. With less room for them, it would close
/// the rest itself, on the thread that reads.
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// Descriptors that came with a message.
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
    // Without a thread to be had, they are closed here.
    let _ = thread::Builder::new().name("shmferry-close".to_owned()).spawn(closing);
}
