//! The files that are served: their bytes, which a seed tells, and what becomes of some meanwhile.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use super::chance::{Dice, STEP, mix};
use super::record::lock;
use super::{Result, told};

/// Files that stay as they are.
const STEADY: [u64; 12] =
    [0, 1, 100, 4096, 5000, 65_536, 65_537, 200_000, 262_144, 1 << 20, 3_000_001, 8 << 20];

/// How many of those are small.
const SMALL: u64 = 7;

/// Files that are truncated and replaced.
const SHIFTING: u64 = 6;

/// One content that a file has had.
struct Version {
    seed: u64,
    /// Each length that it has had, and until when.
    lens: Vec<(u64, Option<Instant>)>,
}

/// What one file has held so far, as far as anybody may still be sent it.
struct Shelf {
    name: String,
    versions: Mutex<Vec<Version>>,
}

/// All files.
pub struct Files {
    dir: PathBuf,
    shelves: Vec<Shelf>,
}

/// A file that a client asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileId(usize);

/// A content that a body may be.
pub struct Candidate {
    seed: u64,
    len: u64,
}

impl Files {
    /// Writes them.
    pub fn make(dir: PathBuf, seed: u64) -> Result<Files> {
        fs::create_dir_all(&dir).map_err(told("files"))?;
        let files = Files::of(dir, seed);
        for shelf in &files.shelves {
            for Version { seed, lens } in &*lock(&shelf.versions) {
                write(&files.dir.join(&shelf.name), *seed, lens.last().map_or(0, |(len, _)| *len))?;
            }
        }
        Ok(files)
    }

    /// Those that were written with this seed, before any of them has shifted.
    pub fn of(dir: PathBuf, seed: u64) -> Files {
        let mut dice = Dice::of(seed, 0, 0);
        let shifting: Vec<u64> = (0..SHIFTING).map(|_| shifting_len(&mut dice)).collect();
        let lens = STEADY.into_iter().chain(shifting);
        let shelves = lens.zip(0..).map(|(len, number)| {
            let (name, seed) = (format!("f{number}"), dice.roll(u64::MAX));
            Shelf { name, versions: Mutex::new(vec![Version { seed, lens: vec![(len, None)] }]) }
        });
        let shelves = shelves.collect();
        Files { dir, shelves }
    }

    pub fn small(&self, dice: &mut Dice) -> FileId {
        FileId(dice.roll(SMALL) as usize)
    }

    /// One that is larger than those, and not by much.
    pub fn middling(&self, dice: &mut Dice) -> FileId {
        FileId((SMALL + dice.roll(2)) as usize)
    }

    /// One that stays as it is, and has more bytes than a socket's buffers take.
    pub fn largest(&self) -> FileId {
        FileId(STEADY.len() - 1)
    }

    pub fn large(&self, dice: &mut Dice) -> FileId {
        FileId((SMALL + dice.roll(STEADY.len() as u64 - SMALL)) as usize)
    }

    pub fn shifting(&self, dice: &mut Dice) -> FileId {
        FileId(STEADY.len() + dice.roll(SHIFTING) as usize)
    }

    pub fn is_shifting(&self, file: FileId) -> bool {
        file.0 >= STEADY.len()
    }

    pub fn key(&self, file: FileId) -> String {
        format!("/{}", self.shelves[file.0].name)
    }

    /// What a body that was asked for at `since`, and is announced with this length, may be.
    pub fn candidates(&self, file: FileId, announced: u64, since: Instant) -> Vec<Candidate> {
        let versions = lock(&self.shelves[file.0].versions);
        let fits = |version: &&Version| {
            version
                .lens
                .iter()
                .any(|(len, until)| *len == announced && until.is_none_or(|until| until >= since))
        };
        versions
            .iter()
            .filter(fits)
            .map(|version| Candidate { seed: version.seed, len: announced })
            .collect()
    }

    /// Truncates a file, or puts another in its place, as the dice have it; says which.
    pub fn shift(&self, dice: &mut Dice) -> Result<&'static str> {
        let shelf = &self.shelves[self.shifting(dice).0];
        let path = self.dir.join(&shelf.name);
        let (truncates, part, seed, next_len) =
            (dice.roll(2) == 0, dice.roll(4), dice.roll(u64::MAX), shifting_len(dice));
        // What comes is known before it is there, what goes until it is gone.
        let mut versions = lock(&shelf.versions);
        let version = versions.last_mut().ok_or("a file without a content")?;
        let len = version.lens.last().map_or(0, |(len, _)| *len);
        if truncates && len > 0 {
            let left = len * part / 4;
            version.lens.push((left, None));
            drop(versions);
            OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|file| file.set_len(left))
                .map_err(told("truncating"))?;
        } else {
            versions.push(Version { seed, lens: vec![(next_len, None)] });
            drop(versions);
            let fresh = self.dir.with_extension("next");
            write(&fresh, seed, next_len)?;
            fs::rename(&fresh, &path).map_err(told("replacing"))?;
        }
        let now = Instant::now();
        let mut versions = lock(&shelf.versions);
        let last = versions.len() - 1;
        for (number, version) in versions.iter_mut().enumerate() {
            let current = if number == last { version.lens.len() - 1 } else { usize::MAX };
            for (index, (_, until)) in version.lens.iter_mut().enumerate() {
                if index != current && until.is_none() {
                    *until = Some(now);
                }
            }
        }
        let surplus = versions.len().saturating_sub(MEMORY);
        versions.drain(..surplus);
        Ok(if truncates && len > 0 { "file truncated" } else { "file replaced" })
    }
}

/// More versions than a file has within a watchdog's time.
const MEMORY: usize = 1000;

impl Candidate {
    /// Whether `bytes` are what it has from `offset` on.
    pub fn has(&self, mut offset: u64, mut bytes: &[u8]) -> bool {
        if offset + bytes.len() as u64 > self.len {
            return false;
        }
        while !bytes.is_empty() {
            let word = word(self.seed, offset / 8).to_le_bytes();
            let expected = &word[(offset % 8) as usize..];
            let n = expected.len().min(bytes.len());
            if expected[..n] != bytes[..n] {
                return false;
            }
            bytes = &bytes[n..];
            offset += n as u64;
        }
        true
    }
}

fn shifting_len(dice: &mut Dice) -> u64 {
    let most = dice.pick(&[10_000, 1 << 20, 6 << 20]);
    1 + dice.roll(most)
}

/// Eight bytes of the file of this seed: no two files share any eight.
fn word(seed: u64, number: u64) -> u64 {
    mix(seed.wrapping_add(number.wrapping_mul(STEP)))
}

fn write(path: &Path, seed: u64, len: u64) -> Result<()> {
    let mut bytes: Vec<u8> =
        (0..len.div_ceil(8)).flat_map(|number| word(seed, number).to_le_bytes()).collect();
    bytes.truncate(len as usize);
    fs::File::create(path)
        .and_then(|mut file| file.write_all(&bytes))
        .map_err(told("writing a file"))
}
