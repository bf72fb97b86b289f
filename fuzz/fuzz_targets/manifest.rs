//! Any bytes as a manifest, and its keys looked up; any bytes as a key beneath a directory.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use shmferry::Size;
use shmferry_examples::getfile;
use shmferry_examples::store::Store;

/// A directory with two files to name. It is not removed: `TMPDIR` says where it is.
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let place = std::env::temp_dir().join(format!("fuzz-manifest-{}", std::process::id()));
    fs::create_dir_all(place.join("d")).expect("a directory");
    fs::write(place.join("a"), "first").expect("a file");
    fs::write(place.join("d/b"), "second").expect("a file");
    place
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let manifest = PLACE.join("manifest");
    fs::write(&manifest, bytes).expect("a manifest");
    match Store::open(&manifest) {
        Ok(store) => {
            let Store::Manifest(files) = &store else { panic!("a file is no directory") };
            assert!(!files.is_empty());
            for key in files.keys() {
                assert_eq!(getfile::check_path(key), Ok(()));
                assert!(!key.contains(&b'\t'));
                assert!(store.look_up(key).expect("it could be opened before").is_some());
            }
        }
        Err(error) => assert!(error.contains("manifest:"), "{error}"),
    }
    let beneath = Store::open(&PLACE.join("d")).expect("a directory");
    if let Ok(Some(file)) = beneath.look_up(bytes) {
        let len = Size::of_file(&file).expect("it was opened");
        assert_eq!(len, Size::Known(6), "{} leads out", bytes.escape_ascii());
    }
});
