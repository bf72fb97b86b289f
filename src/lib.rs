//! Ferries files and byte streams between processes of one machine through shared memory.
//!
//! # The model
//! One process, the *receiver*, owns a [`SegmentPool`]. For each transfer it leases a segment, and
//! sends a small request that names the segment and a key. Another process, the *sender*, answers
//! through that segment alone: first status and size, then the bytes, chunk by chunk.
//!
//! ```text
//!  receiver                                                         sender
//!  ────────                                                         ──────
//!  pool.lease()                                                     queue.recv()
//!  lease.request(key)  ──── request: segment, generation, key ────▶ transfer.key()
//!  transfer.reply()                                                 transfer.accept(size)
//!        ▲      ┌────────────────────────────────────────┐                │ pread
//!        └──────┤ status, size │ slot 0 │ slot 1 │ slot 2 ◀───────────────┘
//!       write   └────────────────────────────────────────┘
//!                       filled ▶  two semaphores  ◀ free
//! ```
//!
//! Control travels through the [queue](RequestQueue), data through memory that both sides have
//! mapped. A segment is cut into slots, so that the sender can read the next piece of its file while
//! the receiver still passes on the last; two semaphores count filled and free ones, and cost no
//! system call unless a side has to sleep. Whatever the size of a file, a transfer takes the memory
//! of one segment, which was allocated when the pool was made.
//!
//! # A whole example
//! Sender and receiver would be two processes; two threads show the same calls.
//!
//! ```
//! use shmferry::{
//!     Deadline, Memfd, Refusal, Reply, RequestQueue, Requester, SegmentPool, Seqpacket,
//! };
//! use std::{fs::File, io::{Read, Write}, thread, time::Duration};
//!
//! # let dir = tempfile::tempdir()?;
//! # let (socket, picture) = (dir.path().join("cache.sock"), dir.path().join("a.jpg"));
//! # File::create(&picture)?.write_all(&[0xd8; 300_000])?;
//! // The sender serves files at a Unix socket.
//! let queue = Seqpacket::new(&socket).bind()?;
//! let sender = thread::spawn(move || -> shmferry::Result<()> {
//!     for _ in 0..2 {
//!         let transfer = queue.recv(Deadline::NEVER)?;
//!         match transfer.key() {
//!             b"/a.jpg" => {
//!                 let file = File::open(&picture).expect("the example's own file");
//!                 let size = file.metadata().expect("an open file").len();
//!                 transfer.accept(size)?.send_file(&file)?;
//!             }
//!             _ => transfer.refuse(Refusal::NotFound)?,
//!         }
//!     }
//!     Ok(())
//! });
//!
//! // The receiver owns the memory, and asks.
//! let pool = SegmentPool::<Memfd>::builder().segments(2).segment_len(512 << 10).slots(4).create()?;
//! let cache = Seqpacket::new(&socket).requester(&pool)?; // connects by itself, in any start order
//! let deadline = Deadline::after(Duration::from_secs(5));
//!
//! let (request, transfer) = pool.lease(deadline)?.request("/a.jpg")?;
//! cache.send(request, deadline)?;
//! let Reply::Found(mut body) = transfer.reply(deadline)? else { panic!("it is there") };
//! let mut bytes = Vec::new();
//! body.read_to_end(&mut bytes)?; // or `copy_to(&socket)`, straight from the segment
//! assert_eq!(bytes, [0xd8; 300_000]);
//!
//! let (request, transfer) = pool.lease(deadline)?.request("/b.jpg")?;
//! cache.send(request, deadline)?;
//! assert!(matches!(transfer.reply(deadline)?, Reply::Refused(Refusal::NotFound)));
//! # sender.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where to begin
//! | to | see |
//! | --- | --- |
//! | own segments and lease them | [`SegmentPool`], [`Lease`] |
//! | ask and receive | [`Requester`], [`ShmTransfer<Receiver, Offered>`](ShmTransfer#method.reply) |
//! | ask through restarts of the server | [`Requester::ask`] |
//! | answer and send | [`RequestQueue`], [`ShmTransfer<Sender, Starting>`](ShmTransfer#method.accept) |
//! | choose a queue | [`Seqpacket`] or [`PosixMq`] between processes, [`InProcess`] within one |
//! | serve many at once without being held up by the slow ones | [`WorkerPool`] |
//! | free the segments that slow readers hold | [`Spool`], [`copy_to_or_spool`](ShmTransfer#method.copy_to_or_spool) |
//! | attach more than a size | [`Metadata`] |
//!
//! | | [`Seqpacket`] with [`Memfd`] | [`PosixMq`] with [`Named`] |
//! | --- | --- | --- |
//! | choose it | by default | where requests must go through a POSIX queue, or no socket may be used |
//! | processes of | any users that are allowed | one user |
//! | a peer can make the other's memory vanish | no: it is sealed | yes: it is trusted not to |
//! | a server turns a client away with the reason | yes | no: the client's deadline ends its wait |
//! | requests under way | bounded for each client | 10 in the queue for all, unless the system allows more |
//! | left after `kill -9` of both | a socket and a lock file | those of the queue, and the segments, until the next start |
//!
//! # Errors
//! [`Error`] tells causes apart, and [`Error::fault`] whose they are. Every wait takes a
//! [`Deadline`], or the transfer's patience, which counts from the last byte that the other side took,
//! and ends at once when the peer's process ends:
//! [`Error::Disconnected`] is a dead peer, [`Error::Timeout`] one that lives and is late. What a
//! sender had filled before it died is still delivered first. Dropping anything, at any point, is
//! safe: the other side is told, and the segment comes back or is replaced.
//!
//! # Trust
//! A peer is another program, perhaps one with a fault. All that it writes is read once, checked
//! against what this side knows, and only then used; a peer that lies gets [`Error::Peer`] or loses
//! its connection. It can spoil the bytes in the segments that it was given, and nothing else: no
//! reference to that memory exists but to atomics, descriptors are sealed and measured before they
//! are mapped, and the receiver maps slots read-only. The socket is this user's alone unless told
//! otherwise, and the peer's user is checked on both sides.
//!
//! That is the socket with [`Memfd`]. [`PosixMq`] with [`Named`] is for processes of one user that trust
//! each other not to shrink a segment under the other's feet.
//!
//! A server is given all segments of a pool: have one pool for each server that you would not trust
//! with another's bytes. What a client hands over is checked to be really allocated, but that
//! guards against accidents only: a client can feign it, or give the memory back to the system
//! later, and then the server pays for the pages that it maps and writes. A client can cost a
//! socket server twice [`max_bytes`](Seqpacket::max_bytes) in that way, and no more. Where the
//! system grants no memory beyond what it has (`vm.overcommit_memory=2`), such a page can be
//! refused while it is written to, which ends the server with `SIGBUS`: there, serve only clients
//! that you trust.
//!
//! Names in `/dev/shm` and of queues can be taken by others before they are needed. That costs an
//! error that says what stands there and whose it is ([`Error::NameTaken`]), and never more: what
//! belongs to another user is not opened for use, waited for, or removed. Not defended against: a
//! peer of the same user that attaches a debugger, or uses up the machine.
//!
//! # Fork
//! A child of `fork` that does not execute another program has copies of its parent's pools,
//! leases, requests, transfers, requesters, queues and crews. They are still the parent's. The
//! child may drop them, at any point, which changes nothing for the parent: no name, socket, lock,
//! segment or watch of it is touched. Any other use of them is refused with [`Misuse::Forked`],
//! which names the process that made them; calls that return no error do nothing, or report nothing
//! ([`SegmentPool::stats`] is all zero). The child makes its own, and these work as in any process.
//!
//! - A server that becomes a daemon binds after its last fork. One that forked later drops the
//!   queue and binds anew.
//! - Until a child drops what it inherited, executes another program, or ends, its copies of
//!   descriptors keep its parent's connections and locks open. A peer is told of the parent's
//!   *death* only then. A requester or socket queue that the parent *drops* hangs up at once.
//! - Children are told apart by a handler of the C library's `fork`. A child made in another way
//!   (the system call `clone` itself, `_Fork`) is not noticed, and must use nothing of this crate.
//!
//! # Limits
//! - Between processes on Linux only (5.3 or later, for `pidfd_open`); one machine, one memory. Elsewhere
//!   there are named segments, transfers, and the queue within a process; none of it has been run there.
//! - A segment has 1 to 512 slots of up to 1 GiB; a key up to 4,096 bytes, metadata up to 1,024.
//! - Each segment costs its owner one file descriptor.
//! - Bytes are copied twice: by the kernel into the slot (`pread`), and out of it, unless they are read where
//!   they are ([`Chunk::bytes`]). Nothing is lent beyond that.
//! - A waiting side, or a server's worker, may spin for up to 50 µs at a time, while processors are to spare.
//! - Memory pages of 4 KiB.
//! - A process with a limit on file sizes (`ulimit -f`) below a segment gets `SIGXFSZ` when it makes
//!   one; ignored or handled, that is an error like any other.
//! - Memory that a container's limit would refuse is not foreseen: a pool is checked against what the
//!   machine has available.
//!
//! # Features
//! - `raw-sync` (off): sleep by the crate `raw_sync`, as systems without a futex would have to. For
//!   testing that; slower, and weaker when a peer is killed. Both processes must be built alike, or
//!   attaching fails with a mismatch of versions.
//!
//! # When not to use it
//! - If the receiver can open the file itself, or be handed its descriptor, let it.
//! - If all you move is small messages, a Unix socket does it with far less machinery.
//! - For one writer and many readers of the same data, use a shared ring or a memory map.
//!
//! The byte layout and the rules that the comments cite (L, P, S) are in `docs/protocol.md`, the
//! decisions in `docs/design.md`, and what used to break in `docs/failure-modes.md`.
#![deny(missing_docs)]
// Excused in `segment/mapping.rs`, `segment/named/ending.rs`, `peer/credentials.rs`, `process.rs`
// and `sync/raw_sync.rs`, where each block carries its proof.
#![deny(unsafe_code)]
// The library returns errors; only a defect of its own may panic.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]
// Elsewhere only the portable part is built, which has no use for some of what it shares with the rest.
#![cfg_attr(not(target_os = "linux"), allow(dead_code))]

