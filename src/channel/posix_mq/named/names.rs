//! Names in the file system of shared memory: allocated, checked, swept when their owner is gone.

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

/// Where Linux keeps POSIX shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

impl Owner {
    /// Where its lifeline is.
    pub(crate) fn lifeline(self) -> PathBuf {
        Path::new(SHARED_MEMORY).join(self.stem())
    }

    /// Whether one of its segments still has its name.
    pub(crate) fn has_named(self, index: u32) -> bool {
        fs::symlink_metadata(path(&self.segment(index))).is_ok()
    }
}

/// Bytes that named segments can still take: of memory, and of the file system that they are in.
pub(super) fn available() -> Option<u64> {
    let room =
        statvfs(SHARED_MEMORY).ok().map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    match (available_memory(), room) {
        (Some(memory), Some(room)) => Some(memory.min(room)),
        (memory, room) => memory.or(room),
    }
}

/// Gives a new segment its blocks, so that a full file system is an error now and not a SIGBUS
/// later.
pub(super) fn allocate(name: &str, geometry: Geometry) -> Result<()> {
    let fd = shm::open(name, shm::OFlags::RDWR, Mode::empty()).map_err(Error::os("shm_open"))?;
    let len = geometry.mapped_len() as u64;
    retry_on_intr(|| fallocate(&fd, FallocateFlags::empty(), 0, len))
        .map_err(Error::os("fallocate"))
}

/// The error for a name of a new segment that is taken; `None` if it is free by now.
pub(super) fn taken(name: &str) -> Option<Error> {
    lifeline::taken(&path(name))
}

/// Opens what stands at a segment's name, and checks that it is safe to map.
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

/// Where the memory of this name is.
fn path(name: &str) -> PathBuf {
    format!("{SHARED_MEMORY}{name}").into()
}

/// Removes what owners that are gone have left, among this user's names; never a living owner's.
/// What cannot be read or removed is left for another time.
pub(crate) fn sweep() {
    let Ok(entries) = fs::read_dir(SHARED_MEMORY) else { return };
    let mut left: BTreeMap<Owner, BTreeSet<u32>> = BTreeMap::new();
    for (owner, index) in entries.flatten().filter(is_this_users).filter_map(|entry| parse(&entry))
    {
        left.entry(owner).or_default().extend(index);
    }
    for (owner, indices) in left {
        // Locked by us until its names are gone; without a lifeline, the owner was ending already,
        // and these are what it did not come to.
        let gone = match Lifeline::inherit(&owner.lifeline()) {
            Ok(Some(lifeline)) => Some(lifeline),
            Ok(None) if !owner.lifeline().exists() => None,
            Ok(None) | Err(_) => continue,
        };
        for index in indices {
            // Fails if somebody else was quicker.
            let _ = shm::unlink(owner.segment(index));
        }
        drop(gone);
    }
}

/// As [`sweep`], on a thread of its own. Reading a large directory takes a while, and the thread
/// that tells of deaths has the next one to tell.
pub(crate) fn sweep_aside() {
    let state = SWEEP.get();
    // One that is under way may have passed a name by: it is repeated.
    if state.swap(ASKED, Ordering::Relaxed) != IDLE {
        return;
    }
    let thread = thread::Builder::new().name("shmferry-sweep".to_owned());
    // Without a thread to be had, it is done here.
    if thread.spawn(|| sweep_while_asked(state)).is_err() {
        sweep_while_asked(state);
    }
}

/// Whether a sweep on a thread of its own is under way in this process, and was asked for again.
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

/// Removes all names of an owner in this process, its lifeline last.
pub(super) fn remove(owner: Owner) {
    let Ok(entries) = fs::read_dir(SHARED_MEMORY) else { return };
    for entry in entries.flatten() {
        if let Some((found, Some(index))) = parse(&entry)
            && found == owner
        {
            // Fails if it went meanwhile.
            let _ = shm::unlink(owner.segment(index));
        }
    }
    // Fails if nothing but it was left to be dropped, and that was.
    let _ = fs::remove_file(owner.lifeline());
}

fn is_this_users(entry: &DirEntry) -> bool {
    entry.metadata().is_ok_and(|found| found.uid() == geteuid().as_raw())
}

/// The owner whose name this is, and the segment, unless it is the lifeline.
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
