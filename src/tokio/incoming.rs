//! A request, as a task answers it.

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::loan::Loan;
use crate::peer::Peer;
use crate::protocol::{Lending, Metadata, Refusal, Sender, ShmTransfer, Size, Starting};

use super::answer::{Duty, Progress};
use super::outgoing::Outgoing;

type Requested = ShmTransfer<Sender, Starting>;

/// A request, and the duty to answer it: [`crate::Incoming`], for a task.
///
/// Dropped unanswered, it tells its client so ([`Error::Aborted`]).
#[must_use = "a request that is dropped is aborted"]
pub struct Incoming {
    /// Dropped before the transfer.
    duty: Duty,
    transfer: Requested,
    timeout: Duration,
}

impl Incoming {
    pub(super) fn new(transfer: Requested, timeout: Duration, duty: Duty) -> Incoming {
        Incoming { duty, transfer, timeout }
    }

    /// What is asked for.
    pub fn key(&self) -> &[u8] {
        self.transfer.key()
    }

    /// The process that asks; `None` within one process.
    pub fn peer(&self) -> Option<Peer> {
        self.transfer.peer()
    }

    /// Answers that there will be no bytes, and why. Does not wait.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::refuse`].
    pub fn refuse(self, why: Refusal) -> Result<()> {
        self.answered(|transfer, _, progress| {
            transfer.refuse(why)?;
            progress.end_answer();
            Ok(())
        })
    }

    /// Answers with these bytes.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::send_bytes`].
    pub async fn send_bytes(self, bytes: &[u8]) -> Result<()> {
        let mut outgoing = self.accept(bytes.len() as u64)?;
        outgoing.send(bytes).await?;
        outgoing.finish().await.map(drop)
    }

    /// Answers with a file, from its beginning to its end.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::send_file`].
    pub async fn send_file(self, file: &File) -> Result<()> {
        let size = Size::of_file(file).map_err(Error::Source)?;
        self.accept(size)?.send_file(file).await.map(drop)
    }

    /// Answers from a loan: without a copy, if the client takes loans and has room for this one.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::lend`].
    pub async fn lend(self, loan: &Loan) -> Result<()> {
        self.lend_with(loan, &()).await
    }

    /// As [`lend`](Self::lend), with metadata beside the size.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::lend_with`].
    pub async fn lend_with(self, loan: &Loan, metadata: &impl Metadata) -> Result<()> {
        let sent = self.answered(|transfer, timeout, progress| {
            Ok(match transfer.try_lend(loan, metadata)? {
                Lending::Lent => {
                    progress.end_answer();
                    None
                }
                Lending::Send(sending) => Some(Outgoing::new(sending, timeout, progress)),
            })
        });
        match sent? {
            Some(outgoing) => outgoing.send_loan(loan).await,
            None => Ok(()),
        }
    }

    /// Accepts the request, and announces `size` bytes ([`Size::Unknown`] for a stream); they are
    /// then sent bit by bit. Does not wait.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::accept`].
    pub fn accept(self, size: impl Into<Size>) -> Result<Outgoing> {
        self.accept_with(size, &())
    }

    /// As [`accept`](Self::accept), with metadata beside the size.
    ///
    /// # Errors
    /// Those of [`crate::Incoming::accept_with`].
    pub fn accept_with(self, size: impl Into<Size>, metadata: &impl Metadata) -> Result<Outgoing> {
        self.answered(|transfer, timeout, progress| {
            Ok(Outgoing::new(transfer.accept_with(size, metadata)?, timeout, progress))
        })
    }

    fn answered<T>(
        self,
        answer: impl FnOnce(Requested, Duration, Arc<Progress>) -> Result<T>,
    ) -> Result<T> {
        let progress = self.duty.fulfil();
        let answered = answer(self.transfer, self.timeout, Arc::clone(&progress));
        answered.inspect_err(|_| progress.end_answer())
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("tokio::Incoming").field("transfer", &self.transfer).finish_non_exhaustive()
    }
}
