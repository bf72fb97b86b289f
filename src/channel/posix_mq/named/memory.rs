//! Adapts memory mapped by crate `shared_memory` to a segment's mapping.
#![allow(unsafe_code)]

use shared_memory::Shmem;

use crate::process::Origin;
use crate::segment::Mapped;

/// Mapped named memory. Its drop unmaps it, and removes the name if this process made it.
pub(super) struct Memory {
    memory: Shmem,
    /// A child of `fork` leaves the name alone: it is the parent's.
    origin: Origin,
}

impl Memory {
    pub(super) fn new(memory: Shmem) -> Memory {
        Memory { memory, origin: Origin::here() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            self.memory.set_owner(false);
        }
    }
}

// SAFETY: a `Shmem` is an address, a length, a descriptor and a name. None of them has to do with
// the thread that made it: a mapping belongs to the process.
unsafe impl Send for Memory {}
// SAFETY: through `&Memory` nothing is reached but the address and the length, which never change.
unsafe impl Sync for Memory {}

// SAFETY: the crate maps `len` bytes for reading and writing, unmaps them when the `Shmem` is
// dropped and not before, and gives out references to them by `unsafe` functions only, which are
// never called. Named memory can be resized only by processes of this user, which are trusted not
// to (M1).
unsafe impl Mapped for Memory {
    fn base(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }
}
