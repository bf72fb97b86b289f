//! The `Named` backing: named POSIX shared memory, by crate `shared_memory`.
//!
//! The crate makes, maps and removes the memory, for its owner. Added here: blocks are allocated
//! before use; a peer opens a name once, checks that descriptor, and maps it (rules L1, L2); names
//! contain pool and owner, and an owner that starts removes the names of dead ones (rule L3).

use std::io;

use shared_memory::{ShmemConf, ShmemError};

use crate::error::{Error, Result};
use crate::process::Origin;
use crate::segment::{
    Backing, Geometry, Mapping, PoolId, ReadSlots, Segment, SegmentId, WriteSlots, sealed,
};

#[cfg(target_os = "linux")]
use super::lifeline::Lifeline;

#[cfg(target_os = "linux")]
mod ending;
mod memory;
#[cfg(target_os = "linux")]
mod names;
#[cfg(target_os = "linux")]
pub(super) use names::{sweep, sweep_aside};

use memory::Memory;

/// Segments in POSIX shared memory, which the peer opens by name. For processes of one user: a
/// process that may open the memory may also resize it, and so crash those that have it mapped.
///
/// The names begin with `shmferry-`, the owner's pid and the pool; only this user may open them.
/// They are removed with the pool. The names of a killed owner are removed by a server that sees it
/// die, or when the next pool of this kind is made, or the next
/// [`PosixMq`](crate::channel::PosixMq) is bound.
#[derive(Debug)]
pub struct Named(Owner);

/// The process that made a pool of named segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) pool: PoolId,
}

/// Resources that a pool of named segments owns: its lifeline.
pub struct Ownership {
    owner: Owner,
    origin: Origin,
    /// Dropped after the segments: while it is held, no sweep removes their names.
    #[cfg(target_os = "linux")]
    _lifeline: Lifeline,
}

impl Named {
    /// The owner, which a peer needs beside the segment's id to open it.
    pub(crate) fn owner(&self) -> Owner {
        self.0
    }
}

impl Owner {
    /// The prefix of all its names.
    fn stem(self) -> String {
        format!("shmferry-{}-{}", self.pid, self.pool)
    }

    fn segment(self, index: u32) -> String {
        format!("/{}-{index}", self.stem())
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.origin.is_here() {
            ending::is_over(self.owner);
        }
    }
}

impl Backing for Named {}

impl sealed::Backing for Named {
    type Ownership = Ownership;

    fn own(pool: PoolId) -> Result<Ownership> {
        let owner = Owner { pid: std::process::id(), pool };
        #[cfg(target_os = "linux")]
        sweep();
        #[cfg(target_os = "linux")]
        let lifeline = Lifeline::hold(owner.lifeline())?;
        #[cfg(target_os = "linux")]
        ending::outlived_by(owner);
        Ok(Ownership {
            owner,
            origin: Origin::here(),
            #[cfg(target_os = "linux")]
            _lifeline: lifeline,
        })
    }

    fn available() -> Option<u64> {
        #[cfg(target_os = "linux")]
        return names::available();
        #[cfg(not(target_os = "linux"))]
        None
    }

    fn create(
        own: &Ownership,
        id: SegmentId,
        geometry: Geometry,
    ) -> Result<(Segment<ReadSlots>, Named)> {
        let name = own.owner.segment(id.index);
        let made = ShmemConf::new().os_id(&name).size(geometry.mapped_len()).create();
        #[cfg(target_os = "linux")]
        if let Err(ShmemError::MappingIdExists) = made
            && let Some(taken) = names::taken(&name)
        {
            return Err(taken);
        }
        let memory = Memory::new(made.map_err(failed("creating shared memory"))?);
        #[cfg(target_os = "linux")]
        names::allocate(&name, geometry)?;
        let mapping =
            Mapping::kept(memory, geometry, false).map_err(Error::os("mapping a segment"))?;
        mapping.header().initialise(id, geometry);
        Ok((Segment::new(id, mapping), Named(own.owner)))
    }

    fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
        attach(self.0, id, geometry)
    }
}

/// Opens and maps a segment that a peer named, after checking everything the peer claims (rules L1,
/// L2).
pub(super) fn attach(
    owner: Owner,
    id: SegmentId,
    geometry: Geometry,
) -> Result<Segment<WriteSlots>> {
    let mapping = open(&owner.segment(id.index), geometry)?;
    mapping.header().verify(id, geometry)?;
    Ok(Segment::new(id, mapping))
}

/// Opens a name once, then checks and maps that descriptor: the name may refer to other memory by
/// then.
#[cfg(target_os = "linux")]
fn open(name: &str, geometry: Geometry) -> Result<Mapping> {
    let memory = names::open_checked(name, geometry)?;
    Mapping::opened(memory, geometry, true).map_err(Error::os("mapping a segment"))
}

#[cfg(not(target_os = "linux"))]
fn open(name: &str, geometry: Geometry) -> Result<Mapping> {
    let memory = ShmemConf::new().os_id(name).open().map_err(failed("opening shared memory"))?;
    let (found, expected) = (memory.len() as u64, geometry.mapped_len() as u64);
    if found != expected {
        return Err(crate::error::LayoutMismatch::Size { found, expected }.into());
    }
    Mapping::kept(Memory::new(memory), geometry, true).map_err(Error::os("mapping a segment"))
}

/// Converts the crate's errors: they have the system's error code, or a text of their own.
fn failed(call: &'static str) -> impl FnOnce(ShmemError) -> Error {
    move |error| {
        let source = match error {
            ShmemError::MapCreateFailed(code)
            | ShmemError::MapOpenFailed(code)
            | ShmemError::UnknownOsError(code) => io::Error::from_raw_os_error(code as i32),
            ShmemError::MappingIdExists => io::ErrorKind::AlreadyExists.into(),
            other => io::Error::other(other),
        };
        Error::Os { call, source }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
