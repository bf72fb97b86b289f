//! Copies the bytes to a socket, pipe or file by system calls, straight from the segment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::error::{Error, Result};
use crate::protocol::ShmTransfer;
use crate::protocol::sink::SinkWait;
use crate::sync::Deadline;

use super::chunk::ChunkSource;
use super::{Chunk, Receiver, Receiving};

impl ShmTransfer<Receiver, Receiving> {
    /// Copies everything to a socket, pipe or file, straight from the segment; returns the bytes
    /// copied. Waits as long as there is progress within the [timeout](Self::set_timeout). After an
    /// error of the sink, a second call continues where the first one stopped.
    ///
    /// # Errors
    /// Those of [`next_chunk`](Self::next_chunk), and [`Error::Sink`] or [`Error::Timeout`] when
    /// the sink does not take the bytes.
    pub fn copy_to(&mut self, sink: impl AsFd) -> Result<u64> {
        self.copy_until(sink.as_fd(), &mut None, |_| false).map(|(copied, _)| copied)
    }

    /// Copies to a sink until the end, or until told to stop while the sink takes nothing. Returns
    /// the bytes copied, and whether that was the end.
    pub(in crate::protocol) fn copy_until(
        &mut self,
        sink: BorrowedFd<'_>,
        wait: &mut Option<SinkWait>,
        is_ended: impl Fn(&Receiver) -> bool,
    ) -> Result<(u64, bool)> {
        let mut copied = 0;
        // A chunk that the sink took only in part stays open: a second call continues there.
        while self.open_chunk(Deadline::after(self.side.waiter.timeout()))? {
            let before = self.unread();
            let is_written = self.write_open(sink, wait, &is_ended)?;
            copied += (before - self.unread()) as u64;
            if !is_written {
                return Ok((copied, false));
            }
            self.close_chunk();
        }
        Ok((copied, true))
    }

    /// Has the kernel write the unread bytes of the open chunk; `false` if told to stop. The wait
    /// for the sink continues over several calls, until the sink takes bytes.
    pub(in crate::protocol) fn write_open(
        &mut self,
        sink: BorrowedFd<'_>,
        wait: &mut Option<SinkWait>,
        is_ended: impl Fn(&Receiver) -> bool,
    ) -> Result<bool> {
        self.side.check_origin()?;
        let ShmTransfer { side, state } = self;
        let Some(open) = &mut state.open else { return Ok(true) };
        let len = open.chunk.len as usize;
        while open.read < len {
            match side.guard.segment.readable().send_slot(
                state.cursor,
                open.read,
                len - open.read,
                sink,
            ) {
                Ok(0) => return Err(Error::Sink(io::ErrorKind::WriteZero.into())),
                Ok(sent) => {
                    open.read += sent;
                    *wait = None;
                    side.tell_progress();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let side = &*side;
                    let wait =
                        wait.get_or_insert_with(|| SinkWait::new(sink, side.waiter.timeout()));
                    if !wait.go_on(sink, || side.tell_progress(), || is_ended(side))? {
                        return Ok(false);
                    }
                }
                Err(error) => return Err(Error::Sink(error)),
            }
        }
        Ok(true)
    }
}

impl Chunk<'_> {
    /// Consumes all bytes, having the kernel write them to a socket, pipe or file.
    ///
    /// While a socket or pipe takes nothing more, the wait is
    /// [`blocking`](crate::workers::blocking): the thread's place at work is free meanwhile.
    ///
    /// # Errors
    /// [`Error::Timeout`] when the sink takes nothing for the transfer's
    /// [timeout](ShmTransfer::set_timeout); [`Error::Sink`] when it fails.
    pub fn write_to(&mut self, sink: impl AsFd) -> Result<()> {
        match &mut self.source {
            ChunkSource::Slot(transfer) => {
                transfer.write_open(sink.as_fd(), &mut None, |_| false).map(drop)
            }
            #[cfg(target_os = "linux")]
            ChunkSource::Lent(body) => body.write_seen(sink),
        }
    }
}
