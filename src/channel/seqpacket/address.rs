//! The path that a server listens at: locked while it lives, taken over after its death.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FileType, lstat};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use rustix::process::getuid;

use crate::channel::lock_file::LockFile;
use crate::error::{Error, Misuse, Result};
use crate::own_file::{is_own, named, taken_by};
use crate::process::Origin;
use crate::sync::Deadline;

use super::{socket, socket_address};

/// The most connections that wait to be accepted; the system may cap it.
const BACKLOG: i32 = 1024;

/// The mode of a directory that a server has made: private, and sticky. By the sticky bit a
/// successor knows that the last server is to remove the directory, even if the first was killed.
const MADE_DIR: u32 = 0o1700;

/// How often a directory is made anew that others remove meanwhile.
const TRIES: u32 = 1000;

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
        let mut tries = 0;
        let (made_dir, mut lock) = loop {
            let is_made = make_parent(path)?;
            match LockFile::take(&lock_path, &address_text) {
                Ok((lock, _)) => {
                    let dir = path.parent().filter(|_| is_made);
                    break (dir.map(|dir| MadeDir::new(dir.to_owned())), lock);
                }
                // A predecessor that ended just now has removed its directory.
                Err(Error::Os { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && tries < TRIES =>
                {
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        };
        lock.sign()?;
        let (path_buf, origin) = (path.to_owned(), Origin::here());
        let mut address =
            Address { path: path_buf, bound: false, origin, _lock: lock, _made_dir: made_dir };

        // We have the lock, so that no server of ours lives there. A socket of this user that
        // nothing listens at is a dead server's; anything else is not ours to remove.
        match lstat(path) {
            Ok(found) if is_own(&found, FileType::Socket) && is_dead(&socket_address)? => {
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

/// Whether nothing listens at this socket. A server that has just ended may have let go of its lock
/// a moment before its listener is closed: that is waited for.
fn is_dead(address: &SocketAddrUnix) -> Result<bool> {
    const MOMENT: Duration = Duration::from_secs(1);
    let end = Deadline::after(MOMENT);
    loop {
        match rustix::net::connect(&socket()?, address) {
            Err(Errno::CONNREFUSED) => return Ok(true),
            Err(Errno::PROTOTYPE) => return Ok(false), // of another kind than ours, and living
            _ if end.has_passed() => return Ok(false),
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Makes the directory of `path`, if it is missing; says whether it is to go with this server: if
/// this one or an earlier one has made it.
fn make_parent(path: &Path) -> Result<bool> {
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else {
        return Ok(false);
    };
    match DirBuilder::new().mode(MADE_DIR).create(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(fs::symlink_metadata(dir).is_ok_and(|found| {
                let mode = found.mode() & 0o5777; // the set-group bit comes from its parent
                found.is_dir() && found.uid() == getuid().as_raw() && mode == MADE_DIR
            }))
        }
        Err(error) => Err(Error::os("making the socket's directory")(named(dir, &error))),
    }
}

#[cfg(test)]
mod tests;
