//! Answers with a loan: an announcement that no bytes follow (rules N).

use crate::error::{Error, Result};
use crate::loan::{Introduced, Loan};
use crate::protocol::{FOUND_FOR_WANT_OF_ROOM, LENT, Metadata, ShmTransfer, Size};
use crate::segment::Phase;
use crate::sync::atomic::Relaxed;

use super::{Loans, Sender, Sending, Starting};

/// What became of an answer from a loan.
pub(crate) enum Lending {
    /// The receiver has it.
    Lent,
    /// It cannot be lent: the request is accepted, and the same bytes are to be sent.
    Send(ShmTransfer<Sender, Sending>),
}

impl ShmTransfer<Sender, Starting> {
    /// Answers with a loan, or a part of one. Where it cannot be lent, its bytes are sent through
    /// the segment, which waits for the receiver as [`send_file`](ShmTransfer::send_file) does.
    ///
    /// # Errors
    /// [`Error::Stale`] when the receiver has withdrawn the request; [`Error::Misuse`] for metadata
    /// that does not fit; where the bytes are sent, those of `send_file`.
    pub fn lend(self, loan: &Loan, metadata: &impl Metadata) -> Result<()> {
        match self.try_lend(loan, metadata)? {
            Lending::Lent => Ok(()),
            Lending::Send(sending) => sending.send_loan(loan),
        }
    }

    /// Whether its receiver takes loans of some kind.
    #[cfg(feature = "loan-store")]
    pub(crate) fn takes_loans(&self) -> bool {
        match &self.state.loans {
            Loans::None => false,
            Loans::ByLink => self.side.stand.link().is_some_and(|link| link.lender().is_some()),
            Loans::Within(_) => true,
        }
    }

    /// As [`lend`](Self::lend), but leaves it to the caller to send the bytes.
    pub(crate) fn try_lend(mut self, loan: &Loan, metadata: &impl Metadata) -> Result<Lending> {
        let metadata = metadata.encode();
        // First: whoever reads the announcement finds the loan (rule N3).
        let introduced = match &self.state.loans {
            Loans::None => Introduced::No { wanted: 0 },
            Loans::ByLink => {
                let lender = self.side.stand.link().and_then(|link| link.lender());
                lender.map_or(Introduced::No { wanted: 0 }, |lender| lender.introduce(loan))
            }
            Loans::Within(offer) => {
                offer.give(loan.content().clone());
                Introduced::Yes
            }
        };
        match introduced {
            Introduced::Yes => {
                self.side.announce(LENT, loan.len(), &metadata)?;
                let announcement = &self.side.header().announcement;
                announcement.loan.store(loan.id(), Relaxed);
                announcement.loan_start.store(loan.start(), Relaxed);
                self.side.end_without_bytes(Phase::Finished)?;
                Ok(Lending::Lent)
            }
            Introduced::No { wanted } => {
                let size = Size::Known(loan.len());
                if wanted == 0 {
                    self.side.accept(size, &metadata)?;
                } else {
                    self.side.announce(FOUND_FOR_WANT_OF_ROOM, loan.len(), &metadata)?;
                    self.side.header().announcement.loan.store(wanted, Relaxed);
                }
                Ok(Lending::Send(ShmTransfer { side: self.side, state: Sending::new(size) }))
            }
        }
    }
}

impl ShmTransfer<Sender, Sending> {
    /// Sends a loan's bytes, which were announced.
    pub(crate) fn send_loan(self, loan: &Loan) -> Result<()> {
        let range = loan.start()..loan.start() + loan.len();
        match self.send_file_range(loan, range) {
            Ok(_) => Ok(()),
            Err(Error::SizeMismatch { found, .. }) => {
                Err(Error::SizeMismatch { announced: loan.len(), found })
            }
            Err(error) => Err(error),
        }
    }
}
