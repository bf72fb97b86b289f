//! Serves each request with a task.

use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, pending, poll_fn};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::coop::consume_budget;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep, timeout};

use crate::address::Address;
use crate::channel::{InProcess, RequestQueue, SeqpacketQueue};
use crate::error::{Error, Misuse, Result};
use crate::protocol::{DEFAULT_TIMEOUT, Sender, ShmTransfer, Starting};
use crate::server::{Hook, PAUSE, ServeError, ServerBuilder};
use crate::sync::BUDGET;

use super::answer::{Progress, UnderWay, answer};
use super::descriptor::readable;
use super::incoming::Incoming;

/// How often tasks are looked after once the queue is closed: nobody attends to it any more.
const LOOK: Duration = Duration::from_millis(1);

type Requested = ShmTransfer<Sender, Starting>;

/// A server that has its address, and does not take requests yet: [`crate::Server`], with a task
/// for each request instead of a thread.
///
/// ```no_run
/// use shmferry::Refusal;
/// use shmferry::tokio::Server;
/// use std::fs::File;
///
/// # async fn serve() -> shmferry::Result<()> {
/// let server = Server::bind("unix:/run/me/cache.sock")?.serve(|request| async move {
///     match request.key() {
///         b"/a.jpg" => request.send_file(&File::open("/srv/a.jpg")?).await,
///         _ => request.refuse(Refusal::NotFound),
///     }
/// })?;
/// server.wait().await;
/// # Ok(())
/// # }
/// ```
#[must_use = "it serves nobody before `serve`"]
pub struct Server {
    queue: Queue,
    timeout: Duration,
    hook: Arc<Hook>,
}

#[derive(Clone)]
enum Queue {
    Socket(Arc<SeqpacketQueue>),
    Within(InProcess),
}

impl Server {
    /// Takes an address, `unix:PATH`, for this process: as [`crate::Server::bind`].
    ///
    /// # Errors
    /// Those of [`crate::Server::bind`]; and [`Error::Misuse`] for a message queue, over which
    /// tasks cannot wait.
    pub fn bind<A>(address: A) -> Result<Server>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        ServerBuilder::default().bind_tokio(address)
    }

    /// A server of a queue within this process, which has room for requests.
    pub fn in_process(queue: InProcess) -> Server {
        let queue = Queue::Within(queue);
        Server { queue, timeout: DEFAULT_TIMEOUT, hook: Arc::default() }
    }

    /// How long a transfer waits for a client that takes nothing; 30 seconds by default. One that
    /// reads slowly but steadily is never given up.
    pub fn timeout(mut self, timeout: Duration) -> Server {
        self.timeout = timeout;
        self
    }

    /// Has `hook` told of every error, as [`crate::Server::on_error`] does. It is called by the
    /// task that met the error.
    pub fn on_error(self, hook: impl Fn(&ServeError) + Send + Sync + 'static) -> Server {
        self.hook.set(hook);
        self
    }

    /// Serves requests until it is [stopped](Serving::stop): has `handler` run for each. There are
    /// as many at a time as clients ask: each has at most a few more under way than it has
    /// segments.
    ///
    /// A handler begins where requests are taken. If it has to wait, or fills more than one slot,
    /// it goes on as a task of its own. So what computes for long is to be done on another thread,
    /// as ever with tasks, or others wait for it.
    ///
    /// An error of the handler ends its transfer, and so does a panic: its client is told
    /// ([`Error::Aborted`]) unless it had its answer already, [`on_error`](Self::on_error) is told
    /// the error, and the server goes on.
    ///
    /// # Errors
    /// [`Error::Os`] when the system refuses to watch the queue.
    ///
    /// # Panics
    /// Outside of a tokio runtime with its I/O and time enabled.
    pub fn serve<F, A, E>(self, handler: F) -> Result<Serving>
    where
        F: Fn(Incoming) -> A + Send + Sync + 'static,
        A: Future<Output = std::result::Result<(), E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let Server { queue, timeout, hook } = self;
        let source = Source::of(&queue)?;
        let (done, is_done) = watch::channel(false);
        let (handler, at) = (Arc::new(handler), queue.clone());
        let over = Over { queue: Some(queue.clone()), done };
        tokio::spawn(async move {
            let over = over;
            let (mut answers, under_way) = (JoinSet::new(), Arc::new(UnderWay));
            loop {
                // While answers are under way, their tasks have this thread.
                let look = if Arc::strong_count(&under_way) == 1 { BUDGET } else { Duration::ZERO };
                match source.next(look).await {
                    Ok(transfer) => {
                        let (handler, hook) = (Arc::clone(&handler), Arc::clone(&hook));
                        let progress = Arc::new(Progress::of(&transfer, &under_way));
                        let mut answering = Box::pin({
                            let progress = Arc::clone(&progress);
                            async move {
                                answer(transfer, timeout, progress, &*handler, &hook).await;
                            }
                        });
                        // Most answers need no task of their own.
                        let first =
                            poll_fn(|context| Poll::Ready(answering.as_mut().poll(context)));
                        let is_done = first.await.is_ready();
                        progress.go_on_as_task();
                        if !is_done {
                            answers.spawn(answering);
                            yield_now().await; // it goes on first
                        }
                    }
                    Err(Error::Closed | Error::Misuse(_)) => break,
                    Err(error) => {
                        hook.tell(&ServeError::Queue(error));
                        sleep(PAUSE).await;
                    }
                }
                while answers.try_join_next().is_some() {}
            }
            drop(source);
            wind_down(&at, &mut answers, &under_way).await;
            drop(at);
            drop(over);
        });
        Ok(Serving { inner: Arc::new(Inner { queue, is_done }) })
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("tokio::Server").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl ServerBuilder {
    /// As [`bind`](Self::bind), for a server of tasks.
    ///
    /// # Errors
    /// Those of [`bind`](Self::bind); and [`Error::Misuse`] for a message queue, over which tasks
    /// cannot wait.
    pub fn bind_tokio<A>(self, address: A) -> Result<Server>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let Address::Unix(path) = address.try_into()? else {
            return Err(Misuse::NoTasksOverQueues.into());
        };
        let hook = Arc::<Hook>::default();
        let queue = Queue::Socket(Arc::new(self.socket(path, &hook)?));
        Ok(Server { queue, timeout: DEFAULT_TIMEOUT, hook })
    }
}

