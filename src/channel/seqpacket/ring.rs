//! The ring of requests in shared memory: while a worker polls it, a request needs no system call.
//!
//! The client makes the ring, and passes it to the server over their connection. Each side keeps
//! its own cursor in private memory, and publishes its position. A request that does not fit (a
//! long key, a full ring) goes over the connection. A message on the connection also wakes a server
//! that sleeps.
//!
//! # Orderings
//! 1. *What an entry hands over.* The client writes it, then `POSTED` with `Release`; the server
//!    reads `POSTED` with `Acquire`, then the entry.
//! 2. *Room.* The server reads the entry, then writes `TAKEN` with `Release`; the client reads
//!    `TAKEN` with `Acquire` before it writes there again.
//! 3. *No lost request.* Client: write `POSTED`, `fence(SeqCst)`, read `NEED_WAKEUP`. Server,
//!    before it stops polling: raise `NEED_WAKEUP`, `fence(SeqCst)`, read `POSTED`. The fences are
//!    totally ordered: either the client's comes first, and then the server sees the entry and
//!    keeps polling, or the server's does, and then the client sees `NEED_WAKEUP` raised and sends
//!    a wakeup.
//!
//! Everything else is `Relaxed`: a side that lowers `NEED_WAKEUP` is about to poll, or has sent a
//! wakeup. A client lowers it only after the wakeup was sent, since sending can fail, and other
//! threads would rely on it. It lowers only the value that it sent the wakeup for. Both sides
//! change it by read-modify-write: with plain stores on the server's side, loom finds a value that
//! is lowered too late.

use std::sync::Arc;
use std::time::Duration;

use crate::error::PeerFault;
use crate::segment::Words;
use crate::sync::atomic::{Acquire, AtomicU64, Relaxed, Release, SeqCst, fence};
use crate::sync::modelled::{Mutex, lock};
use crate::sync::{Spinner, current_cpu};

/// Requests that a ring holds.
pub(crate) const ENTRIES: u64 = if cfg!(loom) { 2 } else { 64 };
/// The longest key that fits an entry, in bytes.
pub(crate) const KEY_ROOM: usize = (ENTRY_WORDS - 2) * size_of::<u64>();
/// Bytes of a ring: whole pages.
pub(crate) const RING_LEN: usize = (RING_WORDS * size_of::<u64>()).next_multiple_of(4096);
pub(super) const RING_WORDS: usize = SERVER_ASKS + GROUP;

// Positions in the ring, in words.
/// Groups written by different sides are 128 bytes apart.
const GROUP: usize = if cfg!(loom) { 2 } else { 16 };
/// How many requests the client has posted; only grows.
pub(crate) const POSTED: usize = 0;
const CLIENT_CPU: usize = 1;
/// How many requests the server has taken; only grows.
pub(crate) const TAKEN: usize = GROUP;
const SERVER_CPU: usize = GROUP + 1;
/// Not zero: no worker polls the ring, so a post must be followed by a wakeup. The server raises it
/// to a new number each time; the client lowers only that number, never a later one.
pub(crate) const NEED_WAKEUP: usize = 2 * GROUP;
pub(crate) const FIRST_ENTRY: usize = 3 * GROUP;
/// An entry: the generation; the segment's index below the key's length, with [`TAKES_LOANS`] in
/// it; and the key.
pub(crate) const ENTRY_WORDS: usize = if cfg!(loom) { 3 } else { 32 };

/// Behind the entries: not zero while the client's tasks ask for a signal, and the server's; see
/// [`signal`](super::signal).
pub(crate) const CLIENT_ASKS: usize = FIRST_ENTRY + ENTRIES as usize * ENTRY_WORDS;
pub(crate) const SERVER_ASKS: usize = CLIENT_ASKS + GROUP;

/// In the key's length: the answer may be lent.
const TAKES_LOANS: u64 = 1 << 31;

// As specified in docs/protocol.md (rule L1).
#[cfg(not(loom))]
const _: () = {
    assert!(RING_LEN == 20_480 && ENTRIES == 64 && ENTRY_WORDS == 32 && KEY_ROOM == 240);
    assert!(
        POSTED == 0
            && CLIENT_CPU == 1
            && TAKEN == 16
            && SERVER_CPU == 17
            && NEED_WAKEUP == 32
            && FIRST_ENTRY == 48
            && CLIENT_ASKS == 2096
            && SERVER_ASKS == 2112
    );
    assert!(RING_WORDS * size_of::<u64>() <= RING_LEN);
};

/// `NEED_WAKEUP` of a new ring, which no worker polls yet.
const NEW: u64 = 1;

