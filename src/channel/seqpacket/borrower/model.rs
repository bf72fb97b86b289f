//! Loans under loom: introduction, account, announcement, borrowing, eviction, return and the
//! second request as they ship, by `ci/loom.sh`.
//!
//! Real are `SocketLender` and `SocketBorrower` with their locks, `Account`, `KeptLoans`, the
//! messages' bytes, the memory that is lent with its checks, `try_lend`, `read_reply`, and the
//! decisions of `ask`. Replaced are the socket (two lists of messages), the ring (a list of
//! requests), and what the models of transfers replace.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};

use loom::sync::Condvar;
use loom::thread;

use super::*;
use crate::channel::seqpacket::client::loans;
use crate::channel::seqpacket::lender::SocketLender;
use crate::channel::{Request, Requester, SendError};
use crate::error::Awaited;
use crate::loan::{FILE, Introduced, Lender, Loan, SEALED};
use crate::peer::{Link, ReceivedFds};
use crate::protocol::model::{LONG_GRACE, Pool, Watched, link, model, next, pool};
use crate::protocol::{Lending, Receiver, Reply, Sender, ShmTransfer, Starting};
use crate::segment::SegmentPool;
use crate::sync::Deadline;
use crate::sync::atomic::{AcqRel, AtomicU32};

type Asking = ShmTransfer<Sender, Starting>;

/// One direction of a connection.
#[derive(Default)]
struct Messages {
    list: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    is_full: bool,
    /// The sender has hung up: what was sent before can be read.
    is_over: bool,
    /// The next read fails, as it does where the other side hung up with messages unread.
    is_reset: bool,
    /// The reader has no number left for a descriptor.
    loses_descriptor: bool,
}

/// One end of a connection.
struct End {
    /// Other threads run between taking a message and keeping what came with it.
    received: AtomicU32,
    incoming: Arc<Mutex<Messages>>,
    outgoing: Arc<Mutex<Messages>>,
}

