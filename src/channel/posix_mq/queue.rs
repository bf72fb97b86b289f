//! The server of a POSIX message queue: many workers take requests of many clients' pools.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::geteuid;

use crate::channel::RequestQueue;
use crate::channel::leaving::Leaving;
use crate::channel::lock_file::LockFile;
use crate::channel::poller::Poller;
use crate::error::{Awaited, Error, Result};
use crate::peer::{Link, Peer, Watch, on_hang_up};
use crate::process::Origin;
use crate::protocol::{Loans, Refusal, Sender, ShmTransfer, Starting};
use crate::segment::{Geometry, PoolId, Segment, SegmentId, WriteSlots};
use crate::sync::{Deadline, lock};

use super::builder::Policy;
use super::lifeline::Lifeline;
use super::mqueue::Mqueue;
use super::name::Name;
use super::named::{Owner, attach, sweep, sweep_aside};
use super::wire::{MAX_MESSAGE, Message};

/// The token of the message queue in the poller.
const QUEUE: u64 = 0;

/// How many unusable messages a worker takes before it checks its deadline again.
const BATCH: usize = 64;

/// How often the queue is read after `close`: by default it is full with 10 requests.
const LOOK_WHILE_LEAVING: Duration = Duration::from_millis(5);

/// Takes requests at one name. Shared by many workers, by reference or in an `Arc`.
///
/// Dropping it removes the queue and hangs up on every client.
pub struct PosixMqQueue {
    shared: Arc<Shared>,
    name: Name,
    /// The lock on the name. Dropped by `close`, for a successor.
    lock: Mutex<Option<LockFile>>,
    /// The thread that answers clients after `close`.
    leaving: Mutex<Option<Leaving>>,
    /// Last: its drop tells clients of this server's end.
    lifeline: Lifeline,
}

/// Shared by the workers, and by the thread that answers clients after `close`.
struct Shared {
    poller: Poller,
    policy: Policy,
    clients: Arc<Clients>,
    descriptor: Mqueue,
    origin: Origin,
}

type Clients = Mutex<HashMap<Owner, Arc<Client>>>;

/// A client's pool that requests have come from.
struct Client {
    link: Arc<Link>,
    mapped: Mutex<Mapped>,
    _watch: Watch,
}

/// The segments of a pool that are mapped in this process.
#[derive(Default)]
struct Mapped {
    version: u64,
    segments: HashMap<u32, MappedSegment>,
    /// Counts uses, to find the least recently used segment.
    clock: u64,
}

struct MappedSegment {
    segment: Arc<Segment<WriteSlots>>,
    last_used: u64,
}

impl PosixMqQueue {
    pub(super) fn bind(name: Name, policy: Policy) -> Result<PosixMqQueue> {
        let poller = Poller::new()?;
        let (mut lock, predecessor) = LockFile::take(&name.lock(), &name)?;
        // The predecessor that signed it is dead; its queue and lifeline are ours to remove.
        if !predecessor.is_empty() {
            Mqueue::unlink(&name)?;
            drop(Lifeline::inherit(&name.lifeline())?);
        }
        lock.sign()?;
        let descriptor = Mqueue::create(&name, policy.capacity, MAX_MESSAGE)?;
        // Removes the queue's name if what follows fails.
        let unlinked_on_failure = Unlink(&name);
        poller.add(&descriptor, QUEUE)?;
        // Last: a client that finds the lifeline finds the rest.
        let lifeline = Lifeline::hold(name.lifeline())?;
        std::mem::forget(unlinked_on_failure);
        sweep();
        Ok(PosixMqQueue {
            shared: Arc::new(Shared {
                poller,
                policy,
                clients: Arc::default(),
                descriptor,
                origin: Origin::here(),
            }),
            name,
            lock: Mutex::new(Some(lock)),
            leaving: Mutex::new(None),
            lifeline,
        })
    }

    /// The living clients that have sent requests, each once. None in a child of `fork`, which has
    /// no clients.
    pub fn clients(&self) -> Vec<Peer> {
        if !self.shared.origin.is_here() {
            return Vec::new();
        }
        let clients = lock(&self.shared.clients);
        let mut peers: Vec<Peer> =
            clients.values().filter_map(|client| client.link.peer()).collect();
        drop(clients);
        peers.sort_unstable_by_key(|peer| peer.pid);
        peers.dedup();
        peers
    }

    /// Removes the names, only once: later they may be a successor's.
    fn leave_names(&self) {
        let mut held = lock(&self.lock);
        if held.is_some() {
            self.lifeline.remove_name();
            drop(Unlink(&self.name));
            *held = None; // last: a successor waits for it
        }
    }
}

/// Removes a queue's name when dropped.
struct Unlink<'n>(&'n Name);

impl Drop for Unlink<'_> {
    fn drop(&mut self) {
        // A failure is ignored: the next server removes leftovers.
        let _ = Mqueue::unlink(self.0);
    }
}

impl Shared {
    /// Starts the thread that answers clients after `close`.
    fn start_leaving(self: &Arc<Self>) -> Result<Leaving> {
        let shared = Arc::clone(self);
        Leaving::start(move || {
            for _ in 0..BATCH {
                // On an error of the system, the rest is taken in the next round.
                let Ok(Some(transfer)) = shared.try_recv() else { break };
                // Fails if the client has withdrawn it.
                let _ = transfer.refuse(Refusal::Leaving);
            }
            LOOK_WHILE_LEAVING
        })
    }

