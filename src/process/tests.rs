//! What a child of `fork` may do with what it inherits.

use super::*;
use std::sync::Mutex;

/// Whether `child` is true in a child of `fork`.
fn in_a_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child only reads and writes atomics and its own heap, and ends by `_exit`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = i32::from(!child());
        // SAFETY: ends this process, without its handlers.
        unsafe { libc::_exit(code) }
    }
    assert!(pid > 0);
    let mut status = 0;
    // SAFETY: `status` is ours, and alive.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

#[test]
fn a_child_is_another_process_and_its_child_yet_another() {
    let parent = Origin::here();
    assert!(parent.is_here() && parent.check().is_ok());
    assert_eq!(parent.pid(), std::process::id());
    assert!(in_a_child(|| {
        let child = Origin::here();
        let refused = parent.check() == Err(Misuse::Forked { made_by: parent.pid() });
        let is_here = child.is_here() && !parent.is_here();
        is_here && refused && in_a_child(|| !child.is_here() && !parent.is_here())
    }));
    assert!(parent.is_here());
}

#[test]
fn a_child_begins_with_statics_of_its_own_whatever_its_parent_holds() {
    static EACH: PerProcess<Mutex<u32>> = PerProcess::new();
    static ALL: AtomicUsize = AtomicUsize::new(0);
    assert!(EACH.get_if_made().is_none());
    let mut held = EACH.get().lock().unwrap();
    *held = 7;
    let counted = [(); 3].map(|()| Counted::among(&ALL));
    let counts = |count| Counted::count(&ALL) == count;
    let mut inherited = Some(counted);
    assert!(in_a_child(|| {
        let is_new = EACH.get_if_made().is_none() && *EACH.get().lock().unwrap() == 0;
        let is_zero = counts(0);
        let one = Counted::among(&ALL);
        drop(inherited.take());
        is_new && is_zero && counts(1) && one.all() == 1
    }));
    assert!(counts(3));
    drop(inherited);
    assert!(counts(0));
}

#[test]
fn a_child_forgets_what_only_its_parent_may_drop() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    struct Told;
    impl Drop for Told {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
    let mut own = Some(Own::new(Told));
    assert!(in_a_child(|| {
        drop(own.take());
        DROPPED.load(Ordering::Relaxed) == 0
    }));
    drop(own);
    assert_eq!(DROPPED.load(Ordering::Relaxed), 1);
}
