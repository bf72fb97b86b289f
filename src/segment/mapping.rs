//! A segment's memory in this process: maps it, and copies bytes into slots and out of them.
//!
//! The invariants that every block rests on:
//! - **M1** `base` is the start of a mapping of at least `geometry.mapped_len()` bytes, readable,
//!   that lives until the `Mapping` is dropped, and whose backing does not shrink: it was sealed
//!   before it was mapped, or it is named memory that only processes of this user can open, which
//!   are trusted not to resize it.
//! - **M2** The first `HEADER_LEN` bytes of it are writable too.
//! - **M3** So are the slots, if `slots_writable`.
//! - **M4** The only references into the memory of M1 are to `Header`, which is all atomics (and
//!   cells, with the `raw_sync` parker), and to `SharedByte`s, which are read-only atomics.
//!   Otherwise, slots are accessed through raw pointers and by system calls (rule S1): a peer that
//!   breaks rule P3 can spoil the bytes that are read, and nothing else.
#![allow(unsafe_code)]

#[cfg(unix)]
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};

#[cfg(target_os = "linux")]
use crate::sync::atomic::AtomicU64;
use crate::sync::atomic::{AtomicU8, Relaxed};

use super::geometry::{Geometry, HEADER_LEN, PAGE};
use super::header::Header;

/// A byte that another process can write at any time: each [`read`](Self::read) may return a
/// different value.
#[repr(transparent)]
pub struct SharedByte(AtomicU8);

impl SharedByte {
    /// The value at this moment.
    #[inline]
    pub fn read(&self) -> u8 {
        self.0.load(Relaxed)
    }

    /// Bytes that do not change, in the type of those that may.
    #[cfg(target_os = "linux")]
    pub(crate) fn of_constant(bytes: &[u8]) -> &[SharedByte] {
        // SAFETY: the same memory, size and alignment, for as long. Nothing but relaxed loads of a
        // byte can be done with it, which are allowed in memory that is mapped read-only.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<SharedByte>(), bytes.len()) }
    }
}

impl fmt::Debug for SharedByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}

/// A mapped segment.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    geometry: Geometry,
    slots_writable: bool,
    keeper: Keeper,
}

/// Who unmaps the memory.
enum Keeper {
    /// Mapped here: `Mapping` unmaps it when dropped.
    #[cfg(target_os = "linux")]
    Ours,
    /// Mapped by the caller: the boxed value unmaps it when dropped.
    Other(#[expect(dead_code, reason = "kept for its drop")] Box<dyn Mapped>),
}

/// Memory that is already mapped; dropping the value unmaps it.
///
/// # Safety
/// From `base` on, `len` bytes are readable and writable until this is dropped, their backing does
/// not shrink, and no references to them exist (M1 to M4).
pub(crate) unsafe trait Mapped: Send + Sync + 'static {
    fn base(&self) -> *mut u8;
    fn len(&self) -> usize;
}

// SAFETY: the mapping belongs to the process, not to a thread (M1), and all else that `Mapping`
// keeps is `Send`.
unsafe impl Send for Mapping {}
// SAFETY: as above; through `&Mapping` the memory is reached by atomics and raw copies only (M4).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a descriptor, as [`map_sealed`] does.
    #[cfg(target_os = "linux")]
    pub(crate) fn sealed(
        fd: impl std::os::fd::AsFd,
        geometry: Geometry,
        slots_writable: bool,
    ) -> rustix::io::Result<Mapping> {
        let base = map_sealed(fd, geometry.mapped_len())?;
        let mapping = Mapping { base, geometry, slots_writable, keeper: Keeper::Ours };
        mapping.protect_slots()?;
        Ok(mapping)
    }
}

/// Named memory.
#[cfg_attr(not(feature = "posix-mq"), allow(dead_code))]
impl Mapping {
    /// Maps named memory by the descriptor that was opened and checked, since the name may refer to
    /// other memory by now. Fails with `INVAL` for memory that is too short.
    #[cfg(target_os = "linux")]
    pub(crate) fn opened(
        fd: impl std::os::fd::AsFd,
        geometry: Geometry,
        slots_writable: bool,
    ) -> rustix::io::Result<Mapping> {
        let base = map(fd, geometry.mapped_len(), rustix::mm::MapFlags::empty())?;
        let mapping = Mapping { base, geometry, slots_writable, keeper: Keeper::Ours };
        // Fails where `MAP_POPULATE` would not report pages that cannot be allocated.
        mapping.populate()?;
        mapping.protect_slots()?;
        Ok(mapping)
    }

