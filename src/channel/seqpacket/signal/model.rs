//! Tasks under loom: how they are signalled, as it ships, by `ci/loom.sh`.
//!
//! Real are the links with their locks, the words and the decisions of [`SocketSignal`], the
//! semaphores, the step that does not wait, offers, and both sides of a transfer. Replaced are the
//! socket (a count of messages, which an *attendant* waits for, as who reads the descriptor does),
//! a task (a thread that sleeps until its waker is called), and what the models of transfers
//! replace.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32 as Untracked, Ordering};
use std::task::{Poll, Wake, Waker, ready};

use loom::sync::Condvar;
use loom::thread::{self, JoinHandle};
use rustix::io::Errno;

use super::*;
use crate::channel::Request;
use crate::channel::seqpacket::borrower::SocketBorrower;
use crate::channel::seqpacket::client::Received;
use crate::channel::seqpacket::ring::RING_WORDS;
use crate::error::Awaited;
use crate::loan::{Borrower, LoanLimits, SEALED};
use crate::peer::{Link, Poison, ReceivedFds, Registration};
use crate::protocol::model::{
    Asked, Asking, LONG_GRACE, Watched, ask_over, found, link_to_sender, model, pool, receive,
    send, try_as_task,
};
use crate::protocol::{Receiver, Receiving, Refusal, Reply, ShmTransfer, Wanted};
use crate::sync::modelled::{Mutex, lock};
use crate::sync::task_model::run;
use crate::sync::{Deadline, Semaphore};

/// What is on its way to one side of a connection.
struct Line {
    messages: Mutex<Messages>,
    comes: Condvar,
    /// How often this side has asked.
    asked: Untracked,
    /// How many threads of the other side post.
    posters: u32,
}

#[derive(Default)]
struct Messages {
    unread: VecDeque<Vec<u8>>,
    signals: u32,
    /// Whether one message fills it.
    is_narrow: bool,
    /// The next message cannot be sent, for want of memory.
    fails_once: bool,
    is_over: bool,
}

impl Line {
    fn posted_by(posters: u32) -> Arc<Line> {
        let (messages, comes, asked) = (Mutex::default(), Condvar::new(), Untracked::new(0));
        Arc::new(Line { messages, comes, asked, posters })
    }

    /// A message that is no signal fills it.
    fn fill(&self) {
        let mut messages = lock(&self.messages);
        messages.is_narrow = true;
        messages.unread.push_back(Message::Loan { id: 1, kind: SEALED, len: 1 }.encode());
        self.comes.notify_one();
    }

    /// Waits until there is something to read; `false` at the end.
    fn is_readable(&self) -> bool {
        let mut messages = lock(&self.messages);
        while messages.unread.is_empty() && !messages.is_over {
            messages = self.comes.wait(messages).unwrap();
        }
        !messages.unread.is_empty()
    }

    fn take(&self) -> Option<Vec<u8>> {
        lock(&self.messages).unread.pop_front()
    }

    fn close(&self) {
        lock(&self.messages).is_over = true;
        self.comes.notify_one();
    }
}

/// One end of a connection.
struct End {
    incoming: Arc<Line>,
    outgoing: Arc<Line>,
}

impl Packets for End {
    fn send_now(&self, message: &[u8], _: Option<BorrowedFd<'_>>) -> Result<()> {
        let Line { messages, comes, asked, posters } = &*self.outgoing;
        let mut messages = lock(messages);
        if messages.is_over {
            return Err(Error::Disconnected);
        }
        if mem::take(&mut messages.fails_once) {
            return Err(Error::os("sendmsg")(Errno::NOBUFS));
        }
        if messages.is_narrow && !messages.unread.is_empty() {
            return Err(Error::Timeout(Awaited::QueueRoom));
        }
        messages.unread.push_back(message.to_vec());
        messages.signals += 1;
        let most = asked.load(Ordering::Relaxed) * posters;
        assert!(messages.signals <= most, "a signal that nobody asked for");
        drop(messages);
        comes.notify_one();
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>> {
        let Some(message) = self.incoming.take() else { return Ok(None) };
        let len = message.len();
        buffer[..len].copy_from_slice(&message);
        Ok(Some(Received { len, fds: ReceivedFds(Vec::new()), lost: false }))
    }
}

/// A side's signal, which counts how often it asks.
struct Counted {
    signal: SocketSignal<End>,
    ours: Arc<Line>,
    theirs: Arc<Line>,
}

impl Signal for Counted {
    fn ask(&self) {
        self.ours.asked.fetch_add(1, Ordering::Relaxed);
        self.signal.ask();
    }