impl Packets for End {
    fn send_now(&self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut outgoing = lock(&self.outgoing);
        match (outgoing.is_over, outgoing.is_full) {
            (true, _) => Err(Error::Disconnected),
            (_, true) => Err(Error::Timeout(Awaited::QueueRoom)),
            _ => {
                let fd = fd.map(|fd| fd.try_clone_to_owned().unwrap());
                outgoing.list.push_back((message.to_vec(), fd));
                Ok(())
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>> {
        let mut incoming = lock(&self.incoming);
        let was_reset = mem::take(&mut incoming.is_reset);
        let message = if was_reset { None } else { incoming.list.pop_front() };
        let is_over = was_reset || incoming.is_over;
        let has_fd = message.as_ref().is_some_and(|(_, fd)| fd.is_some());
        let lost = has_fd && mem::take(&mut incoming.loses_descriptor);
        drop(incoming);
        self.received.fetch_add(1, AcqRel);
        let Some((message, fd)) = message else {
            return if is_over { Err(Error::Disconnected) } else { Ok(None) };
        };
        let len = message.len();
        buffer[..len].copy_from_slice(&message);
        let fds = ReceivedFds(fd.into_iter().filter(|_| !lost).collect());
        Ok(Some(Received { len, fds, lost }))
    }
}

/// A client's process, and a server's.
struct Pair {
    pool: Pool,
    borrower: Arc<SocketBorrower<End>>,
    receivers: Arc<Link>,
    to_server: Arc<Mutex<Messages>>,
    to_client: Arc<Mutex<Messages>>,
    requests: Mutex<Requests>,
    comes: Condvar,
    lender: Arc<SocketLender<End>>,
    senders: Arc<Link>,
    servers_end: Arc<End>,
    /// Each of one byte, its number.
    loans: Vec<Loan>,
}

#[derive(Default)]
struct Requests {
    list: VecDeque<Asking>,
    /// How many there were.
    count: u32,
    is_over: bool,
}

/// Each of one byte, its number. Made once for all interleavings.
fn lent(count: u8) -> Vec<Loan> {
    (0..count).map(|number| Loan::from_bytes(&[number]).unwrap()).collect()
}

/// Both sides have these limits.
fn pair(pool: Pool, loans: &[Loan], limits: LoanLimits) -> Arc<Pair> {
    let (to_client, to_server) = (Arc::default(), Arc::default());
    let [incoming, outgoing] = [&to_client, &to_server].map(Arc::<Mutex<Messages>>::clone);
    let clients_end = Arc::new(End { received: AtomicU32::new(0), incoming, outgoing });
    let [incoming, outgoing] = [&to_server, &to_client].map(Arc::<Mutex<Messages>>::clone);
    let servers_end = Arc::new(End { received: AtomicU32::new(0), incoming, outgoing });
    let lender = Arc::new(SocketLender::new(&servers_end, SEALED | FILE, limits));
    let senders = link();
    senders.lend_by(Arc::clone(&lender) as _);
    Arc::new(Pair {
        pool,
        borrower: Arc::new(SocketBorrower::new(&clients_end, limits)),
        receivers: link(),
        to_server,
        to_client,
        requests: Mutex::default(),
        comes: Condvar::new(),
        lender,
        senders,
        servers_end,
        loans: loans.to_vec(),
    })
}

fn two_segments() -> Pool {
    let builder = SegmentPool::<Watched>::builder().segments(2).segment_len(1).slots(1);
    builder.grace(LONG_GRACE).create().unwrap()
}

fn at_most(bytes: u64, count: u32) -> LoanLimits {
    LoanLimits { bytes, count }
}

/// The client's end of the ring.
impl Requester<Watched> for Pair {
    fn send(
        &self,
        request: Request<Watched>,
        _: Deadline,
    ) -> std::result::Result<(), SendError<Watched>> {
        let segment = request.pooled.writable().unwrap();
        let (generation, key) = (request.generation, Arc::clone(&request.key));
        let loans = loans(request.takes_loans);
        request.goes_over(Arc::clone(&self.borrower) as _);
        let asking = ShmTransfer::begin(segment, generation, key, &self.senders, loans);
        let mut requests = lock(&self.requests);
        requests.list.push_back(asking);
        requests.count += 1;
        drop(requests);
        self.comes.notify_one();
        request.sent_over(&self.receivers);
        Ok(())
    }
}

impl Pair {
    /// Asks for a loan; returns whether it was lent. Its byte is right in any case.
    fn ask_for(&self, number: u8) -> bool {
        let lease = self.pool.lease(Deadline::NEVER).unwrap();
        let reply = Requester::ask(self, lease, &[number], Deadline::NEVER);
        self.check(number, reply.unwrap())
    }

    fn check(&self, number: u8, reply: Reply) -> bool {
        match reply {
            Reply::Lent(body) => {
                assert_eq!(&body.into_bytes().unwrap()[..], [number]);
                true
            }
            Reply::Found(mut body) => {
                assert_eq!(next(&mut body).unwrap(), Some(number));
                false
            }
            Reply::Refused(why) => panic!("{why:?}"),
        }
    }

    /// Sends a request, and leaves its reply to the caller.
    fn request(&self, number: u8) -> ShmTransfer<Receiver, crate::protocol::Offered> {
        let lease = self.pool.lease(Deadline::NEVER).unwrap();
        let (request, asked) = lease.request([number]).unwrap();
        Requester::send(self, request, Deadline::NEVER).unwrap();
        asked
    }

    /// The next request; `None` when no more will come.
    fn take(&self) -> Option<Asking> {
        let mut requests = lock(&self.requests);
        loop {
            match requests.list.pop_front() {
                Some(asking) => return Some(asking),
                None if requests.is_over => return None,
                None => requests = self.comes.wait(requests).unwrap(),
            }
        }
    }

    /// No more requests will come. Returns how many there were.
    fn close(&self) -> u32 {
        let mut requests = lock(&self.requests);
        requests.is_over = true;
        self.comes.notify_all();
        requests.count
    }

    /// Reads what the client has returned, as the server does.
    fn hear(&self) {
        let mut buffer = [0; MAX_MESSAGE + 1];
        while let Ok(Some(Received { len, .. })) = self.servers_end.receive(&mut buffer) {
            match Message::decode(&buffer[..len]).unwrap() {
                Message::Returned { ids } => self.lender.take_back(ids).unwrap(),
                message => panic!("{message:?}"),
            }
        }
    }

    /// Answers one request, if one comes.
    fn serve_one(&self) -> bool {
        let Some(asking) = self.take() else { return false };
        self.hear();
        let number = asking.key()[0];
        match asking.try_lend(&self.loans[usize::from(number)], &()) {
            Ok(Lending::Lent) | Err(Error::Stale) => {}
            Ok(Lending::Send(mut sending)) => {
                let slot = sending.next_slot(Deadline::NEVER);
                match slot.and_then(|slot| slot.send(&[number])) {
                    Ok(()) | Err(Error::Cancelled) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            Err(error) => panic!("{error:?}"),
        }
        true
    }

    fn serve(&self) {
        while self.serve_one() {}
    }

    /// Asks, and answers in this same thread.
    fn fetch(self: &Arc<Self>, number: u8) -> bool {
        let asked = self.request(number);
        self.serve_one();
        self.check(number, asked.reply(Deadline::NEVER).unwrap())
    }

    /// The server counts as lent what the client has, and nothing else.
    fn check_account(&self) {
        let has = |loan: &Loan| self.borrower.borrow(loan.id()).unwrap().is_some();
        let has: Vec<bool> = self.loans.iter().map(has).collect();
        self.hear();
        for (loan, has) in self.loans.iter().zip(has) {
            let before = lock(&self.to_client).list.len();
            let introduced = matches!(self.lender.introduce(loan), Introduced::Yes);
            let is_known = introduced && lock(&self.to_client).list.len() == before;
            assert_eq!(is_known, has, "loan {}", loan.id());
        }
    }
}

fn spawn(pair: &Arc<Pair>, run: impl FnOnce(&Pair) + 'static) -> thread::JoinHandle<()> {
    let pair = Arc::clone(pair);
    thread::spawn(move || run(&pair))
}

/// Two workers answer from one loan at once: it is introduced once, before it is named.
#[test]
fn a_loan_is_introduced_once_and_before_it_is_named() {
    let loans = lent(1);
    model(move || {
        let pair = pair(two_segments(), &loans, at_most(1, 1));
        let asked = [pair.request(0), pair.request(0)];
        let workers = [(); 2].map(|()| spawn(&pair, |pair| assert!(pair.serve_one())));
        for asked in asked {
            assert!(pair.check(0, asked.reply(Deadline::NEVER).unwrap()), "it was lent");
        }
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert!(lock(&pair.to_client).list.is_empty(), "there was one introduction");
        pair.check_account();
    });
}

/// Two threads of the client read the connection in search of one loan.
#[test]
fn what_one_thread_has_read_is_there_for_another() {
    let loans = lent(1);
    model(move || {
        let pair = pair(two_segments(), &loans, at_most(1, 1));
        let [one, two] = [pair.request(0), pair.request(0)];
        (0..2).for_each(|_| assert!(pair.serve_one()));
        let other = spawn(&pair, |pair| {
            assert!(pair.check(0, one.reply(Deadline::NEVER).unwrap()));
        });
        assert!(pair.check(0, two.reply(Deadline::NEVER).unwrap()));
        other.join().unwrap();
        pair.check_account();
    });
}

/// The client lets go of a loan while the server names it: it asks once more, and no more.
#[test]
fn a_loan_named_that_was_just_returned_is_asked_for_once_more() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        assert!(pair.fetch(0));
        let worker = spawn(&pair, Pair::serve);
        let evicting = spawn(&pair, |pair| pair.borrower.make_room(1));
        pair.ask_for(0);
        evicting.join().unwrap();
        let count = pair.close();
        worker.join().unwrap();
        assert!(count <= 3, "{count}"); // the one of `fetch`, and two
        pair.check_account();
    });
}

/// An account at its limit, in bytes or in loans: what does not fit is streamed, and room is made.
#[test]
fn an_account_at_its_limit_streams_and_lends_once_there_is_room() {
    let loans = lent(2);
    model(move || {
        for limits in [at_most(1, 2), at_most(2, 1)] {
            let pair = pair(pool(1, LONG_GRACE), &loans, limits);
            assert!(pair.fetch(0));
            assert!(!pair.fetch(1), "the account is full");
            assert!(pair.fetch(1), "the client has returned the other");
            pair.check_account();
        }
    });
}

/// As before, and two threads ask at once, each for another loan.
#[test]
fn two_loans_that_are_asked_for_at_once_with_room_for_one() {
    let loans = lent(2);
    model(move || {
        let pair = pair(two_segments(), &loans, at_most(1, 1));
        let worker = spawn(&pair, Pair::serve);
        let other = spawn(&pair, |pair| {
            pair.ask_for(0);
        });
        pair.ask_for(1);
        other.join().unwrap();
        let count = pair.close();
        worker.join().unwrap();
        assert!(count <= 4, "{count}");
        pair.check_account();
        // Room is made for either.
        for number in [0, 1] {
            pair.fetch(number);
            assert!(pair.fetch(number), "{number}");
        }
    });
}

/// A receiver that holds all that it may never returns any: the rest is streamed.
#[test]
fn a_receiver_that_never_returns_gets_the_rest_streamed() {
    let loans = lent(2);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        let asked = pair.request(0);
        pair.serve_one();
        let Ok(Reply::Lent(held)) = asked.reply(Deadline::NEVER) else { panic!() };
        for _ in 0..3 {
            assert!(!pair.fetch(1));
            assert!(lock(&pair.to_server).list.is_empty(), "nothing is returned");
        }
        assert_eq!(&held.into_bytes().unwrap()[..], [0]);
        assert!(!pair.fetch(1));
        assert!(pair.fetch(1), "let go of, and returned");
        pair.check_account();
    });
}

