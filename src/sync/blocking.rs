//! Places to work in: while a worker's thread blocks, its place serves another job.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use crate::process::Origin;

use super::{Deadline, FairSemaphore};

/// Runs `wait`, which blocks on somebody else, while this thread's place in its
/// [`WorkerPool`](crate::workers::WorkerPool) is given to another job. Takes a place again before it
/// returns. On a thread that is no worker it only runs `wait`.
pub fn blocking<T>(wait: impl FnOnce() -> T) -> T {
    // Taken out, so that a wait within the wait does not give the place away twice. In a child of
    // `fork`, the place and the threads that wait for it are the parent's.
    let Some(place) = PLACE.take().filter(|place| place.origin.is_here()) else { return wait() };
    let (places, origin) = (Arc::clone(&place.places), place.origin);
    drop(place);
    let _back_to_work = OnDrop(|| {
        // Not if it was forked within the wait.
        if origin.is_here() {
            PLACE.set(Some(Place::enter(&places)));
        }
    });
    wait()
}

/// Runs `job` in one of these places. A panic has been reported by the panic hook, and its
/// unwinding has ended what the job held; it must not take the thread along.
pub(crate) fn at_place(places: &Arc<FairSemaphore>, job: impl FnOnce()) {
    PLACE.set(Some(Place::enter(places)));
    let _ = panic::catch_unwind(AssertUnwindSafe(job));
    PLACE.set(None);
}

thread_local! {
    /// The place that this thread holds.
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

/// A place that is held; given back when dropped.
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
