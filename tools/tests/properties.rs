//! Properties over inputs at random: the GETFILE codec.
//!
//! `PROPTEST_CASES` in the environment says how many cases each property tries.

use std::env;

use proptest::collection::vec;
use proptest::prelude::*;
use shmferry_tools::getfile::{
    self, Dialect, MAX_PATH_LEN, MAX_REPLY_HEADER_LEN, MAX_REQUEST_LEN, ParsedReply, ParsedRequest,
    check_path, encode_reply, encode_request, parse_reply, parse_request,
};

fn config(cases: u32) -> ProptestConfig {
    let asked = env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Bytes that come close to a header.
fn nearly(words: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        6 => proptest::sample::select(words).prop_map(|word| word.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..4),
        1 => any::<u64>().prop_map(|n| n.to_string().into_bytes()),
    ];
    let joined = vec(part, 0..8).prop_map(|parts| parts.concat());
    prop_oneof![4 => joined, 1 => vec(any::<u8>(), 0..5000)]
}

fn a_path() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_map(|byte| if b"\0 \r\n".contains(&byte) { b'p' } else { byte });
    vec(byte, 0..MAX_PATH_LEN).prop_map(|rest| [b"/", &*rest].concat())
}

fn a_reply() -> impl Strategy<Value = getfile::Reply> {
    prop_oneof![
        any::<u64>().prop_map(|len| getfile::Reply::Ok { len }),
        Just(getfile::Reply::FileNotFound),
        Just(getfile::Reply::Error),
        Just(getfile::Reply::Invalid),
    ]
}

fn a_dialect() -> impl Strategy<Value = Dialect> {
    prop_oneof![Just(Dialect::Spec), Just(Dialect::Classic)]
}

const REQUEST_WORDS: &[&str] =
    &["GETFILE", " ", "GET", "GETFILE GET ", "/", "/a", "\r\n\r\n", "\r\n", "\n"];
const REPLY_WORDS: &[&str] = &[
    "GETFILE",
    " ",
    "OK",
    "GETFILE OK ",
    "0",
    "ERROR",
    "FILE_NOT_FOUND",
    "INVALID",
    "\r\n\r\n",
    "\n",
    "9",
    " 0",
    " \r\n\r\n",
];

proptest! {
    #![proptest_config(config(5000))]

    #[test]
    fn any_bytes_are_judged_as_a_request_once_and_for_all(bytes in nearly(REQUEST_WORDS), more in vec(any::<u8>(), 0..9)) {
        let longer = [&*bytes, &*more].concat();
        match parse_request(&bytes) {
            // What follows a verdict changes nothing.
            verdict @ (ParsedRequest::Invalid(_) | ParsedRequest::Complete { .. }) => {
                prop_assert_eq!(parse_request(&longer), verdict);
            }
            ParsedRequest::Incomplete => prop_assert!(bytes.len() < MAX_REQUEST_LEN),
        }
        if let ParsedRequest::Complete { path } = parse_request(&bytes) {
            prop_assert_eq!(check_path(path), Ok(()));
            let written = encode_request(path).unwrap();
            prop_assert_eq!(parse_request(&written), ParsedRequest::Complete { path });
        }
    }

    #[test]
    fn any_bytes_are_judged_as_a_reply_once_and_for_all(
        bytes in nearly(REPLY_WORDS),
        more in vec(any::<u8>(), 0..9),
        dialect in a_dialect(),
    ) {
        let longer = [&*bytes, &*more].concat();
        match parse_reply(&bytes, dialect) {
            verdict @ (ParsedReply::Invalid(_) | ParsedReply::Complete { .. }) => {
                prop_assert_eq!(parse_reply(&longer, dialect), verdict);
            }
            ParsedReply::Incomplete => prop_assert!(bytes.len() < MAX_REPLY_HEADER_LEN),
        }
        if let ParsedReply::Complete { reply, consumed } = parse_reply(&bytes, dialect) {
            prop_assert!(consumed <= bytes.len());
            let written = encode_reply(reply, dialect);
            let again = ParsedReply::Complete { reply, consumed: written.len() };
            prop_assert_eq!(parse_reply(&written, dialect), again);
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same(path in a_path(), reply in a_reply(), dialect in a_dialect()) {
        let request = encode_request(&path).unwrap();
        prop_assert_eq!(parse_request(&request), ParsedRequest::Complete { path: &path });
        let header = encode_reply(reply, dialect);
        let reply = match (reply, dialect) {
            // The classic dialect has no word for it.
            (getfile::Reply::Invalid, Dialect::Classic) => getfile::Reply::Error,
            (reply, _) => reply,
        };
        let whole = ParsedReply::Complete { reply, consumed: header.len() };
        prop_assert_eq!(parse_reply(&header, dialect), whole);
    }
}
