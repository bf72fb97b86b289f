//! The server of a Unix-socket queue: many workers take requests from many clients' connections.
//!
//! No thread stands between a request and its worker. Workers look at the clients' rings
//! ([`WakePolicy`]); those that find nothing there wait on one epoll, in which each connection is armed for
//! one event at a time: whoever is woken for it has it to itself, reads what has come, at most one
//! request, and arms it again.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::channel::RequestQueue;
use crate::channel::leaving::Leaving;
use crate::channel::poller::Poller;
use crate::error::{Error, Rejection, Result};
use crate::peer::{Link, Peer, Socket, is_behind, on_hang_up};
use crate::protocol::{Refusal, Sender, ShmTransfer, Starting};
use crate::sync::{Deadline, lock};

use super::address::Address;
use super::client::{Client, Heard};
use super::ring::Taker;
use super::wake_policy::{Attended, Door, WakePolicy, next_entry, rest_at_limit};
use super::wire::Message;
use super::{Policy, send};

const LISTENER: u64 = 0;
const FIRST_CLIENT: u64 = 1;

/// How soon to try again after the process ran out of descriptors for new clients, or has too many of
/// them to close.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// How many control messages a worker reads from one client before it looks at the others.
const BATCH: usize = 64;

/// How many requests may come from rings in a row before a worker looks at the connections, if
/// that is due.
const RINGS_IN_A_ROW: u32 = 16;
/// How often a look is due: it costs as much as a request of 1 KiB.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How many requests may come from rings between two looks at the connections while each look finds
/// something: clients that connect or send wake-ups are not held up by those that ask all the time.
const RINGS_BEFORE_BACKLOG: u32 = 4;

/// How many clients are let in at one event of the listener: it has its turn once in a round of all
/// connections that are ready.
const ADMITTED_AT_ONCE: usize = 16;

/// How often clients are looked at after `close`, and how much later for each of them.
const LOOK_WHILE_LEAVING: Duration = Duration::from_millis(20);
const LOOK_AT_ONE: Duration = Duration::from_micros(100);

/// Takes requests at one path. Shared by many workers, by reference or in an `Arc`.
///
/// Dropping it removes the socket and hangs up on every client.
pub struct SeqpacketQueue {
    shared: Arc<Shared>,
    path: PathBuf,
    /// What stands at the path. Given up by `close`, so that a successor can take it.
    address: Mutex<Option<Address>>,
    /// What answers clients after `close`.
    leaving: Mutex<Option<Leaving>>,
}

/// What workers share, and the thread that answers clients after `close`.
struct Shared {
    poller: Arc<Poller>,
    listener: Socket,
    /// The listener is not armed, for lack of descriptors.
    listener_resting: AtomicBool,
    policy: Policy,
    clients: Mutex<Clients>,
    wake_policy: Arc<WakePolicy<Client>>,
    /// Requests from rings since it was asked whether a look at the connections is due.
    from_rings: AtomicU32,
    started: Instant,
    /// When the connections were looked at, in whole [`LOOK_EVERY`] since the start.
    looked: AtomicU64,
    /// The last look at the connections found something: there may be more.
    has_backlog: AtomicBool,
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
        let shared = Arc::new(Shared {
            poller,
            listener,
            listener_resting: AtomicBool::new(false),
            policy,
            clients: Mutex::new(Clients { next: FIRST_CLIENT, connected: BTreeMap::new() }),
            wake_policy: Arc::new(WakePolicy::new()),
            from_rings: AtomicU32::new(0),
            started: Instant::now(),
            looked: AtomicU64::new(0),
            has_backlog: AtomicBool::new(false),
        });
        let address = Mutex::new(Some(address));
        Ok(SeqpacketQueue { shared, path: path.to_owned(), address, leaving: Mutex::new(None) })
    }

    /// The clients connected now. None in a child of `fork`, which serves nobody.
    pub fn clients(&self) -> Vec<Peer> {
        if !self.shared.poller.origin().is_here() {
            return Vec::new();
        }
        self.shared.clients().iter().map(|client| client.peer).collect()
    }
}

