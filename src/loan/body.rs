//! Reads an answer that was lent, as one reads any other: sealed memory or a file.

use std::any::type_name;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, sendfile};
use rustix::io::Errno;

use crate::error::{Error, PeerFault, Result};
use crate::protocol::{DEFAULT_TIMEOUT, Metadata, SinkWait, write_some};
#[cfg(not(loom))]
use crate::segment::SharedByte;

use super::content::{Content, LentFile};
use super::lent::Lent;

/// The most bytes that one call passes on: so that progress is seen, and a wait can time out.
const AT_ONCE: usize = 1 << 20;
/// How many bytes of a file are read at once where somebody looks at them.
const BUFFER: usize = 256 << 10;

/// An answer that was lent: its segment is back in the pool already.
///
/// [`Body`](crate::Body) has one of these inside, or a transfer.
pub struct LentBody {
    source: Source,
    metadata: Box<[u8]>,
    len: u64,
    /// Bytes consumed.
    at: u64,
    timeout: Duration,
}

enum Source {
    Sealed(Lent),
    File {
        file: Arc<LentFile>,
        start: u64,
        /// Bytes read ahead, and from where on in this answer.
        buffer: Vec<u8>,
        buffered: Range<u64>,
    },
}

impl LentBody {
    /// Checks that the loan has the part that was announced (rule P3).
    pub(crate) fn new(
        content: Content,
        (start, len): (u64, u64),
        metadata: Box<[u8]>,
    ) -> Result<LentBody, PeerFault> {
        let whole = content.len();
        let end = start.checked_add(len).filter(|end| *end <= whole);
        let Some(end) = end else { return Err(PeerFault::BeyondLoan { start, len, whole }) };
        let source = match content {
            // Cannot fail: the whole is mapped, and so fits a `usize`.
            Content::Sealed(sealed) => {
                Source::Sealed(Lent::of_sealed(&sealed, start as usize..end as usize))
            }
            Content::File(file) => Source::File { file, start, buffer: Vec::new(), buffered: 0..0 },
        };
        Ok(LentBody { source, metadata, len, at: 0, timeout: DEFAULT_TIMEOUT })
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// The metadata that the sender attached.
    ///
    /// # Errors
    /// [`Error::Peer`] when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        M::decode(&self.metadata).ok_or(PeerFault::MetadataType(type_name::<M>()).into())
    }

    /// How long [`copy_to`](Self::copy_to) waits without progress of the sink.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// What is still to come, as bytes that the user can keep. No copy, if it is sealed memory; a
    /// file is read.
    ///
    /// # Errors
    /// Those of reading.
    pub fn into_bytes(mut self) -> Result<Lent> {
        if let Source::Sealed(lent) = &self.source {
            return Ok(lent.slice(self.at as usize..lent.len()));
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut self, &mut bytes)?;
        Ok(bytes.into())
    }