    /// Takes the next request in the queue, if there is one; skips a few that are withdrawn.
    fn try_recv(&self) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let mut buffer = [0; MAX_MESSAGE];
        for _ in 0..BATCH {
            let Some(len) = self.descriptor.try_receive(&mut buffer)? else { return Ok(None) };
            let message = match Message::decode(&buffer[..len]) {
                Ok(message) => message,
                Err(error) => {
                    self.report(None, &error);
                    continue;
                }
            };
            match self.begin(message) {
                Ok(Some(transfer)) => return Ok(Some(transfer)),
                Ok(None) => {}
                Err(error) => self.report(Some(of_this_user(message.pid)), &error),
            }
        }
        Ok(None)
    }

    /// The transfer for a message; `None` if the request was withdrawn.
    fn begin(&self, message: Message<'_>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let id = SegmentId { pool: PoolId(message.pool), index: message.index };
        let geometry = Geometry::new(message.slot_count, message.slot_len)?;
        let owner = Owner { pid: message.pid, pool: id.pool };
        let Some(client) = self.client(owner)? else { return Ok(None) };
        let limit = self.policy.max_segments as usize;
        let segment = match client.segment(owner, id, geometry, message.version, limit) {
            // The request was withdrawn and its segment retired, or its pool is being dropped.
            Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            attached => attached?,
        };
        let transfer = ShmTransfer::begin(
            segment,
            message.generation,
            message.key.into(),
            &client.link,
            Loans::None,
        );
        Ok((!client.link.is_severed()).then_some(transfer))
    }

    /// The client with this pool, known or new; `None` if its process is gone.
    fn client(&self, owner: Owner) -> Result<Option<Arc<Client>>> {
        let mut clients = lock(&self.clients);
        if let Some(client) = clients.get(&owner) {
            return Ok(Some(Arc::clone(client)));
        }
        let Some(lifeline) = Lifeline::follow(&owner.lifeline())? else { return Ok(None) };
        let link = Arc::new(Link::to_receiver(of_this_user(owner.pid)));
        let watch = on_hang_up(Arc::new(lifeline), {
            let (link, clients) = (Arc::clone(&link), Arc::downgrade(&self.clients));
            move || {
                // Removed first, so that a thread that learns of the end does not find it any more.
                let gone = clients.upgrade().and_then(|clients| lock(&clients).remove(&owner));
                link.sever(|| None);
                drop(gone); // unmaps; not under the lock
                sweep_aside(); // its names, if it was killed
            }
        })?;
        let client = Arc::new(Client { link, mapped: Mutex::default(), _watch: watch });
        clients.insert(owner, Arc::clone(&client));
        Ok(Some(client))
    }

    fn report(&self, peer: Option<Peer>, error: &Error) {
        if let Some(report) = &self.policy.on_rejected {
            // The application's code: a panic in it, told by the panic hook, ends no worker.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| report(peer, error)));
        }
    }
}

impl Client {
    /// A segment of the pool, mapped now if it is not yet.
    fn segment(
        &self,
        owner: Owner,
        id: SegmentId,
        geometry: Geometry,
        version: u64,
        limit: usize,
    ) -> Result<Arc<Segment<WriteSlots>>> {
        let mut mapped = lock(&self.mapped);
        let Mapped { version: known, segments, clock } = &mut *mapped;
        if *known != version {
            // Unmaps retired segments: they have no names any more.
            segments.retain(|&index, _| owner.has_named(index));
            *known = version;
        }
        *clock += 1;
        if let Some(found) = segments.get_mut(&id.index()) {
            found.last_used = *clock;
            return Ok(Arc::clone(&found.segment));
        }
        let segment = Arc::new(attach(owner, id, geometry)?);
        if segments.len() >= limit
            && let Some(oldest) =
                segments.iter().min_by_key(|(_, used)| used.last_used).map(|(&index, _)| index)
        {
            segments.remove(&oldest);
        }
        segments
            .insert(id.index(), MappedSegment { segment: Arc::clone(&segment), last_used: *clock });
        Ok(segment)
    }
}

impl RequestQueue for PosixMqQueue {
    fn recv(&self, deadline: Deadline) -> Result<ShmTransfer<Sender, Starting>> {
        let shared = &*self.shared;
        loop {
            shared.poller.check_open()?;
            if let Some(transfer) = shared.try_recv()? {
                return Ok(transfer);
            }
            if shared.poller.wait(deadline)?.is_none() {
                return Err(Error::Timeout(Awaited::Request));
            }
            let taken = shared.try_recv();
            let armed = shared.poller.arm(&shared.descriptor, QUEUE); // for the next worker
            if let Some(transfer) = taken? {
                return Ok(transfer);
            }
            armed?;
            if deadline.has_passed() {
                return Err(Error::Timeout(Awaited::Request));
            }
        }
    }

    fn close(&self) {
        if !self.shared.origin.is_here() {
            return;
        }
        // First: from here on a successor can take the name.
        self.leave_names();
        self.shared.poller.close();
        let mut leaving = lock(&self.leaving);
        if leaving.is_none() {
            // If the thread cannot be started, later requests wait until the queue is dropped, and
            // then go to the successor.
            *leaving = self.shared.start_leaving().ok();
        }
    }
}

impl Drop for PosixMqQueue {
    fn drop(&mut self) {
        if !self.shared.origin.is_here() {
            return;
        }
        drop(lock(&self.leaving).take()); // waits for its thread
        self.leave_names();
        lock(&self.shared.clients).values().for_each(|client| client.link.sever(|| None));
    }
}

impl fmt::Debug for PosixMqQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PosixMqQueue")
            .field("name", &self.name.as_str())
            .field("clients", &self.clients().len())
            .finish_non_exhaustive()
    }
}

fn of_this_user(pid: u32) -> Peer {
    Peer { pid: Some(pid), uid: geteuid().as_raw() }
}
