//! The GETFILE codec: every malformed header, every split, every limit, in both dialects.

use clap::ValueEnum;
use shmferry_tools::getfile::{
    Dialect, MAX_PATH_LEN, MAX_REPLY_HEADER_LEN, MAX_REQUEST_LEN, Malformed, MalformedReply,
    ParsedReply, ParsedRequest, Reply, check_path, encode_reply, encode_request, parse_reply,
    parse_request,
};

const DIALECTS: [Dialect; 2] = [Dialect::Spec, Dialect::Classic];

/// A path of exactly so many bytes.
fn path_of(len: usize) -> Vec<u8> {
    let mut path = vec![b'p'; len];
    path[0] = b'/';
    path
}

/// Asserts that `header` is malformed, and that every byte before its last one is not to blame.
fn refused_at_last_byte(header: &[u8], why: Malformed) {
    let (last, start) = header.split_last().unwrap();
    for end in 0..=start.len() {
        let parsed = parse_request(&start[..end]);
        assert_eq!(parsed, ParsedRequest::Incomplete, "{}", start[..end].escape_ascii());
    }
    let shown = header.escape_ascii();
    assert_eq!(parse_request(header), ParsedRequest::Invalid(why), "{shown} ends in {last}");
}

#[test]
fn a_request_arrives_byte_by_byte() {
    for path in [&b"/"[..], b"/a.jpg", b"/a/b/../c?d#e", b"/\xff\x01\t\x7f", &path_of(MAX_PATH_LEN)]
    {
        let request = encode_request(path).unwrap();
        for end in 0..request.len() {
            assert_eq!(parse_request(&request[..end]), ParsedRequest::Incomplete, "at {end}");
        }
        assert_eq!(parse_request(&request), ParsedRequest::Complete { path });
    }
}

#[test]
fn a_request_is_written_as_the_protocol_has_it() {
    assert_eq!(encode_request(b"/a.jpg").unwrap(), b"GETFILE GET /a.jpg\r\n\r\n");
}

#[test]
fn what_follows_a_request_is_ignored() {
    for more in [&b"\0"[..], b"body", b"GETFILE GET /b\r\n\r\n", b"\r\n\r\n"] {
        let bytes = [b"GETFILE GET /a\r\n\r\n", more].concat();
        assert_eq!(parse_request(&bytes), ParsedRequest::Complete { path: b"/a" });
    }
}

#[test]
fn one_space_before_the_blank_line_is_tolerated() {
    let request = b"GETFILE GET /a \r\n\r\n";
    for end in 0..request.len() {
        assert_eq!(parse_request(&request[..end]), ParsedRequest::Incomplete, "at {end}");
    }
    assert_eq!(parse_request(request), ParsedRequest::Complete { path: b"/a" });
    refused_at_last_byte(b"GETFILE GET /a  ", Malformed::RequestEnd);
}

