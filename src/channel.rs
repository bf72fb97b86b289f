//! Requests, and the queues that carry them: control messages only, no file contents.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

#[cfg(target_os = "linux")]
use crate::error::PeerFault;
use crate::error::{Error, Misuse, Result};
use crate::peer::Link;
use crate::protocol::{
    Answer, Keep, Loans, Offer, Offered, Receiver, Refusal, Reply, Sender, ShmTransfer, Starting,
};
use crate::segment::{Again, Backing, Lease, PooledSegment, SegmentId};
use crate::sync::Deadline;
use crate::workers;

mod in_process;
#[cfg(target_os = "linux")]
mod leaving;
#[cfg(target_os = "linux")]
mod lock_file;
#[cfg(target_os = "linux")]
mod poller;
#[cfg(feature = "posix-mq")]
mod posix_mq;
#[cfg(target_os = "linux")]
mod reconnect;
#[cfg(target_os = "linux")]
mod seqpacket;

pub use in_process::InProcess;
#[cfg(feature = "posix-mq")]
pub use posix_mq::Named;
#[cfg(all(target_os = "linux", feature = "posix-mq"))]
pub use posix_mq::{PosixMq, PosixMqQueue, PosixMqRequester};
#[cfg(target_os = "linux")]
pub use seqpacket::{Seqpacket, SeqpacketQueue, SeqpacketRequester};
#[cfg(fuzzing)]
pub(crate) use {
    posix_mq::wire::Message as QueueMessage, seqpacket::ring::fuzz as fuzz_ring,
    seqpacket::wire::Message, seqpacket::wire::VERSION,
};

/// The longest key that a request carries, in bytes.
pub const KEY_LIMIT: usize = 4096;

/// The receiver's end of a queue: sends requests.
///
/// `B` is the backing of the segments that the queue can pass on.
pub trait Requester<B: Backing>: Send + Sync {
    /// Sends a request, waiting for room until the deadline.
    ///
    /// # Errors
    /// Hands the request back, unsent, with the reason.
    fn send(&self, request: Request<B>, deadline: Deadline) -> Result<(), SendError<B>>;

    /// How long a task waits for a server that is not there, if not as long as for the answer.
    /// Threads wait within [`send`](Self::send).
    #[doc(hidden)]
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Asks for `key` through a leased segment: sends the request, and waits for the reply until
    /// the deadline. A request that its server did not take before it ended goes to the successor.
    /// It is withdrawn first, so no two servers answer it. A request that was answered from a loan
    /// which this side had just returned is sent once more, and answered through the segment.
    ///
    /// # Errors
    /// Those of [`send`](Self::send) and of [`reply`](ShmTransfer::reply). [`Error::Disconnected`]
    /// means that a server took the request and died, or that the deadline passed before a
    /// successor could be asked.
    fn ask(&self, lease: Lease<B>, key: &[u8], deadline: Deadline) -> Result<Reply> {
        let (mut lease, mut takes_loans) = (lease, true);
        for attempt in 0.. {
            let (request, mut asked) = Asked::request(lease, key, takes_loans)?;
            self.send(request, deadline)?;
            let answer = asked.transfer.read_reply(deadline);
            match asked.settle(answer, true, || deadline.has_passed())? {
                Step::Settled(reply) => return Ok(reply),
                Step::WithoutLoans(again) => (lease, takes_loans) = (again, false),
                Step::OfSuccessor(again) => {
                    if attempt > 0 {
                        workers::blocking(|| pause(attempt, deadline));
                    }
                    lease = again;
                }
            }
        }
        unreachable!("the loop has no end of its own")
    }
}

/// A request that was sent, and what is needed to send it again.
pub(crate) struct Asked<B: Backing> {
    pub(crate) transfer: ShmTransfer<Receiver, Offered>,
    again: Again<B>,
    takes_loans: bool,
}

/// What comes of an answer.
pub(crate) enum Step<B: Backing> {
    /// This is it.
    Settled(Reply),
    /// The request has to be sent once more: what was lent has been returned meanwhile.
    WithoutLoans(Lease<B>),
    /// The request has to be sent to the server's successor, after a pause.
    OfSuccessor(Lease<B>),
}

impl<B: Backing> Asked<B> {
    /// A request, which the caller is to send.
    pub(crate) fn request(
        lease: Lease<B>,
        key: &[u8],
        takes_loans: bool,
    ) -> Result<(Request<B>, Asked<B>)> {
        let again = lease.again();
        let (mut request, transfer) = lease.request(key)?;
        request.takes_loans = takes_loans;
        Ok((request, Asked { transfer, again, takes_loans }))
    }

    /// Decides what comes of an answer. Once it is late, nobody else is asked.
    /// Who `may_wait` does so for a sender that is about to leave the segment.
    #[inline]
    pub(crate) fn settle(
        self,
        answer: Result<Answer>,
        may_wait: bool,
        is_late: impl Fn() -> bool,
    ) -> Result<Step<B>> {
        #[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
        let Asked { transfer, again, takes_loans } = self;
        match answer {
            Ok(Answer::Found(state)) => Ok(Step::Settled(Reply::Found(transfer.receiving(state)))),
            Ok(Answer::Refused(Refusal::Leaving))
                if transfer.may_have_successor() && !is_late() =>
            {
                Ok(Step::OfSuccessor(again.lease(transfer.give_up(), may_wait)?))
            }
            Ok(Answer::Refused(why)) => Ok(Step::Settled(Reply::Refused(why))),
            #[cfg(target_os = "linux")]
            Ok(Answer::Lent(lent)) => match transfer.body_of(lent)? {
                Some(body) => Ok(Step::Settled(Reply::Lent(body))),
                None if takes_loans => {
                    Ok(Step::WithoutLoans(again.lease(transfer.give_up(), may_wait)?))
                }
                None => Err(PeerFault::UnknownLoan(lent.id).into()),
            },
            // Withdrawn: no sender has accepted it, and none can any more (P1).
            Err(Error::Disconnected) if !is_late() && transfer.withdraw() => {
                Ok(Step::OfSuccessor(again.lease(transfer.give_up(), may_wait)?))
            }
            Err(error) => Err(error),
        }
    }
}

