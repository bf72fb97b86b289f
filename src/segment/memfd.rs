//! The `Memfd` backing: sealed anonymous memory; the kernel frees it after its last user's death.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    fstatfs, memfd_create,
};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, LayoutMismatch, Result};

use super::mapping::{Mapping, Words};
use super::{
    Backing, Geometry, PoolId, ReadSlots, Segment, SegmentId, WriteSlots, available_memory,
};

#[cfg(test)]
mod tests;

/// Segments in sealed memfds; they reach the peer as descriptors, over a Unix socket.
#[derive(Debug)]
pub struct Memfd(OwnedFd);

/// The seals that make a descriptor safe to map: it cannot be resized, and the seals cannot be
/// removed.
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

impl Backing for Memfd {}

impl super::sealed::Backing for Memfd {
    type Ownership = ();

    fn own(_pool: PoolId) -> Result<()> {
        Ok(())
    }

    fn available() -> Option<u64> {
        available_memory()
    }

    fn create((): &(), id: SegmentId, geometry: Geometry) -> Result<(Segment<ReadSlots>, Memfd)> {
        let fd = allocate(&format!("shmferry-{id}"), geometry.mapped_len() as u64)?;
        let mapping = Mapping::sealed(&fd, geometry, false).map_err(Error::os("mmap"))?;
        mapping.header().initialise(id, geometry);
        Ok((Segment::new(id, mapping), Memfd(fd)))
    }

    fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
        attach(&self.0, id, geometry)
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The file system that ordinary memfds are in, as `statfs` names it.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Allocates zeroed words to be shared with a peer; returns the mapping and its descriptor.
pub(crate) fn create_words(name: &str, len: usize) -> Result<(Words, OwnedFd)> {
    let fd = allocate(name, len as u64)?;
    Ok((Words::sealed(&fd, len).map_err(Error::os("mmap"))?, fd))
}

/// Maps words from a peer's descriptor.
pub(crate) fn attach_words(fd: impl AsFd, len: usize) -> Result<Words> {
    check(&fd, len as u64, SEALS)?;
    Words::sealed(&fd, len).map_err(Error::os("mmap"))
}

/// Maps a segment from a peer's descriptor, after checking everything the peer claims (rules L1,
/// L2).
pub(crate) fn attach(
    fd: impl AsFd,
    id: SegmentId,
    geometry: Geometry,
) -> Result<Segment<WriteSlots>> {
    check(&fd, geometry.mapped_len() as u64, SEALS)?;
    let mapping = Mapping::sealed(&fd, geometry, true).map_err(Error::os("mmap"))?;
    mapping.header().verify(id, geometry)?;
    Ok(Segment::new(id, mapping))
}

/// Makes an empty memfd, without seals yet.
pub(crate) fn empty_memfd(name: &str) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag that forbids executing it.
    memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|errno| if errno == Errno::INVAL { memfd_create(name, flags) } else { Err(errno) })
        .map_err(Error::os("memfd_create"))
}

/// Allocates all blocks of a memfd, so that a lack of memory is an error here and not a SIGBUS
/// later (L2).
pub(crate) fn allocate_blocks(fd: impl AsFd, len: u64) -> Result<()> {
    retry_on_intr(|| fallocate(&fd, FallocateFlags::empty(), 0, len))
        .map_err(Error::os("fallocate"))
}

/// Makes a memfd with all its blocks allocated, sealed against resizing.
fn allocate(name: &str, len: u64) -> Result<OwnedFd> {
    let fd = empty_memfd(name)?;
    allocate_blocks(&fd, len)?;
    fcntl_add_seals(&fd, SEALS).map_err(Error::os("sealing a memfd"))?;
    Ok(fd)
}

/// Checks that a descriptor is memory of this length with these seals, and its blocks allocated
/// (rules L2 and N2).
pub(crate) fn check(fd: impl AsFd, expected: u64, required: SealFlags) -> Result<()> {
    let seals = match fcntl_get_seals(&fd) {
        Ok(seals) => seals,
        Err(Errno::INVAL) => SealFlags::empty(), // not a memfd
        Err(errno) => return Err(Error::os("reading a descriptor's seals")(errno)),
    };
    if !seals.contains(required) {
        return Err(LayoutMismatch::Unsealed.into());
    }
    // Refuses hugetlbfs: its pages can run out after the mapping, and the access ends in SIGBUS.
    if fstatfs(&fd).map_err(Error::os("fstatfs"))?.f_type != TMPFS_MAGIC {
        return Err(LayoutMismatch::NotMemory.into());
    }
    let stat = fstat(&fd).map_err(Error::os("fstat"))?;
    let found = u64::try_from(stat.st_size).unwrap_or(0);
    if found != expected {
        return Err(LayoutMismatch::Size { found, expected }.into());
    }
    let present = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    if present < expected {
        return Err(LayoutMismatch::Sparse { present, expected }.into());
    }
    Ok(())
}
