//! Fills a memfd and seals it, so that its bytes never change again (rule N1).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::fs::fcntl_add_seals;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::segment::{allocate_blocks, available_memory, empty_memfd};

use super::content::Content;
use super::memory::{SEALS, take_huge_pages};

/// Copies all that `reader` gives into sealed memory. With `expected` bytes the memory is there
/// before the first is read; more or fewer may come.
///
/// The memory is filled by `write`, never through a mapping: a writable mapping would have to be
/// gone before the seal, and could be kept by a defect or a child of `fork`.
pub(super) fn copy(reader: impl Read, expected: u64) -> Result<Content> {
    let mut memory = File::from(empty_memfd("shmferry-loan")?);
    if expected > 0 {
        check_file_size(expected)?;
        check_available(expected)?;
        take_huge_pages(&memory, expected);
        allocate_blocks(&memory, expected)?;
    }
    let len = fill(reader, &mut memory)?;
    let written = memory.metadata().map_err(Error::os("fstat"))?.len();
    if written != len {
        memory.set_len(len).map_err(Error::os("ftruncate"))?; // fewer than expected came
    }
    // Fails with `EBUSY` while any page can still be written to.
    fcntl_add_seals(&memory, SEALS).map_err(Error::os("sealing a loan"))?;
    Content::of_sealed(memory.into(), len)
}

/// As [`copy`], of a whole file, without its position.
pub(super) fn copy_file(file: &File) -> Result<Content> {
    let expected = file.metadata().map_err(Error::Source)?.len();
    copy(FromStart { file, at: 0 }, expected)
}

/// Writes until the reader's end; returns the bytes.
fn fill(mut reader: impl Read, memory: &mut File) -> Result<u64> {
    const AT_ONCE: usize = 256 << 10;
    let mut buffer = vec![0; AT_ONCE];
    memory.seek(SeekFrom::Start(0)).map_err(Error::os("lseek"))?;
    let (mut len, mut assured) = (0, 0);
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => return Ok(len),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Source(error)),
        };
        let end = len + read as u64;
        check_file_size(end)?;
        // A reader without end is stopped before the machine is.
        if end > assured {
            let more = len.clamp(AT_ONCE as u64, 64 << 20);
            check_available(more)?;
            assured = len + more;
        }
        io::Write::write_all(memory, &buffer[..read]).map_err(Error::os("writing a loan"))?;
        len = end;
    }
}

/// Fails beyond the process's limit on file sizes, which holds for memfds, too: a write beyond it
/// would end the process by `SIGXFSZ`.
fn check_file_size(len: u64) -> Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if len > limit => Err(Error::os("writing a loan")(Errno::FBIG)),
        _ => Ok(()),
    }
}

/// Fails if the system has less memory left: asked for more, it would kill a process instead.
fn check_available(asked: u64) -> Result<()> {
    if available_memory().is_some_and(|available| available < asked) {
        return Err(Error::Memory { asked, source: io::ErrorKind::OutOfMemory.into() });
    }
    Ok(())
}

/// Reads a file by offset.
struct FromStart<'f> {
    file: &'f File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(into, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
