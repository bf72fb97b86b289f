//! The server of a Unix-socket queue: many workers take requests from many clients' connections.
//!
//! There is no dispatcher thread. Workers check the clients' rings ([`WakePolicy`]). Those that
//! find nothing there wait on one epoll, in which each connection is armed for one event at a time.
//! The worker woken for a connection has it exclusively, reads messages up to one request, and arms
//! it again.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::channel::RequestQueue;
use crate::channel::leaving::Leaving;
use crate::channel::poller::{Poller, TIMER, WAKE_ONE};
use crate::error::{Error, Rejection, Result};
use crate::peer::{Link, Peer, Socket, is_behind, on_hang_up};
use crate::protocol::{Refusal, Sender, ShmTransfer, Starting};
use crate::sync::{BUDGET, Deadline, lock};

use super::address::Address;
use super::client::{Client, Heard, loans};
use super::ring::Taker;
use super::wake_policy::{Attended, WakePolicy, WorkSource, next_entry, rest_at_limit};
use super::wire::Message;
use super::{Policy, send};

const LISTENER: u64 = 0;
const FIRST_CLIENT: u64 = 1;

/// How soon to accept clients again after the process ran out of descriptors, or while too many are
/// being closed.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// How many control messages a worker reads from one client before it turns to others.
const BATCH: usize = 64;

/// How many requests may come from rings in a row before a worker checks whether a look at the
/// connections is due.
const RINGS_IN_A_ROW: u32 = 16;
/// How often a look at the connections is due: it costs as much as a request of 1 KiB.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How many requests may come from rings between two looks at the connections while each look finds
/// something: clients that connect or send wakeups are not starved by busy ones.
const RINGS_BEFORE_BACKLOG: u32 = 4;

/// How long a task looks for a request before it sleeps, where that can pay.
const MOMENT: Duration = BUDGET;

/// How many clients are accepted at one event of the listener, which comes up once in a round of
/// all ready connections.
const ADMITTED_AT_ONCE: usize = 16;

/// How often clients are served after `close`, and how much less often for each of them.
const LOOK_WHILE_LEAVING: Duration = Duration::from_millis(20);
const LOOK_AT_ONE: Duration = Duration::from_micros(100);

/// Takes requests at one path. Shared by many workers, by reference or in an `Arc`.
///
/// Dropping it removes the socket and hangs up on every client.
pub struct SeqpacketQueue {
    shared: Arc<Shared>,
    path: PathBuf,
    /// The socket and its lock. Dropped by `close`, so that a successor can take the path.
    address: Mutex<Option<Address>>,
    /// The thread that answers clients after `close`.
    leaving: Mutex<Option<Leaving>>,
}

/// Shared by the workers, and by the thread that answers clients after `close`.
struct Shared {
    poller: Arc<Poller>,
    listener: Socket,
    policy: Policy,
    clients: Mutex<Clients>,
    wake_policy: Arc<WakePolicy<Client>>,
    /// Requests from rings since the last check whether a look at the connections is due.
    from_rings: AtomicU32,
    started: Instant,
    /// When the connections were last looked at, in units of [`LOOK_EVERY`] since the start.
    looked: AtomicU64,
    /// True if the last look at the connections found something: there may be more.
    has_backlog: AtomicBool,
}

#[derive(Default)]
struct Clients {
    next: u64,
    /// By token, and so in the order of arrival.
    connected: BTreeMap<u64, Arc<Client>>,
}

/// What came of accepting a client.
enum Admission {
    Admitted,
    NoneWaits,
    /// Or no memory.
    NoDescriptors,
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

    /// The clients connected now. None in a child of `fork`, which has no clients.
    pub fn clients(&self) -> Vec<Peer> {
        if !self.shared.poller.origin().is_here() {
            return Vec::new();
        }
        self.shared.clients().iter().map(|client| client.peer).collect()
    }
}

impl SeqpacketQueue {
    /// Takes the next request, if there is one, and wakes the tasks that have something to take
    /// ([`poll_slot`](ShmTransfer::poll_slot)). Never waits, but looks for a request for up to 50
    /// µs where that can pay. Once this is pending, the queue's descriptor ([`AsFd`]) becomes
    /// readable when it is to be called again. For one caller at a time, and none beside it in
    /// [`recv`](RequestQueue::recv): another might not be told.
    ///
    /// # Errors
    /// Those of [`recv`](RequestQueue::recv), but for [`Error::Timeout`].
    pub fn try_recv(&self) -> Poll<Result<ShmTransfer<Sender, Starting>>> {
        self.try_recv_within(MOMENT)
    }

