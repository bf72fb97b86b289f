//! The queue within one process: sender and receiver are threads, the transfer is the same.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use crossbeam_channel::{
    Receiver as Outlet, Select, SelectedOperation, Sender as Inlet, TrySendError, bounded,
};

use crate::error::{Awaited, Error, Result};
use crate::peer::Link;
use crate::process::Own;
use crate::protocol::{Sender, ShmTransfer, Starting};
use crate::segment::Backing;
use crate::sync::{Deadline, lock};
use crate::workers;

use super::{Request, RequestQueue, Requester, SendError};

/// A bounded queue between threads, over [`crossbeam_channel`]. Carries any backing.
///
/// Cheap to clone; all clones are the same queue, and each is both of its ends. Requests still in
/// it when it is closed, or when the last clone is dropped, are aborted. A thread that ends without
/// closing the queue is not noticed: within a process, no hang-up tells of it.
///
/// ```
/// use shmferry::channel::{InProcess, Requester, RequestQueue};
/// use shmferry::protocol::Reply;
/// use shmferry::segment::{Memfd, SegmentPool};
/// use shmferry::Deadline;
/// use std::{io::Read, thread};
///
/// let pool = SegmentPool::<Memfd>::builder().segments(1).create()?;
/// let queue = InProcess::bounded(1);
/// let sender = {
///     let queue = queue.clone();
///     thread::spawn(move || {
///         let transfer = queue.recv(Deadline::NEVER)?;
///         let mut sending = transfer.accept(5)?;
///         sending.next_slot(Deadline::NEVER)?.send(b"hello")
///     })
/// };
///
/// let (request, transfer) = pool.lease(Deadline::NEVER)?.request("greeting")?;
/// queue.send(request, Deadline::NEVER)?;
/// let Reply::Found(mut body) = transfer.reply(Deadline::NEVER)? else { panic!("refused") };
/// let mut text = String::new();
/// body.read_to_string(&mut text).unwrap();
/// assert_eq!(text, "hello");
/// sender.join().unwrap()?;
/// # Ok::<(), shmferry::Error>(())
/// ```
#[derive(Clone)]
pub struct InProcess {
    inlet: Own<Inlet<ShmTransfer<Sender, Starting>>>,
    outlet: Own<Outlet<ShmTransfer<Sender, Starting>>>,
    /// Taken, and so disconnected, when the queue is closed.
    open: Own<Arc<Mutex<Option<Inlet<()>>>>>,
    closed: Own<Outlet<()>>,
    /// Of the tasks that wait for a request.
    tasks: Arc<Mutex<Vec<Waker>>>,
    link: Arc<Link>,
}

impl InProcess {
    /// A queue with room for `requests` that are not taken yet; zero makes every `send` wait for a
    /// `recv`.
    pub fn bounded(requests: usize) -> InProcess {
        let (inlet, outlet) = bounded(requests);
        let (open, closed) = bounded(0);
        let link = Arc::new(Link::within());
        let open = Own::new(Arc::new(Mutex::new(Some(open))));
        let (inlet, outlet, closed) = (Own::new(inlet), Own::new(outlet), Own::new(closed));
        InProcess { inlet, outlet, open, closed, tasks: Arc::default(), link }
    }

    fn is_closed(&self) -> bool {
        lock(&self.open).is_none()
    }

    /// Waits for room, or for the end of the queue; hands back what was not sent, with the reason.
    fn send_slowly(
        &self,
        transfer: ShmTransfer<Sender, Starting>,
        deadline: Deadline,
    ) -> Option<(ShmTransfer<Sender, Starting>, Error)> {
        let mut select = Select::new();
        let room = select.send(&self.inlet);
        select.recv(&self.closed);
        match wait_for(&mut select, deadline) {
            Some(ready) if ready.index() == room => match ready.send(&self.inlet, transfer) {
                Ok(()) => None,
                Err(unsent) => Some((unsent.0, Error::Closed)),
            },
            Some(ready) => {
                // This channel carries no values: its disconnection tells of the end.
                let _ = ready.recv(&self.closed);
                Some((transfer, Error::Closed))
            }
            None => Some((transfer, Error::Timeout(Awaited::QueueRoom))),
        }
    }