/// The client has no number left for the descriptor: it returns the loan, and asks once more.
#[test]
fn a_descriptor_that_is_lost_is_returned_and_its_bytes_asked_for_once_more() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        lock(&pair.to_client).loses_descriptor = true;
        let worker = spawn(&pair, Pair::serve);
        assert!(!pair.ask_for(0));
        assert!(pair.ask_for(0), "the server has heard that it was returned");
        let count = pair.close();
        worker.join().unwrap();
        assert_eq!(count, 3);
        pair.check_account();
    });
}

/// No room on the connection, or too many descriptors on their way: the loan is not named.
#[test]
fn a_loan_that_could_not_be_introduced_is_streamed() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        lock(&pair.to_client).is_full = true;
        assert!(!pair.fetch(0));
        pair.check_account();
        lock(&pair.to_client).is_full = false;
        let worker = spawn(&pair, Pair::serve);
        assert!(pair.ask_for(0));
        assert_eq!(pair.close(), 2);
        worker.join().unwrap();
    });
}

/// The segment is back as soon as the announcement is read, and the body is read on while another
/// transfer has it (rule N4).
#[test]
fn a_segment_is_used_again_while_what_was_lent_is_read() {
    let loans = lent(2);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        let worker = spawn(&pair, Pair::serve);
        let lease = pair.pool.lease(Deadline::NEVER).unwrap();
        let reply = Requester::ask(&*pair, lease, &[0], Deadline::NEVER).unwrap();
        let Reply::Lent(body) = reply else { panic!("{reply:?}") };
        assert!(!pair.ask_for(1), "the account is full");
        assert_eq!(pair.pool.stats().retired, 0);
        assert_eq!(&body.into_bytes().unwrap()[..], [0]);
        pair.close();
        worker.join().unwrap();
    });
}

