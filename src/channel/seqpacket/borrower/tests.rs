//! A borrower over a pair of sockets, whose other end does as the test likes.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

use super::*;
use crate::channel::seqpacket::send;
use crate::loan::{Loan, SEALED};
use crate::sync::Deadline;

fn pair(limits: LoanLimits) -> (SocketBorrower, Socket) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (SocketBorrower::new(&Arc::new(ours.into()), limits), theirs.into())
}

const MANY: LoanLimits = LoanLimits { bytes: 1 << 20, count: 1000 };

fn introduce(server: &Socket, id: u64, len: usize) {
    let loan = Loan::from_bytes(&vec![id as u8; len]).unwrap();
    let message = Message::Loan { id, kind: SEALED, len: len as u64 }.encode();
    send(server, &message, Some(loan.as_fd()), Deadline::NEVER).unwrap();
}

/// What the server hears; `None` if there is nothing.
fn heard(server: &Socket) -> Option<Vec<u8>> {
    let mut buffer = [0; MAX_MESSAGE];
    let (len, _) = recv(server, &mut buffer, RecvFlags::empty()).ok()?;
    Some(buffer[..len].to_vec())
}

fn returned(ids: &[u64]) -> Vec<u8> {
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Message::Returned { ids: &ids }.encode()
}

#[test]
fn returns_that_found_no_room_are_told_the_next_time() {
    let (borrower, server) = pair(MANY);
    introduce(&server, 1, 100);
    assert!(borrower.borrow(1).unwrap().is_some());
    let wakeup = Message::Wakeup.encode();
    let at_once = || Deadline::after(Duration::ZERO);
    while send(&borrower.socket, &wakeup, None, at_once()).is_ok() {}
    borrower.make_room(100);
    while let Some(message) = heard(&server) {
        assert_eq!(message, wakeup);
    }
    // Nothing more is evicted: what was freed is enough.
    borrower.make_room(100);
    assert_eq!(heard(&server), Some(returned(&[1])));
    borrower.make_room(100);
    assert_eq!(heard(&server), None, "once");
}

#[test]
fn loans_of_answers_that_nobody_read_are_returned_when_room_is_wanted() {
    let (borrower, server) = pair(MANY);
    for id in 1..=16 {
        introduce(&server, id, 100);
    }
    borrower.make_room(200);
    assert_eq!(heard(&server), Some(returned(&[1, 2])));
    assert!(borrower.borrow(1).unwrap().is_none());
    assert!(borrower.borrow(16).unwrap().is_some());
}

#[test]
fn a_farewell_found_in_search_of_a_loan_is_not_lost() {
    let (borrower, server) = pair(MANY);
    introduce(&server, 1, 100);
    let farewell = Message::farewell(Rejection::TooManyBytes(5)).encode();
    send(&server, &farewell, None, Deadline::NEVER).unwrap();
    introduce(&server, 3, 100);
    assert!(borrower.borrow(2).unwrap().is_none());
    assert_eq!(borrower.last_words(), Some(Rejection::TooManyBytes(5)));
    assert!(borrower.borrow(1).unwrap().is_some());
    assert!(borrower.borrow(3).unwrap().is_none(), "nothing counts after a farewell");
}

#[test]
fn what_a_server_had_introduced_is_there_after_its_end() {
    for unread in [false, true] {
        for watcher_first in [false, true] {
            let (borrower, server) = pair(MANY);
            introduce(&server, 1, 100);
            introduce(&server, 2, 100);
            if unread {
                // The server's end with messages unread shows as an error first.
                let wakeup = Message::Wakeup.encode();
                send(&borrower.socket, &wakeup, None, Deadline::NEVER).unwrap();
            }
            drop(server);
            wait_closed(&borrower);
            if watcher_first {
                assert_eq!(borrower.last_words(), None);
            }
            let bytes = borrower.borrow(2).unwrap().expect("it was introduced").len();
            assert_eq!(bytes, 100, "{unread} {watcher_first}");
            assert!(borrower.borrow(1).unwrap().is_some());
            assert!(borrower.borrow(3).unwrap().is_none());
        }
    }
}

/// Waits until the other end is closed, which happens in the background.
fn wait_closed(borrower: &SocketBorrower) {
    use crate::sync::wait_ready;
    use rustix::event::PollFlags;
    // `POLLHUP` is always reported; nothing else is asked for.
    assert!(wait_ready(&*borrower.socket, PollFlags::empty(), Deadline::NEVER).unwrap());
}

