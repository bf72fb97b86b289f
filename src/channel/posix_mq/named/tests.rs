//! Named segments: attached if valid, refused otherwise, and removed when their owner is gone.

use super::*;
use crate::error::LayoutMismatch;
use crate::random::random;
use crate::segment::sealed::Backing as _;
use rustix::fs::{FallocateFlags, Mode, fallocate, ftruncate};
use rustix::shm;
use std::os::unix::fs::MetadataExt;

/// A pool of the test's own, so that no names collide.
fn owned() -> (Ownership, SegmentId, Geometry) {
    let id = SegmentId { pool: PoolId(random().unwrap()), index: 3 };
    (Named::own(id.pool).unwrap(), id, Geometry::new(2, 5000).unwrap())
}

fn refusal(owner: Owner, id: SegmentId, geometry: Geometry) -> LayoutMismatch {
    match attach(owner, id, geometry) {
        Err(Error::Layout(unusable)) => unusable.0,
        other => panic!("{other:?}"),
    }
}

/// Memory under the segment's name that was not made by us; removed when dropped.
struct Impostor(String);

impl Impostor {
    fn new(name: String, len: u64, allocated: bool) -> Impostor {
        let flags = shm::OFlags::RDWR | shm::OFlags::CREATE | shm::OFlags::EXCL;
        let fd = shm::open(&*name, flags, Mode::RUSR | Mode::WUSR).unwrap();
        ftruncate(&fd, len).unwrap();
        if allocated {
            fallocate(&fd, FallocateFlags::empty(), 0, len).unwrap();
        }
        Impostor(name)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        // Swept already, in some tests.
        let _ = shm::unlink(&*self.0);
    }
}

#[test]
fn an_honest_segment_is_attached_and_its_name_goes_with_it() {
    let (own, id, geometry) = owned();
    let path = format!("/dev/shm{}", own.owner.segment(id.index));
    let (owned, memory) = Named::create(&own, id, geometry).unwrap();
    let found = std::fs::metadata(&path).unwrap();
    assert_eq!(found.mode() & 0o777, 0o600);
    assert_eq!((found.len(), found.blocks() * 512), (20_480, 20_480), "allocated when it is made");
    let attached = memory.attach(id, geometry).unwrap();
    attached.writable().write_slot(1, 4990, b"0123456789");
    let mut seen = [0; 10];
    owned.readable().read_slot(1, 4990, &mut seen);
    assert_eq!(&seen, b"0123456789");
    drop(attached);
    assert!(own.owner.has_named(id.index), "it is the owner's to remove");
    drop(owned);
    assert!(!own.owner.has_named(id.index));
}

#[test]
fn only_the_segment_that_was_announced() {
    let (own, id, geometry) = owned();
    let (_owned, _memory) = Named::create(&own, id, geometry).unwrap();
    let recut = Geometry::new(2, 5001).unwrap();
    let found = LayoutMismatch::Geometry { slot_count: 2, slot_len: 5000 };
    assert_eq!(refusal(own.owner, id, recut), found);
    let longer = Geometry::new(3, 5000).unwrap();
    let sizes = LayoutMismatch::Size { found: 20_480, expected: 28_672 };
    assert_eq!(refusal(own.owner, id, longer), sizes);
    let other = SegmentId { pool: PoolId(!id.pool.0), ..id };
    let found = LayoutMismatch::Identity { found: id, expected: other };
    assert_eq!(refusal(own.owner, other, geometry), found);
    let absent = attach(own.owner, SegmentId { index: 4, ..id }, geometry);
    assert!(
        matches!(&absent, Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound),
        "{absent:?}"
    );
}

#[test]
fn nothing_that_could_kill_us_by_itself() {
    let (own, id, geometry) = owned();
    let (name, len) = (own.owner.segment(id.index), geometry.mapped_len() as u64);
    for (found, allocated, refused) in [
        (0, false, LayoutMismatch::Size { found: 0, expected: len }),
        (len - 1, true, LayoutMismatch::Size { found: len - 1, expected: len }),
        (len, false, LayoutMismatch::Sparse { present: 0, expected: len }),
        (len, true, LayoutMismatch::NotASegment),
    ] {
        let _impostor = Impostor::new(name.clone(), found, allocated);
        assert_eq!(refusal(own.owner, id, geometry), refused);
    }
    // A name that is taken is not overwritten.
    let _impostor = Impostor::new(name.clone(), len, true);
    let made = Named::create(&own, id, geometry);
    let us = rustix::process::geteuid().as_raw();
    match made.map(drop) {
        Err(Error::NameTaken { path, kind: "a regular file", uid }) => {
            assert_eq!((path.to_str(), uid), (Some(&*format!("/dev/shm{name}")), us));
        }
        other => panic!("{other:?}"),
    }
}

