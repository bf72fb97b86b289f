//! One client's connection: its request, its reply, its end.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read, Seek, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use shmferry::protocol::{Spool, send_all};
use shmferry::workers::blocking;
use shmferry::{Deadline, Error, Result};
use shmferry_examples::getfile::{
    Dialect, MAX_REQUEST_LEN, ParsedRequest, Reply, encode_reply, parse_request,
};

use super::proxy::Miss;
use super::waiting::{Entry, GRACE, Waiting};

/// How long, and for how many bytes, a client may go on sending after its reply. Closing on unread
/// input makes the system reset the connection, and that can destroy the reply.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// Bytes that are read of a stream at a time, and the longest body that is spooled in memory.
const BUFFER: usize = 64 << 10;

/// What every reply begins with, in both dialects.
const REPLY_START: &[u8] = b"GETFILE ";

/// A file to send, with its exact length.
pub struct Found {
    pub len: u64,
    pub body: Body,
}

/// Where a file's bytes come from.
pub enum Body {
    Cached(Box<shmferry::Body>),
    Stream(Box<dyn Read>),
}

/// A connection. Dropping it closes it.
pub struct Client {
    stream: Arc<TcpStream>,
    dialect: Dialect,
    timeout: Duration,
    /// Bytes of its reply's header that it has been sent, to see whether it is there.
    begun: Cell<usize>,
}

impl Client {
    /// A client that may take `timeout` for its request, and as long without progress in its reply.
    pub fn new(stream: TcpStream, dialect: Dialect, timeout: Duration) -> Client {
        Client { stream: Arc::new(stream), dialect, timeout, begun: Cell::new(0) }
    }

    /// Reads the request; returns the path, or `None` for one that is malformed, not finished in
    /// time, or cut because too many are `waiting`.
    pub fn request(&self, waiting: &Waiting) -> io::Result<Option<Vec<u8>>> {
        let deadline = Deadline::after(self.timeout);
        let grace = deadline.min(Deadline::after(GRACE));
        let mut slow = None;
        let mut buffer = [0; MAX_REQUEST_LEN];
        let mut filled = 0;
        loop {
            let until = if slow.is_some() { deadline } else { grace };
            let Some(read) = self.read(&mut buffer[filled..], until)? else {
                if slow.is_some() {
                    return Ok(None);
                }
                slow = Some(waiting.enter(&self.stream, filled > 0));
                continue;
            };
            filled += read;
            match parse_request(&buffer[..filled]) {
                ParsedRequest::Complete { path } => return Ok(Some(path.to_vec())),
                ParsedRequest::Incomplete if read > 0 => {
                    slow.iter().for_each(Entry::has_begun);
                }
                ParsedRequest::Incomplete | ParsedRequest::Invalid(_) => return Ok(None),
            }
        }
    }

