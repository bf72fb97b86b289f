//! The server of a Unix-socket queue: many workers take requests from many clients' connections.
//!
//! No thread stands between a request and its worker. Workers look at the clients' rings
//! ([`Lookout`]); those that find nothing there wait on one epoll, in which each connection is armed for
//! one event at a time: whoever is woken for it has it to itself, reads what has come, at most one
//! request, and arms it again.

use std::collections::BTreeMap;
use std::fmt;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SocketFlags};

use crate::channel::RequestQueue;
use crate::channel::poller::Poller;
use crate::error::{Awaited, Error, PeerFault, Rejection, Result};
use crate::peer::{Link, MOST_DESCRIPTORS, Peer, Socket, Strays, Watch, is_behind, on_hang_up};
use crate::protocol::{Sender, ShmTransfer, Starting};
use crate::segment::{Geometry, PoolId, Segment, SegmentId, WriteSlots, attach_memfd, attach_words};
use crate::sync::{Deadline, lock};

use super::address::Address;
use super::lookout::{Lookout, Watched};
use super::ring::{RING_LEN, Taker};
use super::wire::{MAX_MESSAGE, Message, VERSION};
use super::{Policy, send};

const LISTENER: u64 = 0;
const FIRST_CLIENT: u64 = 1;

/// How soon to try again after the process ran out of descriptors for new clients, or has too many of
/// them to close.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// How many control messages a worker reads from one client before it looks at the others.
const BATCH: usize = 64;

/// How many requests may come from rings in a row before somebody looks at the connections.
const RINGS_IN_A_ROW: u32 = 16;

/// Takes requests at one path. Shared by many workers, by reference or in an `Arc`.
///
/// Dropping it removes the socket and hangs up on every client.
pub struct SeqpacketQueue {
    poller: Arc<Poller>,
    listener: Socket,
    /// The listener is not armed, for lack of descriptors.
    listener_resting: AtomicBool,
    policy: Policy,
    clients: Mutex<Clients>,
    lookout: Arc<Lookout<Client>>,
    /// Requests from rings since the connections were looked at.
    from_rings: AtomicU32,
    address: Address,
}

#[derive(Default)]
struct Clients {
    next: u64,
    /// By token, and so in the order in which they came.
    connected: BTreeMap<u64, Arc<Client>>,
}

/// One connection.
struct Client {
    token: u64,
    socket: Arc<Socket>,
    link: Arc<Link>,
    peer: Peer,
    /// Locked by whoever the epoll woke for it, and by whoever takes from its ring.
    state: Mutex<ClientState>,
    /// Set once it has handed one over.
    ring: OnceLock<Taker>,
    /// It has as many requests under way as honesty needs: nothing more is taken from its ring.
    resting: AtomicBool,
    /// We have hung up: nothing is taken from its ring any more. Set under the lock of `state`.
    over: AtomicBool,
    greeted: AtomicBool,
    _watch: Watch,
}

#[derive(Default)]
struct ClientState {
    pool: Option<(PoolId, Geometry)>,
    segments: BTreeMap<u32, Arc<Segment<WriteSlots>>>,
}

/// What one message was.
enum Heard {
    /// None has come.
    Nothing,
    /// It was taken note of.
    Noted,
    Request(ShmTransfer<Sender, Starting>),
}

impl SeqpacketQueue {
    pub(super) fn bind(path: &Path, policy: Policy) -> Result<SeqpacketQueue> {
        let poller = Arc::new(Poller::new()?);
        let (address, listener) = Address::listen(path)?;
        let listener = Socket::from(listener);
        poller.add(&listener, LISTENER)?;
        Ok(SeqpacketQueue {
            poller,
            listener,
            listener_resting: AtomicBool::new(false),
            policy,
            clients: Mutex::new(Clients { next: FIRST_CLIENT, connected: BTreeMap::new() }),
            lookout: Arc::new(Lookout::new()),
            from_rings: AtomicU32::new(0),
            address,
        })
    }

    /// The clients connected now.
    pub fn clients(&self) -> Vec<Peer> {
        lock(&self.clients).connected.values().map(|client| client.peer).collect()
    }

    /// Waits for one event; `None` at the deadline, and at times before it.
    fn wait(&self, deadline: Deadline) -> Result<Option<u64>> {
        // While no descriptors are left, nothing tells us when some are.
        let resting = self.listener_resting.swap(false, Ordering::Relaxed);
        let until = if resting { deadline.min(Deadline::after(OUT_OF_DESCRIPTORS)) } else { deadline };
        let woken = self.poller.wait(until)?;
        if resting {
            self.poller.arm(&self.listener, LISTENER)?;
        }
        Ok(woken)
    }

