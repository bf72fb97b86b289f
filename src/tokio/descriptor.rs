//! A descriptor of this crate, as tokio waits for it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits for a copy of this descriptor to be readable.
pub(super) fn readable(descriptor: impl AsFd) -> io::Result<AsyncFd<OwnedFd>> {
    let copy = descriptor.as_fd().try_clone_to_owned()?;
    // SAFETY: the number of an `OwnedFd` never changes, and the descriptor stays open as long as
    // the `OwnedFd`, which the `AsyncFd` owns and takes off its runtime's list before it drops it.
    Ok(unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }?)
}
