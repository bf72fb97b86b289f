//! The message in the queue, as bytes. All numbers are little-endian.

use crate::channel::KEY_LIMIT;
use crate::error::{PeerFault, Rejection, Result};
use crate::segment::LAYOUT_VERSION;

/// Longest message, in bytes: below the 8,192 that Linux allows by default.
pub(crate) const MAX_MESSAGE: usize = HEAD + KEY_LIMIT;

/// Bytes before the key.
pub(crate) const HEAD: usize = 8 + 4 + 4 + 8 + 8 + 4 + 8 + 4 + 4;

const MAGIC: [u8; 8] = *b"shmferry";

/// A request: put what `key` names into this segment, in this generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    /// The process that owns the pool.
    pub(crate) pid: u32,
    pub(crate) pool: u64,
    /// Changes whenever segments have left the pool.
    pub(crate) version: u64,
    pub(crate) index: u32,
    pub(crate) generation: u64,
    pub(crate) slot_count: u32,
    pub(crate) slot_len: u32,
    pub(crate) key: &'a [u8],
}

impl<'a> Message<'a> {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.key.len());
        bytes.extend(MAGIC);
        bytes.extend(LAYOUT_VERSION.to_le_bytes());
        bytes.extend(self.pid.to_le_bytes());
        bytes.extend(self.pool.to_le_bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.index.to_le_bytes());
        bytes.extend(self.generation.to_le_bytes());
        bytes.extend(self.slot_count.to_le_bytes());
        bytes.extend(self.slot_len.to_le_bytes());
        bytes.extend(self.key);
        bytes
    }

    /// Fails for bytes that are not a request, and for another version.
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Message<'a>> {
        let malformed = PeerFault::MalformedMessage { len: bytes.len() };
        let mut rest = bytes.strip_prefix(&MAGIC).ok_or(malformed)?;
        let version = take(&mut rest).map(u32::from_le_bytes).ok_or(malformed)?;
        if version != LAYOUT_VERSION {
            return Err(Rejection::Version { theirs: version, ours: LAYOUT_VERSION }.into());
        }
        Ok(Self::read(rest).ok_or(malformed)?)
    }

    fn read(mut rest: &'a [u8]) -> Option<Message<'a>> {
        let rest = &mut rest;
        Some(Message {
            pid: u32::from_le_bytes(take(rest)?),
            pool: u64::from_le_bytes(take(rest)?),
            version: u64::from_le_bytes(take(rest)?),
            index: u32::from_le_bytes(take(rest)?),
            generation: u64::from_le_bytes(take(rest)?),
            slot_count: u32::from_le_bytes(take(rest)?),
            slot_len: u32::from_le_bytes(take(rest)?),
            key: Some(*rest).filter(|key| key.len() <= KEY_LIMIT)?,
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
