//! What the cache serves: a manifest's files, or all that is beneath a directory (rule S4).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;
use shmferry::Size;
use shmferry::workers::blocking;

use super::getfile::check_path;

/// Non-blocking, so that a FIFO cannot hold us up before we see that it is one.
const READ: OFlags =
    OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Names a file without opening it: no lease is broken, no FIFO waited for.
const NAME_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Tries to open a file while others rename what is on its way; the kernel asks for more each time.
const TRIES: usize = 32;

/// Files by key.
pub enum Store {
    /// Each key with its own path.
    Manifest(HashMap<Vec<u8>, PathBuf>),
    /// Keys are paths beneath this directory.
    Directory(OwnedFd),
}

impl Store {
    /// Opens a manifest, or a directory.
    pub fn open(path: &Path) -> Result<Store, String> {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Store::directory(path),
            Ok(_) => Store::manifest(path),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Opens a directory.
    pub fn directory(path: &Path) -> Result<Store, String> {
        let complain = |error| format!("{}: {error}", path.display());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(|errno| complain(errno.into()))?;
        let store = Store::Directory(root);
        store.look_up(b".").map_err(complain)?; // an old kernel, a directory closed to us
        Ok(store)
    }

    fn manifest(manifest: &Path) -> Result<Store, String> {
        let text =
            fs::read(manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
        let directory = manifest.parent().unwrap_or(Path::new(""));
        let mut files = HashMap::new();
        for (line, number) in text.split(|byte| *byte == b'\n').zip(1..) {
            let added = match parse_line(line.trim_ascii(), directory) {
                Ok(Some((key, _))) if files.contains_key(&key) => {
                    Err(format!("the key {} is taken already", key.escape_ascii()))
                }
                entry => entry.map(|entry| files.extend(entry)),
            };
            added.map_err(|reason| format!("{}:{number}: {reason}", manifest.display()))?;
        }
        if files.is_empty() {
            let manifest = manifest.display();
            return Err(format!("{manifest}: names no file; expected KEY PATH on each line"));
        }
        Ok(Store::Manifest(files))
    }

    /// Opens the file behind a key, and tells its size; `None` when there is no such regular file.
    /// One that holds less or more than its metadata says, as in procfs, is of unknown size.
    /// Blocks while another process gives its lease on the file back, with the worker's place lent.
    pub fn look_up(&self, key: &[u8]) -> io::Result<Option<(File, Size)>> {
        let opened = match self {
            Store::Manifest(files) => match files.get(key) {
                Some(path) => past_leases(|flags| open(path, flags, Mode::empty())),
                None => return Ok(None),
            },
            Store::Directory(root) => {
                let path = key.strip_prefix(b"/").unwrap_or(key);
                past_leases(|flags| open_beneath(root, path, flags))
            }
        };
        match opened {
            Ok(fd) => {
                regular(fd)?.map(|file| Size::of_file(&file).map(|size| (file, size))).transpose()
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
}

/// What some editors put at the beginning of UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn open_beneath(root: &OwnedFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut opened = Err(Errno::AGAIN);
    for _ in 0..TRIES {
        opened = openat2(root, path, flags, Mode::empty(), bounds);
        if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    opened
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

fn regular(fd: OwnedFd) -> io::Result<Option<File>> {
    let file = File::from(fd);
    Ok(file.metadata()?.is_file().then_some(file))
}

/// The key and the path on one line; `None` on a blank one, and on a comment.
fn parse_line(line: &[u8], directory: &Path) -> Result<Option<(Vec<u8>, PathBuf)>, String> {
    if line.is_empty() || line.starts_with(b"#") {
        return Ok(None);
    }
    let blank = line.iter().position(|byte| matches!(byte, b' ' | b'\t'));
    let Some((key, path)) = blank.map(|at| line.split_at(at)) else {
        return Err(format!("expected KEY PATH, found {} alone", line.escape_ascii()));
    };
    check_path(key).map_err(|why| format!("the key {} is not usable: {why}", shown(key)))?;
    let path = directory.join(OsStr::from_bytes(path.trim_ascii()));
    let opened = match open(&path, READ, Mode::empty()) {
        // Only a regular file has leases. Whoever holds one is not waited for here.
        Err(Errno::AGAIN) => return Ok(Some((key.to_vec(), path))),
        opened => opened.map_err(io::Error::from).and_then(regular),
    };
    match opened {
        Ok(Some(_)) => Ok(Some((key.to_vec(), path))),
        Ok(None) => Err(format!("{} is not a regular file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// A key in an error: of a long one, its beginning.
fn shown(key: &[u8]) -> String {
    const MOST: usize = 60;
    match key.get(..MOST) {
        Some(start) if key.len() > MOST => format!("{}...", start.escape_ascii()),
        _ => key.escape_ascii().to_string(),
    }
}
