//! What keys ask for beside a path, and what the cache tells of files: the web server's terms.

use std::os::unix::fs::MetadataExt;

use http_range_header::{EndPosition, StartPosition, parse_range_header};
use shmferry::{Metadata, Size};

/// After a path and a NUL, which no path holds: what the cache tells of the file.
pub const HEAD: &str = "head";
/// There: the names in a directory, each as `d` or `f`, its length, a blank, the name, a NUL.
pub const LIST: &str = "list";
/// The code of the refusal of a part that a file does not have.
pub const NO_SUCH_PART: u16 = 416;

/// Parts a key into the path, and what is asked for instead of all of the file.
pub fn split(key: &[u8]) -> (&[u8], Option<&str>) {
    let nul = key.iter().position(|byte| *byte == 0);
    let asked = |at| std::str::from_utf8(&key[at + 1..]).unwrap_or_default();
    (&key[..nul.unwrap_or(key.len())], nul.map(asked))
}

/// What the cache tells of a file, beside each answer from it. Numbers, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes of the whole file; the largest number if only its end will tell.
    pub len: u64,
    /// The first byte that follows.
    pub start: u64,
    /// When it was modified, in seconds since 1970: up to the year 9999.
    pub modified: u64,
    /// Differs once the file has changed; 0 while it is so new that a change might not show.
    pub version: u64,
}

impl Stamp {
    /// Looks at a file: before it is read, so that what is read is never older than its stamp.
    pub fn of(file: &std::fs::File) -> std::io::Result<Stamp> {
        let found = file.metadata()?;
        let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
        let parts = [found.ino(), found.len()].into_iter().chain(times.map(|time| time as u64));
        // FNV-1a: the same on every machine and in every version.
        let fnv = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let version = parts.flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, fnv);
        let len = Size::of_file(file)?.known();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        // Times come in ticks of up to a second; those of procfs mean nothing.
        let is_settled = len.is_some() && found.ctime() + 1 < now as i64;
        let modified = found.mtime().clamp(0, 253_402_300_799) as u64;
        let version = if is_settled { version.max(1) } else { 0 };
        Ok(Stamp { len: len.unwrap_or(u64::MAX), start: 0, modified, version })
    }

    /// The bytes that `bytes=5-9`, `bytes=5-` or `bytes=-5` asks for; `None` if there are none.
    pub fn part(&self, asked: &str) -> Option<std::ops::Range<u64>> {
        let [part] = parse_range_header(asked).ok()?.ranges.try_into().ok()?;
        let start = match part.start {
            StartPosition::Index(first) => first,
            StartPosition::FromLast(count) => self.len.saturating_sub(count),
        };
        let end = match part.end {
            EndPosition::Index(last) => last.saturating_add(1).min(self.len),
            EndPosition::LastByte => self.len,
        };
        (start < end).then_some(start..end)
    }
}

impl Metadata for Stamp {
    fn encode(&self) -> Vec<u8> {
        [self.len, self.start, self.modified, self.version].map(u64::to_le_bytes).concat()
    }

    fn decode(bytes: &[u8]) -> Option<Stamp> {
        let (words, []) = bytes.as_chunks() else { return None };
        let [len, start, modified, version] = words.try_into().ok()?;
        let [len, start, modified, version] =
            [len, start, modified, version].map(u64::from_le_bytes);
        Some(Stamp { len, start, modified, version })
    }
}
