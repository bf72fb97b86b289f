//! Names in `/dev/shm`: allocates and checks their memory, removes those of dead owners.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirEntry};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, Stat, fallocate, fstat, statvfs};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;
use rustix::shm;

use crate::channel::posix_mq::lifeline::{self, Lifeline};
use crate::error::{Error, LayoutMismatch, Result};
use crate::process::PerProcess;
use crate::segment::{Geometry, PoolId, available_memory};

use super::Owner;

/// The directory of POSIX shared memory on Linux.
const SHARED_MEMORY: &str = "/dev/shm";

impl Owner {
    /// The path of its lifeline.
    pub(crate) fn lifeline(self) -> PathBuf {
        Path::new(SHARED_MEMORY).join(self.stem())
    }

    /// Whether one of its segments still has its name.
    pub(crate) fn has_named(self, index: u32) -> bool {
        fs::symlink_metadata(path(&self.segment(index))).is_ok()
    }
}

/// Bytes that named segments can still take: limited by memory, and by their file system.
pub(super) fn available() -> Option<u64> {
    let room =
        statvfs(SHARED_MEMORY).ok().map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    match (available_memory(), room) {
        (Some(memory), Some(room)) => Some(memory.min(room)),
        (memory, room) => memory.or(room),
    }
}

/// Allocates the blocks of a new segment, so that a full file system is an error now and not a
/// SIGBUS later.
pub(super) fn allocate(name: &str, geometry: Geometry) -> Result<()> {
    let fd = shm::open(name, shm::OFlags::RDWR, Mode::empty()).map_err(Error::os("shm_open"))?;
    let len = geometry.mapped_len() as u64;
    retry_on_intr(|| fallocate(&fd, FallocateFlags::empty(), 0, len))
        .map_err(Error::os("fallocate"))
}

/// The error for a new segment's name that is taken; `None` if it is free by now.
pub(super) fn taken(name: &str) -> Option<Error> {
    lifeline::taken(&path(name))
}

/// Opens a segment by its name, and checks that it is safe to map.
pub(super) fn open_checked(name: &str, geometry: Geometry) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path(name), flags, Mode::empty()).map_err(|errno| match errno {
        // A symbolic link, a directory, a socket.
        Errno::LOOP | Errno::ISDIR | Errno::NXIO => LayoutMismatch::NotMemory.into(),
        errno => Error::os("opening shared memory")(errno),
    })?;
    let found: Stat = fstat(&fd).map_err(Error::os("fstat"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(LayoutMismatch::NotMemory.into());
    }
    if found.st_uid != geteuid().as_raw() {
        return Err(LayoutMismatch::Foreign(found.st_uid).into());
    }
    let expected = geometry.mapped_len() as u64;
    let size = u64::try_from(found.st_size).unwrap_or(0);
    if size != expected {
        return Err(LayoutMismatch::Size { found: size, expected }.into());
    }
    let present = u64::try_from(found.st_blocks).unwrap_or(0).saturating_mul(512);
    if present < expected {
        return Err(LayoutMismatch::Sparse { present, expected }.into());
    }
    Ok(fd)
}

/// The path of the memory with this name.
fn path(name: &str) -> PathBuf {
    format!("{SHARED_MEMORY}{name}").into()
}

/// Removes this user's names of owners that are gone; never a living owner's. Names that cannot be
/// read or removed are left for the next sweep.
pub(crate) fn sweep() {
    let Ok(entries) = fs::read_dir(SHARED_MEMORY) else { return };
    let mut left: BTreeMap<Owner, BTreeSet<u32>> = BTreeMap::new();
    for (owner, index) in entries.flatten().filter(is_this_users).filter_map(|entry| parse(&entry))
    {
        left.entry(owner).or_default().extend(index);
    }
    for (owner, indices) in left {
        // Locked by us until its names are removed. Without a lifeline, the owner was killed while
        // it removed its names.
        let gone = match Lifeline::inherit(&owner.lifeline()) {
            Ok(Some(lifeline)) => Some(lifeline),
            Ok(None) if !owner.lifeline().exists() => None,
            Ok(None) | Err(_) => continue,
        };
        for index in indices {
            // Fails if another process was quicker.
            let _ = shm::unlink(owner.segment(index));
        }
        drop(gone);
    }
}

/// As [`sweep`], on a background thread: reading a large directory takes a while, and must not
/// delay the watcher thread.
pub(crate) fn sweep_aside() {
    let state = SWEEP.get();
    // A sweep under way may have missed a new name: it is repeated.
    if state.swap(ASKED, Ordering::Relaxed) != IDLE {
        return;
    }
    let thread = thread::Builder::new().name("shmferry-sweep".to_owned());
    // If no thread can be started, it runs here.
    if thread.spawn(|| sweep_while_asked(state)).is_err() {
        sweep_while_asked(state);
    }
}

/// Whether a background sweep is under way in this process, and whether it is to be repeated.
static SWEEP: PerProcess<AtomicU8> = PerProcess::new();

const IDLE: u8 = 0;
const UNDER_WAY: u8 = 1;
const ASKED: u8 = 2;

fn sweep_while_asked(state: &AtomicU8) {
    loop {
        state.store(UNDER_WAY, Ordering::Relaxed);
        sweep();
        let ended = state.compare_exchange(UNDER_WAY, IDLE, Ordering::Relaxed, Ordering::Relaxed);
        if ended.is_ok() {
            return;
        }
    }
}

/// Removes all names of an owner of this process, its lifeline last.
pub(super) fn remove(owner: Owner) {
    let Ok(entries) = fs::read_dir(SHARED_MEMORY) else { return };
    for entry in entries.flatten() {
        if let Some((found, Some(index))) = parse(&entry)
            && found == owner
        {
            // Fails if it was removed meanwhile.
            let _ = shm::unlink(owner.segment(index));
        }
    }
    // Fails if the pool's drop has just removed it.
    let _ = fs::remove_file(owner.lifeline());
}

fn is_this_users(entry: &DirEntry) -> bool {
    entry.metadata().is_ok_and(|found| found.uid() == geteuid().as_raw())
}

/// The owner in a name, and the segment's number; `None` for a lifeline.
fn parse(entry: &DirEntry) -> Option<(Owner, Option<u32>)> {
    let name = entry.file_name().into_string().ok()?;
    let mut parts = name.strip_prefix("shmferry-")?.split('-');
    let pid = parts.next()?.parse().ok()?;
    let pool = parts.next().filter(|pool| pool.len() == 16)?;
    let owner = Owner { pid, pool: PoolId(u64::from_str_radix(pool, 16).ok()?) };
    let index = parts.next().map(|index| index.parse().ok());
    match (index, parts.next()) {
        (None, None) => Some((owner, None)),
        (Some(Some(index)), None) => Some((owner, Some(index))),
        _ => None,
    }
}
