//! A hang-up runs the call registered for it, and no other.

use super::*;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

/// A watched socket, its other end, and a channel that gets a message when that hangs up.
fn watched() -> (Watch, OwnedFd, Receiver<()>) {
    let flags = SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (ours, theirs) = pair.unwrap();
    let (told, said) = channel();
    let watch = on_hang_up(Arc::new(ours), move || told.send(()).unwrap()).unwrap();
    (watch, theirs, said)
}

#[test]
fn each_hang_up_is_told_to_those_whom_it_concerns() {
    let timeout = Duration::from_secs(30);
    let (_first, one, first_said) = watched();
    let (_second, other, second_said) = watched();
    // A peer that only stops sending counts as hung up.
    shutdown(&other, Shutdown::Write).unwrap();
    second_said.recv_timeout(timeout).unwrap();
    assert_eq!(first_said.try_recv(), Err(TryRecvError::Empty));
    drop(one);
    first_said.recv_timeout(timeout).unwrap();
}

#[test]
fn a_watch_that_is_dropped_keeps_nothing() {
    let (watch, _theirs, said) = watched();
    drop(watch);
    assert_eq!(said.try_recv(), Err(TryRecvError::Disconnected), "its call is kept");
}
