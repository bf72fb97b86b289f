//! The mapping for loom: ordinary memory in place of a segment; loom checks each access to a slot.
//!
//! It has the functions of `mapping.rs`. Those that need a kernel fail: the model moves bytes by
//! `write_slot` and `read_slot`. loom reports two accesses to one slot that are not ordered.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use loom::cell::UnsafeCell;
use rustix::io::Errno;

use crate::sync::atomic::AtomicU64;

use super::geometry::Geometry;
use super::header::Header;

pub(crate) struct Mapping {
    memory: Arc<Memory>,
    geometry: Geometry,
    slots_writable: bool,
}

/// The trait of `mapping.rs`.
///
/// # Safety
/// No conditions: its functions are never called here.
#[allow(dead_code)]
pub(crate) unsafe trait Mapped: Send + Sync + 'static {
    fn base(&self) -> *mut u8;
    fn len(&self) -> usize;
}

struct Memory {
    header: Header,
    slots: Vec<UnsafeCell<Vec<u8>>>,
}

// SAFETY: the cells are accessed by `with` and `with_mut` only, and loom ends a model in which two
// accesses, one of them a `with_mut`, are not ordered.
unsafe impl Sync for Memory {}

impl Mapping {
    /// Zeroed memory, as the receiver maps it.
    pub(crate) fn watched(geometry: Geometry) -> Mapping {
        let slot = || UnsafeCell::new(vec![0; geometry.slot_len as usize]);
        let slots = (0..geometry.slot_count).map(|_| slot()).collect();
        let memory = Arc::new(Memory { header: Header::default(), slots });
        Mapping { memory, geometry, slots_writable: false }
    }

    /// The same memory, as the sender maps it.
    pub(crate) fn writable(&self) -> Mapping {
        Mapping { memory: Arc::clone(&self.memory), geometry: self.geometry, slots_writable: true }
    }

    pub(crate) fn sealed(_: impl AsFd, _: Geometry, _: bool) -> rustix::io::Result<Mapping> {
        Err(Errno::NOSYS)
    }

    pub(crate) fn opened(_: impl AsFd, _: Geometry, _: bool) -> rustix::io::Result<Mapping> {
        Err(Errno::NOSYS)
    }

    pub(crate) fn kept(_: impl Mapped, _: Geometry, _: bool) -> io::Result<Mapping> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn header(&self) -> &Header {
        &self.memory.header
    }

    pub(crate) fn read_slot(&self, slot: u32, offset: usize, into: &mut [u8]) {
        self.memory.slots[slot as usize].with(|bytes| {
            // SAFETY: no write is concurrent, or loom has ended the model.
            let bytes = unsafe { &*bytes };
            into.copy_from_slice(&bytes[offset..offset + into.len()]);
        });
    }

    pub(crate) fn write_slot(&self, slot: u32, offset: usize, bytes: &[u8]) {
        assert!(self.slots_writable, "slots are mapped read-only");
        self.memory.slots[slot as usize].with_mut(|to| {
            // SAFETY: no other access is concurrent, or loom has ended the model.
            let to = unsafe { &mut *to };
            to[offset..offset + bytes.len()].copy_from_slice(bytes);
        });
    }

    pub(crate) fn pread_slot(
        &self,
        _: u32,
        _: usize,
        _: usize,
        _: BorrowedFd<'_>,
        _: u64,
    ) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn send_slot(
        &self,
        _: u32,
        _: usize,
        _: usize,
        _: BorrowedFd<'_>,
    ) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Words in ordinary memory, in place of sealed shared ones.
#[derive(Clone)]
pub(crate) struct Words(Arc<[AtomicU64]>);

impl Words {
    pub(crate) fn zeroed(count: usize) -> Words {
        Words((0..count).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn sealed(_: impl AsFd, _: usize) -> rustix::io::Result<Words> {
        Err(Errno::NOSYS)
    }
}

impl std::ops::Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}
