//! The bytes of an answer, as a task sends them.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::error::{Awaited, Error, Misuse, Result};
use crate::loan::Loan;
use crate::protocol::{Awaiting, Sender, Sending, ShmTransfer, Size};

use super::answer::Progress;
use super::wait::{Step, Wait};

type Transfer = Box<ShmTransfer<Sender, Sending>>;

/// An answer under way: [`crate::Outgoing`], without a thread that waits.
///
/// Write to it ([`AsyncWrite`]), or send a file. Ended by [`finish`](Self::finish), or by the last
/// byte of the size that was announced. Dropped before that, it tells its client that it broke off
/// ([`Error::Aborted`]).
#[must_use = "an answer that is dropped unfinished breaks off"]
pub struct Outgoing {
    /// None once it is finished.
    transfer: Option<Transfer>,
    patience: Patience,
}

/// How long to wait for a client that takes nothing (rule P9).
struct Patience {
    timeout: Duration,
    wait: Wait,
    /// What the client had taken when this was last looked at, and when that was found.
    seen: Option<(u32, Instant)>,
    /// Of the handler.
    progress: Arc<Progress>,
}

impl Outgoing {
    pub(super) fn new(
        transfer: ShmTransfer<Sender, Sending>,
        timeout: Duration,
        progress: Arc<Progress>,
    ) -> Outgoing {
        let patience = Patience { timeout, wait: Wait::default(), seen: None, progress };
        Outgoing { transfer: Some(Box::new(transfer)), patience }
    }

    /// How many bytes were announced.
    pub fn size(&self) -> Size {
        self.transfer.as_ref().map_or(Size::Unknown, |transfer| transfer.size())
    }

    /// Bytes handed to the client so far.
    pub fn sent(&self) -> u64 {
        self.transfer.as_ref().map_or(0, |transfer| transfer.sent())
    }

    /// Sends these bytes; to be followed by more, or by [`finish`](Self::finish).
    ///
    /// # Errors
    /// Those of [`crate::Outgoing`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            let written = poll_fn(|context| self.poll_send(context, left)).await?;
            left = &left[written..];
        }
        Ok(())
    }

    /// Sends a file from its beginning, as much as was announced or all of it, and finishes;
    /// returns the bytes sent in all. What is in the page cache is copied where the task runs, a
    /// slot at a time; the rest is read on one of tokio's blocking threads.
    ///
    /// # Errors
    /// Those of [`crate::Outgoing::send_file`].
    pub async fn send_file(self, file: impl AsFd) -> Result<u64> {
        let len = self.transfer()?.size().known().map(|_| self.unwritten());
        self.send_from(file, 0, len).await
    }

    /// As [`send_file`](Self::send_file), for the bytes of a file in `range`.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] when the range is not as long as what is left of the announced size.
    pub async fn send_file_range(self, file: impl AsFd, range: Range<u64>) -> Result<u64> {
        let len = range.end.saturating_sub(range.start);
        let room = self.unwritten();
        if self.transfer()?.size() != Size::Unknown && room != len {
            return Err(Misuse::RangeLength { range: len, expected: room }.into());
        }
        self.send_from(file, range.start, Some(len)).await
    }

    /// Ends the answer; returns the bytes sent in all. Needed after writing, and for an unknown
    /// size; one of known size ends by itself with its last byte.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when fewer bytes were sent than announced, which aborts.
    pub async fn finish(mut self) -> Result<u64> {
        poll_fn(|context| self.poll_finish(context)).await
    }

    fn transfer(&self) -> Result<&ShmTransfer<Sender, Sending>> {
        Ok(self.transfer.as_deref().ok_or(Misuse::TransferOver)?)
    }

    fn unwritten(&self) -> u64 {
        self.transfer.as_ref().map_or(0, |transfer| transfer.unwritten())
    }

    /// Waits until the next slot is free.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let transfer = self.transfer.as_mut().ok_or(Misuse::TransferOver)?;
        self.patience.poll(context, transfer)
    }

    fn poll_send(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_room(context))?;
        let transfer = self.transfer.as_mut().ok_or(Misuse::TransferOver)?;
        // Has its slot, and so does not wait.
        Poll::Ready(io::Write::write(&mut **transfer, bytes).map_err(Error::from))
    }

    fn poll_finish(&mut self, context: &mut Context<'_>) -> Poll<Result<u64>> {
        let transfer = self.transfer.as_ref().ok_or(Misuse::TransferOver)?;
        if transfer.needs_end() {
            ready!(self.poll_room(context))?;
        }
        match self.transfer.take() {
            Some(transfer) => {
                let finished = transfer.finish(); // has its slot
                self.patience.progress.end_answer();
                Poll::Ready(finished)
            }
            None => Poll::Ready(Err(Misuse::TransferOver.into())),
        }
    }

    /// Sends a loan's bytes, which were announced.
    pub(super) async fn send_loan(self, loan: &Loan) -> Result<()> {
        let range = loan.start()..loan.start() + loan.len();
        match self.send_file_range(loan, range).await {
            Ok(_) => Ok(()),
            Err(Error::SizeMismatch { found, .. }) => {
                Err(Error::SizeMismatch { announced: loan.len(), found })
            }
            Err(error) => Err(error),
        }
    }

    async fn send_from(mut self, file: impl AsFd, start: u64, len: Option<u64>) -> Result<u64> {
        poll_fn(|context| Pin::new(&mut self).poll_flush(context)).await?;
        let mut done = 0;
        while Some(done) != len {
            let left =
                len.map_or(usize::MAX, |len| usize::try_from(len - done).unwrap_or(usize::MAX));
            poll_fn(|context| self.poll_room(context)).await?;
            let filled = self.fill(file.as_fd(), start + done, left).await?;
            done += match (filled, len) {
                (0, Some(announced)) => {
                    let sent = self.sent();
                    return Err(match self.size() {
                        Size::Known(announced) => Error::SizeMismatch { announced, found: sent },
                        Size::Unknown => Error::SizeMismatch { announced, found: done },
                    });
                }
                (0, None) => break,
                (filled, _) => filled as u64,
            };
        }
        self.finish().await
    }

    /// Sends one slot full of a file; on another thread, if the file is not in memory.
    async fn fill(&mut self, file: impl AsFd, offset: u64, limit: usize) -> Result<usize> {
        let transfer = self.transfer.as_mut().ok_or(Misuse::TransferOver)?;
        if let Some(filled) = transfer.fill_now(&file, offset, limit)? {
            return Ok(filled);
        }
        let file: OwnedFd = file.as_fd().try_clone_to_owned().map_err(Error::Source)?;
        // If this is dropped, that thread drops the transfer, and so aborts it.
        let mut transfer = self.transfer.take().ok_or(Misuse::TransferOver)?;
        let filling = spawn_blocking(move || {
            let filled = transfer.fill(&file, offset, limit);
            (transfer, filled)
        });
        let (transfer, filled) =
            filling.await.map_err(|error| Error::Source(io::Error::other(error)))?;
        self.transfer = Some(transfer);
        filled
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        drop(self.transfer.take());
        self.patience.progress.end_answer();
    }
}

