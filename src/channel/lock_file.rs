//! A lock file: locked while a server lives; the kernel releases the lock when the server dies.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::own_file::open_own;
use crate::process::Origin;

/// A file locked by this process; dropping it removes the file. What a predecessor wrote stays in
/// it until [`sign`](Self::sign): it tells the next server that there may be leftovers to remove.
pub(super) struct LockFile {
    path: PathBuf,
    file: File,
    ours: bool,
    origin: Origin,
}

impl LockFile {
    /// Locks the file; returns it with what a killed predecessor left in it.
    ///
    /// # Errors
    /// [`Error::AddressInUse`], with its pid, when a living server of `address` has locked it;
    /// [`Error::NameTaken`] when the path is not a regular file of this user.
    pub(super) fn take(path: &Path, address: impl Display) -> Result<(LockFile, String)> {
        loop {
            let mut file = open(path, OFlags::RDWR | OFlags::CREATE)?;
            let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
            let mut found = String::new();
            file.read_to_string(&mut found).map_err(Error::os("reading the lock file"))?;
            match locked {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let pid = pid_in(&found).unwrap_or(0);
                    return Err(Error::AddressInUse { address: address.to_string(), pid });
                }
                Err(errno) => return Err(Error::os("flock")(errno)),
            }
            // A server that ends removes the file: check that the locked file still has the name.
            let locked = file.metadata().map_err(Error::os("fstat"))?;
            match fs::symlink_metadata(path) {
                Ok(found) if (found.dev(), found.ino()) == (locked.dev(), locked.ino()) => {}
                _ => continue,
            }
            let (path, ours, origin) = (path.to_owned(), found.is_empty(), Origin::here());
            return Ok((LockFile { path, file, ours, origin }, found));
        }
    }

    /// Writes this process's pid. To be called after the predecessor's
    /// leftovers are removed.
    pub(super) fn sign(&mut self) -> Result<()> {
        let content = format!("{}\n", std::process::id());
        let file = &mut self.file;
        file.rewind()
            .and_then(|()| file.write_all(content.as_bytes()))
            .and_then(|()| file.set_len(content.len() as u64))
            .map_err(Error::os("writing the lock file"))?;
        self.ours = true;
        Ok(())
    }
}

/// The pid in a server's lock file; `None` if there is none, or the file is not this user's.
#[cfg_attr(not(feature = "posix-mq"), allow(dead_code))]
pub(super) fn holder(path: &Path) -> Option<u32> {
    let mut content = String::new();
    open(path, OFlags::RDONLY).ok()?.take(LONGEST_PID).read_to_string(&mut content).ok()?;
    pid_in(&content)
}

/// The most bytes of the first line.
const LONGEST_PID: u64 = 16;

fn open(path: &Path, access: OFlags) -> Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    open_own(path, access, mode, FileType::RegularFile, "opening the lock file").map(File::from)
}

/// The pid that a lock file's content begins with.
fn pid_in(content: &str) -> Option<u32> {
    content.lines().next()?.parse().ok()
}

impl Drop for LockFile {
    fn drop(&mut self) {
        if self.ours && self.origin.is_here() {
            // A failure is ignored: the next server removes leftovers.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests;
