//! How a task waits for one step of its peer: it tries for a moment, and then sleeps until woken.

use std::hint;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant as Real};

use tokio::task::coop::poll_proceed;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::protocol::Awaiting;
use crate::sync::BUDGET;

/// How long a task tries before it sleeps, where that can pay: others share its processor.
const MOMENT: Duration = BUDGET;
/// Tries between two readings of the clock.
const TRIES: usize = 16;

/// How often a task tries again that nobody wakes: the two processes have nothing to signal by.
const UNWOKEN: Duration = Duration::from_millis(1);

/// One side's wait, over a whole transfer.
#[derive(Default)]
pub(super) struct Wait {
    /// Made when it is first needed.
    timer: Option<Pin<Box<Sleep>>>,
    /// The end of this wait, where the caller has not fixed one.
    end: Option<Instant>,
}

/// A step of a transfer, as [`Wait::poll`] takes it.
pub(super) trait Step {
    type Output;

    /// Tries, and has the task woken later if one is given.
    fn attempt(&mut self, task: Option<&Waker>) -> Poll<Self::Output>;

    /// The side of the transfer that waits.
    fn side(&mut self) -> &mut dyn Awaiting;
}

impl Wait {
    /// Tries the step. Pending until it is done, or until `end`: then the result is `None`.
    pub(super) fn poll<S: Step>(
        &mut self,
        context: &mut Context<'_>,
        end: Option<Instant>,
        step: &mut S,
    ) -> Poll<Option<S::Output>> {
        // As all that tokio offers: after many steps in a row, others have their turn.
        let budget = ready!(poll_proceed(context));
        let tried = match try_for_a_moment(step) {
            Poll::Pending => step.attempt(Some(context.waker())),
            done => done,
        };
        if let Poll::Ready(done) = tried {
            budget.made_progress();
            self.end = None;
            return Poll::Ready(Some(done));
        }
        loop {
            let retry = (!step.side().is_woken()).then(|| Instant::now() + UNWOKEN);
            let Some(until) = [end, retry].into_iter().flatten().min() else {
                return Poll::Pending;
            };
            ready!(self.poll_timer(context, until));
            if end.is_some_and(|end| end <= Instant::now()) {
                self.end = None;
                return Poll::Ready(None);
            }
            if let Poll::Ready(done) = step.attempt(None) {
                self.end = None;
                return Poll::Ready(Some(done));
            }
        }
    }

    /// The end of this wait, `timeout` after its begin.
    pub(super) fn end_of(&mut self, timeout: Duration) -> Option<Instant> {
        if self.end.is_none() {
            self.end = after(timeout);
        }
        self.end
    }

    /// Ready at this time.
    pub(super) fn poll_timer(&mut self, context: &mut Context<'_>, until: Instant) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if timer.deadline() != until {
            timer.as_mut().reset(until);
        }
        timer.as_mut().poll(context)
    }
}

/// Tries, and goes on to try for a moment where that can pay.
fn try_for_a_moment<S: Step>(step: &mut S) -> Poll<S::Output> {
    let first = step.attempt(None);
    if first.is_ready() || !step.side().begin_tries() {
        return first;
    }
    let start = Real::now();
    loop {
        for _ in 0..TRIES {
            hint::spin_loop();
            if let Poll::Ready(done) = step.attempt(None) {
                step.side().end_tries(true);
                return Poll::Ready(done);
            }
        }
        if start.elapsed() >= MOMENT {
            step.side().end_tries(false);
            return Poll::Pending;
        }
    }
}

/// The end of a wait that begins now; `None` for one beyond what the clock can express.
pub(super) fn after(timeout: Duration) -> Option<Instant> {
    Instant::now().checked_add(timeout)
}
