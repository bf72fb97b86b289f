//! Serves any number of clients from one thread, without a runtime: `epoll unix:PATH`. A key is a
//! number of bytes, and is answered with as many: byte `n` is `n` modulo 251.
//!
//! # When what is ready
//! - The **queue** is readable while `try_recv` has something to do, which is more than requests:
//!   it accepts clients, notices that they end, and wakes the answers that wait for them. So it is
//!   called until it is pending: only that clears the readiness. Requests that are left in it are
//!   not lost, but a loop that is told of changes only (`EPOLLET`) is not told of them again.
//! - An **answer** is waited for by a waker. `poll_slot` that is pending has left the waker behind,
//!   and it is called once: when the client may have freed a slot, or is gone. A wake-up is a hint.
//!   It may be for nothing, and it may come after its answer has ended: a step that is tried again
//!   is pending again, and a number that is not known is skipped.
//! - Wakers are called by the thread that calls `try_recv`, and, when a client dies, by the
//!   library's own watcher: hence the eventfd, which ends the wait of the loop.

use rustix::event::{EventfdFlags, epoll, eventfd};
use shmferry::channel::Seqpacket;
use shmferry::protocol::{Sender, Sending, ShmTransfer, Starting};
use shmferry::{Refusal, Result};
use std::collections::HashMap;
use std::mem::{MaybeUninit, take};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Wake, Waker};

/// The answers to go on with, by number.
struct ReadyList {
    numbers: Mutex<Vec<u64>>,
    changed: OwnedFd,
}

struct Number(u64, Arc<ReadyList>);

impl Wake for Number {
    fn wake(self: Arc<Self>) {
        self.1.numbers.lock().unwrap().push(self.0);
        let _ = rustix::io::write(&self.1.changed, &1u64.to_ne_bytes()); // full is readable, too
    }
}

/// An answer under way.
struct Answer {
    transfer: ShmTransfer<Sender, Sending>,
    left: u64,
    sent: u64,
    waker: Waker,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).expect("usage: epoll unix:PATH");
    let path = address.strip_prefix("unix:").expect("an address that begins with unix:");
    let queue = Seqpacket::new(path).max_clients(10_000).bind()?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    for fd in [rustix::fd::AsFd::as_fd(&queue), rustix::fd::AsFd::as_fd(&changed)] {
        epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    let ready = Arc::new(ReadyList { numbers: Mutex::default(), changed });
    let (mut answers, mut next) = (HashMap::new(), 0);
    loop {
        while let Poll::Ready(request) = queue.try_recv() {
            let waker = Waker::from(Arc::new(Number(next, Arc::clone(&ready))));
            // Fails if the client has changed its mind.
            if let Ok(Some(answer)) = begin(request?, waker) {
                answer.waker.wake_by_ref();
                answers.insert(next, answer);
                next += 1;
            }
        }
        let numbers = take(&mut *ready.numbers.lock().unwrap());
        for number in &numbers {
            let Some(answer) = answers.get_mut(number) else { continue };
            match answer.go_on() {
                Poll::Pending => {}
                // A slot at a time: others have their turn.
                Poll::Ready(Ok(true)) => answer.waker.wake_by_ref(),
                // All is sent, or the client is gone.
                Poll::Ready(Ok(false) | Err(_)) => drop(answers.remove(number)),
            }
        }
        if numbers.is_empty() {
            let mut events = [MaybeUninit::uninit(); 2];
            let _ = epoll::wait(&epoll, &mut events, None); // a signal: as if for nothing
            let _ = rustix::io::read(&ready.changed, &mut [0; 8]);
        }
    }
}

/// Accepts a request, or refuses it.
fn begin(request: ShmTransfer<Sender, Starting>, waker: Waker) -> Result<Option<Answer>> {
    match str::from_utf8(request.key()).ok().and_then(|key| key.parse().ok()) {
        None => request.refuse(Refusal::Invalid).map(|()| None),
        Some(0) => request.accept(0)?.finish().map(|_| None),
        Some(left) => Ok(Some(Answer { transfer: request.accept(left)?, left, sent: 0, waker })),
    }
}

impl Answer {
    /// Fills a slot, if there is one; whether there is more to send.
    fn go_on(&mut self) -> Poll<Result<bool>> {
        let slot = std::task::ready!(self.transfer.poll_slot(&self.waker))?;
        let len = slot.capacity() as u64; // as much as is left, at most
        let bytes: Vec<u8> = (self.sent..self.sent + len).map(|n| (n % 251) as u8).collect();
        slot.send(&bytes)?;
        (self.sent, self.left) = (self.sent + len, self.left - len);
        Poll::Ready(Ok(self.left > 0))
    }
}