/// What the workers' common loop asks of this queue.
impl Door for Shared {
    type Ring = Client;
    /// The token of what is ready.
    type Event = u64;
    type Request = ShmTransfer<Sender, Starting>;

    fn take(&self, client: &Arc<Client>) -> Result<Option<Self::Request>> {
        self.judge(client, self.take_from_ring(client))
    }

    fn sleep(&self, deadline: Deadline) -> Result<Option<u64>> {
        let is_only_a_look = deadline.has_passed();
        // While no descriptors are left, nothing tells us when some are.
        let resting = self.listener_resting.swap(false, Ordering::Relaxed);
        let until =
            if resting { deadline.min(Deadline::after(OUT_OF_DESCRIPTORS)) } else { deadline };
        let woken = self.poller.wait(until)?;
        if is_only_a_look {
            self.has_backlog.store(woken.is_some(), Ordering::Relaxed);
        }
        if resting {
            self.poller.arm(&self.listener, LISTENER)?;
        }
        Ok(woken)
    }

    fn attend(&self, token: u64) -> Result<Attended<Client, Self::Request>> {
        if token == LISTENER {
            self.admit_all(ADMITTED_AT_ONCE)?;
            return Ok(Attended::nothing());
        }
        let client = lock(&self.clients).connected.get(&token).cloned();
        let Some(client) = client else { return Ok(Attended::nothing()) };
        let request = self.judge(&client, self.listen_to(&client))?;
        Ok(Attended { ring: client.ring.get().is_some().then_some(client), request })
    }

    fn wake_one(&self) {
        self.poller.wake_one();
    }

    fn is_look_due(&self) -> bool {
        let has_backlog = self.has_backlog.load(Ordering::Relaxed);
        let in_a_row = if has_backlog { RINGS_BEFORE_BACKLOG } else { RINGS_IN_A_ROW };
        if self.from_rings.fetch_add(1, Ordering::Relaxed) < in_a_row {
            return false;
        }
        self.from_rings.store(0, Ordering::Relaxed);
        let now = (self.started.elapsed().as_nanos() / LOOK_EVERY.as_nanos()) as u64;
        self.looked.swap(now, Ordering::Relaxed) != now || has_backlog
    }

    fn check_open(&self) -> Result<()> {
        self.poller.check_open()
    }
}

impl Shared {
    /// The clients connected now, the oldest first.
    fn clients(&self) -> Vec<Arc<Client>> {
        lock(&self.clients).connected.values().cloned().collect()
    }

