//! The messages: encoded and decoded, and other bytes refused.

use super::*;

fn samples() -> Vec<Message<'static>> {
    vec![
        Message::Hello {
            version: VERSION,
            pool: 7,
            slot_count: 4,
            slot_len: 128 << 10,
            loans: 3,
            limits: LoanLimits { bytes: 1 << 40, count: 256 },
        },
        Message::Returned { ids: &[7; 8] },
        Message::Loan { id: 1 << 60, kind: 1, len: 1 << 33 },
        Message::Segment { index: 3 },
        Message::Retire { index: u32::MAX },
        Message::Ring,
        Message::Wakeup,
        Message::Request { index: 1, generation: 1 << 40, takes_loans: true, key: b"/a.jpg" },
        Message::Request { index: 1, generation: 2, takes_loans: false, key: b"" },
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
            let whole = is_request && len >= 14; // a request with a shorter key is a request
            assert_eq!(Message::decode(&bytes[..len]).is_ok(), whole, "{len} of {message:?}");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert_eq!(Message::decode(&longer).is_ok(), is_request);
    }
}

#[test]
fn a_key_beyond_the_limit_is_malformed() {
    let key = vec![b'k'; KEY_LIMIT + 1];
    let bytes = Message::Request { index: 0, generation: 1, takes_loans: true, key: &key }.encode();
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
            // Seen from the other side, with versions swapped.
            Rejection::Version { ours, .. } => Rejection::Version { theirs: ours, ours: VERSION },
            same => same,
        };
        assert_eq!(back, Some(mirrored));
    }
}

use proptest::collection::vec;
use proptest::prelude::*;

/// `PROPTEST_CASES` in the environment overrides the number of cases.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..Default::default()
    }
}

/// Bytes that resemble a message: of a valid or invalid kind, with or without the magic, of any
/// length.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let magic =
        prop_oneof![3 => Just([&MAGIC[..], &VERSION.to_le_bytes()].concat()), 1 => Just(vec![])];
    let rest = prop_oneof![4 => vec(any::<u8>(), 0..30), 1 => vec(any::<u8>(), 0..MAX_MESSAGE + 9)];
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
            // After the number of another version, the rest is not kept.
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
        kind in 0..9,
        (index, small) in any::<(u32, u32)>(),
        large in any::<u64>(),
        key in vec(any::<u8>(), 0..=KEY_LIMIT),
    ) {
        let ids = [large.to_le_bytes(), large.to_be_bytes()].concat();
        let message = match kind {
            0 => Message::Hello { version: VERSION, pool: large, slot_count: index, slot_len: small, loans: small, limits: LoanLimits { bytes: large, count: index } },
            1 => Message::Segment { index },
            2 => Message::Retire { index },
            3 => Message::Request { index, generation: large, takes_loans: small % 2 == 0, key: &key },
            4 => Message::Ring,
            5 => Message::Wakeup,
            6 => Message::Returned { ids: &ids },
            7 => Message::Loan { id: large, kind: index, len: large ^ u64::from(small) },
            _ => Message::Farewell { code: small, detail: large },
        };
        let bytes = message.encode();
        prop_assert!(bytes.len() <= MAX_MESSAGE);
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }
}
