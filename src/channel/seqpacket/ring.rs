//! The ring of requests in memory that a client shares with its server: while somebody looks at it, a
//! request costs neither side a system call.
//!
//! The client owns the ring, and hands it over on the connection beside which it lies. Each side keeps
//! its own cursor; what it tells the other is only how far it is. A request that does not fit (its key is
//! long, the ring is full) goes over the connection, which is also what wakes a server that sleeps.
//!
//! # Orderings
//! 1. *What an entry hands over.* The client writes it, then `POSTED` with `Release`; the server reads
//!    `POSTED` with `Acquire`, then the entry.
//! 2. *Room.* The server reads the entry, then writes `TAKEN` with `Release`; the client reads `TAKEN` with
//!    `Acquire` before it writes there again.
//! 3. *No lost request.* Client: write `POSTED`, `fence(SeqCst)`, read `NEED_WAKEUP`. Server, before it stops looking:
//!    raise `NEED_WAKEUP`, `fence(SeqCst)`, read `POSTED`. The fences are totally ordered: either the client's
//!    comes first, and then the server sees the entry and looks on, or the server's does, and then the
//!    client sees `NEED_WAKEUP` raised and knocks.
//!
//! Everything else is `Relaxed`: whoever lowers `NEED_WAKEUP` is about to look, or has knocked. A client lowers it only
//! after the knock, since a knock can fail, and others would rely on it; and only the bell that it knocked for.
//! Both sides change it by read-modify-write: with plain stores on the server's side, loom finds a bell that is
//! lowered too late.

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
pub(super) const RING_WORDS: usize = FIRST_ENTRY + ENTRIES as usize * ENTRY_WORDS;

// Where things are, in words.
/// Groups written by different sides are 128 bytes apart.
const GROUP: usize = if cfg!(loom) { 2 } else { 16 };
/// How many requests the client has put in; ever growing.
pub(crate) const POSTED: usize = 0;
const CLIENT_CPU: usize = 1;
/// How many the server has taken out; ever growing.
pub(crate) const TAKEN: usize = GROUP;
const SERVER_CPU: usize = GROUP + 1;
/// Not zero: nobody looks, so knock after posting. The server raises it to another number each time; the client
/// lowers that number, and no later one.
pub(crate) const NEED_WAKEUP: usize = 2 * GROUP;
pub(crate) const FIRST_ENTRY: usize = 3 * GROUP;
/// An entry: the generation, the segment's index below the key's length, and the key.
pub(crate) const ENTRY_WORDS: usize = if cfg!(loom) { 3 } else { 32 };

// As docs/protocol.md has them (rule L1).
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
    );
    assert!(RING_WORDS * size_of::<u64>() <= RING_LEN);
};

/// The bell of a new ring, at which nobody looks.
const NEW: u64 = 1;

/// How long a client waits for a worker that is on its way back before it knocks.
const KNOCK_AFTER: Duration = Duration::from_micros(10);

/// The client's end, for many threads.
pub(super) struct Poster {
    ring: Words,
    /// How many requests were put in.
    posted: Mutex<u64>,
    spinner: Mutex<Spinner>,
}

impl Poster {
    /// Over a fresh ring, all zeroes, that nobody else has mapped yet.
    pub(super) fn new(ring: Words) -> Poster {
        ring[NEED_WAKEUP].store(NEW, Relaxed);
        ring[SERVER_CPU].store(u64::from(current_cpu()), Relaxed); // no news of it yet: do not spin
        Poster { ring, posted: Mutex::new(0), spinner: Mutex::new(Spinner::new()) }
    }

