//! Opens files to send, by keys and paths that may be anything: only regular ones, none outside
//! their directory, and none that holds its worker up.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;

use crate::workers::blocking;

/// Non-blocking: opening a FIFO does not wait for its writer.
const READ: OFlags =
    OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Names a file without opening it: no lease is broken, no FIFO waited for.
const NAME_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Tries to open a file while others rename what is on its way: the kernel asks for more each time.
const TRIES: usize = 32;

/// The regular files beneath a directory, by key: what a server can hand out of it to anybody.
///
/// ```no_run
/// use shmferry::{Refusal, Server, files::Directory};
///
/// let root = Directory::open("/srv/pictures")?;
/// let server = Server::bind("unix:/run/me/cache.sock")?.serve(8, move |request| {
///     match root.file(request.key())? {
///         Some(file) => request.send_file(&file),
///         None => request.refuse(Refusal::NotFound),
///     }
/// })?;
/// # server.wait();
/// # Ok::<(), shmferry::Error>(())
/// ```
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    /// Opens a directory. It stays the same one when its name goes to another.
    ///
    /// # Errors
    /// Those of the system. Needs Linux 5.6, for `openat2`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Directory> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = Directory(open(path.as_ref(), flags, Mode::empty())?);
        // An old kernel, a directory closed to us.
        openat2(&directory.0, ".", OFlags::PATH, Mode::empty(), ResolveFlags::BENEATH)?;
        Ok(directory)
    }

    /// Opens the file that a key names: a path, with or without a slash before it. `None` when
    /// there is no such regular file beneath the directory: neither `..` nor a symbolic link leads
    /// out of it.
    ///
    /// Waits while another process gives its lease on the file back, as [`blocking`] does. Whatever
    /// the key names is opened for a moment: a process that waits for a reader of a FIFO there is
    /// let go on. Keep FIFOs and devices out of such a directory.
    ///
    /// # Errors
    /// Those of the system other than that there is no such file: no right to read it, say.
    pub fn file(&self, key: impl AsRef<[u8]>) -> io::Result<Option<File>> {
        let key = key.as_ref();
        let path = key.strip_prefix(b"/").unwrap_or(key);
        let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        regular(|flags| {
            let mut opened = Err(Errno::AGAIN);
            for _ in 0..TRIES {
                opened = openat2(&self.0, path, flags, Mode::empty(), bounds);
                if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
                    break;
                }
            }
            opened
        })
    }
}

/// Opens a file at a path that is trusted, as [`Directory::file`] does beneath a directory.
///
/// # Errors
/// As there.
pub fn open_regular(path: impl AsRef<Path>) -> io::Result<Option<File>> {
    regular(|flags| open(path.as_ref(), flags, Mode::empty()))
}

fn regular<F>(open_with: F) -> io::Result<Option<File>>
where
    F: Fn(OFlags) -> rustix::io::Result<OwnedFd>,
{
    match past_leases(open_with) {
        Ok(fd) => {
            let file = File::from(fd);
            Ok(file.metadata()?.is_file().then_some(file))
        }
        // Absent, out of bounds, no name for a file, or no file.
        Err(
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::XDEV
            | Errno::LOOP
            | Errno::INVAL
            | Errno::NAMETOOLONG
            | Errno::NXIO
            | Errno::NODEV,
        ) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens a file for reading. Where another process holds a lease on it, opening without blocking
/// fails; so then the file is named first, and opened with blocking once it is known to be regular.
fn past_leases<F>(open_with: F) -> rustix::io::Result<OwnedFd>
where
    F: Fn(OFlags) -> rustix::io::Result<OwnedFd>,
{
    match open_with(READ) {
        Err(Errno::AGAIN) => {}
        opened => return opened,
    }
    let named = open_with(NAME_ONLY)?;
    if FileType::from_raw_mode(fstat(&named)?.st_mode) != FileType::RegularFile {
        return Err(Errno::NXIO);
    }
    // The same inode, whatever its name stands for by now.
    let itself = format!("/proc/self/fd/{}", named.as_raw_fd());
    blocking(|| {
        loop {
            match open(&itself, READ.difference(OFlags::NONBLOCK), Mode::empty()) {
                Err(Errno::INTR) => {}
                opened => return opened,
            }
        }
    })
}
