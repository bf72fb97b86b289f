//! Places at work: while a worker's thread blocks, its place is free for another job.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use crate::process::Origin;

use super::{Deadline, FairSemaphore};

/// Runs `wait`, which blocks on another thread or process. Meanwhile this thread's place in its
/// [`WorkerPool`](crate::workers::WorkerPool) is free for another job; the thread takes a place
/// again before this returns. On a thread that is not a worker's it only runs `wait`.
pub fn blocking<T>(wait: impl FnOnce() -> T) -> T {
    // Taken out, so that a nested wait does not free the place twice. In a child of `fork`, the
    // place and the threads that wait for it belong to the parent.
    let Some(place) = PLACE.take().filter(|place| place.origin.is_here()) else { return wait() };
    let (places, origin) = (Arc::clone(&place.places), place.origin);
    drop(place);
    let _back_to_work = OnDrop(|| {
        // Not in a child that was forked during the wait.
        if origin.is_here() {
            PLACE.set(Some(Place::enter(&places)));
        }
    });
    wait()
}

/// Runs `job` in one of these places. Catches a panic, so that the thread goes on: the panic hook
/// has reported it, and unwinding has dropped what the job held.
pub(crate) fn at_place(places: &Arc<FairSemaphore>, job: impl FnOnce()) {
    PLACE.set(Some(Place::enter(places)));
    let _ = panic::catch_unwind(AssertUnwindSafe(job));
    PLACE.set(None);
}

thread_local! {
    /// The place that this thread holds.
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

/// A place in use; freed when dropped.
struct Place {
    places: Arc<FairSemaphore>,
    origin: Origin,
}

impl Place {
    fn enter(places: &Arc<FairSemaphore>) -> Place {
        places.enter(Deadline::NEVER);
        Place { places: Arc::clone(places), origin: Origin::here() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.origin.is_here() {
            self.places.leave();
        }
    }
}

/// Runs its closure when it goes out of scope, unwinding included.
pub(crate) struct OnDrop<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
