//! The path that a server listens at: held by a lock while it lives, taken over when it is dead.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::getuid;

use crate::error::{Error, Misuse, Result};

use super::{socket, socket_address};

/// Connections that wait to be accepted, as the system caps it.
const BACKLOG: i32 = 1024;

/// Stands in the lock file, after the pid, if its server made the directory.
const MADE_DIR: &str = "made its directory\n";

/// A path that this process serves at. Dropping it removes all that it put there.
pub(super) struct Address {
    path: PathBuf,
    /// What stands at the path is our socket, ours to remove.
    bound: bool,
    lock_path: PathBuf,
    /// Locked: the kernel lets go of it when this process ends, however it ends.
    _lock: File,
    made_dir: Option<PathBuf>,
}

impl Address {
    /// Takes the path, and listens there.
    pub(super) fn listen(path: &Path) -> Result<(Address, OwnedFd)> {
        let socket_address = socket_address(path)?;
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);

        let mut made_dir = make_parent(path)?;
        let mut locked = lock_exclusively(path, &lock_path);
        if matches!(&locked, Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound) {
            // A predecessor that ended just now has taken its directory along.
            made_dir = make_parent(path)?;
            locked = lock_exclusively(path, &lock_path);
        }
        let (mut lock, predecessor) = locked?;
        // A killed server's directory is ours to remove in its place.
        if predecessor.ends_with(MADE_DIR) {
            made_dir = path.parent().map(Path::to_owned);
        }
        let note = if made_dir.is_some() { MADE_DIR } else { "" };
        write!(lock, "{}\n{note}", std::process::id()).map_err(Error::os("writing the lock file"))?;
        let mut address = Address { path: path.to_owned(), bound: false, lock_path, _lock: lock, made_dir };

        // We hold the lock, so a socket that stands there has no living owner. Anything else that
        // stands there is not ours to remove: `bind` says that the address is in use.
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            fs::remove_file(path).map_err(Error::os("removing a dead server's socket"))?;
        }
        let listener = socket()?;
        rustix::net::bind(&listener, &socket_address).map_err(Error::os("bind"))?;
        address.bound = true;
        // Before `listen`, so that nobody else could have connected (S3).
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(Error::os("chmod"))?;
        rustix::net::listen(&listener, BACKLOG).map_err(Error::os("listen"))?;
        Ok((address, listener))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the next server copes with leftovers. The
        // lock goes last: while its file stands, nobody else serves here.
        if self.bound {
            let _ = fs::remove_file(&self.path);
        }
        let _ = fs::remove_file(&self.lock_path);
        if let Some(dir) = &self.made_dir {
            let _ = fs::remove_dir(dir); // unless someone else uses it by now
        }
    }
}

/// Checks that a directory is this user's alone, if it is there.
pub(super) fn check_private(dir: &Path) -> Result<()> {
    match fs::symlink_metadata(dir) {
        Ok(found) if found.is_dir() && found.uid() == getuid().as_raw() && found.mode() & 0o022 == 0 => {
            Ok(())
        }
        Ok(_) => Err(Misuse::UnsafeDirectory(dir.to_owned()).into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::os("looking at the runtime directory")(error)),
    }
}

/// Makes the directory of `path`, if it is missing; says which it made.
fn make_parent(path: &Path) -> Result<Option<PathBuf>> {
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else { return Ok(None) };
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(Some(dir.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
        Err(error) => Err(Error::os("making the socket's directory")(error)),
    }
}

/// Locks the lock file, and empties it; returns also what a predecessor that was killed left in it.
fn lock_exclusively(path: &Path, lock_path: &Path) -> Result<(File, String)> {
    loop {
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(lock_path)
            .map_err(Error::os("opening the lock file"))?;
        let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let mut found = String::new();
        lock.read_to_string(&mut found).map_err(Error::os("reading the lock file"))?;
        match locked {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let pid = found.lines().next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
                return Err(Error::AddressInUse { address: path.display().to_string(), pid });
            }
            Err(errno) => return Err(Error::os("flock")(errno)),
        }
        // A server that ends removes the file: is what we locked still the one that stands there?
        let ours = lock.metadata().map_err(Error::os("fstat"))?;
        match fs::symlink_metadata(lock_path) {
            Ok(found) if (found.dev(), found.ino()) == (ours.dev(), ours.ino()) => {}
            _ => continue,
        }
        lock.rewind().and_then(|()| lock.set_len(0)).map_err(Error::os("emptying the lock file"))?;
        return Ok((lock, found));
    }
}
