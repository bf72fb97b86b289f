//! The documents keep to the code: README shows the examples as they are, and every test that
//! `docs/failure-modes.md` names exists.

use std::fs;
use std::path::Path;

/// Where tests are, in the repository.
const TESTS: [&str; 5] =
    ["tests", "tests/tasks/tests", "examples/common/tests", "examples/http/tests", "tools/tests"];

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

#[test]
fn readme_shows_the_examples_as_they_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let readme = read("README.md");
    for example in ["examples/serve.rs", "examples/fetch.rs"] {
        let code = read(example);
        assert!(readme.contains(&format!("```rust,no_run\n{code}```")), "{example} differs");
        assert!(code.lines().count() <= 20, "{example} is long for a first look");
    }
}

#[test]
fn every_variant_of_error_is_explained() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let (source, answers) = (read("src/error.rs"), read("docs/errors.md"));
    let body = source.split_once("pub enum Error {").unwrap().1.split_once("\n}").unwrap().0;
    let variants = body.lines().filter_map(|line| {
        let name = line.strip_prefix("    ")?;
        name.starts_with(char::is_uppercase).then(|| name.split(['(', ' ', ',']).next().unwrap())
    });
    let variants: Vec<_> = variants.collect();
    assert!(variants.len() > 15, "{variants:?}");
    for variant in variants {
        assert!(
            answers.contains(&format!("`{variant}`")),
            "docs/errors.md says nothing of {variant}"
        );
    }
}
