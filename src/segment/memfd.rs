//! The `Memfd` backing: anonymous memory behind a descriptor, which the kernel frees with its last
//! holder, whatever killed that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create,
};
use rustix::io::Errno;

use crate::error::{Error, LayoutMismatch, Result};

use super::mapping::Mapping;
use super::{Backing, Geometry, ReadSlots, Segment, SegmentId, WriteSlots};

/// Segments in sealed memfds; they reach the peer as descriptors, over a Unix socket.
#[derive(Debug)]
pub struct Memfd(OwnedFd);

/// What makes a descriptor safe to map: nobody can resize it, nor take that back.
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

impl Backing for Memfd {}

impl super::sealed::Backing for Memfd {
    fn create(id: SegmentId, geometry: Geometry) -> Result<(Segment<ReadSlots>, Memfd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let name = format!("shmferry-{id}");
        // Kernels before 6.3 do not know the flag that forbids executing it.
        let fd = memfd_create(&*name, flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|errno| if errno == Errno::INVAL { memfd_create(&*name, flags) } else { Err(errno) })
            .map_err(Error::os("memfd_create"))?;
        // Allocated now, so that a lack of memory is an error here and not a SIGBUS later (L2).
        fallocate(&fd, FallocateFlags::empty(), 0, geometry.mapped_len() as u64)
            .map_err(Error::os("fallocate"))?;
        fcntl_add_seals(&fd, SEALS).map_err(Error::os("sealing a memfd"))?;
        let mapping = Mapping::new(&fd, geometry, false).map_err(Error::os("mmap"))?;
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

/// Maps a segment that a peer handed over, checking all that it claims first (rules L1, L2).
pub(crate) fn attach(fd: impl AsFd, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
    let expected = geometry.mapped_len() as u64;
    let seals = match fcntl_get_seals(&fd) {
        Ok(seals) => seals,
        Err(Errno::INVAL) => SealFlags::empty(), // no memfd at all
        Err(errno) => return Err(Error::os("reading a descriptor's seals")(errno)),
    };
    if !seals.contains(SEALS) {
        return Err(LayoutMismatch::Unsealed.into());
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
    let mapping = Mapping::new(&fd, geometry, true).map_err(Error::os("mmap"))?;
    mapping.header().verify(id, geometry)?;
    Ok(Segment::new(id, mapping))
}
