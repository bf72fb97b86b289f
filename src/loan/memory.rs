//! Maps sealed memory for reading: the only memory of another process that becomes `&[u8]`.
//!
//! Rule N2 makes that sound. The descriptor is memory of tmpfs (a memfd: nothing else there takes
//! these seals), whose seals say that no one can write to it (`WRITE`), resize it (`SHRINK`,
//! `GROW`), or lift a seal (`SEAL`). The kernel refuses the seal `WRITE` while any writable mapping
//! or pinned page of it exists, and any later one; a `PROT_READ` mapping that was shared and
//! writable before is among those refused. So its bytes are constant from the check on, in every
//! process. It has no holes, so that no access can fail for lack of memory, and since it cannot
//! shrink, none lies beyond its end.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::slice;

use rustix::fs::{SealFlags, SeekFrom, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::error::{Error, LayoutMismatch, Result};
use crate::segment::check_memfd;

/// The seals after which no byte of it can change. `FUTURE_WRITE` is not enough: mappings made
/// before it can still write.
pub(super) const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

/// Sealed memory as this process has it mapped. Invariant: `base` begins a readable mapping of
/// `len` bytes that satisfies rule N2 and lives as long as this, or `len` is zero.
pub(super) struct SealedMemory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing writes to it (N2).
unsafe impl Send for SealedMemory {}
// SAFETY: as above.
unsafe impl Sync for SealedMemory {}

impl SealedMemory {
    /// Checks a descriptor by rule N2, and maps all `len` bytes of it.
    ///
    /// The mapping is private: some kernels refuse a shared one of a write-sealed memfd (before
    /// 6.7, and early 6.12). It is never written to, so that it shows the memory itself.
    pub(super) fn map(fd: impl AsFd, len: u64) -> Result<SealedMemory> {
        check_memfd(&fd, len, SEALS)?;
        let len = usize::try_from(len).map_err(|_| Error::os("mmap")(Errno::NOMEM))?;
        if len == 0 {
            return Ok(SealedMemory { base: NonNull::dangling(), len });
        }
        check_filled(&fd, len as u64)?;
        let base = map_readable(fd, len).map_err(Error::os("mmap"))?;
        Ok(SealedMemory { base, len })
    }
}

/// A huge page. An address in huge pages takes one entry of the processor's table for 512 pages,
/// and mapping them one page fault for as many.
pub(super) const HUGE: usize = 2 << 20;

/// Has the kernel take huge pages for the whole blocks of so much memory that nothing was written
/// to yet, if it has them (Linux 6.1 and later). They are allocated then, and zero.
pub(super) fn take_huge_pages(memory: &File, len: u64) {
    let Ok(len) = usize::try_from(len) else { return };
    let whole = len - len % HUGE;
    // The kernel wants something to collapse in each.
    let is_begun = (0..whole).step_by(HUGE).all(|at| memory.write_all_at(&[0], at as u64).is_ok());
    if whole == 0 || !is_begun {
        return;
    }
    let Ok(base) = map_readable(memory, whole) else { return };
    // SAFETY: this is the mapping just made; the advice changes no byte. If it fails, pages are
    // ordinary ones, which are allocated and written to all the same.
    unsafe { libc::madvise(base.as_ptr().cast::<c_void>(), whole, libc::MADV_COLLAPSE) };
    // SAFETY: this is that mapping, to which there are no references.
    let unmapped = unsafe { munmap(base.as_ptr().cast::<c_void>(), whole) };
    debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
}

/// Maps `len` bytes, more than none, for reading; at the start of a huge page, if there can be any.
fn map_readable(fd: impl AsFd, len: usize) -> rustix::io::Result<NonNull<u8>> {
    let hint = if len < HUGE { ptr::null_mut() } else { free_place(len)? };
    // SAFETY: with a hint, or none, the kernel chooses addresses that are free: no memory of ours
    // is hit.
    let base = unsafe { mmap(hint, len, ProtFlags::READ, MapFlags::PRIVATE, fd, 0)? };
    NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)
}

/// Where so much memory is likely to be free, from the start of a huge page on. Another thread can
/// take it meanwhile: it is only a hint.
fn free_place(len: usize) -> rustix::io::Result<*mut c_void> {
    let room = len.checked_add(HUGE).ok_or(Errno::NOMEM)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a null hint lets the kernel choose fresh addresses, so no memory of ours is hit.
    let start = unsafe { mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags)? };
    // SAFETY: this is that mapping, which nothing refers to.
    unsafe { munmap(start, room)? };
    Ok(start.wrapping_byte_add(start.align_offset(HUGE)))
}

/// Checks that memory has no holes within its size. Its number of blocks does not tell: blocks can
/// be allocated beyond the end instead.
fn check_filled(fd: impl AsFd, len: u64) -> Result<()> {
    match seek(&fd, SeekFrom::Hole(0)).map_err(Error::os("lseek"))? {
        // The end counts as a hole.
        hole if hole < len => Err(LayoutMismatch::Sparse { present: hole, expected: len }.into()),
        _ => Ok(()),
    }
}

impl Deref for SealedMemory {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `base` is valid for `len` reads as long as `self` lives, or dangling for none. No
        // byte changes meanwhile, in this process or another (N2): this file maps it for reading
        // only, and the seals bind all others.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for SealedMemory {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: this is the whole mapping of `map`; `deref` borrows from `self`, so that no
            // reference into it is left.
            let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
            debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
        }
    }
}
