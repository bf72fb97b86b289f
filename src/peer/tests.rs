//! Links: certain deaths, in-flight limits, reasons of an end, and signals that come late.

use super::*;
use crate::error::{Error, Rejection};
use crate::sync::Deadline;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::task::Waker;
use std::time::Duration;

#[test]
fn only_a_process_that_has_ended_is_dead_for_certain() {
    let at_once = || Deadline::after(Duration::ZERO);
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let to = |pid| Link::to_sender(Peer { pid, uid: 0 });
    let (childs, nameless, within) = (to(Some(child.id())), to(None), Link::within());
    for link in [&childs, &nameless, &within] {
        link.sever(|| None);
        assert!(!link.wait_dead(at_once()), "it only hung up");
    }
    child.kill().unwrap();
    assert!(childs.wait_dead(Deadline::after(Duration::from_secs(30))));
    child.wait().unwrap();
    assert!(childs.wait_dead(at_once()), "and stays dead when its number is free again");
    assert!(!nameless.wait_dead(at_once()));
}

#[test]
fn room_is_told_of_once_and_only_when_enough_have_left() {
    let link = Arc::new(Link::within());
    let told = Arc::new(AtomicU32::new(0));
    let tell = || {
        let told = Arc::clone(&told);
        move || _ = told.fetch_add(1, Relaxed)
    };
    let mut under_way: Vec<_> = (0..3).map(|_| link.count()).collect();
    assert!(link.is_below(4) && !link.is_below(3));
    link.when_below(2, tell());
    for expected in [0, 1, 1] {
        under_way.pop();
        assert_eq!(told.load(Relaxed), expected, "{} left", under_way.len());
    }
    link.when_below(1, tell());
    assert_eq!(told.load(Relaxed), 2, "at once: there is room");
    let last = link.count();
    link.when_below(1, tell());
    assert_eq!(told.load(Relaxed), 2, "as many as may be");
    drop(last);
    assert_eq!(told.load(Relaxed), 3);
}

#[test]
fn the_first_reason_for_an_end_is_the_one_that_is_told() {
    let link = Link::within();
    link.sever(|| Some(Rejection::Protocol));
    link.sever(|| Some(Rejection::Resources));
    assert!(matches!(link.disconnect_reason(), Error::Rejected(Rejection::Protocol)));
}

/// Counts how often it asks.
struct Asks(Arc<AtomicUsize>);

impl Signal for Asks {
    fn ask(&self) {
        self.0.fetch_add(1, SeqCst);
    }

    fn is_asked(&self) -> bool {
        false
    }

    fn signal(&self) {}

    fn tell(&self) {}
}

/// A client's ring may come after its first request.
#[test]
fn tasks_that_wait_before_there_is_a_signal_have_asked_once_there_is() {
    for waits in [false, true] {
        let link = Arc::new(Link::to_receiver(Peer { pid: None, uid: 0 }));
        let registration = link.count();
        if waits {
            registration.wake_later(Waker::noop());
        }
        let asked = Arc::<AtomicUsize>::default();
        link.signal_by(Box::new(Asks(Arc::clone(&asked))));
        assert_eq!(asked.load(SeqCst), usize::from(waits));
    }
}
