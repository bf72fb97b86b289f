use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::loan::SEALED;
use crate::sync::{FairSemaphore, at_place};

fn pair() -> (Arc<Socket>, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Arc::new(Socket::from(ours)), theirs)
}

#[test]
fn workers_in_one_place_do_not_wait_for_each_other_at_a_full_connection() {
    let (socket, _unread) = pair();
    while rustix::net::send(&*socket, &[0], rustix::net::SendFlags::NOSIGNAL).is_ok() {}
    let limits = LoanLimits { bytes: 1, count: 1 };
    let lender = Arc::new(SocketLender::new(&socket, SEALED, limits));
    let loan = Loan::from_bytes(&[7]).unwrap();
    let place = Arc::new(FairSemaphore::new(1));
    let (done, ended) = mpsc::channel();
    for _ in 0..4 {
        let (lender, loan, place) = (Arc::clone(&lender), loan.clone(), Arc::clone(&place));
        let done = done.clone();
        std::thread::spawn(move || {
            for _ in 0..1000 {
                at_place(&place, || {
                    assert!(matches!(lender.introduce(&loan), Introduced::No { wanted: 0 }));
                });
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..4 {
        ended.recv_timeout(Duration::from_secs(20)).expect("no worker waits for ever");
    }
}