    /// As [`recv`](RequestQueue::recv), without waiting: if there is no request, `task` is woken
    /// once there may be one. Needs a queue with room for requests.
    ///
    /// # Errors
    /// Those of [`recv`](RequestQueue::recv), but for [`Error::Timeout`].
    pub fn poll_recv(&self, task: &Waker) -> Poll<Result<ShmTransfer<Sender, Starting>>> {
        let attempt = || match self.recv(Deadline::after(Duration::ZERO)) {
            Err(Error::Timeout(_)) => Poll::Pending,
            taken => Poll::Ready(taken),
        };
        let taken = attempt();
        if taken.is_ready() {
            return taken;
        }
        // Before the second try: what is sent after it wakes the task.
        let mut tasks = lock(&self.tasks);
        if !tasks.iter().any(|waiting| waiting.will_wake(task)) {
            tasks.push(task.clone());
        }
        drop(tasks);
        attempt()
    }

    fn wake_tasks(&self) {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.into_iter().for_each(Waker::wake);
    }

    /// Aborts the requests left in the closed queue.
    fn drain(&self) {
        self.outlet.try_iter().for_each(drop);
    }
}

impl<B: Backing> Requester<B> for InProcess {
    fn send(&self, request: Request<B>, deadline: Deadline) -> Result<(), SendError<B>> {
        if let Err(forked) = Own::origin(&self.inlet).check().and(request.check_origin()) {
            return Err(SendError { request, error: forked.into() });
        }
        if self.is_closed() {
            return Err(SendError { request, error: Error::Closed });
        }
        let transfer = match request.begin_here(&self.link) {
            Ok(transfer) => transfer,
            Err(error) => return Err(SendError { request, error }),
        };
        let unsent = match self.inlet.try_send(transfer) {
            Ok(()) => None,
            Err(TrySendError::Disconnected(transfer)) => Some((transfer, Error::Closed)),
            // The send is inside `blocking`. Waiting for a place at work with a slot of the channel
            // reserved would make every receiver spin on that slot.
            Err(TrySendError::Full(transfer)) => {
                workers::blocking(|| self.send_slowly(transfer, deadline))
            }
        };
        match unsent {
            Some((transfer, error)) => {
                transfer.forget();
                Err(SendError { request, error })
            }
            None => {
                request.sent_over(&self.link);
                self.wake_tasks();
                if self.is_closed() {
                    self.drain(); // closed meanwhile, perhaps after its drain
                }
                Ok(())
            }
        }
    }
}

impl RequestQueue for InProcess {
    fn recv(&self, deadline: Deadline) -> Result<ShmTransfer<Sender, Starting>> {
        Own::origin(&self.inlet).check()?;
        let mut select = Select::new();
        let request = select.recv(&self.outlet);
        select.recv(&self.closed);
        if self.is_closed() {
            return Err(Error::Closed);
        }
        match wait_for(&mut select, deadline) {
            Some(ready) if ready.index() == request => {
                ready.recv(&self.outlet).map_err(|_| Error::Closed)
            }
            Some(ready) => {
                let _ = ready.recv(&self.closed);
                Err(Error::Closed)
            }
            None => Err(Error::Timeout(Awaited::Request)),
        }
    }

    fn close(&self) {
        if !Own::origin(&self.inlet).is_here() {
            return;
        }
        lock(&self.open).take();
        self.drain();
        self.wake_tasks();
    }
}

impl fmt::Debug for InProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_here = Own::origin(&self.inlet).is_here();
        let queued = if is_here { self.outlet.len() } else { 0 };
        f.debug_struct("InProcess").field("queued", &queued).finish_non_exhaustive()
    }
}

fn wait_for<'a>(select: &mut Select<'a>, deadline: Deadline) -> Option<SelectedOperation<'a>> {
    match deadline.instant() {
        None => Some(select.select()),
        Some(at) => select.select_deadline(at).ok(),
    }
}

#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests;