    /// Turns a client that misbehaves away, and forgets one that is gone.
    fn judge(
        &self,
        client: &Arc<Client>,
        taken: Result<Option<ShmTransfer<Sender, Starting>>>,
    ) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        match taken {
            // Its client is gone: no answer is waited for.
            Ok(Some(transfer)) if client.link.is_severed() => drop(transfer),
            Ok(transfer) => return Ok(transfer),
            Err(Error::Disconnected) => self.remove(client.token),
            Err(error) => self.turn_away(client, &error),
        }
        Ok(None)
    }

    /// Has a thread answer all clients from now on, those included that are not let in yet. It looks at
    /// each of them every 20 ms, and less often where they are many: what it has to do is soon done.
    fn start_leaving(self: &Arc<Self>) -> Result<Leaving> {
        let shared = Arc::clone(self);
        Leaving::start(move || {
            // Fails if the system does; those outside are let in later, or find the door gone.
            let _ = shared.admit_all(BATCH);
            let clients = shared.clients();
            clients.iter().for_each(|client| shared.send_on(client));
            LOOK_WHILE_LEAVING + LOOK_AT_ONE * u32::try_from(clients.len()).unwrap_or(u32::MAX)
        })
    }

    /// Answers what a client has asked for by now, up to a limit, with "ask my successor".
    fn send_on(&self, client: &Arc<Client>) {
        for _ in 0..BATCH {
            match self.judge(client, self.next_of(client)) {
                // Fails if the client has withdrawn it.
                Ok(Some(transfer)) => drop(transfer.refuse(Refusal::Leaving)),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// The next request of one client, by whichever way it came.
    fn next_of(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        for _ in 0..BATCH {
            let mut state = lock(&client.state);
            match client.hear(&mut state, &self.policy)? {
                Heard::Request(transfer) => return Ok(Some(transfer)),
                Heard::Noted => {}
                Heard::Nothing => break,
            }
        }
        // Armed before the look: for a request that comes after it, there is a message.
        if client.ring.get().is_some_and(Taker::arm) {
            self.take_from_ring(client)
        } else {
            Ok(None)
        }
    }

    /// Accepts clients, at most so many, as long as there are some.
    fn admit_all(&self, most: usize) -> Result<()> {
        for _ in 0..most {
            let before = lock(&self.clients).next;
            self.admit()?;
            if lock(&self.clients).next == before {
                break;
            }
        }
        Ok(())
    }

    /// Accepts one client, if there still is one, and arms the listener for the next.
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
            // It left before we came, or another worker was quicker.
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
            clients
                .connected
                .values()
                .find(|client| !client.greeted.load(Ordering::Relaxed))
                .cloned()
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
        self.let_next_in(client);
        Ok(request)
    }

    /// Takes a request out of a client's ring; `None` when somebody else was quicker, or it was withdrawn.
    fn take_from_ring(
        &self,
        client: &Arc<Client>,
    ) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let request = {
            let mut state = lock(&client.state);
            let Some(ring) = client.ring.get() else { return Ok(None) };
            let Some(entry) = next_entry(&**client, ring)? else { return Ok(None) };
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
        if rest_at_limit(&**client, &client.link, client.bound()) {
            self.let_next_in(client);
        }
        Ok(request)
    }

    /// Lets workers read the client's next request; but only once its requests under way are no
    /// more than honesty needs, so that a client which never frees a slot, or asks for a segment
    /// again and again, ties up a bounded number of workers.
    fn let_next_in(&self, client: &Arc<Client>) {
        let (poller, wake_policy) = (Arc::clone(&self.poller), Arc::clone(&self.wake_policy));
        let (link, bound, client) = (Arc::clone(&client.link), client.bound(), Arc::clone(client));
        link.when_below(bound, move || {
            // Fails only when the client was removed meanwhile.
            let _ = poller.arm(&*client.socket, client.token);
            wake_policy.resume(&client, || poller.wake_one());
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
            self.wake_policy.forget(&client);
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
        self.shared.poller.check_open()?; // before any lock
        self.shared.wake_policy.recv(&*self.shared, deadline)
    }

    fn close(&self) {
        if !self.shared.poller.origin().is_here() {
            return;
        }
        // First: from here on a successor can be found.
        drop(lock(&self.address).take());
        self.shared.poller.close();
        let mut leaving = lock(&self.leaving);
        if leaving.is_none() {
            // Without a thread for it, what comes after this waits until the queue is dropped, and is
            // asked again then.
            *leaving = self.shared.start_leaving().ok();
        }
    }
}

impl Drop for SeqpacketQueue {
    fn drop(&mut self) {
        if !self.shared.poller.origin().is_here() {
            return;
        }
        drop(lock(&self.leaving).take()); // waits for its thread
        drop(lock(&self.address).take());
        self.shared.clients().iter().for_each(|client| client.hang_up());
        // For clients that are not let in yet, though a child of `fork` may have the listener open.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
    }
}

impl fmt::Debug for SeqpacketQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeqpacketQueue")
            .field("path", &self.path)
            .field("clients", &self.clients().len())
            .finish_non_exhaustive()
    }
}

/// Says farewell, if the client's buffer has room for it.
fn dismiss(socket: &Socket, why: Rejection) {
    let _ = send(socket, &Message::farewell(why).encode(), None, Deadline::after(Duration::ZERO));
}
