//! How `getfile` reaches a `webproxy`.
//!
//! The name of another test of the programs, so that `cargo test --test listening` builds `webproxy`,
//! too.

use shmferry_test_support::Place;

/// `localhost` may stand for `::1` first, where nothing listens by default.
#[test]
fn getfile_finds_a_webproxy_at_localhost() {
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.run("webproxy", ["-p", "0", "--root", "root"]).listening();
    let port = proxy.address().port().to_string();
    let args = ["-s", "localhost", "-p", &port, "-o", "fetched", "/a"];
    place.run("getfile", args).finish().assert_code(0);
    assert_eq!(std::fs::read(place.path("fetched")).unwrap(), b"hello");
}
