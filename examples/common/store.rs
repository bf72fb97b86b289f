//! What the cache serves: a manifest's files, or all that is beneath a directory (rule S4).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use shmferry::files::{Directory, Entry, open_regular};

use super::getfile::check_path;

/// Files by key.
pub enum Store {
    /// Each key with its own path.
    Manifest(HashMap<Vec<u8>, PathBuf>),
    /// Keys are paths beneath this directory.
    Directory(Directory),
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
        let opened = Directory::open(path).map(Store::Directory);
        opened.map_err(|error| format!("{}: {error}", path.display()))
    }

    fn manifest(manifest: &Path) -> Result<Store, String> {
        let text =
            fs::read(manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
        // Some editors put a byte order mark at the beginning of UTF-8 text.
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
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
            let why = "names no file; expected KEY PATH on each line";
            return Err(format!("{}: {why}", manifest.display()));
        }
        Ok(Store::Manifest(files))
    }

    /// Opens the file behind a key; `None` when there is no such regular file. Blocks while another
    /// process gives its lease on the file back, with the worker's place free.
    pub fn look_up(&self, key: &[u8]) -> io::Result<Option<File>> {
        match self {
            Store::Manifest(files) => files.get(key).map_or(Ok(None), open_regular),
            Store::Directory(root) => root.file(key),
        }
    }

    /// The names in the directory behind a key, as [`LIST`](super::asked::LIST) says; `None` when
    /// there is none, and for a manifest.
    pub fn list(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Store::Directory(root) = self else { return Ok(None) };
        let line = |entry: Entry| {
            let kind = if entry.is_directory { "d" } else { "f" };
            [format!("{kind}{} ", entry.len).as_bytes(), entry.name.as_bytes(), b"\0"].concat()
        };
        Ok(root.list(key)?.map(|entries| entries.into_iter().flat_map(line).collect()))
    }
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
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC; // no FIFO is waited for
    let opened = open(&path, flags, Mode::empty()).map_err(io::Error::from);
    match opened.and_then(|fd| Ok(File::from(fd).metadata()?.is_file())) {
        Ok(true) => Ok(Some((key.to_vec(), path))),
        Ok(false) => Err(format!("{} is not a regular file", path.display())),
        // Only a regular file has leases. Who holds one is not waited for here.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Some((key.to_vec(), path))),
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