#[test]
fn a_malformed_request_is_refused_at_its_first_wrong_byte() {
    // The scheme, the method, the spacing.
    refused_at_last_byte(b"P", Malformed::RequestStart); // PULLFILE
    refused_at_last_byte(b"g", Malformed::RequestStart);
    refused_at_last_byte(b" ", Malformed::RequestStart);
    refused_at_last_byte(b"\r", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE F", Malformed::RequestStart); // FETCH
    refused_at_last_byte(b"GETFILE g", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE  ", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE\t", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE\0", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE GET/", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILE GET\r", Malformed::RequestStart);
    refused_at_last_byte(b"GETFILES", Malformed::RequestStart);
    // The path.
    refused_at_last_byte(b"GETFILE GET f", Malformed::PathStart); // foo
    refused_at_last_byte(b"GETFILE GET  ", Malformed::PathStart);
    refused_at_last_byte(b"GETFILE GET \r", Malformed::PathStart);
    refused_at_last_byte(b"GETFILE GET /a\0", Malformed::PathByte);
    refused_at_last_byte(&[b"GETFILE GET ", &*path_of(4097)].concat(), Malformed::PathTooLong);
    // A fourth token, and line ends that are not CR LF CR LF.
    refused_at_last_byte(b"GETFILE GET /a b", Malformed::RequestEnd);
    refused_at_last_byte(b"GETFILE GET /a\n", Malformed::RequestEnd); // LF LF
    refused_at_last_byte(b"GETFILE GET /a \n", Malformed::RequestEnd);
    refused_at_last_byte(b"GETFILE GET /a\r\r", Malformed::RequestEnd);
    refused_at_last_byte(b"GETFILE GET /a\rb", Malformed::RequestEnd);
    refused_at_last_byte(b"GETFILE GET /a\r\n\n", Malformed::RequestEnd);
    refused_at_last_byte(b"GETFILE GET /a\r\nH", Malformed::RequestEnd); // Host: …
    refused_at_last_byte(b"GETFILE GET /a\r\n\r\r", Malformed::RequestEnd);
}

#[test]
fn malformed_stays_malformed_however_much_follows() {
    let wholes = [
        &b"PULLFILE GET /a\r\n\r\n"[..],
        b"GETFILE FETCH /a\r\n\r\n",
        b"GETFILE GET foo\r\n\r\n",
        b"GETFILE GET /a b\r\n\r\n",
        b"GETFILE GET /a\n\n",
        b"GETFILE GET /a\0\r\n\r\n",
        b"\r\n\r\n",
    ];
    for whole in wholes {
        let mut refused = false;
        for end in 0..=whole.len() {
            let now = matches!(parse_request(&whole[..end]), ParsedRequest::Invalid(_));
            assert!(now || !refused, "{} recovers at {end}", whole.escape_ascii());
            refused = now;
        }
        assert!(refused, "{}", whole.escape_ascii());
    }
}

#[test]
fn a_request_cut_short_stays_incomplete() {
    // The server then takes the end of the stream for a malformed request.
    assert_eq!(parse_request(b""), ParsedRequest::Incomplete);
    assert_eq!(parse_request(b"GETFILE GET /a\r\n\r"), ParsedRequest::Incomplete);
}

#[test]
fn paths_are_checked_before_they_are_sent() {
    assert_eq!(check_path(&path_of(4096)), Ok(()));
    assert_eq!(check_path(&path_of(4097)), Err(Malformed::PathTooLong));
    assert_eq!(check_path(b""), Err(Malformed::PathStart));
    assert_eq!(check_path(b"foo"), Err(Malformed::PathStart));
    for byte in *b"\0 \r\n" {
        let path = [b'/', byte];
        assert_eq!(check_path(&path), Err(Malformed::PathByte));
        assert_eq!(encode_request(&path), Err(Malformed::PathByte));
    }
}

#[test]
fn no_request_is_incomplete_beyond_the_limit() {
    let longest = [b"GETFILE GET ", &*path_of(MAX_PATH_LEN), b" \r\n\r\n"].concat();
    assert_eq!(longest.len(), MAX_REQUEST_LEN);
    assert!(matches!(parse_request(&longest), ParsedRequest::Complete { .. }));
    // Whatever byte comes next, over and over: at the limit at the latest it is decided.
    for byte in 0..=u8::MAX {
        for start in [&b""[..], b"GETFILE GET ", b"GETFILE GET /", b"GETFILE GET /a "] {
            let mut bytes = start.to_vec();
            bytes.resize(MAX_REQUEST_LEN, byte);
            assert!(matches!(parse_request(&bytes), ParsedRequest::Invalid(_)), "{byte}");
        }
    }
}

#[test]
fn replies_are_written_as_the_protocol_has_them() {
    let written = |reply, dialect| String::from_utf8(encode_reply(reply, dialect)).unwrap();
    let ok = Reply::Ok { len: 1234 };
    assert_eq!(written(ok, Dialect::Spec), "GETFILE OK 1234\r\n\r\n");
    assert_eq!(written(Reply::FileNotFound, Dialect::Spec), "GETFILE FILE_NOT_FOUND\r\n\r\n");
    assert_eq!(written(Reply::Error, Dialect::Spec), "GETFILE ERROR\r\n\r\n");
    assert_eq!(written(Reply::Invalid, Dialect::Spec), "GETFILE INVALID\r\n\r\n");
    assert_eq!(written(ok, Dialect::Classic), "GETFILE OK 1234 ");
    assert_eq!(written(Reply::FileNotFound, Dialect::Classic), "GETFILE FILE_NOT_FOUND 0\n");
    assert_eq!(written(Reply::Error, Dialect::Classic), "GETFILE ERROR 0\n");
    // The classic dialect has no word for it.
    assert_eq!(written(Reply::Invalid, Dialect::Classic), "GETFILE ERROR 0\n");
}

#[test]
fn a_reply_arrives_byte_by_byte() {
    let lens = [0, 1, 9, 10, 4096, u64::from(u32::MAX), u64::MAX - 1, u64::MAX];
    let replies = lens.map(|len| Reply::Ok { len }).into_iter();
    let replies = replies.chain([Reply::FileNotFound, Reply::Error, Reply::Invalid]);
    for (reply, dialect) in replies.flat_map(|reply| DIALECTS.map(|dialect| (reply, dialect))) {
        let header = encode_reply(reply, dialect);
        assert!(header.len() <= MAX_REPLY_HEADER_LEN);
        for end in 0..header.len() {
            let parsed = parse_reply(&header[..end], dialect);
            assert_eq!(parsed, ParsedReply::Incomplete, "{reply:?} at {end}");
        }
        let reply = match (reply, dialect) {
            (Reply::Invalid, Dialect::Classic) => Reply::Error,
            (reply, _) => reply,
        };
        let complete = ParsedReply::Complete { reply, consumed: header.len() };
        // Bodies of every kind, also such as look like more of the header.
        for body in [&b""[..], b"x", b" ", b"\r\n\r\n", b"\n", b"123", b"GETFILE ERROR\r\n\r\n"] {
            assert_eq!(parse_reply(&[&*header, body].concat(), dialect), complete);
        }
    }
}

#[test]
fn replies_are_also_taken_as_other_servers_write_them() {
    let len = 18_446_744_073_709_551_615; // as many digits as there can be
    let tolerated: [(&[u8], Reply); 10] = [
        (b"GETFILE FILE_NOT_FOUND 0\r\n\r\n", Reply::FileNotFound),
        (b"GETFILE FILE_NOT_FOUND \r\n\r\n", Reply::FileNotFound),
        (b"GETFILE FILE_NOT_FOUND 0 \r\n\r\n", Reply::FileNotFound),
        (b"GETFILE ERROR 0\r\n\r\n", Reply::Error),
        (b"GETFILE ERROR \r\n\r\n", Reply::Error),
        (b"GETFILE INVALID 0\r\n\r\n", Reply::Invalid),
        (b"GETFILE INVALID \r\n\r\n", Reply::Invalid),
        (b"GETFILE OK 12 \r\n\r\n", Reply::Ok { len: 12 }),
        (b"GETFILE OK 0 \r\n\r\n", Reply::Ok { len: 0 }),
        (b"GETFILE OK 18446744073709551615 \r\n\r\n", Reply::Ok { len }),
    ];
    for (header, reply) in tolerated {
        let shown = header.escape_ascii();
        assert!(header.len() <= MAX_REPLY_HEADER_LEN, "{shown}");
        for end in 0..header.len() {
            let parsed = parse_reply(&header[..end], Dialect::Spec);
            assert_eq!(parsed, ParsedReply::Incomplete, "{shown} at {end}");
        }
        let complete = ParsedReply::Complete { reply, consumed: header.len() };
        for body in [&b""[..], b"x", b" ", b"\r\n\r\n", b"0"] {
            assert_eq!(parse_reply(&[header, body].concat(), Dialect::Spec), complete, "{shown}");
        }
    }
}

#[test]
fn a_malformed_reply_is_refused_at_its_first_wrong_byte() {
    use MalformedReply::{End, Length, Start};
    let both: [(&[u8], MalformedReply); 20] = [
        (b"H", Start), // HTTP/1.1 200 OK
        (b"g", Start),
        (b"\n", Start),
        (b"GETFILE  ", Start),
        (b"GETFILE\r", Start),
        (b"GETFILE o", Start),
        (b"GETFILE OKA", Start),
        (b"GETFILE OK\r", Start),
        (b"GETFILE FILE-", Start),
        (b"GETFILE ERRORS", Start),
        (b"GETFILE G", Start),
        (b"GETFILE OK  ", Length),
        (b"GETFILE OK \r", Length),
        (b"GETFILE OK -", Length),
        (b"GETFILE OK +", Length),
        (b"GETFILE OK x", Length),
        (b"GETFILE OK 18446744073709551616", Length), // 2^64
        (b"GETFILE OK 99999999999999999999", Length),
        (b"GETFILE OK 000000000000000000000", Length), // the 21st digit
        (b"GETFILE OK 12.", End),
    ];
    let spec: [(&[u8], MalformedReply); 14] = [
        (b"GETFILE OK 12 x", End), // classic
        (b"GETFILE OK 12  ", End), // one space at most
        (b"GETFILE OK 12\n", End),
        (b"GETFILE OK 12\r\n\n", End),
        (b"GETFILE OK 0x", End),
        (b"GETFILE FILE_NOT_FOUND 0\n", End), // classic
        (b"GETFILE ERROR 0\n", End),
        (b"GETFILE FILE_NOT_FOUND 1", End), // there is no body
        (b"GETFILE FILE_NOT_FOUND 00", End),
        (b"GETFILE ERROR  ", End),
        (b"GETFILE INVALID 0  ", End),
        (b"GETFILE INVALID\n", Start),
        (b"GETFILE ERROR0", Start),
        (b"GETFILE FILE_NOT_FOUND\r\r", End),
    ];
    let classic: [(&[u8], MalformedReply); 6] = [
        (b"GETFILE OK 12\r", End), // spec
        (b"GETFILE OK 12\n", End),
        (b"GETFILE FILE_NOT_FOUND\r", Start), // spec
        (b"GETFILE ERROR\r", Start),
        (b"GETFILE ERROR 0 ", Start),
        (b"GETFILE I", Start), // INVALID
    ];
    let cases = both.iter().flat_map(|case| DIALECTS.map(|dialect| (dialect, case)));
    let cases = cases.chain(spec.iter().map(|case| (Dialect::Spec, case)));
    let cases = cases.chain(classic.iter().map(|case| (Dialect::Classic, case)));
    for (dialect, (header, why)) in cases {
        let shown = header.escape_ascii();
        let start = &header[..header.len() - 1];
        assert_eq!(parse_reply(start, dialect), ParsedReply::Incomplete, "{dialect}: {shown}");
        assert_eq!(parse_reply(header, dialect), ParsedReply::Invalid(*why), "{dialect}: {shown}");
        let more = [*header, b"\r\n\r\n"].concat();
        assert_eq!(parse_reply(&more, dialect), ParsedReply::Invalid(*why), "{dialect}: {shown}");
    }
}

#[test]
fn no_reply_is_incomplete_beyond_the_limit() {
    let starts = [&b""[..], b"GETFILE ", b"GETFILE OK ", b"GETFILE OK 0", b"GETFILE ERROR"];
    for (dialect, start) in DIALECTS.into_iter().flat_map(|d| starts.map(|start| (d, start))) {
        for byte in 0..=u8::MAX {
            let mut bytes = start.to_vec();
            bytes.resize(MAX_REPLY_HEADER_LEN, byte);
            let parsed = parse_reply(&bytes, dialect);
            assert_ne!(parsed, ParsedReply::Incomplete, "{dialect}: {byte} after {start:?}");
        }
    }
}

#[test]
fn dialects_have_names() {
    for dialect in DIALECTS {
        assert_eq!(Dialect::from_str(&dialect.to_string(), false), Ok(dialect));
    }
    for name in ["", "Spec", "CLASSIC", "spec ", "http"] {
        assert!(Dialect::from_str(name, false).is_err(), "{name}");
    }
}

#[test]
fn what_is_wrong_is_said_in_words() {
    assert_eq!(Malformed::PathStart.to_string(), "the path must start with \"/\"");
    assert!(Malformed::PathTooLong.to_string().contains(&MAX_PATH_LEN.to_string()));
}