impl Patience {
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        transfer: &mut ShmTransfer<Sender, Sending>,
    ) -> Poll<Result<()>> {
        if transfer.sent() > 0 && self.progress.keeps_others_waiting() {
            context.waker().wake_by_ref();
            return Poll::Pending; // and on as a task
        }
        loop {
            let progress = transfer.side().progress();
            let since = match self.seen {
                Some((seen, since)) if seen == progress => since,
                _ => self.seen.insert((progress, Instant::now())).1,
            };
            let end = since.checked_add(self.timeout);
            match ready!(self.wait.poll(context, end, &mut Room(transfer))) {
                Some(done) => {
                    self.seen = None;
                    return Poll::Ready(done);
                }
                None if transfer.side().progress() != progress => {}
                None => return Poll::Ready(Err(Error::Timeout(Awaited::FreeSlot))),
            }
        }
    }
}

impl AsyncWrite for Outgoing {
    /// What is not counted has not been sent.
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(context, bytes).map_err(io::Error::from)
    }

    /// Hands over what is in the current slot.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transfer {
            Some(transfer) => Poll::Ready(io::Write::flush(&mut **transfer)),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Finishes the answer.
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.transfer.is_none() {
            return Poll::Ready(Ok(()));
        }
        this.poll_finish(context).map_ok(drop).map_err(io::Error::from)
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("tokio::Outgoing")
            .field("size", &self.size())
            .field("sent", &self.sent())
            .finish_non_exhaustive()
    }
}

/// Waits for a free slot.
struct Room<'t>(&'t mut ShmTransfer<Sender, Sending>);

impl Step for Room<'_> {
    type Output = Result<()>;

    fn attempt(&mut self, task: Option<&Waker>) -> Poll<Result<()>> {
        self.0.poll_room(task)
    }

    fn side(&mut self) -> &mut dyn Awaiting {
        self.0.side()
    }
}
