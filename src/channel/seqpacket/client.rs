//! The server's side of one client's connection: its segments, its ring, its messages.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags};

use crate::error::{Error, PeerFault, Rejection, Result};
use crate::peer::{Link, MOST_DESCRIPTORS, Peer, ReceivedFds, Socket, Watch};
use crate::protocol::{Loans, Sender, ShmTransfer, Starting};
use crate::segment::{
    Geometry, PoolId, Segment, SegmentId, WriteSlots, attach_memfd, attach_words,
};
use crate::sync::lock;

use super::Policy;
use super::lender::SocketLender;
use super::ring::{RING_LEN, Taker};
use super::signal::SocketSignal;
use super::wake_policy::Watched;
use super::wire::{MAX_MESSAGE, Message, VERSION};

/// One connection.
pub(super) struct Client {
    pub(super) token: u64,
    pub(super) socket: Arc<Socket>,
    pub(super) link: Arc<Link>,
    pub(super) peer: Peer,
    /// Locked by the worker that the epoll woke for it, or that takes from its ring.
    pub(super) state: Mutex<ClientState>,
    /// Set once the client has sent a ring.
    pub(super) ring: OnceLock<Taker>,
    /// At its in-flight limit: its ring is not read.
    resting: AtomicBool,
    /// The server has hung up: its ring is not read any more. Set under the lock of `state`.
    over: AtomicBool,
    pub(super) greeted: AtomicBool,
    _watch: Watch,
}

#[derive(Default)]
pub(super) struct ClientState {
    pool: Option<(PoolId, Geometry)>,
    pub(super) segments: BTreeMap<u32, Arc<Segment<WriteSlots>>>,
    /// Retired by the client; transfers under way may keep them mapped.
    retired: Vec<Weak<Segment<WriteSlots>>>,
    /// Lends to this client, if it takes loans.
    lender: Option<Arc<SocketLender>>,
}

/// The result of one message.
pub(super) enum Heard {
    /// No message has come.
    Nothing,
    /// A message that was handled, and is not a request.
    Noted,
    Request(ShmTransfer<Sender, Starting>),
}

impl Client {
    pub(super) fn new(
        token: u64,
        socket: Arc<Socket>,
        peer: Peer,
        link: Arc<Link>,
        watch: Watch,
    ) -> Client {
        Client {
            token,
            socket,
            link,
            peer,
            state: Mutex::default(),
            ring: OnceLock::new(),
            resting: AtomicBool::new(false),
            over: AtomicBool::new(false),
            greeted: AtomicBool::new(false),
            _watch: watch,
        }
    }

