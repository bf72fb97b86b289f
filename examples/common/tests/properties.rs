//! Properties over inputs at random: what the cache makes of manifests and keys.
//!
//! `PROPTEST_CASES` in the environment says how many cases each property tries.

use std::env;
use std::fs;
use std::io::Read;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use shmferry_examples::getfile::check_path;
use shmferry_examples::store::Store;

fn config(cases: u32) -> ProptestConfig {
    let asked = env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Bytes that come close to a manifest, or to a key.
fn nearly(words: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        6 => proptest::sample::select(words).prop_map(|word| word.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..4),
        1 => any::<u64>().prop_map(|n| n.to_string().into_bytes()),
    ];
    let joined = vec(part, 0..8).prop_map(|parts| parts.concat());
    prop_oneof![4 => joined, 1 => vec(any::<u8>(), 0..5000)]
}

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
                    let mut file = store.look_up(key.as_bytes()).unwrap().unwrap();
                    let mut bytes = String::new();
                    file.read_to_string(&mut bytes).unwrap();
                    assert_eq!(bytes, if *first { "first" } else { "second" });
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
        if let Ok(Some(mut file)) = store.look_up(&key) {
            let mut bytes = String::new();
            file.read_to_string(&mut bytes).unwrap();
            assert!(bytes == "first" || bytes == "second", "{} is {bytes}", key.escape_ascii());
        }
    }
}
