//! Opens files to send, by keys and paths that may be anything: only regular ones, none outside
//! their directory, and none that holds its worker up.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
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
        regular(|flags| self.open_beneath(path, flags))
    }

    /// The regular files and the directories in the directory that a key names, sorted by name: of
    /// a directory beneath this one, or of this one for an empty key or a slash. `None` when there
    /// is no such directory. What a symbolic link leads to counts as in [`file`](Self::file).
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # std::fs::create_dir(dir.path().join("more"))?;
    /// # std::fs::write(dir.path().join("a.txt"), "hello")?;
    /// use shmferry::files::Directory;
    ///
    /// let root = Directory::open(dir.path())?;
    /// let found = root.list("/")?.expect("it is there");
    /// assert_eq!((found[0].name.to_str(), found[0].len), (Some("a.txt"), 5));
    /// assert!(found[1].is_directory);
    /// assert!(root.list("/absent/")?.is_none() && root.list("/../")?.is_none());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the system other than that there is no such directory.
    pub fn list(&self, key: impl AsRef<[u8]>) -> io::Result<Option<Vec<Entry>>> {
        let key = key.as_ref();
        // With a dot before it, the root and what is in it have paths of one kind.
        let path = [b"./", key.strip_prefix(b"/").unwrap_or(key), b"/"].concat();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match self.open_beneath(&path, flags) {
            Ok(directory) => directory,
            Err(errno) if is_absence(errno) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let mut entries = Vec::new();
        for entry in Dir::new(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            // What has gone since, leads out of bounds, or must not be seen, is not there.
            let named = self.open_beneath(&[&path, name].concat(), NAME_ONLY);
            let Some(found) = named.ok().and_then(|it| File::from(it).metadata().ok()) else {
                continue;
            };
            if found.is_file() || found.is_dir() {
                let name = OsStr::from_bytes(name).to_owned();
                entries.push(Entry { name, len: found.len(), is_directory: found.is_dir() });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(entries))
    }

    fn open_beneath(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut opened = Err(Errno::AGAIN);
        for _ in 0..TRIES {
            opened = openat2(&self.0, path, flags, Mode::empty(), bounds);
            if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
                break;
            }
        }
        opened
    }
}

/// What [`Directory::list`] tells of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The name, without the directory's.
    pub name: OsString,
    /// Bytes of a file, as it says.
    pub len: u64,
    /// Whether it is a directory, or else a regular file.
    pub is_directory: bool,
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
        Err(errno) if is_absence(errno) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Absent, out of bounds, no name for a file, or no file.
fn is_absence(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOENT
            | Errno::NOTDIR
            | Errno::XDEV
            | Errno::LOOP
            | Errno::INVAL
            | Errno::NAMETOOLONG
            | Errno::NXIO
            | Errno::NODEV
    )
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