    /// As [`try_recv`](Self::try_recv), and looks for a request for so long at most.
    pub(crate) fn try_recv_within(
        &self,
        look: Duration,
    ) -> Poll<Result<ShmTransfer<Sender, Starting>>> {
        self.shared.poller.check_open()?; // before any lock
        match self.shared.wake_policy.try_recv(&*self.shared, Deadline::after(look)) {
            Err(Error::Timeout(_)) => Poll::Pending,
            taken => Poll::Ready(taken),
        }
    }

    /// Wakes the tasks that have something to take. For a queue that was closed, and so is not
    /// attended to any more.
    #[cfg(feature = "tokio")]
    pub(crate) fn look(&self) {
        self.shared.clients().iter().for_each(|client| client.link.look());
    }
}

/// Readable when [`try_recv`](SeqpacketQueue::try_recv) has something to do.
impl AsFd for SeqpacketQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.poller.as_fd()
    }
}

/// What [`WakePolicy::recv`] needs of this queue.
impl WorkSource for Shared {
    type Ring = Client;
    /// The token of a ready descriptor.
    type Event = u64;
    type Request = ShmTransfer<Sender, Starting>;

    fn take(&self, client: &Arc<Client>) -> Result<Option<Self::Request>> {
        self.judge(client, self.take_from_ring(client))
    }

    fn sleep(&self, deadline: Deadline) -> Result<Option<u64>> {
        let is_only_a_look = deadline.has_passed();
        let woken = self.poller.wait(deadline)?;
        if is_only_a_look {
            self.has_backlog.store(woken.is_some(), Ordering::Relaxed);
        }
        Ok(woken)
    }

    fn attend(&self, token: u64) -> Result<Attended<Client, Self::Request>> {
        if token == WAKE_ONE {
            // A ring has become active. Looked for again, also after the deadline: who is told that
            // nothing is there may not come back before the next event.
            return Ok(Attended::nothing());
        }
        if token == TIMER {
            self.poller.arm(&self.listener, LISTENER)?;
            return Ok(Attended::nothing());
        }
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

    /// Rejects a client that misbehaves, and removes one that is gone.
    fn judge(
        &self,
        client: &Arc<Client>,
        taken: Result<Option<ShmTransfer<Sender, Starting>>>,
    ) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        match taken {
            // The client is gone: it does not wait for an answer.
            Ok(Some(transfer)) if client.link.is_severed() => drop(transfer),
            Ok(transfer) => return Ok(transfer),
            Err(Error::Disconnected) => self.remove(client.token),
            Err(error) => self.turn_away(client, &error),
        }
        Ok(None)
    }

    /// Starts a thread that answers all clients, including those that are not accepted yet. It
    /// serves each of them every 20 ms, and less often if there are many.
    fn start_leaving(self: &Arc<Self>) -> Result<Leaving> {
        let shared = Arc::clone(self);
        Leaving::start(move || {
            // On failure, clients are accepted later, or find the listener closed.
            let _ = shared.admit_all(BATCH);
            let clients = shared.clients();
            clients.iter().for_each(|client| shared.send_on(client));
            LOOK_WHILE_LEAVING + LOOK_AT_ONE * u32::try_from(clients.len()).unwrap_or(u32::MAX)
        })
    }

