//! Asks for bytes, from a task.

use std::fmt;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::task::{AbortHandle, yield_now};
use tokio::time::{Instant, sleep};

use crate::address::Address;
use crate::channel::{Asked, InProcess, Requester, SendError, SeqpacketRequester, Step as Settled};
use crate::channel::{Request, pause_before};
use crate::client::ClientBuilder;
use crate::error::{Awaited, Error, Misuse, Result};
use crate::protocol::{Awaiting, Offered, Receiver, Reply, ShmTransfer};
use crate::segment::{Lease, Memfd, PoolStats, SegmentPool};
use crate::sync::Deadline;

use super::body::Body;
use super::descriptor::readable;
use super::wait::{Step, Wait, after};

/// The pause before the next attempt to send, while the connection is full.
const PAUSE: Duration = Duration::from_millis(1);

/// Asks one server for bytes by key, from any number of tasks at once: [`crate::Client`], without a
/// thread that waits.
///
/// Cheap to clone; all clones share the segments, and one task that attends to the connection. That
/// task runs on the runtime in which the client was made, and ends with the last clone and body.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// # let address = &format!("unix:{}/cache.sock", dir.path().display());
/// # let server = shmferry::Server::bind(address).unwrap();
/// # let server = server.serve(2, |request| request.send_bytes(b"hello")).unwrap();
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
/// # runtime.block_on(async {
/// use shmferry::tokio::Client;
///
/// # /*
/// let address = "unix:/run/me/cache.sock";
/// # */
/// let cache = Client::connect(address)?;
/// let body = cache.get("/a.jpg").await?;
/// let bytes: bytes::Bytes = body.into_bytes().await?; // without a copy, if they were lent
/// # assert_eq!(bytes, "hello");
/// # Ok::<(), shmferry::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct Client {
    route: Arc<Route>,
    timeout: Duration,
    lease_timeout: Duration,
}

/// The pool, the way to the server, and the task that attends to it.
pub(super) struct Route {
    pool: SegmentPool<Memfd>,
    line: Line,
    attendant: Option<AbortHandle>,
}

enum Line {
    Socket(Box<SeqpacketRequester>),
    Within(InProcess),
}

impl Client {
    /// A client of the server at an address, `unix:PATH`, with 8 segments of 2 MiB.
    ///
    /// Does not wait for the server: [`get`](Self::get) does.
    ///
    /// # Errors
    /// Those of [`crate::Client::connect`]; and [`Error::Misuse`] for a message queue, over which
    /// tasks cannot wait.
    ///
    /// # Panics
    /// Outside of a tokio runtime with its I/O and time enabled.
    pub fn connect<A>(address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        crate::Client::builder().connect_tokio(address)
    }

    /// Asks for the bytes behind a key (at most [`KEY_LIMIT`](crate::channel::KEY_LIMIT) bytes);
    /// waits for a segment, for the server if it is not there, and for its answer, each up to the
    /// timeout.
    ///
    /// # Errors
    /// Those of [`crate::Client::get`].
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Body> {
        let lease = self.lease(after(self.lease_timeout)).await?;
        self.ask(lease, key.as_ref()).await
    }

    /// How the segments are doing at this moment.
    pub fn stats(&self) -> PoolStats {
        self.route.pool.stats()
    }

    async fn lease(&self, end: Option<Instant>) -> Result<Lease<Memfd>> {
        let mut leasing = self.route.pool.lease_soon();
        let mut timer = Wait::default();
        let mut grace = None;
        let granted = poll_fn(|context| {
            loop {
                if let Poll::Ready(taken) = leasing.poll_patiently(context.waker()) {
                    return Poll::Ready(Some(taken));
                }
                // Our turn, but late senders have the only segments left.
                let retry = leasing.grace().map(|most| {
                    let over = *grace.get_or_insert_with(|| Instant::now() + most);
                    over.min(Instant::now() + PAUSE)
                });
                if grace.is_some_and(|over| over <= Instant::now()) {
                    return Poll::Ready(None);
                }
                let Some(until) = retry.or(end) else { return Poll::Pending };
                std::task::ready!(timer.poll_timer(context, until));
                if retry.is_none() && end.is_some_and(|end| end <= Instant::now()) {
                    return Poll::Ready(Some(Err(Error::Timeout(Awaited::Lease))));
                }
            }
        });
        match granted.await {
            Some(taken) => taken,
            None => leasing.await, // replaces one
        }
    }