    fn is_asked(&self) -> bool {
        self.signal.is_asked()
    }

    fn signal(&self) {
        self.signal.signal();
    }

    fn tell(&self) {
        self.theirs.asked.fetch_add(1, Ordering::Relaxed); // counts as if it had been asked for
        self.signal.tell();
    }
}

/// One process's end of a connection: its link, and what is on its way to it.
#[derive(Clone)]
struct Side {
    link: Arc<Link>,
    line: Arc<Line>,
}

/// Where one process has tasks, and where the other one has.
struct Pair {
    client: Side,
    server: Side,
}

/// Two connected processes, each of which posts with so many threads.
fn pair(posters: u32) -> Pair {
    let words = Arc::new(Words::zeroed(RING_WORDS));
    let [client, server] = [(); 2].map(|()| {
        let (link, line) = (link_to_sender(), Line::posted_by(posters));
        Side { link, line }
    });
    for (ours, theirs, of_client) in [(&client, &server, true), (&server, &client, false)] {
        let [incoming, outgoing] = [ours, theirs].map(|side| Arc::clone(&side.line));
        let socket = Arc::new(End { incoming, outgoing });
        let signal = match of_client {
            true => SocketSignal::of_client(&words, &socket),
            false => SocketSignal::of_server(&words, &socket),
        };
        let [ours_line, theirs_line] = [ours, theirs].map(|side| Arc::clone(&side.line));
        let counted = Counted { signal, ours: ours_line, theirs: theirs_line };
        ours.link.signal_by(Box::new(counted));
    }
    Pair { client, server }
}

impl Side {
    /// Reads what comes, and looks after the tasks each time, until the connection's end.
    fn attend(&self) -> JoinHandle<()> {
        let side = self.clone();
        thread::spawn(move || {
            while side.line.is_readable() {
                side.line.take();
                side.link.look();
            }
        })
    }
}

/// What one task waits for: permits of `filled`, which are made of those of `spare`.
struct Slots {
    filled: Semaphore,
    spare: Semaphore,
}

impl Slots {
    fn new(count: u32) -> Arc<Slots> {
        let slots = Slots { filled: Semaphore::default(), spare: Semaphore::default() };
        slots.spare.reset(count);
        Arc::new(slots)
    }

    /// Posts one, as the other process.
    fn post(&self, from: &Link) {
        self.filled.add(self.spare.try_wait().unwrap());
        self.filled.wake();
        from.wake_tasks();
    }
}

impl Poison for Slots {
    fn poison(&self) {
        self.filled.poison();
    }

    fn has_news(&self) -> bool {
        self.filled.is_settled()
    }
}

/// A task that takes so many permits, or the end. Returns how many it took.
fn take(slots: &Arc<Slots>, registration: &Registration, count: u32) -> u32 {
    for taken in 0..count {
        if run(|task| try_as_task(&slots.filled, registration, task)).is_err() {
            return taken;
        }
    }
    count
}

fn spawn<T: 'static>(run: impl FnOnce() -> T + 'static) -> JoinHandle<T> {
    thread::spawn(run)
}