/// Where requests come from, as a task waits for them.
enum Source {
    Socket(Arc<SeqpacketQueue>, AsyncFd<OwnedFd>),
    Within(InProcess),
}

impl Source {
    fn of(queue: &Queue) -> Result<Source> {
        match queue {
            Queue::Socket(queue) => {
                let descriptor = readable(&**queue).map_err(Error::os("epoll_ctl"))?;
                Ok(Source::Socket(Arc::clone(queue), descriptor))
            }
            Queue::Within(queue) => Ok(Source::Within(queue.clone())),
        }
    }

    /// The next request, looked for so long before it is waited for. Meanwhile, the tasks that
    /// clients signal are woken.
    async fn next(&self, look: Duration) -> Result<Requested> {
        consume_budget().await;
        match self {
            Source::Socket(queue, descriptor) => loop {
                if let Poll::Ready(taken) = queue.try_recv_within(look) {
                    return taken;
                }
                let Ok(mut ready) = descriptor.readable().await else {
                    return Err(Error::Closed); // the runtime ends
                };
                ready.clear_ready();
            },
            Source::Within(queue) => poll_fn(|context| queue.poll_recv(context.waker())).await,
        }
    }
}

impl Queue {
    fn close(&self) {
        match self {
            Queue::Socket(queue) => queue.close(),
            Queue::Within(queue) => RequestQueue::close(queue),
        }
    }
}

/// Closes the queue when the task that takes requests ends, and so when its runtime is dropped:
/// otherwise clients would wait for it, and no successor could have its address.
struct Over {
    queue: Option<Queue>,
    done: watch::Sender<bool>,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.queue.take().iter().for_each(Queue::close);
        self.done.send_replace(true);
    }
}

/// Waits for the answers under way, those included that handlers gave to tasks of their own, and
/// looks after them meanwhile.
async fn wind_down(queue: &Queue, answers: &mut JoinSet<()>, under_way: &Arc<UnderWay>) {
    while !answers.is_empty() || Arc::strong_count(under_way) > 1 {
        let ended = async {
            if answers.join_next().await.is_none() {
                pending::<()>().await; // the others are looked for again
            }
        };
        let _ = timeout(LOOK, ended).await;
        if let Queue::Socket(queue) = queue {
            queue.look();
        }
    }
}

/// A server at work. Cheap to clone; when the last clone is dropped, it stops, and transfers under
/// way go on.
#[derive(Clone)]
pub struct Serving {
    inner: Arc<Inner>,
}

struct Inner {
    queue: Queue,
    is_done: watch::Receiver<bool>,
}

impl Serving {
    /// Stops taking requests, as [`crate::Serving::stop`] does. Transfers under way go on:
    /// [`wait`](Self::wait) for them.
    pub fn stop(&self) {
        self.inner.queue.close();
    }

    /// Waits until it is stopped and its last transfer has ended: for ever, if nobody stops it.
    pub async fn wait(&self) {
        // Fails if the runtime of the server has ended: then it has ended, too.
        let _ = self.inner.is_done.clone().wait_for(|is_done| *is_done).await;
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_done = *self.inner.is_done.borrow();
        f.debug_struct("tokio::Serving").field("is_done", &is_done).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
    }
}