/// How long a client waits for a worker to return to polling before it sends a wakeup.
const WAKE_UP_AFTER: Duration = Duration::from_micros(10);

/// The client's end, for many threads.
pub(super) struct Poster {
    ring: Arc<Words>,
    /// How many requests were posted.
    posted: Mutex<u64>,
    spinner: Mutex<Spinner>,
}

impl Poster {
    /// Over a fresh, zeroed ring that no other process has mapped yet.
    pub(super) fn new(ring: Words) -> Poster {
        ring[NEED_WAKEUP].store(NEW, Relaxed);
        ring[SERVER_CPU].store(u64::from(current_cpu()), Relaxed); // not known yet: do not spin
        let ring = Arc::new(ring);
        Poster { ring, posted: Mutex::new(0), spinner: Mutex::new(Spinner::new()) }
    }

    /// The memory, which has the words for signals as well.
    pub(super) fn words(&self) -> &Arc<Words> {
        &self.ring
    }

    /// Posts a request, and returns its number; `None` if it does not fit.
    pub(super) fn post(
        &self,
        index: u32,
        generation: u64,
        takes_loans: bool,
        key: &[u8],
    ) -> Option<u64> {
        if key.len() > KEY_ROOM {
            return None;
        }
        let mut posted = lock(&self.posted);
        let taken = self.ring[TAKEN].load(Acquire); // pair 2
        // Also covers a server that claims to have taken more than was posted.
        if posted.wrapping_sub(taken) >= ENTRIES {
            return None;
        }
        let entry = entry(&self.ring, *posted);
        entry[0].store(generation, Relaxed);
        let len = key.len() as u64 | if takes_loans { TAKES_LOANS } else { 0 };
        entry[1].store(u64::from(index) | len << 32, Relaxed);
        for (word, bytes) in entry[2..].iter().zip(key.chunks(8)) {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(eight), Relaxed);
        }
        self.ring[CLIENT_CPU].store(u64::from(current_cpu()), Relaxed);
        let number = *posted;
        *posted += 1;
        self.ring[POSTED].store(*posted, Release); // pair 1
        Some(number)
    }

    /// Says whether request `number`, just posted, needs a wakeup. If the client is `at_rest`, with
    /// no other request under way, this spins for a moment first: the worker that served the last
    /// request is most often about to poll again, and will find this one.
    pub(super) fn follow(&self, number: u64, at_rest: bool) -> Posted {
        fence(SeqCst); // pair 3
        if let (true, Ok(mut spinner)) = (at_rest, self.spinner.try_lock()) {
            let taken = || self.was_taken(number).then_some(());
            let is_elsewhere = self.ring[SERVER_CPU].load(Relaxed) != u64::from(current_cpu());
            if spinner.spin(is_elsewhere, WAKE_UP_AFTER, taken).is_some() {
                return Posted::Taken;
            }
        }
        match self.ring[NEED_WAKEUP].load(Relaxed) {
            0 if self.was_taken(number) => Posted::Taken,
            0 => Posted::Awaiting,
            need_wakeup => Posted::MustWake(need_wakeup),
        }
    }

    /// Lowers `NEED_WAKEUP`, after a wakeup was sent for this value.
    pub(super) fn lower(&self, need_wakeup: u64) {
        // Fails if another thread has lowered it, or if the server has raised a later value.
        let _ = self.ring[NEED_WAKEUP].compare_exchange(need_wakeup, 0, Relaxed, Relaxed);
    }

    /// Whether the server says that it has taken request `number`.
    pub(super) fn was_taken(&self, number: u64) -> bool {
        self.ring[TAKEN].load(Acquire) > number
    }
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Posted {
    /// The server says that it has taken it.
    Taken,
    /// A worker polls the ring, or will when it is done, if the server is alive.
    Awaiting,
    /// The server has to be woken, and this value [lowered](Poster::lower) then.
    MustWake(u64),
}

/// The server's end. One worker at a time takes; any worker may check for entries.
pub(super) struct Taker {
    ring: Arc<Words>,
    /// How many requests were taken. Private; the copy in the ring is for the client.
    taken: AtomicU64,
    /// How often `NEED_WAKEUP` was raised.
    raised: AtomicU64,
}

/// A request, copied out of the ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) index: u32,
    pub(super) generation: u64,
    pub(super) takes_loans: bool,
    key: [u8; KEY_ROOM],
    key_len: usize,
}

impl Entry {
    pub(super) fn key(&self) -> &[u8] {
        &self.key[..self.key_len]
    }
}

impl Taker {
    pub(super) fn new(ring: Words) -> Taker {
        Taker { ring: Arc::new(ring), taken: AtomicU64::new(0), raised: AtomicU64::new(NEW) }
    }