    async fn ask(&self, lease: Lease<Memfd>, key: &[u8]) -> Result<Body> {
        let end = after(self.timeout);
        let is_late = || end.is_some_and(|end| end <= Instant::now());
        let (mut lease, mut takes_loans) = (lease, true);
        for attempt in 0.. {
            let (request, mut asked) = Asked::request(lease, key, takes_loans)?;
            self.send(request, end).await?;
            let answer = match self.answer(&mut asked.transfer, end).await {
                // The permit is there, so that this does not wait.
                Ok(()) => asked.transfer.read_reply(Deadline::NEVER),
                Err(error) => Err(error),
            };
            match asked.settle(answer, false, is_late)? {
                Settled::Settled(Reply::Refused(why)) => return Err(Error::Refused(why)),
                Settled::Settled(reply) => {
                    return Ok(Body::new(reply, self.timeout, Arc::clone(&self.route)));
                }
                Settled::WithoutLoans(again) => (lease, takes_loans) = (again, false),
                Settled::OfSuccessor(again) => {
                    lease = again;
                    if attempt > 0 {
                        sleep(pause_before(attempt)).await;
                    }
                }
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// Sends a request; waits for an absent server as long as a thread would.
    async fn send(&self, request: Request<Memfd>, end: Option<Instant>) -> Result<()> {
        let mut request = request;
        let mut absent_since = None;
        for attempt in 0.. {
            let failed = match self.route.send(request) {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            };
            request = failed.request;
            let limit = match failed.error {
                Error::Timeout(Awaited::Server) => {
                    let since = *absent_since.get_or_insert_with(Instant::now);
                    let patience = self.route.patience();
                    [end, patience.and_then(|most| since.checked_add(most))]
                        .into_iter()
                        .flatten()
                        .min()
                }
                Error::Timeout(_) | Error::Disconnected => end,
                error => return Err(error),
            };
            if limit.is_some_and(|limit| limit <= Instant::now()) {
                return Err(failed.error);
            }
            let pause = match failed.error {
                Error::Timeout(Awaited::QueueRoom) => PAUSE,
                _ => pause_before(attempt),
            };
            let pause = Instant::now() + pause;
            tokio::time::sleep_until(limit.map_or(pause, |limit| limit.min(pause))).await;
        }
        unreachable!("the loop has no end of its own")
    }

    async fn answer(
        &self,
        transfer: &mut ShmTransfer<Receiver, Offered>,
        end: Option<Instant>,
    ) -> Result<()> {
        let (mut wait, mut step) = (Wait::default(), Answer(transfer));
        let answered = poll_fn(|context| wait.poll(context, end, &mut step)).await;
        answered.unwrap_or(Err(Error::Timeout(Awaited::Reply)))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("tokio::Client").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl ClientBuilder {
    /// As [`connect`](Self::connect), for tasks of the tokio runtime that this is called in.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect); and [`Error::Misuse`] for a message queue, over which
    /// tasks cannot wait.
    ///
    /// # Panics
    /// Outside of a tokio runtime with its I/O and time enabled.
    pub fn connect_tokio<A>(self, address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let Address::Unix(path) = address.try_into()? else {
            return Err(Misuse::NoTasksOverQueues.into());
        };
        let (pool, requester) = self.socket(path)?;
        let descriptor = readable(&requester).map_err(Error::os("epoll_ctl"))?;
        let line = Line::Socket(Box::new(requester));
        let route = Arc::new_cyclic(|route| {
            let attendant = tokio::spawn(attend(Weak::clone(route), descriptor)).abort_handle();
            Route { pool, line, attendant: Some(attendant) }
        });
        Ok(self.through(route))
    }

    /// As [`in_process`](Self::in_process), for tasks.
    ///
    /// # Errors
    /// Those of [`in_process`](Self::in_process).
    pub fn in_process_tokio(self, queue: &InProcess) -> Result<Client> {
        let pool = self.pool::<Memfd>()?;
        let line = Line::Within(queue.clone());
        Ok(self.through(Arc::new(Route { pool, line, attendant: None })))
    }

    fn through(self, route: Arc<Route>) -> Client {
        let (timeout, lease_timeout) = self.timeouts();
        Client { route, timeout, lease_timeout }
    }
}

/// Attends to the connections of a client, as long as there is one.
async fn attend(route: Weak<Route>, descriptor: AsyncFd<OwnedFd>) {
    loop {
        // Before attending: what comes meanwhile makes it readable again.
        match descriptor.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return, // the runtime ends
        }
        loop {
            let Some(route) = route.upgrade() else { return };
            let Line::Socket(requester) = &route.line else { return };
            // Fails in a child of `fork`, and where the system is at its end: then timeouts do.
            if requester.attend().unwrap_or(true) {
                break;
            }
            drop(route);
            yield_now().await;
        }
    }
}

impl Route {
    /// Sends a request, or hands it back if that would wait.
    fn send(&self, request: Request<Memfd>) -> Result<(), Box<SendError<Memfd>>> {
        let now = Deadline::after(Duration::ZERO);
        let sent = match &self.line {
            Line::Socket(requester) => requester.send(request, now),
            Line::Within(queue) => queue.send(request, now),
        };
        sent.map_err(Box::new)
    }

    fn patience(&self) -> Option<Duration> {
        match &self.line {
            Line::Socket(requester) => requester.patience(),
            Line::Within(_) => None,
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.attendant.iter().for_each(AbortHandle::abort);
    }
}

/// Waits for the answer.
struct Answer<'t>(&'t mut ShmTransfer<Receiver, Offered>);

impl Step for Answer<'_> {
    type Output = Result<()>;

    fn attempt(&mut self, task: Option<&Waker>) -> Poll<Result<()>> {
        self.0.poll_reply(task)
    }

    fn side(&mut self) -> &mut dyn Awaiting {
        self.0.side()
    }
}
