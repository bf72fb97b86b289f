//! A client's line to its server: connected when there is something to send, and again to a successor.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::crew;
use crate::error::{Awaited, Error, Misuse, Result};
use crate::peer::{Link, Peer};
use crate::process::Origin;
use crate::segment::{Backing, PoolId};
use crate::sync::{Deadline, Turnstile, lock};

use super::{Request, SendError};

/// The longest pause between two looks whether the server is there.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

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

/// A way to one server process.
pub(super) trait Connection {
    fn link(&self) -> &Arc<Link>;
}

/// The line of one pool to one address. Used by many threads.
pub(super) struct Line<D: Dial> {
    dial: D,
    pool: PoolId,
    /// How long to wait for a server that is not there; as long as the deadline if `None`.
    absence: Option<Duration>,
    current: Mutex<Option<Arc<D::Connection>>>,
    /// Lets one thread at a time connect. The mutex is never held over anything that blocks.
    connecting: Turnstile,
    origin: Origin,
}

impl<D: Dial> Line<D> {
    pub(super) fn new(dial: D, pool: PoolId, absence: Option<Duration>) -> Line<D> {
        let (current, connecting) = (Mutex::new(None), Turnstile::new(1));
        Line { dial, pool, absence, current, connecting, origin: Origin::here() }
    }

    /// The server, if there is a connection to it, and it is this process's.
    pub(super) fn server(&self) -> Option<Peer> {
        self.origin.check().ok()?;
        self.living().and_then(|connection| connection.link().peer())
    }

    /// Waits until there is a connection.
    pub(super) fn connect(&self, deadline: Deadline) -> Result<()> {
        self.connected(deadline, deadline).map(drop)
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
        let absence = self.absence.map_or(deadline, |patience| deadline.min(Deadline::after(patience)));
        for attempt in 0.. {
            let sent = self.connected(deadline, absence).and_then(|connection| {
                self.dial.deliver(&connection, &request, deadline).map(|()| connection)
            });
            match sent {
                Ok(connection) => {
                    request.sent_over(connection.link());
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

    fn living(&self) -> Option<Arc<D::Connection>> {
        lock(&self.current).clone().filter(|connection| !connection.link().is_severed())
    }

    /// The living connection, or a new one as soon as the server is there: waits until `absence` for
    /// a server that is not there, and until the deadline for one that is.
    ///
    /// A server that is not there cannot tell when it comes: we look again after a pause, which
    /// grows from one millisecond to 100.
    fn connected(&self, deadline: Deadline, absence: Deadline) -> Result<Arc<D::Connection>> {
        for attempt in 0.. {
            if let Some(connection) = self.living() {
                return Ok(connection);
            }
            let tried = crew::lend(|| self.connecting.within(deadline, || self.dial(deadline)));
            if let Some(connection) = tried.transpose()?.flatten() {
                return Ok(connection);
            }
            if absence.has_passed() {
                return Err(Error::Timeout(Awaited::Server));
            }
            crew::lend(|| pause(attempt, absence));
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
            *lock(&self.current) = Some(Arc::clone(connection));
        }
        Ok(opened)
    }
}

/// Sleeps for a while that grows with the attempts.
pub(super) fn pause(attempt: u32, deadline: Deadline) {
    let pause = Duration::from_millis(1 << attempt.min(7)).min(LONGEST_PAUSE);
    thread::sleep(deadline.remaining().map_or(pause, |left| left.min(pause)));
}
