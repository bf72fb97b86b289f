//! The wait of a task for a segment.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::error::Result;
use crate::segment::Backing;
use crate::sync::Place;

use super::lease::Lease;
use super::shared::Shared;

/// A lease to come: see [`lease_soon`](super::SegmentPool::lease_soon).
#[must_use = "nothing is leased before it is awaited"]
pub struct Leasing<B: Backing> {
    pool: Arc<Shared<B>>,
    place: Place,
    /// Whether one of the segments that are available is kept for it.
    is_granted: bool,
}

impl<B: Backing> Leasing<B> {
    pub(super) fn new(pool: Arc<Shared<B>>) -> Leasing<B> {
        Leasing { pool, place: Place::default(), is_granted: false }
    }

    /// Waits for the turn of this task; `false` if it has not come yet.
    fn poll_turn(&mut self, task: &Waker) -> Result<bool> {
        self.pool.origin.check()?;
        self.is_granted = self.is_granted || self.pool.available.poll_enter(&mut self.place, task);
        Ok(self.is_granted)
    }

    fn take(&mut self) -> Result<Lease<B>> {
        self.is_granted = false;
        Ok(Lease::new(self.pool.take(Duration::ZERO)?, Arc::clone(&self.pool)))
    }

    /// As `poll`; but if only segments are left that a late sender may still write to, this is
    /// pending, and nobody is woken: it is to be tried again until the pool's [grace](Self::grace)
    /// is over.
    #[cfg(feature = "tokio")]
    pub(crate) fn poll_patiently(&mut self, task: &Waker) -> Poll<Result<Lease<B>>> {
        if !self.poll_turn(task)? || !self.pool.has_settled() {
            return Poll::Pending;
        }
        Poll::Ready(self.take())
    }

    /// How long a late sender is waited for; `None` while it is not this task's turn.
    #[cfg(feature = "tokio")]
    pub(crate) fn grace(&self) -> Option<Duration> {
        self.is_granted.then_some(self.pool.grace)
    }
}

impl<B: Backing> Future for Leasing<B> {
    type Output = Result<Lease<B>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.poll_turn(context.waker())? {
            return Poll::Pending;
        }
        Poll::Ready(self.take())
    }
}

impl<B: Backing> Drop for Leasing<B> {
    fn drop(&mut self) {
        if !self.pool.origin.is_here() {
            return;
        }
        self.pool.available.give_up(&mut self.place);
        if self.is_granted {
            self.pool.available.leave();
        }
    }
}

impl<B: Backing> fmt::Debug for Leasing<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leasing").field("is_granted", &self.is_granted).finish_non_exhaustive()
    }
}
