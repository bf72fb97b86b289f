//! Which connections are attended to, and how often.

use std::cell::Cell;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;

#[test]
fn what_was_not_read_to_its_end_is_attended_to_again() {
    let lines = Lines::new().unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let connection = Arc::new(());
    lines.add(&ours, &connection).unwrap();
    let calls = Cell::new(0);
    let attend = |is_all| {
        lines.attend(|()| {
            calls.set(calls.get() + 1);
            is_all
        })
    };

    assert!(attend(true).unwrap());
    assert_eq!(calls.take(), 0, "nothing has come");
    rustix::io::write(&theirs, b"something").unwrap();
    assert!(!attend(false).unwrap(), "there may be more");
    assert!(!attend(false).unwrap(), "still");
    assert!(attend(true).unwrap());
    assert_eq!(calls.take(), 3, "though nothing new has come");
    assert!(attend(true).unwrap());
    assert_eq!(calls.take(), 0, "it was read to its end");

    // One that has been dropped meanwhile is forgotten.
    rustix::io::write(&theirs, b"something").unwrap();
    assert!(!attend(false).unwrap());
    drop(connection);
    assert_eq!(calls.take(), 1);
    assert!(attend(true).unwrap());
    assert_eq!(calls.take(), 0);
}