    /// A request from a ring or a connection; `None` when there may be one now.
    fn next(&self, deadline: Deadline) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let is_over = || deadline.has_passed() || self.poller.check_open().is_err();
        self.poller.check_open()?;
        let in_a_row = self.from_rings.fetch_add(1, Ordering::Relaxed);
        if in_a_row < RINGS_IN_A_ROW {
            let found = self.lookout.find().or_else(|| self.lookout.look(is_over));
            if let Some(client) = found {
                return self.attend(&client, Self::take_from_ring);
            }
        }
        self.from_rings.store(0, Ordering::Relaxed);
        let token = if in_a_row >= RINGS_IN_A_ROW {
            self.wait(Deadline::after(Duration::ZERO))?
        } else if self.lookout.lie_down() {
            let woken = self.wait(deadline);
            self.lookout.rise();
            woken?
        } else {
            return Ok(None);
        };
        match token {
            Some(LISTENER) => self.admit().map(|()| None),
            Some(token) => {
                let client = lock(&self.clients).connected.get(&token).cloned();
                client.map_or(Ok(None), |client| self.attend(&client, Self::listen_to))
            }
            None if in_a_row < RINGS_IN_A_ROW && deadline.has_passed() => {
                Err(Error::Timeout(Awaited::Request))
            }
            None => Ok(None),
        }
    }

    /// Takes a request from a client in the given way; a client that misbehaves is turned away.
    fn attend(
        &self,
        client: &Arc<Client>,
        take: impl FnOnce(&Self, &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>>,
    ) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        match take(self, client) {
            // Nobody waits for it: its client is gone.
            Ok(Some(transfer)) if client.link.is_severed() => drop(transfer),
            Ok(transfer) => return Ok(transfer),
            Err(Error::Disconnected) => self.remove(client.token),
            Err(error) => self.turn_away(client, &error),
        }
        Ok(None)
    }

    /// Accepts one client, if there still is one, and lets the next knock.
    fn admit(&self) -> Result<()> {
        if is_behind() {
            self.listener_resting.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => {
                let welcome = self.welcome(socket.into());
                self.poller.arm(&self.listener, LISTENER)?;
                if let Err((peer, error)) = welcome {
                    self.report(peer, &error); // last: it is the application's code
                }
                return Ok(());
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.listener_resting.store(true, Ordering::Relaxed);
                return Ok(());
            }
            // It left before we came, or somebody else was quicker.
            Err(_) => {}
        }
        self.poller.arm(&self.listener, LISTENER)
    }

    /// Checks who it is (rule S3) and starts listening to it.
    fn welcome(&self, socket: Socket) -> Result<(), (Option<Peer>, Error)> {
        let peer = Peer::of_socket(&socket).map_err(|error| (None, error))?;
        let reject = |why: Rejection| {
            dismiss(&socket, why);
            Err((Some(peer), why.into()))
        };
        if !self.policy.trusts(peer) {
            return reject(Rejection::User(peer.uid));
        }
        if !self.make_room() {
            return reject(Rejection::TooManyClients(self.policy.max_clients));
        }
        let socket = Arc::new(socket);
        let link = Arc::new(Link::to_receiver(peer));
        let watch = on_hang_up(Arc::clone(&socket), {
            let link = Arc::clone(&link);
            move || link.sever(|| None)
        })
        .map_err(|error| (Some(peer), error))?;
        let token = {
            let mut clients = lock(&self.clients);
            let token = clients.next;
            clients.next += 1;
            let client = Client {
                token,
                socket: Arc::clone(&socket),
                link,
                peer,
                state: Mutex::default(),
                ring: OnceLock::new(),
                resting: AtomicBool::new(false),
                over: AtomicBool::new(false),
                greeted: AtomicBool::new(false),
                _watch: watch,
            };
            clients.connected.insert(token, Arc::new(client));
            token
        };
        self.poller.add(&*socket, token).map_err(|error| {
            self.remove(token);
            (Some(peer), error)
        })
    }

    /// Makes room for one more client, at the cost of the oldest that has not even greeted us.
    fn make_room(&self) -> bool {
        let silent = {
            let clients = lock(&self.clients);
            if clients.connected.len() < self.policy.max_clients as usize {
                return true;
            }
            clients.connected.values().find(|client| !client.greeted.load(Ordering::Relaxed)).cloned()
        };
        match silent {
            Some(client) => {
                self.turn_away(&client, &Rejection::TooManyClients(self.policy.max_clients).into());
                true
            }
            None => false,
        }
    }

    /// Reads from a client's connection until there is a request; `None` when there is none for now.
    fn listen_to(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let mut request = None;
        if client.link.is_below(client.bound()) {
            let mut state = lock(&client.state);
            for _ in 0..BATCH {
                match self.hear(client, &mut state)? {
                    Heard::Nothing => break,
                    Heard::Noted => {}
                    Heard::Request(transfer) => {
                        request = Some(transfer);
                        break;
                    }
                }
            }
        }
        // Whether it knocked, or meant to and found the connection full.
        if client.has_work() {
            activate(&self.lookout, client);
        }
        self.let_next_in(client);
        Ok(request)
    }

    /// Takes a request out of a client's ring; `None` when somebody else was quicker, or it was withdrawn.
    fn take_from_ring(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let request = {
            let mut state = lock(&client.state);
            let Some(ring) = client.ring.get().filter(|_| !client.is_over()) else { return Ok(None) };
            let Some(entry) = ring.peek()? else { return Ok(None) };
            match state.segments.get(&entry.index).cloned() {
                Some(segment) => {
                    ring.advance();
                    let key = entry.key().into();
                    Some(ShmTransfer::begin(segment, entry.generation, key, &client.link))
                }
                // Its segment was handed over on the connection before; the request stays for now.
                None => match self.hear(client, &mut state)? {
                    Heard::Request(transfer) => Some(transfer),
                    Heard::Noted => None,
                    // Withdrawn, and its segment retired, before we came.
                    Heard::Nothing => {
                        ring.advance();
                        None
                    }
                },
            }
        };
        if !client.link.is_below(client.bound()) {
            client.resting.store(true, Ordering::Relaxed);
            self.let_next_in(client);
        }
        Ok(request)
    }

    /// Reads one message of a client, and does what it says.
    fn hear(&self, client: &Client, state: &mut ClientState) -> Result<Heard> {
        let mut buffer = [0; MAX_MESSAGE + 1];
        let Some((len, mut fds)) = receive(&client.socket, &mut buffer)? else { return Ok(Heard::Nothing) };
        let message = Message::decode(&buffer[..len])?;
        let malformed = PeerFault::MalformedMessage { len };
        match (message, state.pool, &*fds.0) {
            (Message::Hello { version, .. }, None, _) if version != VERSION => {
                return Err(Rejection::Version { theirs: version, ours: VERSION }.into());
            }
            (Message::Hello { pool, slot_count, slot_len, .. }, None, _) => {
                state.pool = Some((PoolId(pool), Geometry::new(slot_count, slot_len)?));
                client.greeted.store(true, Ordering::Relaxed);
            }
            (Message::Segment { index }, Some((pool, geometry)), [fd]) => {
                if state.segments.contains_key(&index) {
                    return Err(PeerFault::RepeatedSegment(index).into());
                }
                let count = state.segments.len() as u64 + 1;
                if count > u64::from(self.policy.max_segments) {
                    return Err(Rejection::TooManySegments(self.policy.max_segments).into());
                }
                if count.saturating_mul(geometry.mapped_len() as u64) > self.policy.max_bytes {
                    return Err(Rejection::TooManyBytes(self.policy.max_bytes).into());
                }
                let segment = attach_memfd(fd, SegmentId { pool, index }, geometry)?;
                state.segments.insert(index, Arc::new(segment));
                fds.0.clear(); // memory, which closes at once
            }
            (Message::Retire { index }, Some(_), _) => {
                state.segments.remove(&index).ok_or(PeerFault::UnknownSegment(index))?;
            }
            (Message::Ring, Some(_), [fd]) => {
                let ring = Taker::new(attach_words(fd, RING_LEN)?);
                client.ring.set(ring).map_err(|_| malformed)?;
                fds.0.clear();
            }
            (Message::Knock, Some(_), _) if client.ring.get().is_some() => {}
            (Message::Request { index, generation, key }, Some(_), _) => {
                // Unknown if it was withdrawn, and its segment retired, while it was being sent.
                if let Some(segment) = state.segments.get(&index).cloned() {
                    let transfer = ShmTransfer::begin(segment, generation, key.into(), &client.link);
                    return Ok(Heard::Request(transfer));
                }
            }
            _ => return Err(malformed.into()),
        }
        Ok(Heard::Noted)
    }

    /// Lets workers read the client's next request; but only once its requests under way are no
    /// more than honesty needs, so that a client which never frees a slot, or asks for a segment
    /// again and again, ties up a bounded number of workers.
    fn let_next_in(&self, client: &Arc<Client>) {
        let (poller, lookout) = (Arc::clone(&self.poller), Arc::clone(&self.lookout));
        let (link, bound, client) = (Arc::clone(&client.link), client.bound(), Arc::clone(client));
        link.when_below(bound, move || {
            // Fails only when the client was removed meanwhile.
            let _ = poller.arm(&*client.socket, client.token);
            if client.resting.swap(false, Ordering::Relaxed) && client.has_work() {
                activate(&lookout, &client);
                poller.nudge();
            }
        });
    }

    /// Hangs up on a client, and says why.
    fn turn_away(&self, client: &Client, error: &Error) {
        let why = match error {
            Error::Rejected(why) => *why,
            Error::Peer(_) | Error::Layout(_) => Rejection::Protocol,
            _ => Rejection::Resources,
        };
        dismiss(&client.socket, why);
        self.remove(client.token);
        self.report(Some(client.peer), error); // last: it is the application's code
    }

    /// Forgets a client; its transfers under way find out by themselves.
    fn remove(&self, token: u64) {
        let gone = lock(&self.clients).connected.remove(&token);
        if let Some(client) = gone {
            hang_up(&client);
            self.lookout.forget(&client);
        }
    }

    fn report(&self, peer: Option<Peer>, error: &Error) {
        if let Some(report) = &self.policy.on_rejected {
            report(peer, error);
        }
    }
}

