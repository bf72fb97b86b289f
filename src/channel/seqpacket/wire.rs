//! The messages on the socket, as bytes. All numbers are little-endian.

use crate::channel::KEY_LIMIT;
use crate::error::{PeerFault, Rejection};
use crate::loan::LoanLimits;
use crate::segment::LAYOUT_VERSION;

/// Longest message, in bytes.
pub(crate) const MAX_MESSAGE: usize = 1 + 4 + 8 + 1 + KEY_LIMIT;

/// How many loans one message returns at most.
pub(crate) const MOST_RETURNED: usize = (MAX_MESSAGE - 1) / size_of::<u64>();

/// Version of these messages together with the segments' layout.
pub(crate) const VERSION: u32 = LAYOUT_VERSION;

const MAGIC: [u8; 8] = *b"shmferry";

/// One message. `Loan` and `Farewell` go from server to client, `Wakeup` in both directions, all
/// others from client to server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// The first message: the client's version and pool, the geometry of all its segments, and how
    /// much it lets be lent to it: the kinds of loans, as bits, and their limits (rule N9).
    Hello {
        version: u32,
        pool: u64,
        slot_count: u32,
        slot_len: u32,
        loans: u32,
        limits: LoanLimits,
    },
    /// The accompanying descriptor is this segment.
    Segment { index: u32 },
    /// This segment will not be named again.
    Retire { index: u32 },
    /// The accompanying descriptor is the ring for further requests.
    Ring,
    /// There is something to take: for a server, a request in the ring, or a free slot; for a
    /// client, a filled one.
    Wakeup,
    /// A request: put what `key` names into this segment, in this generation; or lend it, if the
    /// request takes loans.
    Request { index: u32, generation: u64, takes_loans: bool, key: &'a [u8] },
    /// The client has let go of these loans: their numbers, 8 bytes each.
    Returned { ids: &'a [u8] },
    /// The accompanying descriptor is this loan, of this kind and length (rule N3).
    Loan { id: u64, kind: u32, len: u64 },
    /// The server rejects the client, and hangs up.
    Farewell { code: u32, detail: u64 },
}

impl<'a> Message<'a> {
    const HELLO: u8 = 1;
    const SEGMENT: u8 = 2;
    const RETIRE: u8 = 3;
    const REQUEST: u8 = 4;
    const FAREWELL: u8 = 5;
    const RING: u8 = 6;
    const WAKEUP: u8 = 7;
    const RETURNED: u8 = 8;
    const LOAN: u8 = 9;

    pub(crate) fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        match self {
            Message::Hello { version, pool, slot_count, slot_len, loans, limits } => {
                bytes.push(Self::HELLO);
                bytes.extend(MAGIC);
                bytes.extend(version.to_le_bytes());
                bytes.extend(pool.to_le_bytes());
                bytes.extend(slot_count.to_le_bytes());
                bytes.extend(slot_len.to_le_bytes());
                bytes.extend(loans.to_le_bytes());
                bytes.extend(limits.bytes.to_le_bytes());
                bytes.extend(limits.count.to_le_bytes());
            }
            Message::Segment { index } => {
                bytes.push(Self::SEGMENT);
                bytes.extend(index.to_le_bytes());
            }
            Message::Retire { index } => {
                bytes.push(Self::RETIRE);
                bytes.extend(index.to_le_bytes());
            }
            Message::Ring => bytes.push(Self::RING),
            Message::Wakeup => bytes.push(Self::WAKEUP),
            Message::Request { index, generation, takes_loans, key } => {
                bytes.push(Self::REQUEST);
                bytes.extend(index.to_le_bytes());
                bytes.extend(generation.to_le_bytes());
                bytes.push(u8::from(takes_loans));
                bytes.extend(key);
            }
            Message::Returned { ids } => {
                bytes.push(Self::RETURNED);
                bytes.extend(ids);
            }
            Message::Loan { id, kind, len } => {
                bytes.push(Self::LOAN);
                bytes.extend(id.to_le_bytes());
                bytes.extend(kind.to_le_bytes());
                bytes.extend(len.to_le_bytes());
            }
            Message::Farewell { code, detail } => {
                bytes.push(Self::FAREWELL);
                bytes.extend(code.to_le_bytes());
                bytes.extend(detail.to_le_bytes());
            }
        }
        bytes
    }

    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Message<'a>, PeerFault> {
        Self::read(bytes).ok_or(PeerFault::MalformedMessage { len: bytes.len() })
    }

    fn read(bytes: &'a [u8]) -> Option<Message<'a>> {
        let (kind, mut rest) = bytes.split_first()?;
        let rest = &mut rest;
        let message = match *kind {
            Self::HELLO => {
                if take::<8>(rest)? != MAGIC {
                    return None;
                }
                let version = u32::from_le_bytes(take(rest)?);
                if version != VERSION {
                    // The rest of the message is not checked: another version may define it
                    // differently.
                    let (pool, slot_count, slot_len, loans) = (0, 0, 0, 0);
                    let limits = LoanLimits::NONE;
                    return Some(Message::Hello {
                        version,
                        pool,
                        slot_count,
                        slot_len,
                        loans,
                        limits,
                    });
                }
                let pool = u64::from_le_bytes(take(rest)?);
                let slot_count = u32::from_le_bytes(take(rest)?);
                let slot_len = u32::from_le_bytes(take(rest)?);
                let loans = u32::from_le_bytes(take(rest)?);
                let (bytes, count) =
                    (u64::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?));
                let limits = LoanLimits { bytes, count };
                Message::Hello { version, pool, slot_count, slot_len, loans, limits }
            }
            Self::SEGMENT => Message::Segment { index: u32::from_le_bytes(take(rest)?) },
            Self::RETIRE => Message::Retire { index: u32::from_le_bytes(take(rest)?) },
            Self::RING => Message::Ring,
            Self::WAKEUP => Message::Wakeup,
            Self::REQUEST => {
                let index = u32::from_le_bytes(take(rest)?);
                let generation = u64::from_le_bytes(take(rest)?);
                let takes_loans = match take(rest)? {
                    [0] => false,
                    [1] => true,
                    _ => return None,
                };
                let key = std::mem::take(rest);
                if key.len() > KEY_LIMIT {
                    return None;
                }
                Message::Request { index, generation, takes_loans, key }
            }
            Self::RETURNED => {
                let ids = std::mem::take(rest);
                if ids.is_empty() || ids.len() % size_of::<u64>() != 0 {
                    return None;
                }
                Message::Returned { ids }
            }
            Self::LOAN => Message::Loan {
                id: u64::from_le_bytes(take(rest)?),
                kind: u32::from_le_bytes(take(rest)?),
                len: u64::from_le_bytes(take(rest)?),
            },
            Self::FAREWELL => Message::Farewell {
                code: u32::from_le_bytes(take(rest)?),
                detail: u64::from_le_bytes(take(rest)?),
            },
            _ => return None,
        };
        rest.is_empty().then_some(message)
    }

    /// The farewell for a rejection.
    pub(crate) fn farewell(why: Rejection) -> Message<'static> {
        let (code, detail) = match why {
            Rejection::Version { ours, .. } => (1, u64::from(ours)),
            Rejection::User(uid) => (2, u64::from(uid)),
            Rejection::TooManySegments(limit) => (3, u64::from(limit)),
            Rejection::TooManyBytes(limit) => (4, limit),
            Rejection::TooManyClients(limit) => (5, u64::from(limit)),
            Rejection::Protocol => (6, 0),
            Rejection::Resources => (7, 0),
        };
        Message::Farewell { code, detail }
    }

    /// The server's reason, if this is a farewell.
    pub(crate) fn rejection(self) -> Option<Rejection> {
        let Message::Farewell { code, detail } = self else { return None };
        let small = u32::try_from(detail).unwrap_or(u32::MAX);
        Some(match code {
            1 => Rejection::Version { theirs: small, ours: VERSION },
            2 => Rejection::User(small),
            3 => Rejection::TooManySegments(small),
            4 => Rejection::TooManyBytes(detail),
            5 => Rejection::TooManyClients(small),
            7 => Rejection::Resources,
            _ => Rejection::Protocol,
        })
    }
}

/// Splits `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

#[cfg(test)]
mod tests;
