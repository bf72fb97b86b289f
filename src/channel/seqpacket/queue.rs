//! The server of a Unix-socket queue: many workers take requests from many clients' connections.
//!
//! No thread stands between a request and its worker. All workers wait on one epoll, in which each
//! connection is armed for one event at a time: whoever is woken for it has it to itself, reads one
//! request, arms it again, and goes to work.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SocketFlags};

use crate::channel::RequestQueue;
use crate::channel::poller::Poller;
use crate::error::{Awaited, Error, PeerFault, Rejection, Result};
use crate::peer::{Link, MOST_DESCRIPTORS, Peer, Socket, Strays, Watch, is_behind, on_hang_up};
use crate::protocol::{Sender, ShmTransfer, Starting};
use crate::segment::{Geometry, PoolId, Segment, SegmentId, WriteSlots, attach_memfd};
use crate::sync::{Deadline, lock};

use super::address::Address;
use super::wire::{MAX_MESSAGE, Message, VERSION};
use super::{Policy, send};

const LISTENER: u64 = 0;
const FIRST_CLIENT: u64 = 1;

/// How soon to try again after the process ran out of descriptors for new clients, or has too many of
/// them to close.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// How many control messages a worker reads from one client before it looks at the others.
const BATCH: usize = 64;

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
    /// Locked by whoever the epoll woke for it, and so never contended.
    state: Mutex<ClientState>,
    greeted: AtomicBool,
    _watch: Watch,
}

#[derive(Default)]
struct ClientState {
    pool: Option<(PoolId, Geometry)>,
    segments: HashMap<u32, Arc<Segment<WriteSlots>>>,
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
            address,
        })
    }

    /// The clients connected now.
    pub fn clients(&self) -> Vec<Peer> {
        lock(&self.clients).connected.values().map(|client| client.peer).collect()
    }

    /// Waits for one event; `None` at the deadline.
    fn wait(&self, deadline: Deadline) -> Result<Option<u64>> {
        loop {
            // While no descriptors are left, nothing tells us when some are.
            let resting = self.listener_resting.swap(false, Ordering::Relaxed);
            let until = if resting { deadline.min(Deadline::after(OUT_OF_DESCRIPTORS)) } else { deadline };
            let woken = self.poller.wait(until)?;
            if resting {
                self.poller.arm(&self.listener, LISTENER)?;
            }
            if woken.is_some() || deadline.has_passed() {
                return Ok(woken);
            }
        }
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

    /// Reads from a client until there is a request; `None` when there is none for now.
    fn listen_to(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let mut state = lock(&client.state);
        for _ in 0..BATCH {
            let mut buffer = [0; MAX_MESSAGE + 1];
            let Some((len, mut fds)) = receive(&client.socket, &mut buffer)? else { return Ok(None) };
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
                (Message::Request { index, generation, key }, Some(_), _) => {
                    // Withdrawn, and its segment retired, while it was being sent.
                    let Some(segment) = state.segments.get(&index).cloned() else { continue };
                    return Ok(Some(ShmTransfer::begin(segment, generation, key.into(), &client.link)));
                }
                _ => return Err(malformed.into()),
            }
        }
        Ok(None)
    }

    /// Lets a worker read the client's next request; but only once its requests under way are no
    /// more than honesty needs, so that a client which never frees a slot, or asks for a segment
    /// again and again, ties up a bounded number of workers.
    fn let_next_in(&self, client: &Client) {
        // One for each segment, one more that was withdrawn and asked anew, and a few ending now.
        let bound = 2 * lock(&client.state).segments.len() + 8;
        let (poller, socket, token) = (Arc::clone(&self.poller), Arc::clone(&client.socket), client.token);
        client.link.when_below(bound, move || {
            // Fails only when the client was removed meanwhile.
            let _ = poller.arm(&*socket, token);
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
        loop {
            let token = match self.wait(deadline)? {
                None => return Err(Error::Timeout(Awaited::Request)),
                Some(LISTENER) => {
                    self.admit()?;
                    continue;
                }
                Some(token) => token,
            };
            let Some(client) = lock(&self.clients).connected.get(&token).cloned() else { continue };
            match self.listen_to(&client) {
                Ok(transfer) => {
                    self.let_next_in(&client);
                    match transfer {
                        // Nobody waits for it: its client is gone.
                        Some(transfer) if client.link.is_severed() => drop(transfer),
                        Some(transfer) => return Ok(transfer),
                        None => {}
                    }
                }
                Err(Error::Disconnected) => self.remove(token),
                Err(error) => self.turn_away(&client, &error),
            }
        }
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

/// Ends a connection for both sides, whoever still holds the socket.
fn hang_up(client: &Client) {
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