    /// Takes over memory that is already mapped. Fails with `InvalidInput` if it is too short.
    pub(crate) fn kept(
        memory: impl Mapped,
        geometry: Geometry,
        slots_writable: bool,
    ) -> io::Result<Mapping> {
        let base = NonNull::new(memory.base()).filter(|base| base.addr().get() % PAGE == 0);
        let Some(base) = base.filter(|_| memory.len() >= geometry.mapped_len()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mapping =
            Mapping { base, geometry, slots_writable, keeper: Keeper::Other(Box::new(memory)) };
        #[cfg(target_os = "linux")]
        mapping.populate()?;
        #[cfg(unix)]
        mapping.protect_slots()?;
        Ok(mapping)
    }

    /// Makes the pages present in this process (rule L2), on kernels that can (5.14).
    #[cfg(target_os = "linux")]
    fn populate(&self) -> rustix::io::Result<()> {
        use rustix::mm::{Advice, madvise};
        let (base, len) = (self.base.as_ptr().cast::<c_void>(), self.geometry.mapped_len());
        // SAFETY: these are the mapping's own pages (M1), and making them present changes no byte.
        match unsafe { madvise(base, len, Advice::LinuxPopulateWrite) } {
            Err(rustix::io::Errno::INVAL) => Ok(()),
            populated => populated,
        }
    }
}

impl Mapping {
    /// Makes the slots read-only, if this side only reads them (rule L4), and if the header does
    /// not share a page with them.
    #[cfg(unix)]
    fn protect_slots(&self) -> rustix::io::Result<()> {
        use rustix::mm::{MprotectFlags, mprotect};
        use rustix::param::page_size;
        if self.slots_writable || !(HEADER_LEN as usize).is_multiple_of(page_size()) {
            return Ok(());
        }
        let (slots, len) = (self.slot_ptr(0, 0), self.geometry.mapped_len() - HEADER_LEN as usize);
        // SAFETY: these are the mapping's own pages behind the header (M1), to which there are no
        // references (M4).
        unsafe { mprotect(slots.cast::<c_void>(), len, MprotectFlags::READ) }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned, readable and writable for `HEADER_LEN` bytes (M1,
        // M2), which `Header` fits into (asserted beside it); every bit pattern is a valid atomic,
        // and atomics may change under a shared reference, whoever changes them.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    /// Copies bytes of a slot into private memory.
    pub(crate) fn read_slot(&self, slot: u32, offset: usize, into: &mut [u8]) {
        let from = self.slot_range(slot, offset, into.len());
        // SAFETY: `from` is valid for `into.len()` reads (M1 and the range check); `into` is
        // private memory, so the two cannot overlap; the peer leaves the slot alone until we post
        // it (P3), and if it does not, bytes are spoilt and no more (M4).
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Bytes of a slot, where they are.
    pub(crate) fn slot_bytes(&self, slot: u32, offset: usize, len: usize) -> &[SharedByte] {
        let from = self.slot_range(slot, offset, len).cast::<SharedByte>();
        // SAFETY: `from` is valid for `len` reads as long as `self` lives (M1 and the range check).
        // Every bit pattern is a `SharedByte`, and it may change under a shared reference. Nothing
        // but relaxed loads of a byte can be done with it, which are allowed in memory that is
        // mapped read-only.
        unsafe { std::slice::from_raw_parts(from, len) }
    }

    /// Copies bytes from private memory into a slot.
    pub(crate) fn write_slot(&self, slot: u32, offset: usize, bytes: &[u8]) {
        assert!(self.slots_writable, "slots are mapped read-only");
        let to = self.slot_range(slot, offset, bytes.len());
        // SAFETY: `to` is valid for `bytes.len()` writes (M1, M3, the range check); `bytes` is
        // private memory, so the two cannot overlap; the peer leaves the slot alone until we post
        // it (P3, M4).
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// The address of `len` bytes at `offset` in a slot, all of them inside it.
    fn slot_range(&self, slot: u32, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(slot < self.geometry.slot_count, "slot {slot} of {}", self.geometry.slot_count);
        assert!(
            end.is_some_and(|end| end <= self.geometry.slot_len as usize),
            "{offset} + {len} is past the slot"
        );
        self.slot_ptr(slot, offset)
    }

    fn slot_ptr(&self, slot: u32, offset: usize) -> *mut u8 {
        let at = HEADER_LEN as usize + slot as usize * self.geometry.slot_stride() + offset;
        debug_assert!(at <= self.geometry.mapped_len());
        // SAFETY: `at` is within the mapping, or one past its end (M1, and the callers' checks).
        unsafe { self.base.as_ptr().add(at) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.keeper {
            #[cfg(target_os = "linux")]
            Keeper::Ours => {
                let (base, len) = (self.base.as_ptr().cast::<c_void>(), self.geometry.mapped_len());
                // SAFETY: this is the whole mapping of M1; `header` borrows from `self`, so that no
                // reference into it is left.
                let unmapped = unsafe { rustix::mm::munmap(base, len) };
                debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
            }
            Keeper::Other(_) => {}
        }
    }
}

/// Sealed memory that holds only words, shared by two sides beside their segments.
#[cfg(target_os = "linux")]
pub(crate) struct Words {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: as for `Mapping`.
#[cfg(target_os = "linux")]
unsafe impl Send for Words {}
// SAFETY: through `&Words` the memory is reached by atomics only.
#[cfg(target_os = "linux")]
unsafe impl Sync for Words {}

#[cfg(target_os = "linux")]
impl Words {
    /// Maps a descriptor of at least `len` bytes, under the conditions of [`Mapping::sealed`].
    pub(crate) fn sealed(fd: impl std::os::fd::AsFd, len: usize) -> rustix::io::Result<Words> {
        Ok(Words { base: map_sealed(fd, len)?, len })
    }
}

#[cfg(target_os = "linux")]
impl std::ops::Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable and writable for `len` bytes as long as
        // `self` lives (`map_sealed`); every bit pattern is a valid atomic, and atomics may change
        // under a shared reference, whoever changes them.
        unsafe {
            std::slice::from_raw_parts(
                self.base.as_ptr().cast::<AtomicU64>(),
                self.len / size_of::<AtomicU64>(),
            )
        }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping of `map_sealed`; `deref` borrows from `self`, so that
        // no reference into it is left.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

/// Maps `len` bytes of a descriptor for reading and writing, and makes their pages present in this
/// process (rule L2). Fails with `INVAL` for one that is too short, or not sealed against
/// shrinking. M1 rests on that seal, so it is checked here again; callers check it for better error
/// texts.
#[cfg(target_os = "linux")]
fn map_sealed(fd: impl std::os::fd::AsFd, len: usize) -> rustix::io::Result<NonNull<u8>> {
    use rustix::fs::{SealFlags, fcntl_get_seals};
    if !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
        return Err(rustix::io::Errno::INVAL);
    }
    map(fd, len, rustix::mm::MapFlags::POPULATE)
}

/// Maps `len` bytes of a descriptor for reading and writing. Fails with `INVAL` for one that is too
/// short. That it does not shrink is the caller's obligation (M1): it is sealed, or trusted.
#[cfg(target_os = "linux")]
fn map(
    fd: impl std::os::fd::AsFd,
    len: usize,
    flags: rustix::mm::MapFlags,
) -> rustix::io::Result<NonNull<u8>> {
    use rustix::fs::fstat;
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    if fstat(&fd)?.st_size < i64::try_from(len).map_err(|_| Errno::INVAL)? {
        return Err(Errno::INVAL);
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a null hint lets the kernel choose fresh addresses, so no memory of ours is hit. It
    // is long enough, and stays so (the callers): M1 holds from here on.
    let base = unsafe { mmap(ptr::null_mut(), len, prot, flags | MapFlags::SHARED, fd, 0)? };
    NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)
}

/// Moves bytes between slots and descriptors by system calls.
#[cfg(unix)]
mod by_kernel {
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::time::Duration;

    use rustix::event::PollFlags;
    use rustix::fs::{FileType, fstat};

    use crate::sync::{Deadline, wait_ready};

    use super::{Mapping, c_void, io};

    // With 64-bit offsets: plain `pread` has 32-bit offsets on 32-bit Linux.
    #[cfg(not(target_os = "linux"))]
    use libc::{off_t as FileOffset, pread};
    #[cfg(target_os = "linux")]
    use libc::{off64_t as FileOffset, pread64 as pread};

    impl Mapping {
        /// Reads from a file into a slot, by one `pread`. Returns how many bytes were read.
        pub(crate) fn pread_slot(
            &self,
            slot: u32,
            offset: usize,
            len: usize,
            file: BorrowedFd<'_>,
            file_offset: u64,
        ) -> io::Result<usize> {
            assert!(self.slots_writable, "slots are mapped read-only");
            let to = self.slot_range(slot, offset, len);
            let file_offset = FileOffset::try_from(file_offset).map_err(io::Error::other)?;
            // SAFETY: the kernel writes at most `len` bytes to `to`, which is valid for them (M1,
            // M3, the range check), and no reference to them exists (M4).
            let read = unsafe { pread(file.as_raw_fd(), to.cast::<c_void>(), len, file_offset) };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        }

        /// As [`pread_slot`](Self::pread_slot) at the slot's begin, with what of the file is in
        /// memory: fails with `EAGAIN` rather than wait for a disk.
        #[cfg(feature = "tokio")]
        pub(crate) fn pread_slot_now(
            &self,
            slot: u32,
            len: usize,
            file: BorrowedFd<'_>,
            file_offset: u64,
        ) -> io::Result<usize> {
            assert!(self.slots_writable, "slots are mapped read-only");
            let to = self.slot_range(slot, 0, len);
            let file_offset = FileOffset::try_from(file_offset).map_err(io::Error::other)?;
            let part = libc::iovec { iov_base: to.cast::<c_void>(), iov_len: len };
            // SAFETY: as for `pread_slot`; `part` describes just these bytes.
            let read =
                unsafe { libc::preadv2(file.as_raw_fd(), &part, 1, file_offset, libc::RWF_NOWAIT) };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        }

        /// Sends bytes of a slot to a socket or pipe without blocking, or writes them to another
        /// kind of descriptor. Returns how many were written.
        pub(crate) fn send_slot(
            &self,
            slot: u32,
            offset: usize,
            len: usize,
            sink: BorrowedFd<'_>,
        ) -> io::Result<usize> {
            let from = self.slot_range(slot, offset, len).cast::<c_void>();
            let flags = libc::MSG_DONTWAIT | NO_SIGNAL;
            // SAFETY: the kernel reads at most `len` bytes from `from`, which is valid for them (M1
            // and the range check).
            let mut sent = unsafe { libc::send(sink.as_raw_fd(), from, len, flags) };
            if sent < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOTSOCK) {
                let len = at_once(sink, len)?;
                // SAFETY: as above.
                sent = unsafe { libc::write(sink.as_raw_fd(), from, len) };
            }
            usize::try_from(sent).map_err(|_| io::Error::last_os_error())
        }
    }

    /// How many of `len` bytes can be written without blocking to a descriptor that is not a
    /// socket. A pipe that polls as writable takes `PIPE_BUF` bytes; a file takes everything.
    fn at_once(sink: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        if FileType::from_raw_mode(fstat(sink)?.st_mode) != FileType::Fifo {
            return Ok(len);
        }
        match wait_ready(sink, PollFlags::OUT, Deadline::after(Duration::ZERO))? {
            true => Ok(len.min(libc::PIPE_BUF)),
            false => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Prevents SIGPIPE. Systems without the flag have a process-wide or per-socket setting for
    /// that.
    #[cfg(target_os = "linux")]
    const NO_SIGNAL: libc::c_int = libc::MSG_NOSIGNAL;
    #[cfg(not(target_os = "linux"))]
    const NO_SIGNAL: libc::c_int = 0;
}
