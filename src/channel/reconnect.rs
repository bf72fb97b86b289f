//! A client's connection to its server: made at the first request, and again to a successor.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::{Awaited, Error, Misuse, Result};
use crate::loan::Borrower;
use crate::peer::{Link, Peer};
use crate::process::Origin;
use crate::segment::{Backing, PoolId};
use crate::sync::{Deadline, FairSemaphore, lock};
use crate::workers;

use super::{Request, SendError, pause};

/// How one kind of queue reaches its server.
pub(super) trait Connect {
    type Backing: Backing;
    type Connection: Connection;

    /// Connects; `None` when no server is there now.
    fn connect(&self, deadline: Deadline) -> Result<Option<Self::Connection>>;

    /// Told of each new connection, once it is made.
    fn connected(&self, _: &Arc<Self::Connection>) -> Result<()> {
        Ok(())
    }

    /// Sends one request; [`Error::Disconnected`] when the server is gone, and it was not sent.
    fn deliver(
        &self,
        over: &Self::Connection,
        request: &Request<Self::Backing>,
        deadline: Deadline,
    ) -> Result<()>;
}

/// A connection to one server process. It stays open while [`Reconnecting`] or a transfer uses it.
pub(super) trait Connection: Borrower + 'static {
    fn link(&self) -> &Arc<Link>;
}

/// Connects one pool to one address, and reconnects when the server is replaced. Used by many
/// threads.
pub(super) struct Reconnecting<C: Connect> {
    connector: C,
    pool: PoolId,
    connect_timeout: ConnectTimeout,
    /// True once there has been a connection.
    was_connected: AtomicBool,
    current: Mutex<Option<Arc<C::Connection>>>,
    /// Lets one thread at a time connect. The mutex is never held over a blocking call.
    connecting: FairSemaphore,
    origin: Origin,
}

/// How long a client waits for an absent server, within its deadline; until the deadline if neither
/// is set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectTimeout {
    /// At any time, before and after a first connection.
    pub(super) always: Option<Duration>,
    /// After the loss of a server.
    pub(super) after_loss: Option<Duration>,
}

impl<C: Connect> Reconnecting<C> {
    pub(super) fn new(
        connector: C,
        pool: PoolId,
        connect_timeout: ConnectTimeout,
    ) -> Reconnecting<C> {
        Reconnecting {
            connector,
            pool,
            connect_timeout,
            was_connected: AtomicBool::new(false),
            current: Mutex::new(None),
            connecting: FairSemaphore::new(1),
            origin: Origin::here(),
        }
    }

    pub(super) fn connector(&self) -> &C {
        &self.connector
    }

    /// Fails in a child of `fork`.
    pub(super) fn check_origin(&self) -> Result<()> {
        Ok(self.origin.check()?)
    }

    /// The server, if there is a connection to it. `None` in a child of `fork`.
    pub(super) fn server(&self) -> Option<Peer> {
        self.origin.check().ok()?;
        self.living().and_then(|connection| connection.link().peer())
    }

    /// Waits until there is a connection.
    pub(super) fn connect(&self, deadline: Deadline) -> Result<()> {
        self.connected(deadline, ConnectTimeout::default()).map(drop)
    }

    /// Connects first if there is no connection. A request that could not be sent to a server that
    /// died goes to its successor.
    pub(super) fn send(
        &self,
        request: Request<C::Backing>,
        deadline: Deadline,
    ) -> Result<(), SendError<C::Backing>> {
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
            let sent = self.connected(deadline, self.connect_timeout).and_then(|connection| {
                request.goes_over(Arc::clone(&connection) as _);
                self.connector.deliver(&connection, &request, deadline).map(|()| connection)
            });
            match sent {
                Ok(connection) => {
                    request.sent_over(connection.link());
                    return Ok(());
                }
                Err(Error::Disconnected) if !deadline.has_passed() => {
                    if attempt > 0 {
                        workers::blocking(|| pause(attempt, deadline));
                    }
                }
                Err(error) => return Err(SendError { request, error }),
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// The connection, if its server still takes requests.
    fn living(&self) -> Option<Arc<C::Connection>> {
        let is_usable = |link: &Link| !link.is_severed() && !link.is_leaving();
        lock(&self.current).clone().filter(|connection| is_usable(connection.link()))
    }

    /// Whether the server has said that it is leaving, and is still alive: its successor may start
    /// only after it is gone.
    fn is_being_replaced(&self) -> bool {
        let current = lock(&self.current).clone();
        current.is_some_and(|connection| {
            connection.link().is_leaving() && !connection.link().is_severed()
        })
    }

    /// The living connection, or a new one as soon as the server is there. Waits for an absent
    /// server for `connect_timeout`, and for a present one until the deadline.
    ///
    /// The start of a server is not announced: this tries again after a pause, which grows from one
    /// millisecond to 100.
    fn connected(
        &self,
        deadline: Deadline,
        connect_timeout: ConnectTimeout,
    ) -> Result<Arc<C::Connection>> {
        let timeout = self.shorter(connect_timeout);
        let limit = || timeout.map_or(deadline, |timeout| deadline.min(Deadline::after(timeout)));
        let mut absent = limit();
        for attempt in 0.. {
            if let Some(connection) = self.living() {
                return Ok(connection);
            }
            let tried = workers::blocking(|| {
                self.connecting.within(deadline, || self.try_connect(deadline))
            });
            if let Some(connection) = tried.transpose()?.flatten() {
                return Ok(connection);
            }
            if self.is_being_replaced() {
                absent = limit();
            }
            if absent.has_passed() || deadline.has_passed() {
                return Err(Error::Timeout(Awaited::Server));
            }
            workers::blocking(|| pause(attempt, deadline.min(absent)));
        }
        unreachable!("the loop has no end of its own")
    }

    /// How long a server that is not there is waited for from now on.
    fn shorter(&self, timeout: ConnectTimeout) -> Option<Duration> {
        let after_loss = timeout.after_loss.filter(|_| self.was_connected.load(Relaxed));
        [timeout.always, after_loss].into_iter().flatten().min()
    }

    /// As [`patience`](super::Requester::patience): while a server is being replaced, its successor
    /// is waited for.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.shorter(self.connect_timeout).filter(|_| !self.is_being_replaced())
    }

    /// Connects, unless another thread just did; `None` when no server is there now.
    fn try_connect(&self, deadline: Deadline) -> Result<Option<Arc<C::Connection>>> {
        if let Some(connection) = self.living() {
            return Ok(Some(connection));
        }
        let opened = self.connector.connect(deadline)?.map(Arc::new);
        if let Some(connection) = &opened {
            self.connector.connected(connection)?;
            self.was_connected.store(true, Relaxed);
            let before = lock(&self.current).replace(Arc::clone(connection));
            drop(before); // not under the lock: this may close the connection
        }
        Ok(opened)
    }
}