    /// Puts a request in, and returns its number; `None` if it does not fit.
    pub(super) fn post(&self, index: u32, generation: u64, key: &[u8]) -> Option<u64> {
        if key.len() > KEY_ROOM {
            return None;
        }
        let mut posted = lock(&self.posted);
        let taken = self.ring[TAKEN].load(Acquire); // pair 2
        // A server that claims to have taken what was never there has no room for us either.
        if posted.wrapping_sub(taken) >= ENTRIES {
            return None;
        }
        let entry = entry(&self.ring, *posted);
        entry[0].store(generation, Relaxed);
        entry[1].store(u64::from(index) | (key.len() as u64) << 32, Relaxed);
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

    /// What becomes of request `number`, after it was posted. If the client is `at_rest`, waiting for nothing
    /// else, it waits a moment for a worker first: whoever served the last request is most often on its way
    /// back, and will find this one.
    pub(super) fn follow(&self, number: u64, at_rest: bool) -> Posted {
        fence(SeqCst); // pair 3
        if let (true, Ok(mut spinner)) = (at_rest, self.spinner.try_lock()) {
            let taken = || self.was_taken(number).then_some(());
            let is_elsewhere = self.ring[SERVER_CPU].load(Relaxed) != u64::from(current_cpu());
            if spinner.spin(is_elsewhere, KNOCK_AFTER, taken).is_some() {
                return Posted::Taken;
            }
        }
        match self.ring[NEED_WAKEUP].load(Relaxed) {
            0 if self.was_taken(number) => Posted::Taken,
            0 => Posted::Awaiting,
            need_wakeup => Posted::MustWake(need_wakeup),
        }
    }

    /// Says that the server was woken for this bell.
    pub(super) fn lower(&self, need_wakeup: u64) {
        // Fails if another has lowered it, or if the server has raised the next one.
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
    /// A worker looks, or will when it is done, if the server lives.
    Awaiting,
    /// The server has to be woken, and this bell to be [lowered](Poster::lower) then.
    MustWake(u64),
}

/// The server's end. One worker takes at a time; any may ask whether there is something to take.
pub(super) struct Taker {
    ring: Words,
    /// How many requests were taken out. Ours alone: what stands in the ring is for the client.
    taken: AtomicU64,
    /// How often the bell was raised.
    raised: AtomicU64,
}

/// A request as it stood in the ring, copied out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) index: u32,
    pub(super) generation: u64,
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
        Taker { ring, taken: AtomicU64::new(0), raised: AtomicU64::new(NEW) }
    }

    /// Whether there is something to take, if only nonsense.
    pub(super) fn has_entries(&self) -> bool {
        self.ring[POSTED].load(Acquire) != self.taken.load(Relaxed)
    }

    /// The oldest request, if there is one; left where it is. For one worker at a time.
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
        let (index, key_len) = (word as u32, (word >> 32) as usize);
        if key_len > KEY_ROOM {
            return Err(PeerFault::MalformedMessage { len: key_len });
        }
        let mut key = [0; KEY_ROOM];
        for (bytes, word) in key[..key_len].chunks_mut(8).zip(&entry[2..]) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[..bytes.len()]);
        }
        Ok(Some(Entry { index, generation, key, key_len }))
    }

    /// Takes out what [`peek`](Self::peek) has shown.
    pub(super) fn advance(&self) {
        let taken = self.taken.load(Relaxed) + 1;
        self.taken.store(taken, Relaxed);
        self.ring[SERVER_CPU].store(u64::from(current_cpu()), Relaxed);
        self.ring[TAKEN].store(taken, Release); // pair 2
    }

    /// Has the client knock when it posts next; `true` if there is something to take already.
    pub(super) fn arm(&self) -> bool {
        let need_wakeup = self.raised.fetch_add(1, Relaxed) + 1;
        self.ring[NEED_WAKEUP].swap(need_wakeup, Relaxed);
        fence(SeqCst); // pair 3
        self.has_entries()
    }

    /// Spares the client the knock: somebody looks.
    pub(super) fn disarm(&self) {
        self.ring[NEED_WAKEUP].swap(0, Relaxed);
    }

    /// The processor that posted last.
    pub(super) fn client_cpu(&self) -> u32 {
        self.ring[CLIENT_CPU].load(Relaxed) as u32
    }
}

/// The words of request `number`.
fn entry(ring: &Words, number: u64) -> &[AtomicU64] {
    let at = FIRST_ENTRY + (number % ENTRIES) as usize * ENTRY_WORDS;
    &ring[at..at + ENTRY_WORDS]
}

/// Both ends, honest, while the fuzzer writes to the memory between their steps.
#[cfg(fuzzing)]
pub(crate) fn fuzz(script: &[u8]) -> crate::error::Result<()> {
    use crate::segment::{attach_words, create_words};
    let (ours, memory) = create_words("fuzz", RING_LEN)?;
    let (poster, taker) = (Poster::new(ours), Taker::new(attach_words(&memory, RING_LEN)?));
    let spoilt = attach_words(&memory, RING_LEN)?;
    let mut accepted = 0;
    for step in script.chunks_exact(11) {
        let at = usize::from(u16::from_le_bytes([step[1], step[2]]));
        let value = u64::from_le_bytes(std::array::from_fn(|i| step[3 + i]));
        match step[0] % 6 {
            0 | 1 => spoilt[at % RING_WORDS].store(value, Relaxed),
            2 => {
                let Some(number) =
                    poster.post(at as u32, value, &[step[0]; KEY_ROOM + 8][..at % (KEY_ROOM + 9)])
                else {
                    continue;
                };
                assert_eq!(number, accepted);
                accepted += 1;
                if let Posted::MustWake(need_wakeup) = poster.follow(number, false) {
                    poster.lower(need_wakeup);
                }
            }
            // A server hangs up on a client whose ring makes no sense.
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
