//! The message that crosses the queue, as bytes. All numbers are little-endian.

use crate::channel::KEY_LIMIT;
use crate::error::{PeerFault, Rejection, Result};
use crate::segment::LAYOUT_VERSION;

/// Longest message, in bytes: below the 8,192 that Linux allows by default.
pub(crate) const MAX_MESSAGE: usize = HEAD + KEY_LIMIT;

/// Bytes before the key.
pub(crate) const HEAD: usize = 8 + 4 + 4 + 8 + 8 + 4 + 8 + 4 + 4;

const MAGIC: [u8; 8] = *b"shmferry";

/// Put what this key means into this segment, in this generation.
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

    /// Fails for what is no request, and for one of another version.
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
mod tests {
    use super::*;
    use crate::error::Error;

    fn message(key: &[u8]) -> Message<'_> {
        let (pool, generation) = (u64::MAX - 1, 1 << 40);
        Message {
            pid: 9,
            pool,
            version: 3,
            index: 7,
            generation,
            slot_count: 4,
            slot_len: 1 << 17,
            key,
        }
    }

    fn is_malformed(bytes: &[u8]) -> bool {
        let found = Message::decode(bytes);
        matches!(found, Err(Error::Peer(PeerFault::MalformedMessage { len })) if len == bytes.len())
    }

    #[test]
    fn messages_survive_the_trip() {
        let longest = [b'k'; KEY_LIMIT];
        for key in [&b""[..], b"/a.jpg", &longest] {
            let bytes = message(key).encode();
            assert_eq!(bytes.len(), HEAD + key.len());
            assert_eq!(Message::decode(&bytes).unwrap(), message(key));
        }
        const { assert!(MAX_MESSAGE <= 8192) };
    }

    #[test]
    fn nothing_else_passes() {
        let bytes = message(b"").encode();
        for len in 0..bytes.len() {
            assert!(is_malformed(&bytes[..len]), "{len}");
        }
        assert!(is_malformed(&message(&[b'k'; KEY_LIMIT + 1]).encode()));
        let mut other = bytes.clone();
        other[0] ^= 1;
        assert!(is_malformed(&other));
    }

    #[test]
    fn another_version_is_named_whatever_follows() {
        let bytes = [&MAGIC[..], &9u32.to_le_bytes(), b"whatever version nine says"].concat();
        let found = Message::decode(&bytes);
        assert!(matches!(found, Err(Error::Rejected(Rejection::Version { theirs: 9, .. }))));
    }

    proptest::proptest! {
        /// Bytes that begin as a request does, or not, of any length.
        #[test]
        fn any_bytes_decode_to_what_encodes_to_them(
            begins in proptest::bool::weighted(0.9),
            rest in proptest::collection::vec(proptest::num::u8::ANY, 0..MAX_MESSAGE + 9),
        ) {
            let begin = if begins { [&MAGIC[..], &LAYOUT_VERSION.to_le_bytes()].concat() } else { vec![] };
            let bytes = [begin, rest].concat();
            if let Ok(message) = Message::decode(&bytes) {
                assert_eq!(message.encode(), bytes);
            } else {
                assert!(!begins || !(HEAD..=MAX_MESSAGE).contains(&bytes.len()));
            }
        }
    }
}
