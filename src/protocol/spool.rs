//! Copies the rest of a body for a slow reader to a file, so that its segment is free for others.

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::random::random;
use crate::sync::{Deadline, wait_ready};

use super::sink::send_all_telling;
use super::{Receiver, Receiving, ShmTransfer};

/// How many bytes of a spooled body are read at a time.
const BUFFER: usize = 256 << 10;

/// Space for bodies whose readers are slow, in unnamed files of the temporary directory. Shared by
/// all transfers that are given it.
///
/// See [`ShmTransfer::copy_to_or_spool`].
#[derive(Debug)]
pub struct Spool {
    limit: u64,
    in_use: AtomicU64,
    /// Bodies spooled so far.
    bodies: AtomicU64,
    /// Locked while a body is being spooled. One at a time: each one frees a segment, after which
    /// the others may not need to.
    filling: Mutex<()>,
}

impl Spool {
    /// Space for `limit` bytes in all. With zero, nothing is spooled.
    pub fn new(limit: u64) -> Spool {
        let (in_use, bodies) = (AtomicU64::new(0), AtomicU64::new(0));
        Spool { limit, in_use, bodies, filling: Mutex::new(()) }
    }

    /// Bytes that are spooled now, or reserved for it.
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Relaxed)
    }

    /// How many bodies have been spooled so far.
    pub fn bodies(&self) -> u64 {
        self.bodies.load(Relaxed)
    }

    /// Reserves space for so many bytes, and the right to fill it; `None` if there is less, or if
    /// another body is being spooled.
    fn reserve(&self, bytes: u64) -> Option<(Reserved<'_>, MutexGuard<'_, ()>)> {
        let filling = match self.filling.try_lock() {
            Ok(filling) => filling,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(), // no data to break
            Err(TryLockError::WouldBlock) => return None,
        };
        let room = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.in_use.fetch_update(Relaxed, Relaxed, room).ok()?;
        Some((Reserved { spool: self, bytes }, filling))
    }
}

/// Space reserved in a spool; released when dropped.
struct Reserved<'s> {
    spool: &'s Spool,
    bytes: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.spool.in_use.fetch_sub(self.bytes, Relaxed);
    }
}

/// How long a sender may take for the next chunk of a body that is being spooled. For a slower one
/// spooling gains nothing: the segment stays in use until the sender has finished.
const QUICK: Duration = Duration::from_millis(100);

/// For how long spooling goes on although the socket takes bytes again.
const LONGEST: Duration = Duration::from_secs(1);

impl ShmTransfer<Receiver, Receiving> {
    /// As [`copy_to`](Self::copy_to), to a socket, and ends the transfer. While other callers wait
    /// for a segment of the pool and the socket takes nothing, the rest of a body of known size
    /// goes to the spool, if it and its disk have room, and if the sender is quick. The segment
    /// then goes back to its pool, and the rest is sent from the file. So a slow reader does not
    /// keep a segment from others.
    ///
    /// # Errors
    /// Those of [`copy_to`](Self::copy_to).
    pub fn copy_to_or_spool(mut self, socket: impl AsFd, spool: &Spool) -> Result<u64> {
        let socket = socket.as_fd();
        let timeout = self.side.waiter.timeout();
        let (mut copied, mut wait) = (0, None);
        // One round for each time `copy_until` is told to stop: at most ten a second.
        loop {
            let (more, is_done) =
                self.copy_until(socket, &mut wait, Receiver::is_segment_wanted)?;
            copied += more;
            if is_done {
                return Ok(copied);
            }
            let Some(left) = self.left() else { continue };
            let Some((_room, filling)) = spool.reserve(left) else { continue };
            // All blocks are allocated first: without room on the disk, the body stays in the
            // segment.
            let Ok(file) = unnamed_file(left) else { continue };
            let moved = self.set_aside(&file, socket);
            drop(filling);
            if let Ok(true) = moved {
                spool.bodies.fetch_add(1, Relaxed);
                drop(self); // the segment is free
                return Ok(copied + send_file(&file, socket, timeout, || {})?);
            }
            // First what was spooled; then what is still to come, or the error.
            let sent = send_file(&file, socket, timeout, || self.side.tell_progress())?;
            copied += sent;
            if sent > 0 {
                wait = None;
            }
            match moved {
                Ok(_) | Err(Error::Sink(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the rest to a file; `false` if it stopped early, because the sender is slow or the
    /// socket takes bytes again.
    fn set_aside(&mut self, file: &File, socket: BorrowedFd<'_>) -> Result<bool> {
        let start = Instant::now();
        loop {
            match self.open_chunk(Deadline::after(QUICK)) {
                Ok(true) => {}
                Ok(false) => return Ok(true),
                Err(Error::Timeout(_)) => return Ok(false),
                Err(error) => return Err(error),
            }
            self.write_open(file.as_fd(), &mut None, |_| false)?;
            self.close_chunk();
            let at_once = Deadline::after(Duration::ZERO);
            if start.elapsed() > LONGEST
                && wait_ready(socket, PollFlags::OUT, at_once).unwrap_or(true)
            {
                return Ok(false);
            }
        }
    }
}

/// Sends a whole file; returns its length. Calls `moved` whenever the socket makes progress.
fn send_file(
    file: &File,
    socket: BorrowedFd<'_>,
    timeout: Duration,
    moved: impl Fn(),
) -> Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut sent = 0;
    loop {
        match file.read_at(&mut buffer, sent) {
            Ok(0) => return Ok(sent),
            Ok(read) => {
                send_all_telling(socket, &buffer[..read], timeout, &moved)?;
                sent += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Source(error)),
        }
    }
}

/// A file without a name, with blocks for so many bytes. The kernel removes it when it is closed,
/// even if this process is killed.
fn unnamed_file(room: u64) -> io::Result<File> {
    let file = make_unnamed()?;
    match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, room) {
        // The file system cannot allocate in advance. A write may fail then; the body stays usable.
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(file),
        Err(errno) => Err(errno.into()),
    }
}

fn make_unnamed() -> io::Result<File> {
    let dir = env::temp_dir();
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let unnamed = options.clone().custom_flags(OFlags::TMPFILE.bits() as i32).open(&dir);
    if let Ok(file) = unnamed {
        return Ok(file);
    }
    // The file system has no unnamed files: make one with a name, and remove the name at once.
    let path = dir.join(format!("shmferry-spool-{:016x}", random()?));
    let file = options.create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