/// The connection has no room for a return: it goes later, and loans are lent again.
#[test]
fn a_return_that_finds_no_room_goes_later() {
    let loans = lent(2);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        assert!(pair.fetch(0));
        lock(&pair.to_server).is_full = true;
        assert!(!pair.fetch(1), "the account is full");
        assert!(!pair.fetch(1), "and nothing was heard");
        lock(&pair.to_server).is_full = false;
        assert!(!pair.fetch(1), "the return goes with this answer");
        assert!(pair.fetch(1));
        pair.check_account();
    });
}

/// As before, and the loan that was let go of is asked for itself.
#[test]
fn a_loan_whose_return_found_no_room_is_lent_again() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        assert!(pair.fetch(0));
        lock(&pair.to_server).is_full = true;
        pair.borrower.make_room(1);
        lock(&pair.to_server).is_full = false;
        let worker = spawn(&pair, Pair::serve);
        assert!(!pair.ask_for(0), "the server takes it for lent");
        assert!(pair.ask_for(0));
        assert_eq!(pair.close(), 4);
        worker.join().unwrap();
        pair.check_account();
    });
}

/// A receiver that goes while it is lent something leaves an introduction unread. It stands in
/// nobody's way.
#[test]
fn an_introduction_that_was_never_looked_for_makes_room_like_any_other() {
    let loans = lent(2);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        let asked = pair.request(0);
        let worker = spawn(&pair, Pair::serve);
        drop(asked);
        pair.ask_for(1);
        pair.ask_for(1);
        assert!(pair.ask_for(1));
        pair.close();
        worker.join().unwrap();
        pair.check_account();
    });
}