#[test]
fn a_task_takes_what_is_posted_for_it() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = Slots::new(2);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let posted = Arc::clone(&slots);
        let poster = spawn(move || (0..2).for_each(|_| posted.post(&server.link)));
        assert_eq!(take(&slots, &registration, 2), 2);
        poster.join().unwrap();
        client.line.close();
        attendant.join().unwrap();
    });
}

#[test]
fn a_task_is_told_by_any_of_two_posters() {
    model(|| {
        let Pair { client, server } = pair(2);
        let slots = Slots::new(2);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let posters = [(); 2].map(|()| {
            let (posted, link) = (Arc::clone(&slots), Arc::clone(&server.link));
            spawn(move || posted.post(&link))
        });
        assert_eq!(take(&slots, &registration, 2), 2);
        posters.into_iter().for_each(|poster| poster.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

/// The second task can wait before the first is signalled, while it is looked after, and later.
#[test]
fn two_tasks_of_one_process_each_take_theirs() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = [(); 2].map(|()| Slots::new(1));
        let [first, second] = slots.clone().map(|slots| {
            let registration = client.link.register(Arc::clone(&slots) as _);
            move || assert_eq!(take(&slots, &registration, 1), 1)
        });
        let attendant = client.attend();
        let poster = spawn(move || slots.iter().for_each(|slots| slots.post(&server.link)));
        let other = spawn(second);
        first();
        [other, poster].into_iter().for_each(|thread| thread.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

/// Each task has a poster of its own; the first one's thread looks after both, once it is done.
#[test]
fn two_posters_for_two_tasks() {
    model(|| {
        let Pair { client, server } = pair(2);
        let slots = [(); 2].map(|()| Slots::new(1));
        let registrations =
            slots.clone().map(|slots| client.link.register(Arc::clone(&slots) as _));
        let attendant = client.attend();
        let [first, second] = slots.clone().map(|slots| {
            let link = Arc::clone(&server.link);
            spawn(move || slots.post(&link))
        });
        // One thread runs both, as a runtime can.
        let mut left = [1, 1];
        run(|task| {
            for (at, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
                if try_as_task(&slots[at].filled, &registrations[at], task).is_ready() {
                    *left -= 1;
                }
            }
            if left == [0, 0] { Poll::Ready(()) } else { Poll::Pending }
        });
        [first, second].into_iter().for_each(|thread| thread.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

#[test]
fn a_look_that_nobody_signalled_costs_no_wake_up() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = Slots::new(1);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let poster = spawn({
            let slots = Arc::clone(&slots);
            move || slots.post(&server.link)
        });
        let looking = spawn({
            let link = Arc::clone(&client.link);
            move || link.look()
        });
        assert_eq!(take(&slots, &registration, 1), 1);
        [poster, looking].into_iter().for_each(|thread| thread.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

#[test]
fn a_full_connection_signals_as_well() {
    model(|| {
        let Pair { client, server } = pair(1);
        client.line.fill();
        let slots = Slots::new(2);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let posted = Arc::clone(&slots);
        let poster = spawn(move || (0..2).for_each(|_| posted.post(&server.link)));
        assert_eq!(take(&slots, &registration, 2), 2);
        poster.join().unwrap();
        client.line.close();
        attendant.join().unwrap();
    });
}

/// A signal that failed costs the task nothing once something else is posted.
#[test]
fn a_signal_that_fails_is_made_up_for_by_the_next() {
    model(|| {
        let Pair { client, server } = pair(1);
        lock(&client.line.messages).fails_once = true;
        let slots = Slots::new(2);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let posted = Arc::clone(&slots);
        let poster = spawn(move || (0..2).for_each(|_| posted.post(&server.link)));
        assert!(run(|task| try_as_task(&slots.filled, &registration, task)).is_ok());
        poster.join().unwrap();
        client.line.close();
        attendant.join().unwrap();
    });
}

/// A task that goes on elsewhere: whoever tried first is not woken any more.
#[test]
fn the_last_who_tries_is_woken() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = Slots::new(2);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let poster = spawn({
            let slots = Arc::clone(&slots);
            move || slots.post(&server.link)
        });
        if try_as_task(&slots.filled, &registration, Waker::noop()).is_pending() {
            assert_eq!(take(&slots, &registration, 1), 1);
        }
        poster.join().unwrap();
        client.line.close();
        attendant.join().unwrap();
    });
}

/// A thread that borrows reads the connection as well, and so the attendant may find nothing there.
fn while_a_thread_borrows(is_full: bool) {
    model(move || {
        let Pair { client, server } = pair(1);
        if is_full {
            client.line.fill();
        }
        let socket = End { incoming: Arc::clone(&client.line), outgoing: Arc::clone(&server.line) };
        let limits = LoanLimits { bytes: 1, count: 1 };
        let loans = Arc::new(SocketBorrower::new(&Arc::new(socket), limits));
        let slots = Slots::new(1);
        let registration = client.link.register(Arc::clone(&slots) as _);
        // As a connection's `attend`, and its `borrow`.
        let attendant = spawn({
            let (client, loans) = (client.clone(), Arc::clone(&loans));
            move || {
                while client.line.is_readable() {
                    loans.read_all();
                    client.link.look();
                }
            }
        });
        let borrowing = spawn({
            let link = Arc::clone(&client.link);
            move || {
                let _ = loans.borrow(2);
                if loans.was_signalled() {
                    link.look();
                }
            }
        });
        let poster = spawn({
            let slots = Arc::clone(&slots);
            move || slots.post(&server.link)
        });
        assert_eq!(take(&slots, &registration, 1), 1);
        [poster, borrowing].into_iter().for_each(|thread| thread.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

#[test]
fn a_signal_read_by_who_looks_for_a_loan() {
    while_a_thread_borrows(false);
}

#[test]
fn a_full_connection_read_by_who_looks_for_a_loan() {
    while_a_thread_borrows(true);
}

#[test]
fn a_link_that_is_severed_wakes_its_tasks() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = Slots::new(1);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let poster = spawn({
            let slots = Arc::clone(&slots);
            move || slots.post(&server.link)
        });
        let watcher = spawn({
            let client = client.clone();
            move || {
                client.line.close();
                client.link.sever(|| None);
            }
        });
        assert!(take(&slots, &registration, 2) <= 1);
        [poster, watcher, attendant].into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn what_was_posted_before_the_end_is_taken() {
    model(|| {
        let Pair { client, server } = pair(1);
        let slots = Slots::new(1);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let attendant = client.attend();
        let last = spawn({
            let (slots, client) = (Arc::clone(&slots), client.clone());
            move || {
                slots.post(&server.link);
                client.line.close();
                client.link.sever(|| None);
            }
        });
        assert_eq!(take(&slots, &registration, 2), 1);
        [last, attendant].into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// The process of a hung-up peer goes on, and takes the poison away: the task sees the link.
#[test]
fn a_severed_link_whose_poison_is_gone_ends_the_wait() {
    model(|| {
        let Pair { client, .. } = pair(1);
        let slots = Slots::new(1);
        let registration = client.link.register(Arc::clone(&slots) as _);
        let watcher = spawn({
            let (slots, link) = (Arc::clone(&slots), Arc::clone(&client.link));
            move || {
                link.sever(|| None);
                slots.filled.reset(0);
            }
        });
        assert_eq!(take(&slots, &registration, 1), 0);
        watcher.join().unwrap();
    });
}

#[test]
fn within_a_process_tasks_wait_on_one_link() {
    model(|| {
        let link = Arc::new(Link::within());
        let slots = [(); 2].map(|()| Slots::new(1));
        let [first, second] = slots.clone().map(|slots| {
            let registration = link.register(Arc::clone(&slots) as _);
            move || assert_eq!(take(&slots, &registration, 1), 1)
        });
        let poster = spawn({
            let link = Arc::clone(&link);
            move || slots.iter().for_each(|slots| slots.post(&link))
        });
        let other = spawn(second);
        first();
        [other, poster].into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// The next chunk's byte, without waiting.
fn poll_next(
    body: &mut ShmTransfer<Receiver, Receiving>,
    task: &Waker,
) -> Poll<crate::Result<Option<u8>>> {
    let Some(mut chunk) = ready!(body.poll_chunk(task))? else { return Poll::Ready(Ok(None)) };
    let mut byte = [0];
    assert_eq!(chunk.copy_to(&mut byte), 1);
    Poll::Ready(Ok(Some(byte[0])))
}

/// Receives as a task.
fn receive_as_task(mut asked: Asked) -> crate::Result<Vec<u8>> {
    run(|task| asked.poll_wait(task))?;
    let mut body = found(asked)?;
    let mut bytes = Vec::new();
    while let Some(byte) = run(|task| poll_next(&mut body, task))? {
        bytes.push(byte);
    }
    Ok(bytes)
}

/// Sends as a task: these bytes of so many, one in each chunk.
fn send_as_task(asking: Asking, bytes: &[u8], size: u64) -> crate::Result<u64> {
    let mut sending = asking.accept(size)?;
    for byte in bytes {
        run(|task| sending.poll_slot(task).map(|slot| slot?.send(&[*byte])))?;
    }
    sending.finish()
}

/// A transfer over a connection, by a task on one side or on both. Each side's attendant is there
/// if that side has a task.
fn over_a_connection<R: 'static>(
    slots: u32,
    tasks: (bool, bool),
    sending: impl FnOnce(Asking) + 'static,
    receiving: impl FnOnce(Asked) -> R,
) -> R {
    let Pair { client, server } = pair(1);
    let pool = pool(slots, LONG_GRACE);
    let (asked, asking) = ask_over(&pool, &client.link, &server.link);
    let attendants = [(&client, tasks.0), (&server, tasks.1)]
        .map(|(side, has_task)| has_task.then(|| (Arc::clone(&side.line), side.attend())));
    let sender = spawn(move || sending(asking));
    let received = receiving(asked);
    sender.join().unwrap();
    for (line, attendant) in attendants.into_iter().flatten() {
        line.close();
        attendant.join().unwrap();
    }
    received
}

#[test]
fn a_task_receives_what_a_thread_sends() {
    model(|| {
        let sending = |asking| assert_eq!(send(asking, &[1, 2]).unwrap(), 2);
        let received = over_a_connection(1, (true, false), sending, receive_as_task);
        assert_eq!(received.unwrap(), [1, 2]);
    });
}

#[test]
fn a_task_sends_what_a_thread_receives() {
    model(|| {
        let sending = |asking| assert_eq!(send_as_task(asking, &[1, 2], 2).unwrap(), 2);
        let received = over_a_connection(1, (false, true), sending, receive);
        assert_eq!(received.unwrap(), [1, 2]);
    });
}

#[test]
fn a_task_sends_what_a_task_receives() {
    model(|| {
        let sending = |asking| assert_eq!(send_as_task(asking, &[1, 2], 2).unwrap(), 2);
        let received = over_a_connection(1, (true, true), sending, receive_as_task);
        assert_eq!(received.unwrap(), [1, 2]);
    });
}

#[test]
fn an_abort_wakes_the_receivers_task() {
    model(|| {
        let sending = |asking: Asking| {
            let mut sending = asking.accept(2).unwrap();
            sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
        };
        let received = over_a_connection(2, (true, false), sending, receive_as_task);
        assert!(matches!(received, Err(Error::Aborted)), "{received:?}");
    });
}

#[test]
fn a_cancellation_wakes_the_senders_task() {
    model(|| {
        let sending = |asking| {
            let error = send_as_task(asking, &[1, 2], 3).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error:?}");
        };
        over_a_connection(1, (false, true), sending, |asked| drop(found(asked).unwrap()));
    });
}

#[test]
fn the_end_of_a_link_wakes_the_tasks_of_both_sides() {
    model(|| {
        let links = [(); 2].map(|()| link_to_sender());
        let [client, server] = links.clone();
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &client, &server);
        let sender = spawn(move || {
            let error = send_as_task(asking, &[1, 2], 3).unwrap_err();
            assert!(matches!(error, Error::Disconnected), "{error:?}");
        });
        let watcher = spawn(move || links.iter().for_each(|link| link.sever(|| None)));
        // It does not read, so that the sender has to wait. Without a signal nobody else wakes it.
        let mut asked = asked;
        let answer = run(|task| asked.poll_wait(task));
        // The sender that was severed first aborts.
        let is_right = matches!(answer, Ok(()) | Err(Error::Disconnected | Error::Aborted));
        assert!(is_right, "{answer:?}");
        sender.join().unwrap();
        watcher.join().unwrap();
    });
}

#[test]
fn within_a_process_a_task_sends_what_a_task_receives() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &link, &link);
        let sender = spawn(move || assert_eq!(send_as_task(asking, &[1, 2], 2).unwrap(), 2));
        assert_eq!(receive_as_task(asked).unwrap(), [1, 2]);
        sender.join().unwrap();
    });
}

#[test]
fn within_a_process_an_abort_wakes_the_receivers_task() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (mut asked, asking) = ask_over(&pool, &link, &link);
        let sender = spawn(move || drop(asking));
        let answer = run(|task| asked.poll_wait(task));
        assert!(matches!(answer, Err(Error::Aborted)), "{answer:?}");
        sender.join().unwrap();
    });
}

#[test]
fn within_a_process_a_cancellation_wakes_the_senders_task() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &link, &link);
        let sender = spawn(move || {
            let error = send_as_task(asking, &[1, 2], 3).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error:?}");
        });
        drop(found(asked).unwrap());
        sender.join().unwrap();
    });
}

/// Works at an answer for ever, as a task: until nobody wants it.
fn work_in_vain(wanted: &Wanted) {
    run(|task| match wanted.poll_lost(task) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    });
}

#[test]
fn a_withdrawal_ends_the_work_at_an_answer() {
    model(|| {
        let sending = |asking: Asking| {
            work_in_vain(&asking.wanted());
            assert!(matches!(asking.accept(1), Err(Error::Stale)));
        };
        over_a_connection(1, (false, true), sending, drop);
    });
}

#[test]
fn a_cancellation_ends_the_work_at_an_answer() {
    model(|| {
        let sending = |asking: Asking| {
            let wanted = asking.wanted();
            wanted.set_answered();
            let mut sending = asking.accept(2).unwrap();
            sending.next_slot(Deadline::NEVER).unwrap().send(&[1]).unwrap();
            work_in_vain(&wanted);
        };
        over_a_connection(2, (false, true), sending, |asked| drop(found(asked).unwrap()));
    });
}

#[test]
fn within_a_process_a_withdrawal_ends_the_work_at_an_answer() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &link, &link);
        let working = spawn(move || work_in_vain(&asking.wanted()));
        drop(asked);
        working.join().unwrap();
    });
}

