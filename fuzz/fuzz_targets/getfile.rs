//! Any bytes as a GETFILE request, and as a reply in both dialects.
#![no_main]

use shmferry_tools::getfile::{
    Dialect, MAX_REPLY_HEADER_LEN, MAX_REQUEST_LEN, ParsedReply, ParsedRequest, encode_reply, encode_request,
    parse_reply, parse_request,
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let shorter = &bytes[..bytes.len() / 2];
    match parse_request(bytes) {
        ParsedRequest::Complete { path } => {
            let written = encode_request(path).expect("a path that was parsed");
            assert_eq!(parse_request(&written), ParsedRequest::Complete { path });
        }
        ParsedRequest::Incomplete => assert!(bytes.len() < MAX_REQUEST_LEN),
        ParsedRequest::Invalid(_) => {}
    }
    if parse_request(shorter) != ParsedRequest::Incomplete {
        assert_eq!(parse_request(shorter), parse_request(bytes), "a verdict stands");
    }
    for dialect in [Dialect::Spec, Dialect::Classic] {
        match parse_reply(bytes, dialect) {
            ParsedReply::Complete { reply, consumed } => {
                assert!(consumed <= bytes.len());
                let written = encode_reply(reply, dialect);
                let again = ParsedReply::Complete { reply, consumed: written.len() };
                assert_eq!(parse_reply(&written, dialect), again);
            }
            ParsedReply::Incomplete => assert!(bytes.len() < MAX_REPLY_HEADER_LEN),
            ParsedReply::Invalid(_) => {}
        }
        if parse_reply(shorter, dialect) != ParsedReply::Incomplete {
            assert_eq!(parse_reply(shorter, dialect), parse_reply(bytes, dialect), "a verdict stands");
        }
    }
});
