//! The `Named` backing: POSIX shared memory with a name, by crate `shared_memory`, and what that lacks.
//!
//! The crate makes, opens, maps and removes the memory. Added here: blocks are allocated before
//! anyone touches them, size and header are checked at open (rules L1, L2), names tell pool and owner,
//! and an owner that starts removes the names of those that are gone (rule L3).

use std::io;

use shared_memory::{Shmem, ShmemConf, ShmemError};

use crate::error::{Error, LayoutMismatch, Result};

use super::mapping::Mapping;
use super::{Backing, Geometry, PoolId, ReadSlots, Segment, SegmentId, WriteSlots};

#[cfg(target_os = "linux")]
mod ending;
#[cfg(target_os = "linux")]
mod names;
#[cfg(target_os = "linux")]
pub(crate) use names::sweep;

/// Segments in POSIX shared memory, which the peer opens by name. For processes of one user: whoever
/// may open a name may also resize what it stands for, and so harm those that have it mapped.
///
/// The names begin with `shmferry-`, the owner's pid and the pool; only this user may open them. They
/// go with the pool. What a killed owner leaves is removed when the next pool of this kind is made.
#[derive(Debug)]
pub struct Named(Owner);

/// The process that made a pool of named segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) pool: PoolId,
}

/// What a living pool of named segments holds.
pub struct Ownership {
    owner: Owner,
    /// Goes after the segments: nobody sweeps them as long as it is held.
    #[cfg(target_os = "linux")]
    _lifeline: crate::peer::Lifeline,
}

impl Named {
    /// What a peer needs, beside the segment's id, to open it.
    pub(crate) fn owner(&self) -> Owner {
        self.0
    }
}

impl Owner {
    /// What all its names begin with.
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
        ending::is_over(self.owner);
    }
}

impl Backing for Named {}

impl super::sealed::Backing for Named {
    type Ownership = Ownership;

    fn own(pool: PoolId) -> Result<Ownership> {
        let owner = Owner { pid: std::process::id(), pool };
        #[cfg(target_os = "linux")]
        sweep();
        #[cfg(target_os = "linux")]
        let lifeline = crate::peer::Lifeline::hold(owner.lifeline())?;
        #[cfg(target_os = "linux")]
        ending::outlived_by(owner);
        Ok(Ownership {
            owner,
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

    fn create(own: &Ownership, id: SegmentId, geometry: Geometry) -> Result<(Segment<ReadSlots>, Named)> {
        let name = own.owner.segment(id.index);
        let made = ShmemConf::new().os_id(&name).size(geometry.mapped_len()).create();
        let memory: Shmem = made.map_err(failed("creating shared memory"))?;
        #[cfg(target_os = "linux")]
        names::allocate(&name, geometry)?;
        let mapping = Mapping::named(memory, geometry, false).map_err(Error::os("mapping a segment"))?;
        mapping.header().initialise(id, geometry);
        Ok((Segment::new(id, mapping), Named(own.owner)))
    }

    fn attach(&self, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
        attach(self.0, id, geometry)
    }
}

/// Opens and maps a segment that a peer named, checking all that is claimed of it first (rules L1, L2).
pub(crate) fn attach(owner: Owner, id: SegmentId, geometry: Geometry) -> Result<Segment<WriteSlots>> {
    let name = owner.segment(id.index);
    #[cfg(target_os = "linux")]
    names::check(&name, geometry)?;
    let memory = ShmemConf::new().os_id(&name).open().map_err(failed("opening shared memory"))?;
    let (found, expected) = (memory.len() as u64, geometry.mapped_len() as u64);
    if found != expected {
        return Err(LayoutMismatch::Size { found, expected }.into());
    }
    let mapping = Mapping::named(memory, geometry, true).map_err(Error::os("mapping a segment"))?;
    mapping.header().verify(id, geometry)?;
    Ok(Segment::new(id, mapping))
}

/// The crate's errors as ours: they carry the system's code, or say what is wrong themselves.
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