/// The owner goes, and another user puts memory of its own under the name, at any moment of an
/// attach.
#[test]
fn what_was_checked_is_what_is_mapped() {
    use rustix::fs::{CWD, OFlags, RenameFlags, fstat, open, renameat_with};
    const NOBODY: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make a file of another user");
        return;
    }
    for round in 0..150 {
        let (own, id, geometry) = owned();
        let (segment, memory) = Named::create(&own, id, geometry).unwrap();
        let path = format!("/dev/shm{}", own.owner.segment(id.index));
        // A copy that another user owns, prepared beforehand.
        let theirs = format!("/dev/shm/shmferry-theirs-{}", std::process::id());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&theirs, &bytes).unwrap();
        std::os::unix::fs::chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
        let fd = open(&*theirs, OFlags::RDWR, Mode::empty()).unwrap();
        fallocate(&fd, FallocateFlags::empty(), 0, bytes.len() as u64).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_uid, NOBODY);

        let (owner, together) = (own.owner, std::sync::Barrier::new(3));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                together.wait();
                (0..round % 400).for_each(|_| std::hint::spin_loop());
                drop((segment, memory)); // as when it is retired
            });
            scope.spawn(|| {
                together.wait();
                // Without replacing: in a sticky directory another user cannot do that.
                while renameat_with(CWD, &*theirs, CWD, &*path, RenameFlags::NOREPLACE).is_err() {}
            });
            together.wait();
            loop {
                match attach(owner, id, geometry) {
                    Ok(attached) => {
                        attached.writable().write_slot(0, 0, b"for the owner");
                        let mut seen = [0; 13];
                        rustix::io::pread(&fd, &mut seen, 4096).unwrap();
                        assert_ne!(&seen, b"for the owner", "round {round}: mapped another's");
                    }
                    Err(Error::Layout(crate::error::UnusableSegment(LayoutMismatch::Foreign(
                        NOBODY,
                    )))) => break,
                    // The name is free for a moment.
                    Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        std::fs::remove_file(&path).unwrap();
    }
}

/// Another user can take names in advance. That causes an error that says who did, and nothing
/// else.
#[test]
fn a_name_that_is_taken_is_told_with_whose_it_is() {
    let (own, id, geometry) = owned();
    let path = format!("/dev/shm{}", own.owner.segment(id.index));
    let us = rustix::process::geteuid();
    let squatter = if us.is_root() { 65_534 } else { us.as_raw() };
    let took = |kind: &'static str| {
        std::os::unix::fs::lchown(&path, Some(squatter), None).unwrap();
        match Named::create(&own, id, geometry).map(drop) {
            Err(Error::NameTaken { path: named, kind: told, uid }) => {
                assert_eq!((named.to_str(), told, uid), (Some(&*path), kind, squatter));
            }
            other => panic!("{other:?}"),
        }
        let attached = attach(own.owner, id, geometry).map(drop);
        assert!(matches!(&attached, Err(Error::Layout(_))), "{attached:?}");
        std::fs::remove_file(&path).unwrap();
    };
    std::fs::write(&path, "").unwrap();
    took("a regular file");
    std::os::unix::fs::symlink("/dev/shm/elsewhere", &path).unwrap();
    took("a symbolic link");
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &*path, fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    took("a FIFO");
    drop(Named::create(&own, id, geometry).unwrap());
}

#[test]
fn the_receiver_cannot_write_to_slots() {
    let (own, id, geometry) = owned();
    let (owned, _memory) = Named::create(&own, id, geometry).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let header = std::ptr::from_ref(owned.header()).addr();
    for (start, end, rights) in [(0, 4096, "rw-s"), (4096, 20_480, "r--s")] {
        let line = format!("{:x}-{:x} {rights} ", header + start, header + end);
        assert!(maps.contains(&line), "{line}\n{maps}");
    }
}

#[test]
fn a_sweep_removes_the_names_of_the_dead_and_nobody_elses() {
    let (living, id, geometry) = owned();
    let (_owned, _memory) = Named::create(&living, id, geometry).unwrap();
    // The leftovers of an owner: its lifeline, not held, and a segment; or either alone.
    let owner = |pool: u64| Owner { pid: living.owner.pid, pool: PoolId(id.pool.0 ^ pool) };
    let [dead, ending, bare, foreign] = [1, 2, 3, 4].map(owner);
    for owner in [dead, bare] {
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, owner.lifeline(), fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
    }
    let _left = [dead, ending, foreign].map(|owner| Impostor::new(owner.segment(7), 4096, false));
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        let path = format!("/dev/shm{}", foreign.segment(7));
        std::os::unix::fs::chown(path, Some(65_534), None).unwrap();
    }
    sweep();
    assert!(!dead.lifeline().exists() && !dead.has_named(7) && !ending.has_named(7));
    assert!(!bare.lifeline().exists());
    assert_eq!(foreign.has_named(7), is_root, "another user's to remove");
    assert!(living.owner.lifeline().exists() && living.owner.has_named(id.index));
}