    /// Answers a client's requests so far, up to a limit, with [`Refusal::Leaving`].
    fn send_on(&self, client: &Arc<Client>) {
        for _ in 0..BATCH {
            match self.judge(client, self.next_of(client)) {
                // Fails if the client has withdrawn it.
                Ok(Some(transfer)) => drop(transfer.refuse(Refusal::Leaving)),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// The next request of one client, from its ring or its connection.
    fn next_of(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let next = self.read_next(client);
        client.link.look(); // nobody else attends to it any more
        next
    }

    fn read_next(&self, client: &Arc<Client>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        for _ in 0..BATCH {
            let mut state = lock(&client.state);
            match client.hear(&mut state, &self.policy)? {
                Heard::Request(transfer) => return Ok(Some(transfer)),
                Heard::Noted => {}
                Heard::Nothing => break,
            }
        }
        // Armed first: a request posted after the check comes with a wakeup message.
        if client.ring.get().is_some_and(Taker::arm) {
            self.take_from_ring(client)
        } else {
            Ok(None)
        }
    }

    /// Accepts waiting clients, at most `most`; then arms the listener for the next, unless there
    /// are no descriptors: then the timer has it armed, later, since there is no event for a freed
    /// descriptor. Never both, or workers would spin.
    fn admit_all(&self, most: usize) -> Result<()> {
        let mut rejected = Vec::new();
        let mut outcome = Admission::NoneWaits;
        for _ in 0..most {
            outcome = self.admit(&mut rejected);
            if !matches!(outcome, Admission::Admitted) {
                break;
            }
        }
        let armed = if matches!(outcome, Admission::NoDescriptors) {
            self.poller.wake_after(OUT_OF_DESCRIPTORS);
            Ok(())
        } else {
            self.poller.arm(&self.listener, LISTENER)
        };
        // Last: this calls the application, which may take its time.
        rejected.iter().for_each(|(peer, error)| self.report(*peer, error));
        armed
    }

    /// Accepts one client, if one still waits.
    fn admit(&self, rejected: &mut Vec<(Option<Peer>, Error)>) -> Admission {
        if is_behind() {
            return Admission::NoDescriptors;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => {
                rejected.extend(self.welcome(socket.into()).err());
                Admission::Admitted
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                Admission::NoDescriptors
            }
            Err(Errno::CONNABORTED | Errno::INTR) => Admission::Admitted, // that one left
            Err(_) => Admission::NoneWaits,
        }
    }

    /// Checks the client's user (rule S3), and adds its connection to the epoll.
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

    /// Makes room for one more client, by dropping the oldest that has not sent its hello.
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

    /// Reads from a client's connection until there is a request; `None` when there is none for
    /// now.
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
        client.link.look(); // a full connection is a signal, too
        self.let_next_in(client);
        Ok(request)
    }

    /// Takes a request from a client's ring; `None` when another worker was quicker, or it was
    /// withdrawn.
    fn take_from_ring(
        &self,
        client: &Arc<Client>,
    ) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let mut has_read = false;
        let request = {
            let mut state = lock(&client.state);
            let Some(ring) = client.ring.get() else { return Ok(None) };
            let Some(entry) = next_entry(&**client, ring)? else { return Ok(None) };
            match state.segments.get(&entry.index).cloned() {
                Some(segment) => {
                    ring.advance();
                    let key = entry.key().into();
                    let (generation, loans) = (entry.generation, loans(entry.takes_loans));
                    Some(ShmTransfer::begin(segment, generation, key, &client.link, loans))
                }
                // Its segment was sent on the connection before; the request stays in the ring for
                // now.
                None => {
                    has_read = true;
                    match client.hear(&mut state, &self.policy)? {
                        Heard::Request(transfer) => Some(transfer),
                        Heard::Noted => None,
                        // The request was withdrawn, and its segment retired, before this worker
                        // came.
                        Heard::Nothing => {
                            ring.advance();
                            None
                        }
                    }
                }
            }
        };
        if has_read {
            client.link.look(); // it may have been a signal, or the last of a full connection
        }
        if rest_at_limit(&**client, &client.link, client.bound()) {
            self.let_next_in(client);
        }
        Ok(request)
    }

    /// Lets workers read the client's next request once it is below its in-flight limit. So a
    /// client that never frees a slot, or sends requests without end, ties up a bounded number of
    /// workers.
    fn let_next_in(&self, client: &Arc<Client>) {
        let (poller, wake_policy) = (Arc::clone(&self.poller), Arc::clone(&self.wake_policy));
        let (link, bound, client) = (Arc::clone(&client.link), client.bound(), Arc::clone(client));
        link.when_below(bound, move || {
            // Fails only if the client was removed meanwhile.
            let _ = poller.arm(&*client.socket, client.token);
            wake_policy.resume(&client, || poller.wake_one());
        });
    }

    /// Hangs up on a client, after a farewell with the reason.
    fn turn_away(&self, client: &Client, error: &Error) {
        let why = match error {
            Error::Rejected(why) => *why,
            Error::Peer(_) | Error::Layout(_) => Rejection::Protocol,
            _ => Rejection::Resources,
        };
        dismiss(&client.socket, why);
        self.remove(client.token);
        self.report(Some(client.peer), error); // last: this calls the application
    }

    /// Removes a client; its transfers under way end by themselves.
    fn remove(&self, token: u64) {
        let gone = lock(&self.clients).connected.remove(&token);
        if let Some(client) = gone {
            client.hang_up();
            self.wake_policy.forget(&client);
        }
    }

    fn report(&self, peer: Option<Peer>, error: &Error) {
        if let Some(report) = &self.policy.on_rejected {
            // The application's code: a panic in it, told by the panic hook, ends no worker.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| report(peer, error)));
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
        // First: from here on a successor can take the address.
        drop(lock(&self.address).take());
        self.shared.poller.close();
        let mut leaving = lock(&self.leaving);
        if leaving.is_none() {
            // If the thread cannot be started, later requests wait until the queue is dropped, and
            // then go to the successor.
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
        // Hangs up on clients that are not accepted yet, even if a child of `fork` has the listener
        // open.
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

/// Sends a farewell, if the client's buffer has room for it.
fn dismiss(socket: &Socket, why: Rejection) {
    let _ = send(socket, &Message::farewell(why).encode(), None, Deadline::after(Duration::ZERO));
}
