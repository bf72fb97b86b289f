//! Has a handler answer one request, as long as its client wants the answer.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::panic::{self, AssertUnwindSafe};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use crate::protocol::{Sender, ShmTransfer, Starting, Wanted};
use crate::server::{Hook, ServeError, message_of};

use super::incoming::Incoming;

/// How often to look whether an answer is wanted where the client cannot signal that it is not.
const LOOK: Duration = Duration::from_millis(50);

/// Counts the answers under way of a server: each has a clone of its `Arc`, whoever has the answer.
pub(super) struct UnderWay;

/// How far a handler has come, and its answer.
pub(super) struct Progress {
    _under_way: Arc<UnderWay>,
    wanted: Wanted,
    /// Its request was dropped unanswered.
    unanswered: AtomicBool,
    /// Its first step is past: what follows runs as a task of its own, or of the handler's making.
    is_past: AtomicBool,
}

impl Progress {
    /// A handler is about to begin.
    pub(super) fn of(
        transfer: &ShmTransfer<Sender, Starting>,
        under_way: &Arc<UnderWay>,
    ) -> Progress {
        Progress {
            _under_way: Arc::clone(under_way),
            wanted: transfer.wanted(),
            unanswered: AtomicBool::new(false),
            is_past: AtomicBool::new(false),
        }
    }

    /// The answer is over on this side: from here on, the handler does not work for its client.
    pub(super) fn end_answer(&self) {
        self.wanted.end();
    }

    /// Whether it may still run where requests are taken.
    pub(super) fn keeps_others_waiting(&self) -> bool {
        !self.is_past.load(Relaxed)
    }

    /// Its first step is past.
    pub(super) fn go_on_as_task(&self) {
        self.is_past.store(true, Relaxed);
    }
}

/// The duty to answer a request. Notes that the request is dropped, unless it is answered.
pub(super) struct Duty {
    progress: Arc<Progress>,
    is_done: bool,
}

impl Duty {
    /// To be called before the request is answered; [`Progress::end_answer`] when that is over.
    pub(super) fn fulfil(mut self) -> Arc<Progress> {
        self.is_done = true;
        self.progress.wanted.set_answered();
        Arc::clone(&self.progress)
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        if !self.is_done {
            self.progress.unanswered.store(true, Relaxed);
            self.progress.end_answer();
        }
    }
}

/// Why a handler is not polled any more.
enum End<E> {
    Answered(Result<(), E>),
    Panicked(Box<dyn std::any::Any + Send>),
    /// Its client does not want the answer.
    Unwanted,
}

/// Has one request answered, and tells what went wrong.
pub(super) async fn answer<F, A, E>(
    transfer: ShmTransfer<Sender, Starting>,
    timeout: Duration,
    progress: Arc<Progress>,
    handler: &F,
    hook: &Hook,
) where
    F: Fn(Incoming) -> A,
    A: Future<Output = Result<(), E>>,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let (key, peer) = (transfer.shared_key(), transfer.peer());
    let duty = Duty { progress: Arc::clone(&progress), is_done: false };
    let incoming = Incoming::new(transfer, timeout, duty);
    let end = match panic::catch_unwind(AssertUnwindSafe(|| handler(incoming))) {
        Ok(answering) => run(answering, &progress.wanted).await,
        Err(panic) => End::Panicked(panic),
    };
    let error = match end {
        End::Answered(Ok(())) if progress.unanswered.load(Relaxed) => {
            ServeError::Unanswered { key, peer }
        }
        End::Answered(Ok(())) => return,
        End::Answered(Err(error)) => ServeError::Handler { key, peer, error },
        End::Panicked(panic) => ServeError::Panic { key, peer, message: message_of(&*panic) },
        End::Unwanted => ServeError::Unwanted { key, peer },
    };
    hook.tell(&error);
}

/// Polls a handler until it ends, or its answer is not wanted any more; then drops it.
async fn run<A, E>(answering: A, wanted: &Wanted) -> End<Box<dyn StdError + Send + Sync>>
where
    A: Future<Output = Result<(), E>>,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let mut answering = pin!(Some(answering));
    let mut watch = Attention { wanted, timer: None, is_lost: false };
    let end = poll_fn(|context| {
        let Some(handler) = answering.as_mut().as_pin_mut() else { unreachable!("not ended yet") };
        // Also what makes an error of theirs into one of ours is the application's code.
        let poll = AssertUnwindSafe(|| handler.poll(context).map_err(E::into));
        match panic::catch_unwind(poll) {
            Ok(Poll::Ready(answered)) => Poll::Ready(End::Answered(answered)),
            Err(panic) => Poll::Ready(End::Panicked(panic)),
            Ok(Poll::Pending) => watch.poll_lost(context).map(|()| End::Unwanted),
        }
    })
    .await;
    // And so is what drops it.
    match panic::catch_unwind(AssertUnwindSafe(|| answering.set(None))) {
        Ok(()) => end,
        Err(panic) => End::Panicked(panic),
    }
}

/// Watches whether an answer is wanted.
struct Attention<'w> {
    wanted: &'w Wanted,
    /// Made where the client cannot signal.
    timer: Option<Pin<Box<Sleep>>>,
    /// It was not, when the handler had been polled last.
    is_lost: bool,
}

impl Attention<'_> {
    /// Ready if the answer was not wanted before the handler was polled last, and still is not: a
    /// handler that waits for its client learns the reason there.
    fn poll_lost(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let was_lost = self.is_lost;
            self.is_lost = self.wanted.poll_lost(context.waker());
            match (was_lost, self.is_lost) {
                (true, true) => return Poll::Ready(()),
                (false, true) => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                (_, false) => {}
            }
            if self.wanted.is_told() {
                self.timer = None;
                return Poll::Pending;
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(LOOK)));
            if timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.timer = None;
        }
    }
}
