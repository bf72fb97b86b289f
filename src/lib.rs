//! Ferries files and byte streams between processes of one machine through shared memory.
#![deny(missing_docs)]
// Excused in `segment/mapping.rs` alone, where each block carries its proof.
#![deny(unsafe_code)]
// The library returns errors; only a defect of its own may panic.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]

#[cfg(not(target_os = "linux"))]
compile_error!("shmferry needs Linux: memfd, futex, SCM_RIGHTS over SOCK_SEQPACKET");

mod channel;
mod crew;
mod error;
mod peer;
mod protocol;
mod segment;
mod sync;

pub use channel::{
    InProcess, KEY_LIMIT, Request, RequestQueue, Requester, SendError, Seqpacket, SeqpacketQueue,
    SeqpacketRequester,
};
pub use crew::{Crew, lend};
pub use error::{Awaited, Error, Fault, LayoutMismatch, Misuse, PeerFault, Rejection, Result};
pub use peer::Peer;
pub use protocol::{
    Chunk, DEFAULT_PATIENCE, METADATA_LIMIT, Metadata, Offered, Receiver, Receiving, Refusal, Reply, Sender,
    Sending, ShmTransfer, Size, Slot, Starting,
};
pub use segment::{
    Backing, Geometry, Lease, Memfd, PoolId, PoolStats, ReadSlots, Segment, SegmentId, SegmentPool,
    SegmentPoolBuilder, WriteSlots,
};
pub use sync::Deadline;
