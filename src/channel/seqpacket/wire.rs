//! The messages that cross the socket, as bytes. All numbers are little-endian.

use crate::channel::KEY_LIMIT;
use crate::error::{PeerFault, Rejection};
use crate::segment::LAYOUT_VERSION;

/// Longest message, in bytes.
pub(crate) const MAX_MESSAGE: usize = 1 + 4 + 8 + KEY_LIMIT;

/// Version of these messages together with the segments' layout.
pub(crate) const VERSION: u32 = LAYOUT_VERSION;

const MAGIC: [u8; 8] = *b"shmferry";

/// One message. All but `Farewell` go from client to server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// First, and once: who we are, and the geometry of all our segments.
    Hello { version: u32, pool: u64, slot_count: u32, slot_len: u32 },
    /// The descriptor beside it is this segment.
    Segment { index: u32 },
    /// This segment will not be named again.
    Retire { index: u32 },
    /// The descriptor beside it is the ring that further requests may come through.
    Ring,
    /// There is a request in the ring.
    Wakeup,
    /// Put what this key means into this segment, in this generation.
    Request { index: u32, generation: u64, key: &'a [u8] },
    /// The server turns the client away, and hangs up.
    Farewell { code: u32, detail: u64 },
}

impl<'a> Message<'a> {
    const HELLO: u8 = 1;
    const SEGMENT: u8 = 2;
    const RETIRE: u8 = 3;
    const REQUEST: u8 = 4;
    const FAREWELL: u8 = 5;
    const RING: u8 = 6;
    const KNOCK: u8 = 7;

    pub(crate) fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        match self {
            Message::Hello { version, pool, slot_count, slot_len } => {
                bytes.push(Self::HELLO);
                bytes.extend(MAGIC);
                bytes.extend(version.to_le_bytes());
                bytes.extend(pool.to_le_bytes());
                bytes.extend(slot_count.to_le_bytes());
                bytes.extend(slot_len.to_le_bytes());
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
            Message::Wakeup => bytes.push(Self::KNOCK),
            Message::Request { index, generation, key } => {
                bytes.push(Self::REQUEST);
                bytes.extend(index.to_le_bytes());
                bytes.extend(generation.to_le_bytes());
                bytes.extend(key);
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
                    // What follows is that version's business, not ours to judge.
                    return Some(Message::Hello { version, pool: 0, slot_count: 0, slot_len: 0 });
                }
                let pool = u64::from_le_bytes(take(rest)?);
                let slot_count = u32::from_le_bytes(take(rest)?);
                let slot_len = u32::from_le_bytes(take(rest)?);
                Message::Hello { version, pool, slot_count, slot_len }
            }
            Self::SEGMENT => Message::Segment { index: u32::from_le_bytes(take(rest)?) },
            Self::RETIRE => Message::Retire { index: u32::from_le_bytes(take(rest)?) },
            Self::RING => Message::Ring,
            Self::KNOCK => Message::Wakeup,
            Self::REQUEST => {
                let index = u32::from_le_bytes(take(rest)?);
                let generation = u64::from_le_bytes(take(rest)?);
                let key = std::mem::take(rest);
                if key.len() > KEY_LIMIT {
                    return None;
                }
                Message::Request { index, generation, key }
            }
            Self::FAREWELL => Message::Farewell {
                code: u32::from_le_bytes(take(rest)?),
                detail: u64::from_le_bytes(take(rest)?),
            },
            _ => return None,
        };
        rest.is_empty().then_some(message)
    }

    /// The farewell that says why.
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

    /// Why a server turned us away, if this says so.
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
mod tests {
    use super::*;