/// Sleeps before the next attempt.
pub(crate) fn pause(attempt: u32, deadline: Deadline) {
    let pause = pause_before(attempt);
    thread::sleep(deadline.remaining().map_or(pause, |left| left.min(pause)));
}

/// How long to pause before an attempt: from one millisecond up to 100, growing with the attempts.
pub(crate) fn pause_before(attempt: u32) -> Duration {
    const LONGEST: Duration = Duration::from_millis(100);
    Duration::from_millis(1 << attempt.min(7)).min(LONGEST)
}

/// The sender's end of a queue: hands out requests, to many workers at once.
pub trait RequestQueue: Send + Sync {
    /// Takes the next request, waiting for one until the deadline.
    ///
    /// # Errors
    /// [`Error::Timeout`] when none came; [`Error::Closed`] after [`close`](Self::close);
    /// [`Error::Misuse`] in a child of `fork`: the queue belongs to its parent (a server that
    /// becomes a daemon binds after its last fork); [`Error::Os`] when a system call fails. A
    /// client's misbehaviour is never an error here.
    fn recv(&self, deadline: Deadline) -> Result<ShmTransfer<Sender, Starting>>;

    /// Stops taking requests: every `recv`, running or to come, fails with [`Error::Closed`].
    /// Transfers that were taken before go on.
    ///
    /// Between processes, the address is free for a successor from here on. Requests that were not
    /// taken are answered with [`Refusal::Leaving`] until the queue is dropped, and end with
    /// [`Error::Disconnected`] then; [`Requester::ask`] asks the successor in both cases. Within a
    /// process they end with [`Error::Aborted`] at once.
    fn close(&self);
}

/// A small message that names a segment and the key of what is to be put into it.
///
/// Made by [`Lease::request`], sent by a [`Requester`]. If it is dropped unsent, its transfer
/// fails: no reply will come.
pub struct Request<B: Backing> {
    pooled: Arc<PooledSegment<B>>,
    generation: u64,
    key: Arc<[u8]>,
    offer: Arc<Offer>,
    /// Whether the answer may be lent.
    pub(crate) takes_loans: bool,
}

impl<B: Backing> Lease<B> {
    /// Turns the lease into a request for `key` (at most [`KEY_LIMIT`] bytes) and the transfer that
    /// will bring the answer.
    ///
    /// # Errors
    /// [`Error::Misuse`] when the key is too long: the segment goes back to the pool.
    pub fn request(
        self,
        key: impl AsRef<[u8]>,
    ) -> Result<(Request<B>, ShmTransfer<Receiver, Offered>)> {
        self.segment().origin().check()?;
        let key = key.as_ref();
        if key.len() > KEY_LIMIT {
            return Err(Misuse::KeyTooLong { len: key.len(), limit: KEY_LIMIT }.into());
        }
        let (pooled, guard) = self.into_parts();
        let (transfer, offer, generation) = ShmTransfer::offer(guard)?;
        let key = key.into();
        Ok((Request { pooled, generation, key, offer, takes_loans: true }, transfer))
    }
}

impl<B: Backing> Request<B> {
    /// The segment that the answer is to go through.
    pub fn segment(&self) -> SegmentId {
        self.pooled.segment.id()
    }

    /// What is asked for.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// Fails in a child of `fork`: the request is its parent's.
    pub(crate) fn check_origin(&self) -> Result<(), Misuse> {
        self.pooled.segment.origin().check()
    }

    /// The request as a sender in this same process receives it.
    pub(crate) fn begin_here(&self, link: &Arc<Link>) -> Result<ShmTransfer<Sender, Starting>> {
        let segment = self.pooled.writable()?;
        let loans = match self.takes_loans {
            true => Loans::Within(Arc::clone(&self.offer)),
            false => Loans::None,
        };
        Ok(ShmTransfer::begin(segment, self.generation, Arc::clone(&self.key), link, loans))
    }

    /// Keeps the connection open as long as the transfer; the request is about to be sent over it.
    pub(crate) fn goes_over(&self, connection: Keep) {
        self.offer.goes_over(connection);
    }

    /// Consumes the request once it was sent over `link`.
    pub(crate) fn sent_over(self, link: &Arc<Link>) {
        self.offer.sent_over(link);
    }
}

impl<B: Backing> Drop for Request<B> {
    fn drop(&mut self) {
        if self.check_origin().is_ok() {
            self.offer.abandon();
        }
    }
}

impl<B: Backing> fmt::Debug for Request<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("segment", &self.segment())
            .field("generation", &self.generation)
            .field("key", &String::from_utf8_lossy(&self.key))
            .finish()
    }
}

/// A request that could not be sent, and why.
#[derive(thiserror::Error)]
#[error("the request could not be sent")]
pub struct SendError<B: Backing> {
    /// The request, which can be sent elsewhere or dropped.
    pub request: Request<B>,
    /// The reason.
    #[source]
    pub error: Error,
}

impl<B: Backing> fmt::Debug for SendError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendError")
            .field("error", &self.error)
            .field("request", &self.request)
            .finish()
    }
}

impl<B: Backing> From<SendError<B>> for Error {
    /// Keeps the reason and drops the request.
    fn from(failed: SendError<B>) -> Error {
        failed.error
    }
}
