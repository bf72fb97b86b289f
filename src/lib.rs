//! Ferries files and byte streams between processes of one machine through shared memory.
//!
//! A server answers requests for keys with bytes: a file, a buffer, or a stream as it is made. A
//! client asks, and reads. The bytes cross through memory that both have mapped.
//!
//! ```
//! use shmferry::{Client, Refusal, Server};
//!
//! # let dir = tempfile::tempdir()?;
//! # let address = &format!("unix:{}/cache.sock", dir.path().display());
//! # /*
//! let address = "unix:/run/me/cache.sock";
//! # */
//! let server = Server::bind(address)?.serve(8, |request| match request.key() {
//!     b"/greeting" => request.send_bytes(b"hello"),
//!     _ => request.refuse(Refusal::NotFound),
//! })?;
//!
//! let cache = Client::connect(address)?; // in another process; either may start first
//! assert_eq!(cache.get("/greeting")?.read_all()?, b"hello");
//! # server.stop();
//! # Ok::<(), shmferry::Error>(())
//! ```
//!
//! # Where to begin
//! | to | see |
//! | --- | --- |
//! | ask for bytes and read them | [`Client`], [`Body`] |
//! | serve files, buffers or streams | [`Server`], [`Incoming`], [`Outgoing`] |
//! | serve the files beneath a directory | [`files::Directory`] |
//! | hand the same bytes out again without a copy | [`loan`], [`Incoming::lend`], [`Body::into_bytes`] |
//! | refuse with a reason | [`Incoming::refuse`], [`Refusal`] |
//! | attach more than a size | [`Incoming::accept_with`], [`Metadata`] |
//! | learn of errors within a server | [`Server::on_error`], [`ServeError`] |
//! | do both within one process | [`InProcess`](channel::InProcess), [`ClientBuilder::in_process`] |
//! | know what an error means and what to do | [`Error`] |
//! | own the segments, the queue, each step | [`segment`], [`channel`], [`protocol`] |
//! | be served while others are slow | [`workers`] |
//!
//! # The model
//! The client owns a pool of *segments*. For each transfer it leases one, and sends a small request
//! that names the segment and the key. The server answers through that segment alone: first status
//! and size, then the bytes, chunk by chunk.
//!
//! ```text
//!  client                                                           server
//!  ──────                                                           ──────
//!  lease a segment                                                  take the request
//!  send the request  ────── segment, generation, key ─────────────▶ look the key up
//!  wait for the reply                                               accept, with the size
//!        ▲      ┌────────────────────────────────────────┐                │ pread, write
//!        └──────┤ status, size │ slot 0 │ slot 1 │ slot 2 ◀───────────────┘
//!        read   └────────────────────────────────────────┘
//!                       filled ▶  two semaphores  ◀ free
//! ```
//!
//! Control travels through a [queue](channel), data through memory that both sides have mapped. A
//! segment is cut into slots, so that the server can fill the next one while the client still
//! passes on the last; two semaphores count filled and free ones, and cost no system call unless a
//! side has to sleep. Whatever the size of a file, a transfer takes the memory of one segment,
//! which was allocated when the client was made.
//!
//! # Which transport
//! | | `unix:PATH` | `mq:/NAME` |
//! | --- | --- | --- |
//! | choose it | by default | where requests must go through a POSIX queue, or no socket may be used |
//! | segments are | sealed memory without a name | named shared memory, `/dev/shm`, mode 0600 |
//! | processes of | any users that are allowed | one user |
//! | a peer can make the other's memory vanish | no: it is sealed | yes: it is trusted not to |
//! | a server turns a client away with the reason | yes | no: the client's time-out ends its wait |
//! | requests under way | bounded for each client | 10 in the queue for all, unless the system allows more |
//! | left after `kill -9` of both | a socket and a lock file | those of the queue, and the segments, until the next start |
//!
//! # Errors
//! [`Error`] tells causes apart, and [`Error::fault`] whose they are. Every wait ends by a timeout,
//! which counts from the last byte that the other side took, or by a [`Deadline`]; and it ends at
//! once when the other process ends. [`Error::Disconnected`] is a dead peer, [`Error::Timeout`] one
//! that lives and is late. What a server had sent before it died is still delivered first. Dropping
//! anything, at any point, is safe: the other side is told, and the segment comes back or is
//! replaced.
//!
//! # Trust
//! A peer is another program, perhaps one with a fault. All that it writes is read once, checked
//! against what this side knows, and only then used; a peer that lies gets [`Error::Peer`] or loses
//! its connection. It can spoil the bytes in the segments that it was given, and nothing else: no
//! reference to that memory exists but to atomics, descriptors are sealed and measured before they
//! are mapped, and the receiver maps slots read-only. The socket is this user's alone unless told
//! otherwise, and the peer's user is checked on both sides.
//!
//! That is the socket, `unix:PATH`. The message queue, `mq:/NAME`, is for processes of one user
//! that trust each other not to shrink a segment under the other's feet.
//!
//! What a server lends is memory that nobody can change or shrink any more, its maker included:
//! sealed, and checked for its seals and for holes before it is mapped. That alone becomes a
//! `&[u8]`. What is left is a debugger of the same user, which can write to any memory of this
//! process, the mapping of a loan included: that changes this process's copy, and nobody else's. A
//! lent file is read, never mapped; its changes are seen, and reading it waits as long as its file
//! system does. A file of FUSE is refused, but a server that hides one beneath another file system
//! can make the threads that use its connection wait.
//!
//! A server is given all segments of a pool: have one pool for each server that you would not trust
//! with another's bytes. What a client hands over is checked to be really allocated, but that
//! guards against accidents only: a client can feign it, or give the memory back to the system
//! later, and then the server pays for the pages that it maps and writes. A client can cost a
//! socket server twice [`max_bytes`](ServerBuilder::max_bytes) in that way, and no more. Where the
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
//! leases, requests, transfers, requesters, queues and worker pools. They are still the parent's.
//! The child may drop them, at any point, which changes nothing for the parent: no name, socket,
//! lock, segment or watch of it is touched. Any other use of them is refused with
//! [`Misuse::Forked`](error::Misuse::Forked), which names the process that made them; calls that
//! return no error do nothing, or report nothing ([`Client::stats`] is all zero). The child makes
//! its own, and these work as in any process.
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
//! - Between processes on Linux only (5.3 or later, for `pidfd_open`); one machine, one memory.
//!   Elsewhere there are named segments, transfers, and the queue within a process; none of it has
//!   been run there.
//! - A segment has 1 to 512 slots of up to 1 GiB; a key up to 4,096 bytes, metadata up to 1,024.
//! - Each segment costs its owner one file descriptor.
//! - Bytes that are sent are copied twice: by the kernel into the slot (`pread`), and out of it,
//!   unless they are read where they are ([`Chunk::bytes`](protocol::Chunk::bytes)). Bytes that are
//!   [lent](loan) are not copied.
//! - A waiting side, or a server's worker, may spin for up to 50 µs at a time, while processors are
//!   to spare.
//! - Memory pages of 4 KiB.
//! - A process with a limit on file sizes (`ulimit -f`) below a segment gets `SIGXFSZ` when it
//!   makes one; ignored or handled, that is an error like any other.
//! - Memory that a container's limit would refuse is not foreseen: a pool is checked against what
//!   the machine has available.
//!
//! # Features
//! - `posix-mq` (on): requests over POSIX message queues, `mq:/NAME`, and named segments. Without
//!   it the crate needs 13 packages, itself included.
//! - `bytes` (off): what was lent converts into `bytes::Bytes`, without a copy.
//! - `tracing` (off): errors of servers as events of the crate `tracing`.
//! - `loan-store` (off): `loan::LoanStore`, which lends files that are asked for again.
//! - `tokio` (off): [`tokio::Client` and `tokio::Server`](#waiting-without-a-thread).
//! - `raw-sync` (off): sleep by the crate `raw_sync`, as systems without a futex would have to. For
//!   testing that; slower, and nothing is promised after a peer is killed. Both processes must be
//!   built alike, or attaching fails with a mismatch of versions.
//!
//! # Waiting without a thread
//! The feature `tokio` brings a module of that name, with the same front door for tasks. Beneath it
//! are steps that never wait, for any runtime or none:
//! [`try_recv`](channel::SeqpacketQueue::try_recv),
//! [`poll_slot`](protocol::ShmTransfer::poll_slot),
//! [`lease_soon`](segment::SegmentPool::lease_soon),
//! [`poll_wait`](protocol::ShmTransfer::poll_wait),
//! [`poll_chunk`](protocol::ShmTransfer::poll_chunk); a request is sent with a deadline that has
//! passed. Over sockets and within a process. The contract:
//!
//! - Each side has one descriptor to wait on: a [`SeqpacketQueue`](channel::SeqpacketQueue) for a
//!   server, a [`SeqpacketRequester`](channel::SeqpacketRequester) for a client. Once it is
//!   readable, [`try_recv`](channel::SeqpacketQueue::try_recv) until that is pending, or
//!   [`attend`](channel::SeqpacketRequester::attend): that wakes the tasks that have something to
//!   take, and from then on the descriptor is not readable, until something new comes.
//! - A step that is pending wakes its [`Waker`](std::task::Waker) once it may be worth while to try
//!   again, if somebody attends to the descriptor. A wake-up can be needless: the step is then
//!   pending again. It is never missing.
//! - Only the last waker given for a transfer is woken.
//!
//! # When not to use it
//! - If the client can open the file itself, or be handed its descriptor, let it.
//! - If all you move is small messages, a Unix socket does it with far less machinery.
//! - For one writer and many readers of a stream that both follow, use a shared ring.
//!
//! The byte layout and the rules that the comments cite (L, P, S) are in `docs/protocol.md`, the
//! decisions in `docs/design.md`, and what used to break in `docs/failure-modes.md`.
#![deny(missing_docs)]
// Excused in the few files that begin with `#![allow(unsafe_code)]`, where each block carries its
// proof.
#![deny(unsafe_code)]
// The library returns errors; only a defect of its own may panic.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]
// Elsewhere only the portable part is built, which has no use for some of what it shares with the
// rest.
#![cfg_attr(not(target_os = "linux"), allow(dead_code))]

mod address;
pub mod channel;
mod client;
pub mod error;
#[cfg(target_os = "linux")]
pub mod files;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod id;
#[cfg(target_os = "linux")]
pub mod loan;
#[cfg(target_os = "linux")]
mod own_file;
mod peer;
mod process;
pub mod protocol;
mod random;
pub mod segment;
mod server;
mod sync;
#[cfg(all(target_os = "linux", feature = "tokio", not(loom)))]
pub mod tokio;
pub mod workers;

pub use address::Address;
pub use client::{Body, Client, ClientBuilder};
pub use error::{Error, Fault, Result};
pub use peer::Peer;
pub use protocol::{Metadata, Refusal, Size};
pub use segment::PoolStats;
#[cfg(target_os = "linux")]
pub use server::ServerBuilder;
pub use server::{Incoming, Outgoing, ServeError, Server, Serving};
pub use sync::Deadline;

/// README's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
