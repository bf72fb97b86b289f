//! Names of queues: which are accepted.

use super::*;

#[test]
fn only_what_the_kernel_takes_is_a_name() {
    for name in ["/a", "/cache.1", "/..."] {
        assert!(Name::parse(name.to_owned()).is_ok(), "{name}");
    }
    let long = format!("/{}", "x".repeat(LIMIT + 1));
    for name in ["", "/", "a", "/.", "/..", "/a/b", "//", "/a\0", &long] {
        assert_eq!(Name::parse(name.to_owned()).err(), Some(Misuse::QueueName(name.to_owned())));
    }
}
