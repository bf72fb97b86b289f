//! The loans that a client keeps, so that the next answer from one needs no descriptor (rule N5).

use std::collections::BTreeMap;

use crate::error::PeerFault;
use crate::sync::modelled::{Mutex, lock};

use super::LoanLimits;
use super::content::Content;

/// What a server has lent over one connection: those used last, within limits.
///
/// Loans that somebody else holds as well (a body, a user's [`Lent`](super::Lent)) are not evicted:
/// to let go of them would free nothing.
pub(crate) struct KeptLoans {
    limits: LoanLimits,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    loans: BTreeMap<u64, Entry>,
    bytes: u64,
    /// Counts uses.
    clock: u64,
    /// What has been let go of since the last loan came: the server may not have heard of it yet.
    freed: Option<u64>,
}

struct Entry {
    /// Or what was wrong with it: told to whoever is answered from it.
    content: Result<Content, PeerFault>,
    /// When it was last used, by the table's clock.
    used: u64,
}

impl Entry {
    fn memory_len(&self) -> u64 {
        self.content.as_ref().map_or(0, Content::memory_len)
    }

    fn is_pinned(&self) -> bool {
        self.content.as_ref().is_ok_and(Content::is_shared)
    }
}

impl KeptLoans {
    pub(crate) fn new(limits: LoanLimits) -> KeptLoans {
        KeptLoans { limits, table: Mutex::default() }
    }

    /// The loan of this number, if it is kept.
    pub(crate) fn find(&self, id: u64) -> Result<Option<Content>, PeerFault> {
        let mut table = lock(&self.table);
        table.clock += 1;
        let now = table.clock;
        let Some(entry) = table.loans.get_mut(&id) else { return Ok(None) };
        entry.used = now;
        entry.content.clone().map(Some)
    }

    /// Keeps a loan that the server has just introduced, or what was wrong with it. Returns the
    /// numbers of those that are let go of for it: the server is to be told. One that is beyond the
    /// limits even then, because users hold the others, is not kept.
    pub(crate) fn keep(&self, id: u64, content: Result<Content, PeerFault>) -> Vec<u64> {
        let mut table = lock(&self.table);
        table.clock += 1;
        let mut entry = Entry { content, used: table.clock };
        let before = table.loans.remove(&id);
        if let Some(before) = &before {
            table.bytes -= before.memory_len();
            entry.content = Err(PeerFault::RepeatedLoan(id));
        }
        table.bytes += entry.memory_len();
        table.loans.insert(id, entry);
        table.freed = None;
        // The server knows these limits, and does not go beyond them if it is honest.
        let LoanLimits { bytes, count } = self.limits;
        let evicted = table.evict(bytes, count as usize, Some(id));
        let mut refused = None;
        if table.bytes > bytes || table.loans.len() > count as usize {
            refused = table.refuse(id);
        }
        drop(table);
        drop((before, refused)); // unmapped: not under the lock
        numbers(evicted)
    }

    /// Lets go of the loans unused for longest, because the server cannot lend `bytes` more: so
    /// many, and at least an eighth of all, so that the server hears of many at once. Returns their
    /// numbers.
    pub(crate) fn make_room(&self, bytes: u64) -> Vec<u64> {
        let mut table = lock(&self.table);
        // Several answers can say so before the server hears of the first return.
        if table.freed.is_some_and(|freed| freed >= bytes) {
            return Vec::new();
        }
        let before = table.bytes;
        let most_bytes = before - bytes.max(before / 8).min(before);
        let most_loans = table.loans.len() - table.loans.len().div_ceil(8);
        let evicted = table.evict(most_bytes, most_loans, None);
        if !evicted.is_empty() {
            // At least one: a loan without bytes is asked for by that.
            table.freed = Some(table.freed.unwrap_or(0) + (before - table.bytes).max(1));
        }
        drop(table);
        numbers(evicted)
    }
}

impl Table {
    /// Lets go of a loan's content; whoever is answered from it is told that it was too much.
    fn refuse(&mut self, id: u64) -> Option<Result<Content, PeerFault>> {
        let entry = self.loans.get_mut(&id).filter(|entry| entry.content.is_ok())?;
        self.bytes -= entry.memory_len();
        Some(std::mem::replace(&mut entry.content, Err(PeerFault::LentTooMuch(id))))
    }

    /// Takes out loans that nobody else holds, those unused for longest, until no more than this is
    /// left. Spares one.
    fn evict(&mut self, bytes: u64, loans: usize, spared: Option<u64>) -> Vec<(u64, Entry)> {
        let mut evicted = Vec::new();
        if self.bytes <= bytes && self.loans.len() <= loans {
            return evicted;
        }
        let mut oldest: Vec<(u64, u64)> = self
            .loans
            .iter()
            .filter(|(id, entry)| Some(**id) != spared && !entry.is_pinned())
            .map(|(id, entry)| (entry.used, *id))
            .collect();
        oldest.sort_unstable();
        for (_, id) in oldest {
            if self.bytes <= bytes && self.loans.len() <= loans {
                break;
            }
            if let Some(entry) = self.loans.remove(&id) {
                self.bytes -= entry.memory_len();
                evicted.push((id, entry));
            }
        }
        evicted
    }
}

/// Drops the loans, which unmaps them: not under the lock.
fn numbers(evicted: Vec<(u64, Entry)>) -> Vec<u64> {
    evicted.into_iter().map(|(id, _)| id).collect()
}
