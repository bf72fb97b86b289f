//! A future that is polled by hand: so many times, and no further.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::sync::Notify;

/// Between two polls of a future that nobody wakes: then it is polled for nothing, which it has to
/// bear.
const PAUSE: Duration = Duration::from_millis(1);

/// A future, and how often it was polled and woken.
pub struct Driven<F> {
    future: Pin<Box<F>>,
    woken: Arc<Woken>,
    polls: usize,
}

#[derive(Default)]
struct Woken {
    times: AtomicUsize,
    notify: Notify,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.times.fetch_add(1, SeqCst);
        self.notify.notify_one();
    }
}

impl<F: Future> Driven<F> {
    pub fn new(future: F) -> Driven<F> {
        Driven { future: Box::pin(future), woken: Arc::default(), polls: 0 }
    }

    /// Polls once.
    pub fn poll(&mut self) -> Poll<F::Output> {
        self.polls += 1;
        let waker = Waker::from(Arc::clone(&self.woken));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }

    /// Polls so often: when it is woken, or after a pause. `None` if it has not ended by then.
    pub async fn polled(&mut self, times: usize) -> Option<F::Output> {
        for _ in 0..times {
            if let Poll::Ready(output) = self.poll() {
                return Some(output);
            }
            // Also gives this task a new budget of steps.
            let _ = tokio::time::timeout(PAUSE, self.woken.notify.notified()).await;
            tokio::task::yield_now().await;
        }
        None
    }

    /// How often it was woken.
    pub fn woken(&self) -> usize {
        self.woken.times.load(SeqCst)
    }
}

/// 0, 1, 2, and so on, in steps that grow: a task that tries before it sleeps is polled often.
pub fn counts() -> impl Iterator<Item = usize> {
    std::iter::successors(Some(0), |count| Some(count + 1 + count / 8))
}