    fn samples() -> Vec<Message<'static>> {
        vec![
            Message::Hello { version: VERSION, pool: 7, slot_count: 4, slot_len: 128 << 10 },
            Message::Segment { index: 3 },
            Message::Retire { index: u32::MAX },
            Message::Ring,
            Message::Wakeup,
            Message::Request { index: 1, generation: 1 << 40, key: b"/a.jpg" },
            Message::Request { index: 1, generation: 2, key: b"" },
            Message::Farewell { code: 3, detail: 1024 },
        ]
    }

    #[test]
    fn messages_survive_the_trip() {
        for message in samples() {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn no_prefix_and_no_extension_passes() {
        for message in samples() {
            let bytes = message.encode();
            let is_request = matches!(message, Message::Request { .. });
            for len in 0..bytes.len() {
                let whole = is_request && len >= 13; // a request with a shorter key is a request
                assert_eq!(Message::decode(&bytes[..len]).is_ok(), whole, "{len} of {message:?}");
            }
            let longer = [&bytes[..], b"x"].concat();
            assert_eq!(Message::decode(&longer).is_ok(), is_request);
        }
    }

    #[test]
    fn a_key_beyond_the_limit_is_malformed() {
        let key = vec![b'k'; KEY_LIMIT + 1];
        let bytes = Message::Request { index: 0, generation: 1, key: &key }.encode();
        assert_eq!(Message::decode(&bytes), Err(PeerFault::MalformedMessage { len: bytes.len() }));
        assert!(Message::decode(&bytes[..bytes.len() - 1]).is_ok());
        assert_eq!(bytes.len() - 1, MAX_MESSAGE);
    }

    #[test]
    fn another_version_is_named_whatever_follows() {
        let mut bytes = [&[Message::HELLO][..], &MAGIC, &9u32.to_le_bytes()].concat();
        bytes.extend(b"whatever version nine says");
        assert!(matches!(Message::decode(&bytes), Ok(Message::Hello { version: 9, .. })));
    }

    #[test]
    fn rejections_survive_the_trip() {
        for why in [
            Rejection::Version { theirs: VERSION, ours: 4 },
            Rejection::User(1000),
            Rejection::TooManySegments(9),
            Rejection::TooManyBytes(1 << 40),
            Rejection::TooManyClients(1),
            Rejection::Protocol,
            Rejection::Resources,
        ] {
            let back = Message::farewell(why).rejection();
            let mirrored = match why {
                // Told from the other side, with versions swapped.
                Rejection::Version { ours, .. } => {
                    Rejection::Version { theirs: ours, ours: VERSION }
                }
                same => same,
            };
            assert_eq!(back, Some(mirrored));
        }
    }

    use proptest::collection::vec;
    use proptest::prelude::*;

    /// `PROPTEST_CASES` in the environment says how many cases to try.
    fn config(cases: u32) -> ProptestConfig {
        let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
        ProptestConfig {
            cases: asked.unwrap_or(cases),
            failure_persistence: None,
            ..Default::default()
        }
    }

    /// Bytes that come close to a message: of one kind or none, with the magic or not, of any length.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
        let magic = prop_oneof![3 => Just([&MAGIC[..], &VERSION.to_le_bytes()].concat()), 1 => Just(vec![])];
        let rest =
            prop_oneof![4 => vec(any::<u8>(), 0..30), 1 => vec(any::<u8>(), 0..MAX_MESSAGE + 9)];
        (0u8..10, magic, rest).prop_map(|(kind, magic, rest)| match kind {
            0 => rest,
            Message::HELLO => [&[kind], &*magic, &*rest].concat(),
            kind => [&[kind], &*rest].concat(),
        })
    }

    proptest! {
        #![proptest_config(config(20_000))]

        #[test]
        fn any_bytes_decode_to_what_encodes_to_them(bytes in nearly()) {
            match Message::decode(&bytes) {
                // Nothing is kept of what another version says after its number.
                Ok(Message::Hello { version, .. }) if version != VERSION => {}
                Ok(message) => {
                    prop_assert_eq!(&message.encode(), &bytes);
                    let _ = message.rejection();
                }
                Err(fault) => prop_assert_eq!(fault, PeerFault::MalformedMessage { len: bytes.len() }),
            }
        }

        #[test]
        fn any_message_survives_the_trip(
            kind in 0..7,
            (index, small) in any::<(u32, u32)>(),
            large in any::<u64>(),
            key in vec(any::<u8>(), 0..=KEY_LIMIT),
        ) {
            let message = match kind {
                0 => Message::Hello { version: VERSION, pool: large, slot_count: index, slot_len: small },
                1 => Message::Segment { index },
                2 => Message::Retire { index },
                3 => Message::Request { index, generation: large, key: &key },
                4 => Message::Ring,
                5 => Message::Wakeup,
                _ => Message::Farewell { code: small, detail: large },
            };
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MAX_MESSAGE);
            prop_assert_eq!(Message::decode(&bytes), Ok(message));
        }
    }
}
