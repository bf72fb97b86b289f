//! What the cache serves: a manifest's files, or all that is beneath a directory (rule S4).

use std::collections::{HashMap, hash_map::Entry};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Non-blocking, so that a FIFO cannot hold us up before we see that it is one.
const READ: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

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
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| complain(errno.into()))?;
        let store = Store::Directory(root);
        store.look_up(b".").map_err(complain)?; // an old kernel, a directory closed to us
        Ok(store)
    }

    fn manifest(manifest: &Path) -> Result<Store, String> {
        let text = fs::read(manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
        let directory = manifest.parent().unwrap_or(Path::new(""));
        let mut files = HashMap::new();
        for (line, number) in text.split(|byte| *byte == b'\n').zip(1..) {
            let entry = parse_line(line.trim_ascii(), directory);
            let added = entry.and_then(|entry| match entry {
                None => Ok(()),
                Some((key, path)) => match files.entry(key) {
                    Entry::Vacant(vacant) => {
                        vacant.insert(path);
                        Ok(())
                    }
                    Entry::Occupied(taken) => {
                        Err(format!("the key {} is taken already", taken.key().escape_ascii()))
                    }
                },
            });
            added.map_err(|reason| format!("{}:{number}: {reason}", manifest.display()))?;
        }
        Ok(Store::Manifest(files))
    }

    /// Opens the file behind a key, and tells its size; `None` when there is no such regular file.
    pub fn look_up(&self, key: &[u8]) -> io::Result<Option<(File, u64)>> {
        let opened = match self {
            Store::Manifest(files) => match files.get(key) {
                Some(path) => rustix::fs::open(path, READ, Mode::empty()),
                None => return Ok(None),
            },
            Store::Directory(root) => open_beneath(root, key.strip_prefix(b"/").unwrap_or(key)),
        };
        match opened {
            Ok(fd) => regular(fd),
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

fn open_beneath(root: &OwnedFd, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut opened = Err(Errno::AGAIN);
    for _ in 0..TRIES {
        opened = openat2(root, path, READ, Mode::empty(), bounds);
        if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    opened
}

fn regular(fd: OwnedFd) -> io::Result<Option<(File, u64)>> {
    let file = File::from(fd);
    let found = file.metadata()?;
    Ok(found.is_file().then_some((file, found.len())))
}

/// The key and the path on one line; `None` on a blank one.
fn parse_line(line: &[u8], directory: &Path) -> Result<Option<(Vec<u8>, PathBuf)>, String> {
    if line.is_empty() {
        return Ok(None);
    }
    let blank = line.iter().position(|byte| matches!(byte, b' ' | b'\t'));
    let Some((key, path)) = blank.map(|at| line.split_at(at)) else {
        return Err(format!("expected KEY PATH, found {} alone", line.escape_ascii()));
    };
    let path = directory.join(OsStr::from_bytes(path.trim_ascii()));
    let opened = rustix::fs::open(&path, READ, Mode::empty()).map_err(io::Error::from).and_then(regular);
    match opened {
        Ok(Some(_)) => Ok(Some((key.to_vec(), path))),
        Ok(None) => Err(format!("{} is not a regular file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}