    /// Reads one message, and handles it.
    pub(super) fn hear(&self, state: &mut ClientState, policy: &Policy) -> Result<Heard> {
        let mut buffer = [0; MAX_MESSAGE + 1];
        let Some(Received { len, mut fds, lost }) = receive(&self.socket, &mut buffer)? else {
            return Ok(Heard::Nothing);
        };
        if lost {
            return Err(Error::os("receiving a descriptor")(Errno::MFILE));
        }
        let message = Message::decode(&buffer[..len])?;
        let malformed = PeerFault::MalformedMessage { len };
        match (message, state.pool, &*fds.0) {
            (Message::Hello { version, .. }, None, _) if version != VERSION => {
                return Err(Rejection::Version { theirs: version, ours: VERSION }.into());
            }
            (Message::Hello { pool, slot_count, slot_len, loans, limits, .. }, None, _) => {
                state.pool = Some((PoolId(pool), Geometry::new(slot_count, slot_len)?));
                let limits = limits.and(policy.loans);
                if loans != 0 && limits.count > 0 {
                    let lender = Arc::new(SocketLender::new(&self.socket, loans, limits));
                    state.lender = Some(Arc::clone(&lender));
                    self.link.lend_by(lender);
                }
                self.greeted.store(true, Ordering::Relaxed);
            }
            (Message::Segment { index }, Some((pool, geometry)), [fd]) => {
                if state.segments.contains_key(&index) {
                    return Err(PeerFault::RepeatedSegment(index).into());
                }
                let count = state.segments.len() as u64 + 1;
                if count > u64::from(policy.max_segments) {
                    return Err(Rejection::TooManySegments(policy.max_segments).into());
                }
                // A client that retires segments of transfers under way may have twice the limit
                // mapped. Without a bound it could repeat that for ever.
                state.retired.retain(|segment| segment.strong_count() > 0);
                let most = count.max(state.retired.len() as u64);
                if most.saturating_mul(geometry.mapped_len() as u64) > policy.max_bytes {
                    return Err(Rejection::TooManyBytes(policy.max_bytes).into());
                }
                let segment = attach_memfd(fd, SegmentId { pool, index }, geometry)?;
                state.segments.insert(index, Arc::new(segment));
                fds.0.clear(); // memfds, whose `close` does not block
            }
            (Message::Retire { index }, Some(_), _) => {
                let gone = state.segments.remove(&index).ok_or(PeerFault::UnknownSegment(index))?;
                state.retired.push(Arc::downgrade(&gone));
            }
            (Message::Ring, Some(_), [fd]) => {
                let ring = Taker::new(attach_words(fd, RING_LEN)?);
                self.link.signal_by(Box::new(SocketSignal::of_server(ring.words(), &self.socket)));
                self.ring.set(ring).map_err(|_| malformed)?;
                fds.0.clear();
            }
            // Whoever reads looks after the tasks, once the lock is released.
            (Message::Wakeup, Some(_), _) if self.ring.get().is_some() => {}
            (Message::Returned { ids }, Some(_), _) => {
                let lender = state.lender.as_ref().ok_or(malformed)?;
                lender.take_back(ids)?;
            }
            (Message::Request { index, generation, takes_loans, key }, Some(_), _) => {
                // Unknown if the request was withdrawn and its segment retired while it was being
                // sent.
                if let Some(segment) = state.segments.get(&index).cloned() {
                    let (key, loans) = (key.into(), loans(takes_loans));
                    let transfer = ShmTransfer::begin(segment, generation, key, &self.link, loans);
                    return Ok(Heard::Request(transfer));
                }
            }
            _ => return Err(malformed.into()),
        }
        Ok(Heard::Noted)
    }

    /// Its in-flight limit: one request for each segment, one that was withdrawn and sent again,
    /// and a few that are just ending.
    pub(super) fn bound(&self) -> usize {
        2 * lock(&self.state).segments.len() + 8
    }

    /// Ends the connection for both sides, even if other processes have the socket open.
    pub(super) fn hang_up(&self) {
        // First: a client that finds the connection ended sends its requests elsewhere.
        {
            let _nobody_takes = lock(&self.state);
            self.over.store(true, Ordering::Relaxed);
        }
        self.link.sever(|| None);
        // Fails only if the client has hung up already.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }
}

impl Watched for Client {
    fn has_work(&self) -> bool {
        !self.is_over()
            && !self.resting.load(Ordering::Relaxed)
            && self.ring.get().is_some_and(Taker::has_entries)
    }

    fn arm(&self) -> bool {
        self.ring.get().is_some_and(Taker::arm) && self.has_work()
    }

    fn disarm(&self) {
        if let Some(ring) = self.ring.get() {
            ring.disarm();
        }
    }

    fn is_at_rest(&self) -> bool {
        self.link.is_below(1)
    }

    fn client_cpu(&self) -> u32 {
        self.ring.get().map_or(u32::MAX, Taker::client_cpu)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn begin_rest(&self) {
        self.resting.store(true, Ordering::Relaxed);
    }

    fn end_rest(&self) -> bool {
        self.resting.swap(false, Ordering::Relaxed)
    }
}

/// How the answer to a request can be lent.
pub(super) fn loans(takes_loans: bool) -> Loans {
    if takes_loans { Loans::ByLink } else { Loans::None }
}

/// A message and its descriptors.
pub(super) struct Received {
    pub(super) len: usize,
    pub(super) fds: ReceivedFds,
    /// True if a descriptor came that this process had no number left for.
    pub(super) lost: bool,
}

/// Takes one message and its descriptors, if there is one.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> Result<Option<Received>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET | Errno::PIPE) => return Err(Error::Disconnected),
            Err(errno) => return Err(Error::os("recvmsg")(errno)),
        }
    };
    // From here on, all received descriptors are owned, and so will be closed.
    let fds = ReceivedFds::of(&mut control);
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(PeerFault::MalformedMessage { len: received.bytes }.into());
    }
    match received.bytes {
        0 => Err(Error::Disconnected), // its end; the protocol has no empty messages
        len => Ok(Some(Received { len, fds, lost: received.flags.contains(ReturnFlags::CTRUNC) })),
    }
}
