//! A client's line to its server: connected when there is something to send, and again to a successor.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::crew;
use crate::error::{Awaited, Error, Misuse, Result};
use crate::peer::{Link, Peer};
use crate::process::Origin;
use crate::segment::{Backing, PoolId};
use crate::sync::{Deadline, Turnstile, lock};

use super::{Request, SendError, pause};

/// How one kind of queue reaches its server.
pub(super) trait Dial {
    type Backing: Backing;
    type Connection: Connection;

    /// Connects; `None` when no server is there now.
    fn dial(&self, deadline: Deadline) -> Result<Option<Self::Connection>>;

    /// Sends one request; [`Error::Disconnected`] when the server is gone, and it was not sent.
    fn deliver(
        &self,
        over: &Self::Connection,
        request: &Request<Self::Backing>,
        deadline: Deadline,
    ) -> Result<()>;
}

/// A way to one server process. It lives as long as the line uses it, or a transfer over it.
pub(super) trait Connection: Send + Sync + 'static {
    fn link(&self) -> &Arc<Link>;
}

/// The line of one pool to one address. Used by many threads.
pub(super) struct Line<D: Dial> {
    dial: D,
    pool: PoolId,
    absence: Absence,
    /// There has been a connection.
    was_connected: AtomicBool,
    current: Mutex<Option<Arc<D::Connection>>>,
    /// Lets one thread at a time connect. The mutex is never held over anything that blocks.
    connecting: Turnstile,
    origin: Origin,
}

/// How long a client waits for a server that is not there, within its deadline; as long as that if
/// neither is told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Absence {
    /// At any time.
    pub(super) always: Option<Duration>,
    /// Once a server has been there, and is gone.
    pub(super) after_loss: Option<Duration>,
}

impl<D: Dial> Line<D> {
    pub(super) fn new(dial: D, pool: PoolId, absence: Absence) -> Line<D> {
        Line {
            dial,
            pool,
            absence,
            was_connected: AtomicBool::new(false),
            current: Mutex::new(None),
            connecting: Turnstile::new(1),
            origin: Origin::here(),
        }
    }

    /// The server, if there is a connection to it, and it is this process's.
    pub(super) fn server(&self) -> Option<Peer> {
        self.origin.check().ok()?;
        self.living().and_then(|connection| connection.link().peer())
    }

    /// Waits until there is a connection.
    pub(super) fn connect(&self, deadline: Deadline) -> Result<()> {
        self.connected(deadline, Absence::default()).map(drop)
    }

    /// Connects first where there is no connection. A request that could not be sent to a server that
    /// died goes to its successor.
    pub(super) fn send(
        &self,
        request: Request<D::Backing>,
        deadline: Deadline,
    ) -> Result<(), SendError<D::Backing>> {
        if let Err(forked) = self.origin.check().and(request.check_origin()) {
            return Err(SendError { request, error: forked.into() });
        }
        if request.segment().pool() != self.pool {
            return Err(SendError { request, error: Misuse::ForeignPool.into() });
        }
        if request.offer.is_over() {
            return Err(SendError { request, error: Error::Stale });
        }
        for attempt in 0.. {
            let sent = self.connected(deadline, self.absence).and_then(|connection| {
                self.dial.deliver(&connection, &request, deadline).map(|()| connection)
            });
            match sent {
                Ok(connection) => {
                    let link = Arc::clone(connection.link());
                    request.sent_over(&link, Some(connection));
                    return Ok(());
                }
                Err(Error::Disconnected) if !deadline.has_passed() => {
                    if attempt > 0 {
                        crew::lend(|| pause(attempt, deadline));
                    }
                }
                Err(error) => return Err(SendError { request, error }),
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// The connection to a server that takes requests.
    fn living(&self) -> Option<Arc<D::Connection>> {
        let is_usable = |link: &Link| !link.is_severed() && !link.is_leaving();
        lock(&self.current).clone().filter(|connection| is_usable(connection.link()))
    }

    /// Whether the server has said that it ends, and still lives: its successor may come only when
    /// it is gone.
    fn is_being_replaced(&self) -> bool {
        let current = lock(&self.current).clone();
        current.is_some_and(|connection| connection.link().is_leaving() && !connection.link().is_severed())
    }

    /// The living connection, or a new one as soon as the server is there: waits for a server that is
    /// not there as long as told, and until the deadline for one that is.
    ///
    /// A server that is not there cannot tell when it comes: we look again after a pause, which
    /// grows from one millisecond to 100.
    fn connected(&self, deadline: Deadline, absence: Absence) -> Result<Arc<D::Connection>> {
        let after_loss = absence.after_loss.filter(|_| self.was_connected.load(Relaxed));
        let patience = [absence.always, after_loss].into_iter().flatten().min();
        let limit = || patience.map_or(deadline, |patience| deadline.min(Deadline::after(patience)));
        let mut absent = limit();
        for attempt in 0.. {
            if let Some(connection) = self.living() {
                return Ok(connection);
            }
            let tried = crew::lend(|| self.connecting.within(deadline, || self.dial(deadline)));
            if let Some(connection) = tried.transpose()?.flatten() {
                return Ok(connection);
            }
            if self.is_being_replaced() {
                absent = limit();
            }
            if absent.has_passed() || deadline.has_passed() {
                return Err(Error::Timeout(Awaited::Server));
            }
            crew::lend(|| pause(attempt, deadline.min(absent)));
        }
        unreachable!("the loop has no end of its own")
    }

    /// Connects, unless somebody else just did; `None` when no server is there now.
    fn dial(&self, deadline: Deadline) -> Result<Option<Arc<D::Connection>>> {
        if let Some(connection) = self.living() {
            return Ok(Some(connection));
        }
        let opened = self.dial.dial(deadline)?.map(Arc::new);
        if let Some(connection) = &opened {
            self.was_connected.store(true, Relaxed);
            let before = lock(&self.current).replace(Arc::clone(connection));
            drop(before); // not under the lock: it hangs up, unless a transfer needs it
        }
        Ok(opened)
    }
}