#[test]
fn two_threads_find_their_loans_whoever_reads_first() {
    for round in 0..if cfg!(miri) { 1 } else { 200 } {
        let (borrower, server) = pair(MANY);
        for id in 1..=8 {
            introduce(&server, id, 10);
        }
        thread::scope(|scope| {
            for id in 1..=8 {
                let borrower = &borrower;
                scope.spawn(move || {
                    let found = borrower.borrow(1 + (id + round) % 8).unwrap();
                    assert_eq!(found.expect("it was introduced").len(), 10);
                });
            }
        });
    }
}

#[test]
fn what_lasts_is_bounded_though_introductions_never_end() {
    let (borrower, server) = pair(LoanLimits { bytes: 1000, count: 3 });
    let memory = Loan::from_bytes(&[7; 10]).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut id = 1;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let message = Message::Loan { id, kind: SEALED, len: 10 }.encode();
                let soon = Deadline::after(Duration::from_millis(1));
                let _ = send(&server, &message, Some(memory.as_fd()), soon);
                while heard(&server).is_some() {}
                id += 1;
            }
        });
        for _ in 0..3 {
            assert!(borrower.borrow(u64::MAX).unwrap().is_none());
            assert_eq!(borrower.last_words(), None);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // After the server's end, no more is set aside than an honest one can have introduced.
    while heard(&server).is_some() {}
    let (borrower, server) = pair(LoanLimits { bytes: 1000, count: 3 });
    (0..10).for_each(|id| introduce(&server, id, 10));
    assert_eq!(borrower.last_words(), None);
    assert_eq!(lock(&borrower.inbox).loans.len(), 3);
}

#[test]
fn no_more_is_examined_than_an_honest_server_lends() {
    const PAGE: usize = 4096;
    let limits = LoanLimits { bytes: 8 * PAGE as u64, count: 100 };
    let (borrower, server) = pair(limits);
    (1..=20).for_each(|id| introduce(&server, id, 3 * PAGE));
    assert!(borrower.borrow(20).unwrap().is_some(), "the one that is wanted");
    // Two are within the limits. The last is kept in place of the first.
    assert_eq!(heard(&server), Some(returned(&[3])), "unexamined");
    (4..=19).for_each(|id| assert_eq!(heard(&server), Some(returned(&[id]))));
    assert_eq!(heard(&server), Some(returned(&[1])), "evicted");
    assert_eq!(heard(&server), None);
    // One that is more than all: not even looked at, though it is not there.
    let nothing = std::fs::File::open("/dev/null").unwrap();
    let message = Message::Loan { id: 21, kind: SEALED, len: limits.bytes + 1 }.encode();
    send(&server, &message, Some(nothing.as_fd()), Deadline::NEVER).unwrap();
    let error = borrower.borrow(21).map(drop).unwrap_err();
    assert!(error.to_string().contains("21"), "{error}");
    assert!(matches!(error, Error::Peer(ProtocolError(PeerFault::LentTooMuch(21)))), "{error}");
}

#[test]
fn returns_that_nobody_hears_are_no_more_than_an_honest_server_lends() {
    let (borrower, server) = pair(LoanLimits { bytes: 1 << 20, count: 3 });
    let wakeup = Message::Wakeup.encode();
    let at_once = || Deadline::after(Duration::ZERO);
    while send(&borrower.socket, &wakeup, None, at_once()).is_ok() {}
    for id in 1..=50 {
        introduce(&server, id, 10);
        let _ = borrower.borrow(id);
    }
    assert!(lock(&borrower.returned).len() <= 3);
}

/// A connection on which one more signal has always come.
struct Flood;

impl Packets for Flood {
    fn send_now(&self, _: &[u8], _: Option<BorrowedFd<'_>>) -> Result<()> {
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>> {
        let signal = Message::Wakeup.encode();
        buffer[..signal.len()].copy_from_slice(&signal);
        let fds = ReceivedFds(Vec::new());
        Ok(Some(Received { len: signal.len(), fds, lost: false }))
    }
}

#[test]
fn a_flood_of_signals_holds_up_nobody() {
    let borrower = SocketBorrower::new(&Arc::new(Flood), MANY);
    assert!(!borrower.read_all(), "there may be more");
    assert!(borrower.was_signalled());
    assert!(borrower.borrow(1).unwrap().is_none());
    borrower.make_room(1);
    assert!(borrower.was_signalled());
    assert_eq!(borrower.last_words(), None);
}
