//! Opens this user's files at names that other users could take first, as in `/dev/shm`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, lstat, open};
use rustix::process::geteuid;

use crate::error::{Error, Result};

/// Opens a path, if it is of this kind and owned by this user. Does not wait for the other end of a
/// FIFO, and follows no symbolic link. `call` names the operation in errors.
///
/// # Errors
/// [`Error::NameTaken`] when the path is anything else, [`Error::Os`] when a system call fails.
pub(crate) fn open_own(
    path: &Path,
    access: OFlags,
    mode: Mode,
    kind: FileType,
    call: &'static str,
) -> Result<OwnedFd> {
    let flags = access | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match open(path, flags, mode) {
        Ok(fd) => {
            let found = fstat(&fd).map_err(Error::os("fstat"))?;
            if is_own(&found, kind) { Ok(fd) } else { Err(taken_by(path, &found)) }
        }
        Err(errno) => match lstat(path) {
            Ok(found) if !is_own(&found, kind) => Err(taken_by(path, &found)),
            _ => Err(Error::os(call)(named(path, &errno.into()))),
        },
    }
}

/// The same error, which says where.
pub(crate) fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// What stands at a path that is needed.
pub(crate) fn taken_by(path: &Path, found: &Stat) -> Error {
    let kind = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "something",
    };
    Error::NameTaken { path: path.to_owned(), kind, uid: found.st_uid }
}

/// Whether it is of this kind, and owned by this user.
pub(crate) fn is_own(found: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(found.st_mode) == kind && found.st_uid == geteuid().as_raw()
}