impl RequestQueue for SeqpacketQueue {
    fn recv(&self, deadline: Deadline) -> Result<ShmTransfer<Sender, Starting>> {
        let taken = loop {
            match self.next(deadline) {
                Ok(Some(transfer)) => break Ok(transfer),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
        };
        if self.lookout.leave() {
            self.poller.nudge();
        }
        taken
    }

    fn close(&self) {
        self.poller.close();
    }
}

impl Drop for SeqpacketQueue {
    fn drop(&mut self) {
        lock(&self.clients).connected.values().for_each(|client| hang_up(client));
    }
}

impl fmt::Debug for SeqpacketQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeqpacketQueue")
            .field("path", &self.address.path())
            .field("clients", &self.clients().len())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// How many requests it may have under way: one for each segment, one more that was withdrawn and asked
    /// anew, and a few ending now.
    fn bound(&self) -> usize {
        2 * lock(&self.state).segments.len() + 8
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Has workers look at a client's ring, unless we have hung up.
fn activate(lookout: &Lookout<Client>, client: &Arc<Client>) {
    lookout.activate(client);
    // Whoever removes it says first that it is over, and then has it forgotten.
    if client.is_over() {
        lookout.forget(client);
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
}

/// Ends a connection for both sides, whoever still holds the socket.
fn hang_up(client: &Client) {
    // First: a client that finds nobody on the connection tries its requests elsewhere.
    {
        let _nobody_takes = lock(&client.state);
        client.over.store(true, Ordering::Relaxed);
    }
    client.link.sever(|| None);
    // Fails only if the other end has hung up already.
    let _ = rustix::net::shutdown(&*client.socket, rustix::net::Shutdown::Both);
}

/// Says farewell, if the client's buffer has room for it.
fn dismiss(socket: &Socket, why: Rejection) {
    let _ = send(socket, &Message::farewell(why).encode(), None, Deadline::after(Duration::ZERO));
}

/// Takes one message and its descriptors, if there is one.
fn receive(socket: &Socket, buffer: &mut [u8]) -> Result<Option<(usize, Strays)>> {
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
    // Whatever came along is owned, and closed, from here on.
    let fds = Strays::of(&mut control);
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // There was one, and we had no number left for it.
        return Err(Error::os("receiving a descriptor")(Errno::MFILE));
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(PeerFault::MalformedMessage { len: received.bytes }.into());
    }
    match received.bytes {
        0 => Err(Error::Disconnected), // its end; an empty message is none of ours either
        len => Ok(Some((len, fds))),
    }
}
