//! The path that a server listens at: locked while it lives, taken over after its death.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, lstat};
use rustix::process::getuid;

use crate::channel::lock_file::LockFile;
use crate::error::{Error, Misuse, Result};
use crate::own_file::{named, taken_by};
use crate::process::Origin;

use super::{socket, socket_address};

/// The most connections that wait to be accepted; the system may cap it.
const BACKLOG: i32 = 1024;

/// The mode of a directory that a server has made: private, and sticky. By the sticky bit a
/// successor knows that the last server is to remove the directory, even if the first was killed.
const MADE_DIR: u32 = 0o1700;

/// A path that this process serves at. Dropping it removes everything it created there.
pub(super) struct Address {
    path: PathBuf,
    /// True once our socket is at the path, and so ours to remove.
    bound: bool,
    origin: Origin,
    /// Dropped after the socket: while it is locked, no other process serves here.
    _lock: LockFile,
    /// Dropped last.
    _made_dir: Option<MadeDir>,
}

/// A directory that a server made, and removes.
struct MadeDir(PathBuf, Origin);

impl Address {
    /// Takes the path, and listens there.
    pub(super) fn listen(path: &Path) -> Result<(Address, OwnedFd)> {
        let socket_address = socket_address(path)?;
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);

        let address_text = format!("unix:{}", path.display());
        let mut made_dir = make_parent(path)?;
        let mut locked = LockFile::take(&lock_path, &address_text);
        if matches!(&locked, Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound)
        {
            // A predecessor that ended just now has removed its directory.
            drop(made_dir);
            made_dir = make_parent(path)?;
            locked = LockFile::take(&lock_path, &address_text);
        }
        let (mut lock, _) = locked?;
        lock.sign("")?;
        let (path_buf, origin) = (path.to_owned(), Origin::here());
        let mut address =
            Address { path: path_buf, bound: false, origin, _lock: lock, _made_dir: made_dir };

        // We have the lock, so a socket at the path has no living owner. Anything else there is not
        // ours to remove: `bind` reports that the address is in use.
        match lstat(path) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Socket => {
                fs::remove_file(path).map_err(Error::os("removing a dead server's socket"))?;
            }
            Ok(found) => return Err(taken_by(path, &found)),
            Err(_) => {} // nothing, or `bind` says what is wrong
        }
        let listener = socket()?;
        rustix::net::bind(&listener, &socket_address).map_err(Error::os("bind"))?;
        address.bound = true;
        // Before `listen`, so that no other user can have connected (S3).
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(Error::os("chmod"))?;
        rustix::net::listen(&listener, BACKLOG).map_err(Error::os("listen"))?;
        Ok((address, listener))
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        // A failure is ignored: the next server removes leftovers.
        if self.bound && self.origin.is_here() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl MadeDir {
    fn new(path: PathBuf) -> MadeDir {
        MadeDir(path, Origin::here())
    }
}

impl Drop for MadeDir {
    fn drop(&mut self) {
        if self.1.is_here() {
            let _ = fs::remove_dir(&self.0); // fails if it is not empty
        }
    }
}

/// Checks that a directory is private to this user, if it exists.
pub(super) fn check_private(dir: &Path) -> Result<()> {
    match fs::symlink_metadata(dir) {
        Ok(found)
            if found.is_dir() && found.uid() == getuid().as_raw() && found.mode() & 0o022 == 0 =>
        {
            Ok(())
        }
        Ok(_) => Err(Misuse::UnsafeDirectory(dir.to_owned()).into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::os("looking at the runtime directory")(error)),
    }
}

/// Makes the directory of `path`, if it is missing; returns it if this server is to remove it: if
/// this or an earlier server made it.
fn make_parent(path: &Path) -> Result<Option<MadeDir>> {
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else {
        return Ok(None);
    };
    match DirBuilder::new().mode(MADE_DIR).create(dir) {
        Ok(()) => Ok(Some(MadeDir::new(dir.to_owned()))),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let is_made = fs::symlink_metadata(dir).is_ok_and(|found| {
                let mode = found.mode() & 0o7777;
                found.is_dir() && found.uid() == getuid().as_raw() && mode == MADE_DIR
            });
            Ok(is_made.then(|| MadeDir::new(dir.to_owned())))
        }
        Err(error) => Err(Error::os("making the socket's directory")(named(dir, &error))),
    }
}

#[cfg(test)]
mod tests;
