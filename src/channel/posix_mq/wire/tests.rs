//! The message: encoded and decoded, and other bytes refused.

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
    matches!(found, Err(Error::Peer(crate::error::ProtocolError(PeerFault::MalformedMessage { len }))) if len == bytes.len())
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
    /// Bytes with or without the beginning of a request, of any length.
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