    /// Consumes all that is still to come, if it is sealed memory.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_sealed(&mut self) -> Option<Lent> {
        let Source::Sealed(lent) = &self.source else { return None };
        let rest = lent.slice(self.at as usize..lent.len());
        self.at = self.len;
        Some(rest)
    }

    /// Copies what is still to come to a socket, pipe or file; returns the bytes that this call
    /// copied. Goes by `sendfile`, without a copy in this process, with two exceptions. To a socket
    /// or pipe in blocking mode, that could block for ever. To a socket whose other end is on this
    /// machine, sealed memory goes by `send`, which is faster there. Waits as long as the sink
    /// makes progress.
    ///
    /// # Errors
    /// [`Error::Sink`] when the sink fails, [`Error::Timeout`] when it takes nothing; after either
    /// the call may be made again, and goes on. [`Error::SizeMismatch`] for a lent file that was
    /// cut short, [`Error::Source`] for one that cannot be read.
    pub fn copy_to(&mut self, sink: impl AsFd) -> Result<u64> {
        let before = self.at;
        self.pass_on(sink.as_fd(), self.len)?;
        Ok(self.at - before)
    }

    /// As [`copy_to`](Self::copy_to), for the bytes at hand only.
    pub(crate) fn write_seen(&mut self, sink: impl AsFd) -> Result<()> {
        self.pass_on(sink.as_fd(), self.at + self.seen().len() as u64)
    }

    fn pass_on(&mut self, sink: BorrowedFd<'_>, end: u64) -> Result<()> {
        let mut by_kernel = match &self.source {
            // By `sendfile` the kernel hands on the pages themselves, which spares a network card's
            // machine a copy. On this machine the other end copies out of them more slowly than
            // both copies of `send` take: see the bench `concurrency`, on to TCP.
            Source::Sealed(_) if is_on_this_machine(sink) => false,
            _ => can_sendfile(sink).map_err(|errno| Error::Sink(errno.into()))?,
        };
        let mut wait = None;
        while self.at < end {
            let most = usize::try_from(end - self.at).unwrap_or(AT_ONCE).min(AT_ONCE);
            let written =
                if by_kernel { self.send_some(sink, most) } else { self.write_some(sink, most) };
            match written {
                Ok(more) => {
                    self.at += more as u64;
                    wait = None;
                }
                Err(Error::Sink(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some devices and files of procfs can be written to, and not sent to.
                Err(Error::Sink(error)) if by_kernel && is_einval(&error) => by_kernel = false,
                Err(Error::Sink(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    let wait = wait.get_or_insert_with(|| SinkWait::new(sink, self.timeout));
                    wait.go_on(sink, || {}, || false)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Has the kernel move bytes from the descriptor to the sink.
    fn send_some(&self, sink: BorrowedFd<'_>, most: usize) -> Result<usize> {
        let (fd, start) = match &self.source {
            Source::Sealed(lent) => match lent.memory() {
                Some((fd, range)) => (fd, range.start as u64),
                None => unreachable!("a body's memory is sealed"),
            },
            Source::File { file, start, .. } => (file.fd(), *start),
        };
        match sendfile(sink, fd, Some(&mut (start + self.at)), most) {
            Ok(0) => Err(self.cut_short()),
            Ok(sent) => Ok(sent),
            Err(errno) => Err(Error::Sink(errno.into())),
        }
    }

    /// Writes bytes to the sink, without blocking on a socket or pipe.
    fn write_some(&mut self, sink: BorrowedFd<'_>, most: usize) -> Result<usize> {
        self.read_ahead()?;
        let bytes = self.seen();
        let bytes = &bytes[..bytes.len().min(most)];
        match write_some(sink, bytes) {
            Ok(0) => Err(Error::Sink(io::ErrorKind::WriteZero.into())),
            Ok(written) => Ok(written),
            Err(error) => Err(Error::Sink(error)),
        }
    }

    /// Reads from a file, if none of its bytes are at hand; sealed memory is at hand as a whole.
    pub(crate) fn read_ahead(&mut self) -> Result<()> {
        let at = self.at;
        let cut_short = self.cut_short();
        let Source::File { file, start, buffer, buffered } = &mut self.source else {
            return Ok(());
        };
        if at == self.len || buffered.contains(&at) {
            return Ok(());
        }
        buffer.resize(usize::try_from(self.len - at).unwrap_or(BUFFER).min(BUFFER), 0);
        match file.read_at(buffer, *start + at) {
            Ok(0) => Err(cut_short),
            Ok(read) => {
                *buffered = at..at + read as u64;
                Ok(())
            }
            Err(error) => Err(Error::Source(error)),
        }
    }

    /// Bytes at hand and not consumed yet.
    pub(crate) fn seen(&self) -> &[u8] {
        match &self.source {
            Source::Sealed(lent) => &lent[self.at as usize..],
            Source::File { buffer, buffered, .. } if buffered.contains(&self.at) => {
                let (from, to) = (self.at - buffered.start, buffered.end - buffered.start);
                &buffer[from as usize..to as usize]
            }
            Source::File { .. } => &[],
        }
    }

    /// As [`seen`](Self::seen), in the type of bytes that may change.
    #[cfg(not(loom))]
    pub(crate) fn seen_shared(&self) -> &[SharedByte] {
        SharedByte::of_constant(self.seen())
    }

    /// Copies bytes at hand, as many as fit; returns how many.
    pub(crate) fn consume(&mut self, into: &mut [u8]) -> usize {
        let bytes = self.seen();
        let len = bytes.len().min(into.len());
        into[..len].copy_from_slice(&bytes[..len]);
        self.advance(len);
        len
    }

    /// Consumes bytes at hand.
    pub(crate) fn advance(&mut self, bytes: usize) {
        self.at += bytes as u64;
    }

    /// Bytes still to come.
    pub(crate) fn left(&self) -> u64 {
        self.len - self.at
    }

    fn cut_short(&self) -> Error {
        Error::SizeMismatch { announced: self.len, found: self.at }
    }
}

impl io::Read for LentBody {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.left()).unwrap_or(usize::MAX);
        // Straight from the file, unless some of it was read ahead.
        if let (Source::File { file, start, .. }, true) = (&self.source, self.seen().is_empty()) {
            let len = left.min(into.len());
            let read = file.read_at(&mut into[..len], *start + self.at)?;
            if read == 0 && len > 0 {
                return Err(self.cut_short().into());
            }
            self.advance(read);
            return Ok(read);
        }
        Ok(self.consume(into))
    }
}

impl fmt::Debug for LentBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_file = matches!(self.source, Source::File { .. });
        f.debug_struct("LentBody")
            .field("size", &self.len)
            .field("at", &self.at)
            .field("is_file", &is_file)
            .finish_non_exhaustive()
    }
}

/// Whether the sink is a socket whose other end is on this machine, as far as its address tells.
pub(super) fn is_on_this_machine(sink: BorrowedFd<'_>) -> bool {
    match rustix::net::getpeername(sink).map(|peer| peer.map(SocketAddr::try_from)) {
        Ok(Some(Ok(address))) => address.ip().to_canonical().is_loopback(),
        Ok(_) => true, // a Unix socket
        Err(_) => false,
    }
}

fn is_einval(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// Whether `sendfile` to this sink cannot block for ever: it is in non-blocking mode, or a file.
fn can_sendfile(sink: BorrowedFd<'_>) -> Result<bool, Errno> {
    use rustix::fs::{FileType, fstat};
    let flags = fcntl_getfl(sink)?;
    if flags.contains(OFlags::APPEND) {
        return Ok(false); // refused by the kernel
    }
    let is_file = || Ok(FileType::from_raw_mode(fstat(sink)?.st_mode) == FileType::RegularFile);
    if flags.contains(OFlags::NONBLOCK) { Ok(true) } else { is_file() }
}
