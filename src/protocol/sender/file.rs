//! Sends a file, by reading it straight into the segment.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use crate::error::{Error, Misuse, Result};
use crate::protocol::{ShmTransfer, Size};

use super::{Sender, Sending, Slot};

impl ShmTransfer<Sender, Sending> {
    /// Sends a file from its beginning and ends the transfer; returns the bytes sent in all. Sends
    /// what is left of the announced size, or the whole file when the size is unknown. The bytes
    /// are read straight into the segment by `pread`: the file position is neither used nor moved.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the file ends before the announced size, [`Error::Source`]
    /// when it cannot be read, and those of [`next_slot`](Self::next_slot). All of them abort.
    pub fn send_file(self, file: impl AsFd) -> Result<u64> {
        let len = self.size().known().map(|_| self.unwritten());
        self.send_from(file, 0, len)
    }

    /// As [`send_file`](Self::send_file), for the bytes of a file in `range`.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] when the range is not as long as what is left of the announced size.
    pub fn send_file_range(self, file: impl AsFd, range: Range<u64>) -> Result<u64> {
        let len = range.end.saturating_sub(range.start);
        let room = self.unwritten();
        if self.size() != Size::Unknown && room != len {
            return Err(Misuse::RangeLength { range: len, expected: room }.into());
        }
        self.send_from(file, range.start, Some(len))
    }

    fn send_from(mut self, file: impl AsFd, start: u64, len: Option<u64>) -> Result<u64> {
        self.state.in_batches = true;
        let mut done = 0;
        while Some(done) != len {
            let left = len.map_or(u64::MAX, |len| len - done);
            let slot = self.free_slot(None)?;
            let filled =
                slot.fill_from(&file, start + done, usize::try_from(left).unwrap_or(usize::MAX))?;
            done += match (filled, len) {
                (0, Some(_)) if self.size() != Size::Unknown => {
                    return Err(self.mismatch(self.state.sent));
                }
                (0, Some(announced)) => return Err(Error::SizeMismatch { announced, found: done }),
                (0, None) => break,
                (filled, _) => filled as u64,
            };
        }
        self.finish()
    }
}

#[cfg(feature = "tokio")]
impl ShmTransfer<Sender, Sending> {
    /// Fills the slot that it has from a file, and sends it; returns its length.
    pub(crate) fn fill(&mut self, file: impl AsFd, offset: u64, limit: usize) -> Result<usize> {
        Slot { transfer: self }.fill_from(file, offset, limit)
    }

    /// As [`fill`](Self::fill), with what of the file is in memory; `None` if that is nothing.
    pub(crate) fn fill_now(
        &mut self,
        file: impl AsFd,
        offset: u64,
        limit: usize,
    ) -> Result<Option<usize>> {
        let capacity = Slot { transfer: self }.capacity().min(limit);
        let slots = self.side.writer()?.slots();
        match slots.pread_slot_now(self.state.cursor, capacity, file.as_fd(), offset) {
            Ok(filled @ 1..) => {
                self.publish(filled, false)?;
                Ok(Some(filled))
            }
            // Not in memory; or a file system that does not say. Other errors come again. Some
            // kernels say so by zero: whether this is the end, a plain read decides.
            Ok(0) | Err(_) => Ok(None),
        }
    }
}

impl Slot<'_> {
    /// Sends one chunk read from a file at `offset`, as long as fits the slot; returns its length.
    /// Zero means that the file ends there, and that nothing was sent.
    ///
    /// # Errors
    /// [`Error::Source`] when the file cannot be read.
    pub fn send_from(self, file: impl AsFd, offset: u64) -> Result<usize> {
        self.fill_from(file, offset, usize::MAX)
    }

    #[inline]
    fn fill_from(self, file: impl AsFd, offset: u64, limit: usize) -> Result<usize> {
        let capacity = self.capacity().min(limit);
        let ShmTransfer { side, state } = &mut *self.transfer;
        let slots = side.writer()?.slots();
        let mut filled = 0;
        while filled < capacity {
            let (left, at) = (capacity - filled, offset + filled as u64);
            match slots.pread_slot(state.cursor, filled, left, file.as_fd(), at) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Source(error)),
            }
        }
        if filled > 0 {
            self.transfer.publish(filled, false)?;
        }
        Ok(filled)
    }
}
