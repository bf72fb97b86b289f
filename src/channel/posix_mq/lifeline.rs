//! A lifeline: a FIFO that its owner holds open and locked, so that the kernel tells of its end.
//!
//! Where no connection links two processes, each follows the other's lifeline: it hangs up when its
//! owner dies or drops it, whatever the reason. The lock tells a dead owner's lifeline from a
//! living one's, for whoever clears up after the dead (rule L3).

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

/// How long whoever sweeps a new lifeline by mistake may take to remove it, in moments.
const SWEPT: u32 = 1000;
const MOMENT: Duration = Duration::from_millis(1);

/// A lifeline in our hands. Dropping it removes its name and hangs up on its followers.
pub(crate) struct Lifeline {
    path: PathBuf,
    /// The name is ours to remove.
    is_named: AtomicBool,
    _fifo: OwnedFd,
    origin: Origin,
}

impl Lifeline {
    /// Makes a lifeline where none stands, held from now on.
    pub(crate) fn hold(path: PathBuf) -> Result<Lifeline> {
        for attempt in 0.. {
            let mode = Mode::RUSR | Mode::WUSR;
            match mknodat(CWD, &path, FileType::Fifo, mode, 0) {
                Ok(()) => {}
                // Somebody who sweeps took it for a dead one's, before it was locked, and removes
                // it.
                Err(Errno::EXIST) if (1..SWEPT).contains(&attempt) => thread::sleep(MOMENT),
                Err(errno) => {
                    let taken = if errno == Errno::EXIST { taken(&path) } else { None };
                    return Err(taken.unwrap_or_else(|| Error::os("making a lifeline")(errno)));
                }
            }
            // Open at both ends: opening only the one to write waits for somebody who reads.
            let Some(fifo) = open_fifo(&path, OFlags::RDWR)? else { continue };
            if lock_now(&fifo).map_err(Error::os("locking a lifeline"))? && stands_at(&path, &fifo)
            {
                return Ok(Lifeline::of(path, fifo));
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// Takes over what a dead owner has left; `None` if it lives, or has left nothing.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when what stands there is no lifeline of this user.
    pub(crate) fn inherit(path: &Path) -> Result<Option<Lifeline>> {
        // For reading, so that its followers are not kept from learning that nobody else writes.
        let Some(fifo) = open_fifo(path, OFlags::RDONLY)? else { return Ok(None) };
        let locked = lock_now(&fifo).map_err(Error::os("locking a lifeline"))?;
        let stands = locked && stands_at(path, &fifo);
        // Made only if it is ours: a lifeline that is dropped removes its name.
        Ok(stands.then(|| Lifeline::of(path.to_owned(), fifo)))
    }

    fn of(path: PathBuf, fifo: OwnedFd) -> Lifeline {
        Lifeline { path, is_named: AtomicBool::new(true), _fifo: fifo, origin: Origin::here() }
    }

    /// Removes the name, for a successor's lifeline to take its place. Followers stay with this
    /// one. Does nothing in a child of `fork`: the name is its parent's.
    pub(crate) fn remove_name(&self) {
        if self.origin.is_here() && self.is_named.swap(false, Relaxed) {
            // Nothing can be done about a failure here; a later owner sweeps it.
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Opens another's lifeline, to be told of its end; `None` if its owner is gone.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when what stands there is no lifeline of this user.
    pub(crate) fn follow(path: &Path) -> Result<Option<OwnedFd>> {
        Ok(open_fifo(path, OFlags::RDONLY)?.filter(|fifo| is_held(fifo)))
    }
}

/// Whether the owner of a lifeline that is followed still holds it.
pub(crate) fn is_held(fifo: impl AsFd) -> bool {
    // Without a writer there is an end to read; with one, nothing yet.
    !matches!(rustix::io::read(fifo, &mut [0; 1]), Ok(0))
}

/// Whether a process, as we number it, is the owner of a lifeline that is followed, or has it open
/// like us: a pid that its owner told may mean another process here, where the two see different
/// numbers.
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

/// The error for a name that was to be made and is taken; `None` if nothing stands there by now.
pub(super) fn taken(path: &Path) -> Option<Error> {
    lstat(path).ok().map(|found| taken_by(path, &found))
}

/// Opens this user's FIFO, without waiting for the other end; `None` if nothing stands there.
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
