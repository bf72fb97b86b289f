//! A server's account of what one client has been lent (rule N6).

use std::collections::BTreeMap;

use crate::error::PeerFault;

use super::LoanLimits;

/// What one client has: which loans, and their bytes.
pub(crate) struct Account {
    limits: LoanLimits,
    /// The loans whose descriptors it has, with the bytes of memory that each keeps.
    lent: BTreeMap<u64, u64>,
    bytes: u64,
}

/// How a loan stands with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has the descriptor.
    Known,
    /// It can have it.
    Fits,
    /// It could have it, had it returned others.
    Full,
    /// It can never have it.
    TooLarge,
}

impl Account {
    pub(crate) fn new(limits: LoanLimits) -> Account {
        Account { limits, lent: BTreeMap::new(), bytes: 0 }
    }

    /// How this loan, which keeps so many bytes of memory, stands.
    pub(crate) fn standing(&self, id: u64, bytes: u64) -> Standing {
        if self.lent.contains_key(&id) {
            return Standing::Known;
        }
        if bytes > self.limits.bytes || self.limits.count == 0 {
            return Standing::TooLarge;
        }
        // Cannot overflow: the account's bytes are at most its limit.
        let fits = bytes <= self.limits.bytes - self.bytes
            && (self.lent.len() as u64) < u64::from(self.limits.count);
        if fits { Standing::Fits } else { Standing::Full }
    }

    /// Enters a loan that stood as `Fits`, once its descriptor is on the way.
    pub(crate) fn enter(&mut self, id: u64, bytes: u64) {
        if self.lent.insert(id, bytes).is_none() {
            self.bytes += bytes;
        }
    }

    /// Strikes out a loan that the client has returned. One that it was not lent is a breach.
    pub(crate) fn strike(&mut self, id: u64) -> Result<(), PeerFault> {
        let bytes = self.lent.remove(&id).ok_or(PeerFault::ReturnedUnlent(id))?;
        self.bytes -= bytes;
        Ok(())
    }
}
