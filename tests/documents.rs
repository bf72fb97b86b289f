//! The documents keep to the code: every test that `docs/failure-modes.md` names exists.

use std::fs;
use std::path::Path;

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/failure-modes.md")).unwrap();
    let named: Vec<_> = text.split('`').filter_map(|quoted| quoted.split_once(".rs::")).collect();
    assert!(named.len() > 30, "only {} tests are named", named.len());
    for (file, test) in named {
        let dir = if file.starts_with("src/") { root.to_owned() } else { root.join("tests") };
        let source = fs::read_to_string(dir.join(format!("{file}.rs"))).unwrap_or_default();
        let exists = ["(", "<"].iter().any(|after| source.contains(&format!("fn {test}{after}")));
        assert!(exists, "{file}.rs has no test {test}");
    }
}