mod channel;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod id;
#[cfg(target_os = "linux")]
mod own_file;
mod peer;
mod process;
mod protocol;
mod segment;
mod sync;
mod workers;

pub use channel::{InProcess, KEY_LIMIT, Request, RequestQueue, Requester, SendError};
#[cfg(target_os = "linux")]
pub use channel::{
    PosixMq, PosixMqQueue, PosixMqRequester, Seqpacket, SeqpacketQueue, SeqpacketRequester,
};
pub use error::{Awaited, Error, Fault, LayoutMismatch, Misuse, PeerFault, Rejection, Result};
pub use peer::Peer;
pub use protocol::{
    Chunk, DEFAULT_TIMEOUT, METADATA_LIMIT, Metadata, Offered, Receiver, Receiving, Refusal, Reply,
    Sender, Sending, ShmTransfer, Size, Slot, Starting,
};
#[cfg(target_os = "linux")]
pub use protocol::{Spool, send_all};
#[cfg(target_os = "linux")]
pub use segment::Memfd;
#[cfg(not(loom))]
pub use segment::SharedByte;
pub use segment::{
    Backing, Geometry, Lease, Named, PoolId, PoolStats, ReadSlots, Segment, SegmentId, SegmentPool,
    SegmentPoolBuilder, WriteSlots,
};
pub use sync::Deadline;
pub use workers::{WorkerPool, blocking};
