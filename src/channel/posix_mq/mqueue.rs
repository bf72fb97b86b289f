//! The descriptor of a POSIX message queue, always non-blocking.
//!
//! The timed calls (`mq_timedsend`) use the wall clock, which can be stepped. So waits are polls
//! until a [`Deadline`](crate::Deadline).

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mqueue::{
    MQ_OFlag, MqAttr, MqdT, mq_attr_member_t, mq_close, mq_getattr, mq_open, mq_unlink,
};
use nix::sys::stat::Mode;

use crate::error::{Error, Misuse, Result};

use super::name::Name;

/// An open queue; closed when dropped.
pub(super) struct Mqueue(Option<MqdT>);

impl Mqueue {
    /// Makes an empty queue to read from, for messages of up to `longest` bytes or the system's
    /// limit. Only this user may open it.
    pub(super) fn create(name: &Name, capacity: u32, longest: usize) -> Result<Mqueue> {
        let flags = MQ_OFlag::O_RDONLY | MQ_OFlag::O_CREAT | MQ_OFlag::O_EXCL;
        let longest = limit("msgsize_max").map_or(longest, |most| longest.min(most as usize));
        // Clamped, where the type has 32 bits: the result is still above every limit.
        let messages = capacity.min(i32::MAX as u32) as mq_attr_member_t;
        let attributes = MqAttr::new(0, messages, longest as mq_attr_member_t, 0);
        match open(name, flags, Some(&attributes)) {
            Ok(queue) => Ok(queue),
            Err(Errno::EINVAL) => {
                let (given, most) = (capacity.into(), limit("msg_max").unwrap_or(10));
                Err(Misuse::OutOfRange {
                    what: "the queue's capacity in requests",
                    given,
                    least: 1,
                    most,
                }
                .into())
            }
            Err(errno @ Errno::EMFILE) => {
                Err(Error::os("mq_open, beyond this user's limit on queues (ulimit -q)")(errno))
            }
            Err(errno @ Errno::EEXIST) => Err(Error::os(
                "mq_open, at the name of a queue that no shmferry server made",
            )(errno)),
            Err(errno) => Err(Error::os("mq_open")(errno)),
        }
    }

    /// Opens a server's queue, to write to it; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::NameTaken`] for a queue of another user, who could read our requests.
    pub(super) fn open(name: &Name) -> Result<Option<Mqueue>> {
        match open(name, MQ_OFlag::O_WRONLY, None) {
            Ok(queue) => {
                let found = rustix::fs::fstat(&queue).map_err(Error::os("fstat"))?;
                if found.st_uid != rustix::process::geteuid().as_raw() {
                    let path = Path::new("/dev/mqueue").join(&name.as_str()[1..]);
                    let (kind, uid) = ("a message queue", found.st_uid);
                    return Err(Error::NameTaken { path, kind, uid });
                }
                Ok(Some(queue))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::os("mq_open")(errno)),
        }
    }

    /// Removes the name, if it is there.
    pub(super) fn unlink(name: &Name) -> Result<()> {
        match mq_unlink(name.as_str()) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(Error::os("mq_unlink")(errno)),
        }
    }

    /// The longest message it takes, in bytes.
    pub(super) fn longest(&self) -> Result<usize> {
        let attributes = mq_getattr(self.descriptor()).map_err(Error::os("mq_getattr"))?;
        Ok(usize::try_from(attributes.msgsize()).unwrap_or(0))
    }

    /// Sends a message; `false` when there is no room now.
    pub(super) fn try_send(&self, message: &[u8]) -> Result<bool> {
        loop {
            match nix::mqueue::mq_send(self.descriptor(), message, 0) {
                Ok(()) => return Ok(true),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::os("mq_send")(errno)),
            }
        }
    }

    /// Takes the next message; returns its length, or `None` when there is none now.
    pub(super) fn try_receive(&self, into: &mut [u8]) -> Result<Option<usize>> {
        loop {
            match nix::mqueue::mq_receive(self.descriptor(), into, &mut 0) {
                Ok(len) => return Ok(Some(len)),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::os("mq_receive")(errno)),
            }
        }
    }

    fn descriptor(&self) -> &MqdT {
        match &self.0 {
            Some(descriptor) => descriptor,
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl AsFd for Mqueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor().as_fd()
    }
}

impl Drop for Mqueue {
    fn drop(&mut self) {
        if let Some(descriptor) = self.0.take() {
            // Fails only for an invalid descriptor.
            let _ = mq_close(descriptor);
        }
    }
}

fn open(name: &Name, flags: MQ_OFlag, attributes: Option<&MqAttr>) -> nix::Result<Mqueue> {
    let flags = flags | MQ_OFlag::O_NONBLOCK | MQ_OFlag::O_CLOEXEC;
    let descriptor = mq_open(name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR, attributes)?;
    Ok(Mqueue(Some(descriptor)))
}

/// One of the system's limits on queues.
fn limit(which: &str) -> Option<u64> {
    fs::read_to_string(format!("/proc/sys/fs/mqueue/{which}")).ok()?.trim().parse().ok()
}
