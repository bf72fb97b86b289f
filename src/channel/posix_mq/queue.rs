//! The server of a POSIX message queue: many workers take the requests of many clients' pools.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::process::geteuid;

use crate::channel::RequestQueue;
use crate::channel::lock_file::LockFile;
use crate::channel::poller::Poller;
use crate::error::{Awaited, Error, Result};
use crate::peer::{Lifeline, Link, Peer, Watch, on_hang_up};
use crate::process::Origin;
use crate::protocol::{Sender, ShmTransfer, Starting};
use crate::segment::{
    Geometry, Owner, PoolId, Segment, SegmentId, WriteSlots, attach_named, sweep, sweep_aside,
};
use crate::sync::{Deadline, lock};

use super::Policy;
use super::mqueue::Mqueue;
use super::name::Name;
use super::wire::{MAX_MESSAGE, Message};

/// The token of the message queue in the poller.
const QUEUE: u64 = 0;

/// How many messages that lead to nothing a worker takes before it looks at the time again.
const BATCH: usize = 64;

/// Takes requests at one name. Shared by many workers, by reference or in an `Arc`.
///
/// Dropping it removes the queue and hangs up on every client.
pub struct PosixMqQueue {
    poller: Poller,
    policy: Policy,
    clients: Arc<Clients>,
    /// Fields go in this order: clients learn first, and a successor waits for the lock.
    _lifeline: Lifeline,
    queue: Bound,
    _lock: LockFile,
}

/// The queue, with its name.
struct Bound {
    name: Name,
    descriptor: Mqueue,
    origin: Origin,
}

type Clients = Mutex<HashMap<Owner, Arc<Client>>>;

/// One pool that requests have come from.
struct Client {
    link: Arc<Link>,
    mapped: Mutex<Mapped>,
    _watch: Watch,
}

/// The segments of a pool that are mapped here.
#[derive(Default)]
struct Mapped {
    edition: u64,
    segments: HashMap<u32, MappedSegment>,
    /// Counts uses.
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
        // Whoever signed it before is dead, and its queue and lifeline are ours to remove.
        if !predecessor.is_empty() {
            Mqueue::unlink(&name)?;
            drop(Lifeline::inherit(&name.lifeline())?);
        }
        lock.sign("")?;
        let descriptor = Mqueue::create(&name, policy.capacity, MAX_MESSAGE)?;
        let queue = Bound { name, descriptor, origin: Origin::here() };
        poller.add(&queue.descriptor, QUEUE)?;
        // Last: whoever finds it finds the rest.
        let lifeline = Lifeline::hold(queue.name.lifeline())?;
        sweep();
        Ok(PosixMqQueue { poller, policy, clients: Arc::default(), _lifeline: lifeline, queue, _lock: lock })
    }

    /// The clients whose pools have sent requests and live, each once.
    /// None in a child of `fork`, which serves nobody.
    pub fn clients(&self) -> Vec<Peer> {
        if !self.queue.origin.is_here() {
            return Vec::new();
        }
        let mut peers: Vec<Peer> =
            lock(&self.clients).values().filter_map(|client| client.link.peer()).collect();
        peers.sort_unstable_by_key(|peer| peer.pid);
        peers.dedup();
        peers
    }

    /// Takes what is next in the queue, if there is anything, past a few that nobody waits for.
    fn try_recv(&self) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let mut buffer = [0; MAX_MESSAGE];
        for _ in 0..BATCH {
            let Some(len) = self.queue.descriptor.try_receive(&mut buffer)? else { return Ok(None) };
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

    /// The transfer that a message asks for; `None` if nobody waits for it any more.
    fn begin(&self, message: Message<'_>) -> Result<Option<ShmTransfer<Sender, Starting>>> {
        let id = SegmentId { pool: PoolId(message.pool), index: message.index };
        let geometry = Geometry::new(message.slot_count, message.slot_len)?;
        let owner = Owner { pid: message.pid, pool: id.pool };
        let Some(client) = self.client(owner)? else { return Ok(None) };
        let limit = self.policy.max_segments as usize;
        let segment = match client.segment(owner, id, geometry, message.edition, limit) {
            // Withdrawn, and its segment retired; or its pool is going.
            Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            attached => attached?,
        };
        let transfer = ShmTransfer::begin(segment, message.generation, message.key.into(), &client.link);
        Ok((!client.link.is_severed()).then_some(transfer))
    }

    /// The client with this pool, known or new; `None` if it is gone.
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
                // Forgotten first: who learns of its end finds it gone.
                let gone = clients.upgrade().and_then(|clients| lock(&clients).remove(&owner));
                link.sever(|| None);
                drop(gone); // unmaps, and not under the lock
                sweep_aside(); // its names, if it was killed
            }
        })?;
        let client = Arc::new(Client { link, mapped: Mutex::default(), _watch: watch });
        clients.insert(owner, Arc::clone(&client));
        Ok(Some(client))
    }

    fn report(&self, peer: Option<Peer>, error: &Error) {
        if let Some(report) = &self.policy.on_rejected {
            report(peer, error);
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
        edition: u64,
        limit: usize,
    ) -> Result<Arc<Segment<WriteSlots>>> {
        let mut mapped = lock(&self.mapped);
        let Mapped { edition: known, segments, clock } = &mut *mapped;
        if *known != edition {
            // Some were retired since, which takes their names away.
            segments.retain(|&index, _| owner.has_named(index));
            *known = edition;
        }
        *clock += 1;
        if let Some(found) = segments.get_mut(&id.index()) {
            found.last_used = *clock;
            return Ok(Arc::clone(&found.segment));
        }
        let segment = Arc::new(attach_named(owner, id, geometry)?);
        if segments.len() >= limit
            && let Some(oldest) =
                segments.iter().min_by_key(|(_, used)| used.last_used).map(|(&index, _)| index)
        {
            segments.remove(&oldest);
        }
        segments.insert(id.index(), MappedSegment { segment: Arc::clone(&segment), last_used: *clock });
        Ok(segment)
    }
}

impl RequestQueue for PosixMqQueue {
    fn recv(&self, deadline: Deadline) -> Result<ShmTransfer<Sender, Starting>> {
        loop {
            self.poller.check_open()?;
            if let Some(transfer) = self.try_recv()? {
                return Ok(transfer);
            }
            if self.poller.wait(deadline)?.is_none() {
                return Err(Error::Timeout(Awaited::Request));
            }
            let taken = self.try_recv();
            self.poller.arm(&self.queue.descriptor, QUEUE)?; // for the next worker
            if let Some(transfer) = taken? {
                return Ok(transfer);
            }
            if deadline.has_passed() {
                return Err(Error::Timeout(Awaited::Request));
            }
        }
    }

    fn close(&self) {
        self.poller.close();
    }
}

impl Drop for PosixMqQueue {
    fn drop(&mut self) {
        if !self.queue.origin.is_here() {
            return;
        }
        lock(&self.clients).values().for_each(|client| client.link.sever(|| None));
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            return;
        }
        // Nothing can be done about a failure here, and the next server copes with leftovers.
        let _ = Mqueue::unlink(&self.name);
    }
}

impl fmt::Debug for PosixMqQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PosixMqQueue")
            .field("name", &self.queue.name.as_str())
            .field("clients", &self.clients().len())
            .finish_non_exhaustive()
    }
}

fn of_this_user(pid: u32) -> Peer {
    Peer { pid: Some(pid), uid: geteuid().as_raw() }
}
