//! Asks the kernel about the other end of a socket: its process, and the bytes it has not yet
//! taken.
//!
//! `SO_PEERCRED` is called directly: the kernel reports pid 0 for a peer outside our pid namespace,
//! which rustix's non-zero pid type cannot hold.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::error::{Error, Result};

use super::Peer;

impl Peer {
    /// The process at the other end of a Unix socket (`SO_PEERCRED`).
    pub(crate) fn of_socket(socket: impl AsFd) -> Result<Peer> {
        let (pid, uid) = of_socket(socket.as_fd()).map_err(Error::os("SO_PEERCRED"))?;
        Ok(Peer { pid: u32::try_from(pid).ok().filter(|pid| *pid != 0), uid })
    }
}

/// Bytes written to a socket or pipe that its other end has not taken yet; `None` where the kernel
/// does not tell. For TCP, taken means acknowledged by the other end's kernel.
pub(crate) fn untaken(sink: BorrowedFd<'_>) -> Option<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes one `c_int` to `bytes`, which is one, private and alive.
    let result = unsafe { libc::ioctl(sink.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 {
        return u64::try_from(bytes).ok();
    }
    // Pipes report it by `FIONREAD`. For sockets that means received bytes, but they never get
    // here.
    rustix::io::ioctl_fionread(sink).ok()
}

/// The pid and user of the process at the other end. The pid is zero outside our pid namespace.
fn of_socket(socket: BorrowedFd<'_>) -> io::Result<(libc::pid_t, libc::uid_t)> {
    const SIZE: libc::socklen_t = size_of::<libc::ucred>() as libc::socklen_t;
    let mut cred = MaybeUninit::<libc::ucred>::zeroed();
    let mut len = SIZE;
    // SAFETY: the kernel writes at most `len` bytes to `cred`, which is as long, private and alive,
    // and the written length to `len`.
    let got = unsafe {
        let option = (libc::SOL_SOCKET, libc::SO_PEERCRED);
        libc::getsockopt(socket.as_raw_fd(), option.0, option.1, cred.as_mut_ptr().cast(), &mut len)
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: three integers, zeroed at first and written since: every bit pattern is one.
    let cred = unsafe { cred.assume_init() };
    Ok((cred.pid, cred.uid))
}
