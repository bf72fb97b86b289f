//! The connections of one client, as one descriptor to wait on.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sync::{Deadline, lock};

/// How many connections are taken from the epoll at once.
const AT_ONCE: usize = 8;

/// An epoll of connections, which it does not keep open. Each is reported once for all that has
/// come by then: one that was hung up on stays readable for ever.
pub(super) struct Lines<C> {
    epoll: OwnedFd,
    connections: Mutex<Connections<C>>,
}

struct Connections<C> {
    next: u64,
    open: BTreeMap<u64, Weak<C>>,
    /// Those that more may have come on than was read.
    unread: BTreeSet<u64>,
}

impl<C> Lines<C> {
    pub(super) fn new() -> Result<Lines<C>> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::os("epoll_create1"))?;
        let connections =
            Mutex::new(Connections { next: 0, open: BTreeMap::new(), unread: BTreeSet::new() });
        Ok(Lines { epoll, connections })
    }

    /// Adds a connection. Its socket leaves the epoll when it is closed.
    pub(super) fn add(&self, socket: impl AsFd, connection: &Arc<C>) -> Result<()> {
        let mut connections = lock(&self.connections);
        connections.open.retain(|_, connection| connection.strong_count() > 0);
        let number = connections.next;
        connections.next += 1;
        connections.open.insert(number, Arc::downgrade(connection));
        epoll::add(&self.epoll, socket, epoll::EventData::new_u64(number), ONCE)
            .map_err(Error::os("epoll_ctl"))
    }

    /// Has `attend` read from each connection that has something; it says whether it has read all.
    /// `false` if there may be more.
    pub(super) fn attend(&self, attend: impl Fn(&C) -> bool) -> Result<bool> {
        let mut events = [MaybeUninit::uninit(); AT_ONCE];
        let now = Deadline::after(Duration::ZERO).timespec();
        let events = match epoll::wait(&self.epoll, &mut events, now.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(false),
            Err(errno) => return Err(Error::os("epoll_wait")(errno)),
        };
        // The epoll does not report again what was not read to its end.
        let mut numbers = mem::take(&mut lock(&self.connections).unread);
        numbers.extend(events.iter().map(|event| event.data.u64()));
        let mut is_all = events.len() < AT_ONCE;
        for number in numbers {
            let connection = lock(&self.connections).open.get(&number).cloned();
            let connection = connection.and_then(|connection| connection.upgrade());
            if connection.is_some_and(|connection| !attend(&connection)) {
                lock(&self.connections).unread.insert(number);
                is_all = false;
            }
        }
        Ok(is_all)
    }
}

impl<C> AsFd for Lines<C> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

const ONCE: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ET);

#[cfg(all(test, not(loom)))]
mod tests;
