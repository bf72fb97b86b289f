//! The documents keep to the code: every test that `docs/failure-modes.md` names exists.

use std::fs;
use std::path::Path;

/// Where tests are, in the repository.
const TESTS: [&str; 3] = ["tests", "examples/tests", "tools/tests"];

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(root.join("docs/failure-modes.md")).unwrap();
    let named: Vec<_> = text.split('`').filter_map(|quoted| quoted.split_once(".rs::")).collect();
    assert!(named.len() > 30, "only {} tests are named", named.len());
    for (file, test) in named {
        let dirs = if file.starts_with("src/") { &[""][..] } else { &TESTS };
        let exists = dirs.iter().any(|dir| {
            let path = root.join(dir).join(format!("{file}.rs"));
            let source = fs::read_to_string(path).unwrap_or_default();
            ["(", "<"].iter().any(|after| source.contains(&format!("fn {test}{after}")))
        });
        assert!(exists, "{file}.rs has no test {test}");
    }
}
