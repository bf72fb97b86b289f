//! Properties over inputs at random: the parsers of the programs.
//!
//! `PROPTEST_CASES` in the environment says how many cases each property tries.

use std::env;
use std::fs;
use std::io::Read;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use shmferry::Size;
use shmferry_examples::getfile::{
    self, Dialect, MAX_PATH_LEN, MAX_REPLY_HEADER_LEN, MAX_REQUEST_LEN, ParsedReply, ParsedRequest,
    check_path, encode_reply, encode_request, parse_reply, parse_request,
};
use shmferry_examples::store::Store;

fn config(cases: u32) -> ProptestConfig {
    let asked = env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

// ---------------------------------------------------------------- GETFILE

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

// ---------------------------------------------------------------- manifests

/// A directory with two files beside the manifest.
fn beside(manifest: &[u8], then: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("a"), "first").unwrap();
    fs::write(dir.path().join("sub/b"), "second").unwrap();
    let path = dir.path().join("manifest");
    fs::write(&path, manifest).unwrap();
    then(&path);
}

const MANIFEST_WORDS: &[&str] = &[
    "/k",
    "/l",
    " ",
    "\t",
    "a",
    "sub/b",
    "./a",
    "../a",
    "sub",
    "\n",
    "\n",
    "\r\n",
    "absent",
    "\0",
    "/k a\n",
    "/l sub/b\n",
    "k a\n",
    "#",
    "# /k absent\n",
    "\u{feff}",
];

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn any_bytes_are_a_manifest_or_an_error_with_its_line(text in nearly(MANIFEST_WORDS)) {
        beside(&text, |path| match Store::open(path) {
            Ok(Store::Manifest(files)) => {
                // Each key is the first word of a line, and fits a request; its file can be opened.
                assert!(!files.is_empty());
                let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&text);
                for key in files.keys() {
                    assert_eq!(check_path(key), Ok(()));
                    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
                    let mut keys = lines.filter_map(|line| line.split(|byte| b" \t".contains(byte)).next());
                    assert!(keys.any(|found| found == key));
                    assert!(!key.iter().any(|byte| b" \t\n".contains(byte)));
                }
                let store = Store::Manifest(files);
                assert!(matches!(store.look_up(b"in no manifest"), Ok(None)));
                let Store::Manifest(files) = &store else { unreachable!() };
                for key in files.keys() {
                    assert!(store.look_up(key).unwrap().is_some());
                }
            }
            Ok(Store::Directory(_)) => panic!("a file is no directory"),
            Err(error) => assert!(error.contains("manifest:"), "{error}"),
        });
    }

    #[test]
    fn a_manifest_reads_as_it_was_written(
        lines in vec(("/[!-~]{0,19}", any::<bool>(), 0usize..3), 1..20),
    ) {
        let blanks = [" ", "\t", "  \t "];
        let text: String = lines
            .iter()
            .map(|(key, first, blank)| format!("{key}{}{}\n", blanks[*blank], if *first { "a" } else { "sub/b" }))
            .collect();
        let mut keys: Vec<_> = lines.iter().map(|(key, ..)| key).collect();
        keys.sort();
        let repeated = keys.windows(2).any(|pair| pair[0] == pair[1]);
        beside(text.as_bytes(), |path| match Store::open(path) {
            Err(error) => assert!(repeated && error.contains("taken already"), "{error}"),
            Ok(store) => {
                assert!(!repeated);
                for (key, first, _) in &lines {
                    let (mut file, len) = store.look_up(key.as_bytes()).unwrap().unwrap();
                    let mut bytes = String::new();
                    file.read_to_string(&mut bytes).unwrap();
                    assert_eq!(bytes, if *first { "first" } else { "second" });
                    assert_eq!(len, Size::Known(bytes.len() as u64));
                }
            }
        });
    }

    #[test]
    fn any_key_stays_beneath_a_directory(key in nearly(&["/", "..", ".", "a", "sub", "b", "manifest", "\0", "../", "secret"])) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("a"), "first").unwrap();
        fs::write(root.join("sub/b"), "second").unwrap();
        let store = Store::open(&root).unwrap();
        if let Ok(Some((mut file, _))) = store.look_up(&key) {
            let mut bytes = String::new();
            file.read_to_string(&mut bytes).unwrap();
            assert!(bytes == "first" || bytes == "second", "{} is {bytes}", key.escape_ascii());
        }
    }
}
