//! Waits for a sink, to which received bytes are passed on: a socket, a pipe or a file (rule P9).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::error::{Awaited, Error, Result};
use crate::peer::untaken;
use crate::sync::{Deadline, blocking, wait_ready};

use super::wait::Idle;

/// How often a wait for a sink checks whether to end early.
const LOOK: Duration = Duration::from_millis(100);

/// Prevents SIGPIPE.
#[cfg(target_os = "linux")]
const FLAGS: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
/// Such systems have a process-wide or per-socket setting against SIGPIPE instead.
#[cfg(not(target_os = "linux"))]
const FLAGS: SendFlags = SendFlags::DONTWAIT;

/// Sends bytes to a socket. Waits as long as the other end makes progress: until it has taken no
/// byte for `timeout`. A reader that is slow but steady is not cut off. The kernel reports TCP
/// progress in steps of the receiver's window, about 64 KiB on loopback, so `timeout` should be
/// longer than one step takes. The wait is [`blocking`](crate::workers::blocking): the thread's
/// place at work is free meanwhile.
///
/// # Errors
/// [`Error::Timeout`] when the other end has taken nothing for `timeout`, [`Error::Sink`] when the
/// socket fails, or when the descriptor is not a socket.
pub fn send_all(socket: impl AsFd, bytes: &[u8], timeout: Duration) -> Result<()> {
    send_all_telling(socket.as_fd(), bytes, timeout, || {})
}

/// As [`send_all`]; calls `moved` whenever the other end has taken bytes.
pub(super) fn send_all_telling(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    timeout: Duration,
    moved: impl Fn(),
) -> Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        match rustix::net::send(socket, &bytes[sent..], FLAGS) {
            Ok(0) => return Err(Error::Sink(io::ErrorKind::WriteZero.into())),
            Ok(more) => {
                sent += more;
                moved();
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut wait = SinkWait::new(socket, timeout);
                wait.go_on(socket, &moved, || false).map(drop)?;
            }
            Err(errno) => return Err(Error::Sink(errno.into())),
        }
    }
    Ok(())
}

/// Writes to a socket or pipe without blocking, or to another kind of descriptor. Returns how many
/// bytes were written.
#[cfg(target_os = "linux")]
pub(crate) fn write_some(sink: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    use rustix::fs::{FileType, fstat};
    match rustix::net::send(sink, bytes, FLAGS) {
        Err(Errno::NOTSOCK) => {}
        sent => return Ok(sent?),
    }
    let mut len = bytes.len();
    if FileType::from_raw_mode(fstat(sink)?.st_mode) == FileType::Fifo {
        // A pipe that polls as writable takes `PIPE_BUF` bytes.
        len = len.min(libc::PIPE_BUF);
        if !wait_ready(sink, PollFlags::OUT, Deadline::after(Duration::ZERO))? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(rustix::io::write(sink, &bytes[..len])?)
}

/// A wait for a sink that takes nothing, over all its interruptions.
pub(crate) struct SinkWait(Idle<Option<u64>>);

impl SinkWait {
    pub(crate) fn new(sink: BorrowedFd<'_>, timeout: Duration) -> SinkWait {
        SinkWait(Idle::new(timeout, untaken(sink)))
    }

    /// Waits until the sink takes bytes again; `false` if `is_ended` ends the wait before, after
    /// which it can be resumed. Calls `moved` whenever the other end has taken bytes, even if it
    /// has no room for more yet.
    pub(crate) fn go_on(
        &mut self,
        sink: BorrowedFd<'_>,
        moved: impl Fn(),
        is_ended: impl Fn() -> bool,
    ) -> Result<bool> {
        let SinkWait(idle) = self;
        blocking(|| {
            loop {
                let look = idle.look_again().min(Deadline::after(LOOK));
                match wait_ready(sink, PollFlags::OUT, look) {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(errno) => return Err(Error::Sink(errno.into())),
                }
                let now = untaken(sink);
                if now != idle.seen {
                    moved();
                }
                if idle.is_over(now) {
                    return Err(Error::Timeout(Awaited::Sink));
                }
                if is_ended() {
                    return Ok(false);
                }
            }
        })
    }
}