    /// The memory, which has the words for signals as well.
    pub(super) fn words(&self) -> &Arc<Words> {
        &self.ring
    }

    /// Whether there are entries, valid or not.
    pub(super) fn has_entries(&self) -> bool {
        self.ring[POSTED].load(Acquire) != self.taken.load(Relaxed)
    }

    /// The oldest request, if there is one, without taking it. For one worker at a time.
    pub(super) fn peek(&self) -> Result<Option<Entry>, PeerFault> {
        let taken = self.taken.load(Relaxed);
        let posted = self.ring[POSTED].load(Acquire); // pair 1
        if posted == taken {
            return Ok(None);
        }
        if posted.wrapping_sub(taken) > ENTRIES {
            return Err(PeerFault::ImpossibleRing { posted, taken });
        }
        let entry = entry(&self.ring, taken);
        // Each word is read once, checked, and only then used (rule P3).
        let generation = entry[0].load(Relaxed);
        let word = entry[1].load(Relaxed);
        let (index, len) = (word as u32, word >> 32);
        let takes_loans = len & TAKES_LOANS != 0;
        let key_len = (len & !TAKES_LOANS) as usize;
        if key_len > KEY_ROOM {
            return Err(PeerFault::MalformedMessage { len: key_len });
        }
        let mut key = [0; KEY_ROOM];
        for (bytes, word) in key[..key_len].chunks_mut(8).zip(&entry[2..]) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[..bytes.len()]);
        }
        Ok(Some(Entry { index, generation, takes_loans, key, key_len }))
    }

    /// Takes the request that [`peek`](Self::peek) returned.
    pub(super) fn advance(&self) {
        let taken = self.taken.load(Relaxed) + 1;
        self.taken.store(taken, Relaxed);
        self.ring[SERVER_CPU].store(u64::from(current_cpu()), Relaxed);
        self.ring[TAKEN].store(taken, Release); // pair 2
    }

    /// Requests a wakeup for the client's next post; `true` if there are entries already.
    pub(super) fn arm(&self) -> bool {
        let need_wakeup = self.raised.fetch_add(1, Relaxed) + 1;
        self.ring[NEED_WAKEUP].swap(need_wakeup, Relaxed);
        fence(SeqCst); // pair 3
        self.has_entries()
    }

    /// Tells the client to send no wakeup: a worker polls.
    pub(super) fn disarm(&self) {
        self.ring[NEED_WAKEUP].swap(0, Relaxed);
    }

    /// The processor that the client last posted from.
    pub(super) fn client_cpu(&self) -> u32 {
        self.ring[CLIENT_CPU].load(Relaxed) as u32
    }
}

/// The words of request `number`.
fn entry(ring: &Words, number: u64) -> &[AtomicU64] {
    let at = FIRST_ENTRY + (number % ENTRIES) as usize * ENTRY_WORDS;
    &ring[at..at + ENTRY_WORDS]
}

/// Runs both ends, while the fuzzer writes to the memory between their steps.
#[cfg(fuzzing)]
pub(crate) fn fuzz(script: &[u8]) -> crate::error::Result<()> {
    use crate::segment::{attach_words, create_words};
    let (ours, memory) = create_words("fuzz", RING_LEN)?;
    let (poster, taker) = (Poster::new(ours), Taker::new(attach_words(&memory, RING_LEN)?));
    let corrupted = attach_words(&memory, RING_LEN)?;
    let mut accepted = 0;
    for step in script.chunks_exact(11) {
        let at = usize::from(u16::from_le_bytes([step[1], step[2]]));
        let value = u64::from_le_bytes(std::array::from_fn(|i| step[3 + i]));
        match step[0] % 6 {
            0 | 1 => corrupted[at % RING_WORDS].store(value, Relaxed),
            2 => {
                let Some(number) = poster.post(
                    at as u32,
                    value,
                    at % 3 == 0,
                    &[step[0]; KEY_ROOM + 8][..at % (KEY_ROOM + 9)],
                ) else {
                    continue;
                };
                assert_eq!(number, accepted);
                accepted += 1;
                if let Posted::MustWake(need_wakeup) = poster.follow(number, false) {
                    poster.lower(need_wakeup);
                }
            }
            // A server hangs up on a client whose ring is corrupted.
            3 | 4 => match taker.peek()? {
                Some(entry) => {
                    assert!(entry.key().len() <= KEY_ROOM);
                    taker.advance();
                }
                None => assert!(!taker.has_entries()),
            },
            _ if at % 2 == 0 => drop(taker.arm()),
            _ => taker.disarm(),
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests;