#[test]
fn the_end_of_a_link_ends_the_work_at_an_answer() {
    model(|| {
        let links = [(); 2].map(|()| link_to_sender());
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &links[0], &links[1]);
        let working = spawn(move || work_in_vain(&asking.wanted()));
        links[1].sever(|| None);
        working.join().unwrap();
        drop(asked);
    });
}

/// Whoever answers, and whatever becomes of the segment then: an answer that is complete was
/// wanted.
#[test]
fn an_answer_that_is_complete_was_not_given_up() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (asked, asking) = ask_over(&pool, &link, &link);
        let wanted = Arc::new(asking.wanted());
        let watching = spawn({
            let wanted = Arc::clone(&wanted);
            move || (0..2).for_each(|_| assert!(!wanted.poll_lost(Waker::noop())))
        });
        let sender = spawn(move || {
            wanted.set_answered();
            asking.refuse(Refusal::NotFound).unwrap();
            wanted.end();
        });
        assert!(matches!(asked.reply(Deadline::NEVER), Ok(Reply::Refused(Refusal::NotFound))));
        let (next, _request) = ask_over(&pool, &link, &link);
        drop(next); // withdrawn
        [watching, sender].into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// The transfer is dropped before it is noted which link its request went over.
#[test]
fn a_withdrawal_of_what_is_just_being_sent_ends_the_work_at_it() {
    model(|| {
        let link = Arc::new(Link::within());
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let asking = request.begin_here(&link).unwrap();
        let working = spawn(move || work_in_vain(&asking.wanted()));
        let sending = spawn(move || request.sent_over(&link));
        drop(asked);
        [working, sending].into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// A task can wait for the answer before the request counts as sent.
#[test]
fn a_request_sent_while_its_task_waits() {
    model(|| {
        let Pair { client, server } = pair(1);
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let attendant = client.attend();
        let sending = spawn({
            let link = Arc::clone(&client.link);
            move || {
                let asking = request.begin_here(&server.link).unwrap();
                request.sent_over(&link);
                assert_eq!(send(asking, &[1]).unwrap(), 1);
            }
        });
        assert_eq!(receive_as_task(asked).unwrap(), [1]);
        sending.join().unwrap();
        client.line.close();
        attendant.join().unwrap();
    });
}

/// The server answers before the client's thread has recorded that the request was sent.
#[test]
fn a_request_answered_before_it_counts_as_sent() {
    model(|| {
        let Pair { client, server } = pair(1);
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let asking = request.begin_here(&server.link).unwrap();
        let attendant = client.attend();
        let sender = spawn(move || assert_eq!(send(asking, &[1]).unwrap(), 1));
        let sending = spawn({
            let link = Arc::clone(&client.link);
            move || request.sent_over(&link)
        });
        assert_eq!(receive_as_task(asked).unwrap(), [1]);
        [sender, sending].into_iter().for_each(|thread| thread.join().unwrap());
        client.line.close();
        attendant.join().unwrap();
    });
}

#[test]
fn a_request_dropped_unsent_wakes_the_task_that_waits_for_it() {
    model(|| {
        let pool = pool(1, LONG_GRACE);
        let (request, mut asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let dropping = spawn(move || drop(request));
        assert!(run(|task| asked.poll_wait(task)).is_err());
        dropping.join().unwrap();
    });
}

/// A waker that runs its task at once, as some runtimes do.
struct AtOnce(Mutex<Option<Asked>>);

impl Wake for AtOnce {
    fn wake(self: Arc<Self>) {
        let mut asked = lock(&self.0);
        let _ = asked.as_mut().unwrap().poll_wait(Waker::noop());
    }
}

/// Wakes the task of a request by `then`, with no lock held that the task needs.
fn wakes_at_once(then: impl Fn(Request<Watched>) + Sync + Send + 'static) {
    model(move || {
        let pool = pool(1, LONG_GRACE);
        let (request, asked) = pool.lease(Deadline::NEVER).unwrap().request("key").unwrap();
        let task = Arc::new(AtOnce(Mutex::new(Some(asked))));
        let waker = Waker::from(Arc::clone(&task));
        assert!(lock(&task.0).as_mut().unwrap().poll_wait(&waker).is_pending());
        then(request);
        drop(lock(&task.0).take());
    });
}

#[test]
fn a_task_that_runs_as_soon_as_its_request_is_sent() {
    wakes_at_once(|request| request.sent_over(&link_to_sender()));
}

#[test]
fn a_task_that_runs_as_soon_as_its_request_is_dropped() {
    wakes_at_once(drop);
}