    /// Reads a body of unknown length, of up to `limit` bytes, to its end: into memory, or into an
    /// unnamed temporary file if it is long. Looks between two reads whether the client has left.
    /// `fail` is told what else went wrong.
    pub fn spool(
        &self,
        mut body: impl Read,
        limit: u64,
        fail: impl Fn(&dyn fmt::Display) -> Miss,
    ) -> std::result::Result<Found, Miss> {
        let io_failed = |error: io::Error| fail(&error);
        let mut spooled = tempfile::spooled_tempfile(BUFFER);
        let mut buffer = vec![0; BUFFER];
        let mut len = 0;
        loop {
            if self.has_left().map_err(io_failed)? {
                return Err(Miss::ClientLeft);
            }
            let read = match blocking(|| body.read(&mut buffer)) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(io_failed)?,
            };
            len += read as u64;
            if len > limit {
                let why = "a body of unknown length exceeds";
                return Err(fail(&format_args!("{why} {limit} bytes (--spool-limit)")));
            }
            spooled.write_all(&buffer[..read]).map_err(io_failed)?;
        }
        spooled.rewind().map_err(io_failed)?;
        Ok(Found { len, body: Body::Stream(Box::new(spooled)) })
    }

    /// Whether the client has left, before its reply has begun. One that has sent its last byte may
    /// have closed its half only, and still read. So it is sent what every reply begins with: one
    /// that has left answers with a reset, which a later call sees.
    fn has_left(&self) -> io::Result<bool> {
        let seen = self.poll(PollFlags::RDHUP, Deadline::after(Duration::ZERO))?;
        if seen.intersects(PollFlags::ERR | PollFlags::HUP) {
            return Ok(true);
        }
        if seen.contains(PollFlags::RDHUP) && self.begun.get() == 0 {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.stream, REPLY_START, flags) {
                Ok(sent) => self.begun.set(sent),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(false)
    }

    /// Sends a reply, without the body.
    pub fn reply(&self, reply: Reply) -> io::Result<()> {
        let header = encode_reply(reply, self.dialect).split_off(self.begun.get());
        // The header leaves together with the body's first bytes.
        let has_body = matches!(reply, Reply::Ok { len: 1.. });
        let flags = if has_body { SendFlags::MORE } else { SendFlags::empty() };
        // It is the first that is sent, and shorter than any buffer.
        match rustix::net::send(&self.stream, &header, flags | SendFlags::NOSIGNAL)? {
            sent if sent == header.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Sends a file; returns its length. What is left of it may be set aside while others wait for
    /// its segment.
    ///
    /// # Errors
    /// [`Error::Sink`] or [`Error::Timeout`] where the client is at fault, anything else for the
    /// source. The client sees fewer bytes than announced then, and the connection's end.
    pub fn send(&self, found: Found, aside: &Spool) -> Result<u64> {
        self.reply(Reply::Ok { len: found.len }).map_err(Error::Sink)?;
        match found.body {
            Body::Cached(body) => body.copy_to_or_spool(&*self.stream, aside),
            Body::Stream(source) => self.copy_from(source, found.len),
        }
    }

    /// Closes a connection whose reply has been sent. A client that was `interrupted` in its
    /// request, or has sent more than that, is first given time to finish.
    pub fn close(self, interrupted: bool) {
        let deadline = Deadline::after(LINGER);
        let mut scratch = [0; 4096];
        let mut surplus = 0;
        if rustix::net::shutdown(&self.stream, Shutdown::Write).is_err() {
            return; // the client is gone
        }
        while surplus < LINGER_BYTES {
            let timeout =
                if interrupted || surplus > 0 { deadline } else { Deadline::after(Duration::ZERO) };
            match self.read(&mut scratch, timeout) {
                Ok(Some(read)) if read > 0 => surplus += read,
                _ => return,
            }
        }
    }

    fn copy_from(&self, mut source: Box<dyn Read>, len: u64) -> Result<u64> {
        let mut buffer = vec![0; BUFFER];
        let mut sent = 0;
        while sent < len {
            let most = usize::try_from(len - sent).unwrap_or(usize::MAX).min(BUFFER);
            let read = match blocking(|| source.read(&mut buffer[..most])) {
                Ok(0) => return Err(Error::SizeMismatch { announced: len, found: sent }),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Source(error)),
            };
            send_all(&*self.stream, &buffer[..read], self.timeout)?;
            sent += read as u64;
        }
        // Seeing the end is what lets an origin's connection serve again.
        let _ = source.read(&mut [0]);
        Ok(sent)
    }

    /// Reads what there is, waiting for something until the deadline; `None` when that passed.
    fn read(&self, into: &mut [u8], deadline: Deadline) -> io::Result<Option<usize>> {
        loop {
            match rustix::net::recv(&self.stream, &mut *into, RecvFlags::DONTWAIT) {
                Ok((read, _)) => return Ok(Some(read)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if deadline.has_passed() => return Ok(None),
                Err(Errno::AGAIN) => drop(blocking(|| self.poll(PollFlags::IN, deadline))?),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// What of this the connection has come to by the deadline, or by a signal.
    fn poll(&self, events: PollFlags, deadline: Deadline) -> io::Result<PollFlags> {
        let left = deadline.remaining().and_then(|left| left.try_into().ok());
        let mut fds = [PollFd::new(&self.stream, events)];
        match poll(&mut fds, left.as_ref()) {
            Err(errno) if errno != Errno::INTR => Err(errno.into()),
            _ => Ok(fds[0].revents()),
        }
    }
}
