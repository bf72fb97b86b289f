//! Entry points for `fuzz/`, compiled in no other build: transfers over memory that the fuzzer
//! writes to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::channel::{Message, QueueMessage, VERSION};
use crate::peer::Link;
use crate::protocol::{Loans, Offered, Receiver, Sender, ShmTransfer, Starting};
use crate::segment::sealed::Backing;
use crate::segment::{Geometry, Memfd, PoolId, SegmentId, SegmentPool};
use crate::{Deadline, Error, Result};

/// Decodes a message of the socket, and one of a POSIX queue. A decoded message must encode to the
/// same bytes.
pub fn request(bytes: &[u8]) {
    match Message::decode(bytes) {
        // After the number of another version, the rest is not kept.
        Ok(Message::Hello { version, .. }) if version != VERSION => {}
        Ok(message) => {
            assert_eq!(message.encode(), bytes);
            let _ = message.rejection();
        }
        Err(_) => {}
    }
    if let Ok(message) = QueueMessage::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
}

/// A ring of requests, whose memory the fuzzer writes to between the steps of two correct ends.
pub fn ring(script: &[u8]) {
    let _ = crate::channel::fuzz_ring(script);
}

/// A correct receiver whose request was sent, and the memory as its sender has it.
pub fn offered(pool: &SegmentPool<Memfd>) -> Result<(ShmTransfer<Receiver, Offered>, OwnedFd)> {
    let lease = pool.lease(Deadline::NEVER)?;
    let index = lease.segment().id().index();
    let (_, live) = pool.live();
    let pooled = live.iter().find(|pooled| pooled.segment.id().index() == index);
    let Some(pooled) = pooled else { unreachable!("a segment that is leased is in the pool") };
    let memory = pooled.backing.as_fd().try_clone_to_owned().map_err(Error::os("dup"))?;
    let (request, transfer) = lease.request("key")?;
    request.sent_over(&Arc::new(Link::within()));
    Ok((transfer, memory))
}

/// A correct sender with a request of this generation, over memory that `corrupt` wrote to before
/// it was attached, and the memory as its receiver has it.
pub fn starting(
    slots: u32,
    slot_len: u32,
    generation: u64,
    corrupt: impl FnOnce(BorrowedFd<'_>),
) -> Result<(ShmTransfer<Sender, Starting>, OwnedFd)> {
    let id = SegmentId { pool: PoolId(7), index: 3 };
    let geometry = Geometry::new(slots, slot_len)?;
    let (_owned, memory) = Memfd::create(&(), id, geometry)?;
    corrupt(memory.as_fd());
    let segment = memory.attach(id, geometry)?;
    let transfer = ShmTransfer::begin(
        Arc::new(segment),
        generation,
        b"key"[..].into(),
        &Arc::new(Link::within()),
        Loans::None,
    );
    Ok((transfer, memory.as_fd().try_clone_to_owned().map_err(Error::os("dup"))?))
}
