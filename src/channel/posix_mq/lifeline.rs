//! A lifeline: a FIFO that its owner keeps open and locked, so that its death causes a hang-up.
//!
//! Where two processes have no connection, each follows the other's lifeline: it hangs up when its
//! owner dies or drops it. The lock distinguishes a living owner's lifeline from a dead one's,
//! whose names may be removed (rule L3).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, lstat, mknodat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::own_file::{open_own, taken_by};
use crate::process::Origin;

/// How many times to wait for a process that is removing a new lifeline by mistake.
const SWEPT: u32 = 1000;
const MOMENT: Duration = Duration::from_millis(1);

/// A lifeline of this process. Dropping it removes its name and hangs up on its followers.
pub(crate) struct Lifeline {
    path: PathBuf,
    /// True while the name exists and is ours to remove.
    is_named: AtomicBool,
    _fifo: OwnedFd,
    origin: Origin,
}

impl Lifeline {
    /// Makes a lifeline at a free name, and locks it.
    pub(crate) fn hold(path: PathBuf) -> Result<Lifeline> {
        for attempt in 0.. {
            let mode = Mode::RUSR | Mode::WUSR;
            match mknodat(CWD, &path, FileType::Fifo, mode, 0) {
                Ok(()) => {}
                // A sweep in another process saw it before it was locked, took it for a dead
                // owner's, and is removing it.
                Err(Errno::EXIST) if (1..SWEPT).contains(&attempt) => thread::sleep(MOMENT),
                Err(errno) => {
                    let taken = if errno == Errno::EXIST { taken(&path) } else { None };
                    return Err(taken.unwrap_or_else(|| Error::os("making a lifeline")(errno)));
                }
            }
            // Opened for reading and writing: opening it for writing alone would wait for a reader.
            let Some(fifo) = open_fifo(&path, OFlags::RDWR)? else { continue };
            if lock_now(&fifo).map_err(Error::os("locking a lifeline"))? && stands_at(&path, &fifo)
            {
                return Ok(Lifeline::of(path, fifo));
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// Takes over the lifeline of a dead owner; `None` if the owner is alive, or left none.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when the path is not a lifeline of this user.
    pub(crate) fn inherit(path: &Path) -> Result<Option<Lifeline>> {
        // For reading only: a writer would delay the hang-up that its followers wait for.
        let Some(fifo) = open_fifo(path, OFlags::RDONLY)? else { return Ok(None) };
        let locked = lock_now(&fifo).map_err(Error::os("locking a lifeline"))?;
        let stands = locked && stands_at(path, &fifo);
        // Constructed only if it is ours, because its drop removes the name.
        Ok(stands.then(|| Lifeline::of(path.to_owned(), fifo)))
    }

    fn of(path: PathBuf, fifo: OwnedFd) -> Lifeline {
        Lifeline { path, is_named: AtomicBool::new(true), _fifo: fifo, origin: Origin::here() }
    }

    /// Removes the name, so that a successor can use it. Followers stay with this lifeline. Does
    /// nothing in a child of `fork`: the name is its parent's.
    pub(crate) fn remove_name(&self) {
        if self.origin.is_here() && self.is_named.swap(false, Relaxed) {
            // A failure is ignored: a later owner removes the name.
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Opens another process's lifeline, to learn of its end; `None` if its owner is gone.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when the path is not a lifeline of this user.
    pub(crate) fn follow(path: &Path) -> Result<Option<OwnedFd>> {
        Ok(open_fifo(path, OFlags::RDONLY)?.filter(|fifo| is_held(fifo)))
    }
}

/// Whether the owner of a followed lifeline still has it open.
pub(crate) fn is_held(fifo: impl AsFd) -> bool {
    // Without a writer, a read returns end of file; with one, it would block.
    !matches!(rustix::io::read(fifo, &mut [0; 1]), Ok(0))
}

/// Whether the process with this pid has a followed lifeline open. A pid that the owner wrote may
/// be another process here, in a different pid namespace.
pub(crate) fn has_open(pid: u32, fifo: impl AsFd) -> bool {
    let (Ok(fifo), Ok(open)) = (fstat(fifo), fs::read_dir(format!("/proc/{pid}/fd"))) else {
        return false;
    };
    open.flatten()
        .filter_map(|fd| fs::metadata(fd.path()).ok())
        .any(|found| (found.dev(), found.ino()) == (fifo.st_dev, fifo.st_ino))
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        self.remove_name();
    }
}

/// The error for a new name that is taken; `None` if it is free by now.
pub(super) fn taken(path: &Path) -> Option<Error> {
    lstat(path).ok().map(|found| taken_by(path, &found))
}

/// Opens this user's FIFO, without waiting for the other end; `None` if there is none.
fn open_fifo(path: &Path, access: OFlags) -> Result<Option<OwnedFd>> {
    match open_own(path, access, Mode::empty(), FileType::Fifo, "opening a lifeline") {
        Ok(fifo) => Ok(Some(fifo)),
        Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn lock_now(fifo: &OwnedFd) -> io::Result<bool> {
    match flock(fifo, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn stands_at(path: &Path, fifo: &OwnedFd) -> bool {
    match (lstat(path), fstat(fifo)) {
        (Ok(there), Ok(ours)) => (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
