//! What is lent, on either side: sealed memory or a file, with its descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs};

use crate::error::{Error, Misuse, PeerFault, Result, UnusableSegment};

use super::memory::SealedMemory;

/// The kinds of loans, as a client's hello and an introduction name them: bits.
pub(crate) const SEALED: u32 = 1;
pub(crate) const FILE: u32 = 2;

/// The file system whose server is a process like any other: reading can block for ever.
const FUSE_MAGIC: rustix::fs::FsWord = 0x6573_5546;

/// Cheap to clone.
#[derive(Clone)]
pub(crate) enum Content {
    Sealed(Arc<Sealed>),
    File(Arc<LentFile>),
}

/// Sealed memory, mapped.
pub(crate) struct Sealed {
    fd: OwnedFd,
    memory: SealedMemory,
}

/// A file that was this long when it was lent.
pub(crate) struct LentFile {
    file: File,
    len: u64,
}

impl Content {
    /// Memory that is sealed as rule N2 asks; checks that.
    pub(super) fn of_sealed(fd: OwnedFd, len: u64) -> Result<Content> {
        let memory = SealedMemory::map(&fd, len)?;
        Ok(Content::Sealed(Arc::new(Sealed { fd, memory })))
    }

    /// A file that can be lent as it is (rule N8).
    pub(super) fn of_file(file: File) -> Result<Content> {
        let why = check_file(&file).map_err(|errno| Error::Source(errno.into()))?;
        if let Some(why) = why {
            return Err(Misuse::NotLendable(why).into());
        }
        let len = file.metadata().map_err(Error::Source)?.len();
        Ok(Content::File(Arc::new(LentFile { file, len })))
    }

    /// What a server has introduced as a loan of this kind and length. Everything that it claims is
    /// checked (rules N2 and N8). Hands the descriptor back on failure: closing it can block.
    pub(crate) fn of_peer(fd: OwnedFd, kind: u32, len: u64) -> Result<Content, (OwnedFd, Error)> {
        match kind {
            SEALED => match SealedMemory::map(&fd, len) {
                Ok(memory) => Ok(Content::Sealed(Arc::new(Sealed { fd, memory }))),
                Err(Error::Layout(UnusableSegment(why))) => {
                    Err((fd, PeerFault::UnusableMemory(why).into()))
                }
                Err(error) => Err((fd, error)),
            },
            FILE => match check_file(&fd) {
                Ok(None) => Ok(Content::File(Arc::new(LentFile { file: fd.into(), len }))),
                Ok(Some(why)) => Err((fd, PeerFault::UnusableFile(why).into())),
                Err(errno) => Err((fd, Error::os("examining a lent file")(errno))),
            },
            kind => Err((fd, PeerFault::UnknownLoanKind(kind).into())),
        }
    }

    pub(crate) fn kind(&self) -> u32 {
        match self {
            Content::Sealed(_) => SEALED,
            Content::File(_) => FILE,
        }
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Content::Sealed(sealed) => sealed.memory.len() as u64,
            Content::File(file) => file.len,
        }
    }

    /// Bytes of memory that it keeps.
    pub(crate) fn memory_len(&self) -> u64 {
        match self {
            Content::Sealed(sealed) => sealed.memory.len() as u64,
            Content::File(_) => 0,
        }
    }

    /// Whether someone else has a clone of it.
    pub(super) fn is_shared(&self) -> bool {
        match self {
            Content::Sealed(sealed) => Arc::strong_count(sealed) > 1,
            Content::File(file) => Arc::strong_count(file) > 1,
        }
    }
}

impl AsFd for Content {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Content::Sealed(sealed) => sealed.fd.as_fd(),
            Content::File(file) => file.file.as_fd(),
        }
    }
}

impl Sealed {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl LentFile {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Reads at an offset; zero bytes mean that the file was cut short.
    pub(super) fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }
}

/// Why a descriptor cannot be lent as a file, if it cannot.
fn check_file(file: impl AsFd) -> rustix::io::Result<Option<&'static str>> {
    let flags = fcntl_getfl(&file)?;
    if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE != OFlags::RDONLY {
        return Ok(Some("a descriptor that is not for reading only"));
    }
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Ok(Some("a descriptor of something else than a regular file"));
    }
    if fstatfs(&file)?.f_type == FUSE_MAGIC {
        return Ok(Some("a file of a FUSE file system, whose reads can block for ever"));
    }
    Ok(None)
}
