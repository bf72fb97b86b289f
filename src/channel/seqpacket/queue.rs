//! The server of a Unix-socket queue: many workers take requests from many clients' connections.
//!
//! No thread stands between a request and its worker. Workers look at the clients' rings
//! ([`Lookout`]); those that find nothing there wait on one epoll, in which each connection is armed for
//! one event at a time: whoever is woken for it has it to itself, reads what has come, at most one
//! request, and arms it again.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::channel::RequestQueue;
use crate::channel::poller::Poller;
use crate::error::{Awaited, Error, Rejection, Result};
use crate::peer::{Link, Peer, Socket, is_behind, on_hang_up};
use crate::protocol::{Sender, ShmTransfer, Starting};
use crate::sync::{Deadline, lock};

use super::address::Address;
use super::client::{Client, Heard};
use super::lookout::{Lookout, Watched};
use super::wire::Message;
use super::{Policy, send};

const LISTENER: u64 = 0;
const FIRST_CLIENT: u64 = 1;

/// How soon to try again after the process ran out of descriptors for new clients, or has too many of
/// them to close.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// How many control messages a worker reads from one client before it looks at the others.
const BATCH: usize = 64;

/// How many requests may come from rings in a row before somebody looks at the connections, if that is due.
const RINGS_IN_A_ROW: u32 = 16;
/// How often a look is due: it costs as much as a request of 1 KiB.
const LOOK_EVERY: Duration = Duration::from_millis(1);

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
    /// Requests from rings since it was asked whether a look at the connections is due.
    from_rings: AtomicU32,
    started: Instant,
    /// When the connections were looked at, in whole [`LOOK_EVERY`] since the start.
    looked: AtomicU64,
    address: Address,
}

#[derive(Default)]
struct Clients {
    next: u64,
    /// By token, and so in the order in which they came.
    connected: BTreeMap<u64, Arc<Client>>,
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
            started: Instant::now(),
            looked: AtomicU64::new(0),
            address,
        })
    }

    /// The clients connected now. None in a child of `fork`, which serves nobody.
    pub fn clients(&self) -> Vec<Peer> {
        if !self.poller.origin().is_here() {
            return Vec::new();
        }
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
        let must_look = self.is_look_due();
        if !must_look {
            let found = self.lookout.find().or_else(|| self.lookout.look(is_over));
            if let Some(client) = found {
                return self.attend(&client, Self::take_from_ring);
            }
        }
        let token = if must_look {
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
            None if !must_look && deadline.has_passed() => Err(Error::Timeout(Awaited::Request)),
            None => Ok(None),
        }
    }

    /// Whether it is the turn of the connections: busy rings keep no newcomer out.
    fn is_look_due(&self) -> bool {
        if self.from_rings.fetch_add(1, Ordering::Relaxed) < RINGS_IN_A_ROW {
            return false;
        }
        self.from_rings.store(0, Ordering::Relaxed);
        let now = (self.started.elapsed().as_nanos() / LOOK_EVERY.as_nanos()) as u64;
        self.looked.swap(now, Ordering::Relaxed) != now
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
            let client = Client::new(token, Arc::clone(&socket), peer, link, watch);
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
                match client.hear(&mut state, &self.policy)? {
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
                None => match client.hear(&mut state, &self.policy)? {
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
            client.hang_up();
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
        self.poller.check_open()?;
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
        if !self.poller.origin().is_here() {
            return;
        }
        lock(&self.clients).connected.values().for_each(|client| client.hang_up());
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

/// Has workers look at a client's ring, unless we have hung up.
fn activate(lookout: &Lookout<Client>, client: &Arc<Client>) {
    lookout.activate(client);
    // Whoever removes it says first that it is over, and then has it forgotten.
    if client.is_over() {
        lookout.forget(client);
    }
}

/// Says farewell, if the client's buffer has room for it.
fn dismiss(socket: &Socket, why: Rejection) {
    let _ = send(socket, &Message::farewell(why).encode(), None, Deadline::after(Duration::ZERO));
}