/// A server is killed, with a message unread, right after it has named a loan: what was announced
/// can be read (rule P7), whoever reads the connection first.
#[test]
fn a_loan_named_by_a_server_that_was_killed_is_there() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        let asked = pair.request(0);
        let server = spawn(&pair, |pair| {
            pair.serve_one();
            let mut to_client = lock(&pair.to_client);
            to_client.is_over = true;
            to_client.is_reset = true;
            drop(to_client);
            lock(&pair.to_server).is_over = true;
            // The watcher in the client's process.
            pair.receivers.sever(|| pair.borrower.last_words());
        });
        match asked.reply(Deadline::NEVER) {
            Ok(reply) => assert!(pair.check(0, reply)),
            Err(error) => panic!("{error:?}"),
        }
        server.join().unwrap();
    });
}

/// One thread sends requests, another reads the replies: what was lent is found however soon.
#[test]
fn a_reply_that_is_read_before_its_sender_has_noted_the_request() {
    let loans = lent(1);
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 1));
        let lease = pair.pool.lease(Deadline::NEVER).unwrap();
        let (request, asked) = lease.request([0]).unwrap();
        let worker = spawn(&pair, |pair| assert!(pair.serve_one()));
        let sender = spawn(&pair, move |pair| {
            Requester::send(pair, request, Deadline::NEVER).unwrap();
        });
        assert!(pair.check(0, asked.reply(Deadline::NEVER).unwrap()));
        sender.join().unwrap();
        worker.join().unwrap();
    });
}

/// Answers that crossed the return of one loan ask for room as well: nothing more is let go of.
/// Loans without bytes count, too.
#[test]
fn answers_that_crossed_a_return_cost_nothing_more() {
    let loans: Vec<Loan> = (0..2).map(|_| Loan::from_bytes(&[]).unwrap()).collect();
    model(move || {
        let pair = pair(pool(1, LONG_GRACE), &loans, at_most(1, 2));
        for loan in &pair.loans {
            assert!(matches!(pair.lender.introduce(loan), Introduced::Yes));
            assert!(pair.borrower.borrow(loan.id()).unwrap().is_some());
        }
        let other = spawn(&pair, |pair| pair.borrower.make_room(1));
        pair.borrower.make_room(1);
        other.join().unwrap();
        pair.hear();
        let kept = |loan: &&Loan| pair.borrower.borrow(loan.id()).unwrap().is_some();
        assert_eq!(pair.loans.iter().filter(kept).count(), 1);
        pair.check_account();
    });
}
