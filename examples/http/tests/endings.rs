//! The cache's end and return, and the web server's own end, with answers under way.

mod site;

use std::io::{Read, Write};
use std::net::TcpStream;

use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{LARGE, Signal, noise, wait_until};
use site::{Answer, Site, has, start_curl};

#[test]
fn without_its_cache_it_says_so_and_with_the_next_one_it_goes_on() {
    let _watchdog = watchdog();
    let large = noise(1, 2 * LARGE);
    let mut site = Site::new(&[("a", b"hello"), ("large", &large)]);
    site.get("/a").assert(200, b"hello");
    // An answer under way breaks off, and is visibly short.
    let mut under_way = TcpStream::connect(site.address).unwrap();
    under_way.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    under_way.read_exact(&mut [0; 12]).unwrap();
    site.take_cache().kill();
    let mut rest = Vec::new();
    let _ = under_way.read_to_end(&mut rest); // a reset, perhaps
    assert!(rest.len() < large.len(), "a killed cache sent everything");

    site.get("/a").assert_status(502);
    site.get("/").assert_status(502);
    site.get("/healthz").assert_status(503);
    site.get("/metrics").assert_status(200);
    site.ask("POST /a HTTP/1.0\r\n\r\n").assert_status(405);
    site.restart_cache();
    site.get("/a").assert(200, b"hello");
    site.get("/large").assert(200, &large);
    site.get("/healthz").assert_status(200);

    // In order: its successor is waited for.
    site.take_cache().terminate();
    site.get("/a").assert_status(502);
    site.restart_cache();
    site.get("/a").assert(200, b"hello");
    site.end();
}

#[test]
fn it_may_be_started_first_and_tags_outlive_a_restart() {
    let _watchdog = watchdog();
    let place = shmferry_test_support::Place::new();
    place.write("files/a", b"hello");
    let web = site::run_web(&place, "127.0.0.1:0", &[]).listening();
    let address = web.address();
    let mut site = Site { place, cache: None, web, address };
    site.restart_cache();
    site.get("/a").assert(200, b"hello");
    let tag = site.tag("/a");
    site.take_cache().terminate();
    site.restart_cache();
    assert_eq!(site.get("/a").header("etag"), Some(tag));
    site.end();
}

#[test]
fn at_its_end_answers_under_way_complete_and_no_connection_is_taken() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let large = noise(2, 24 << 20);
    let site = Site::new(&[("large", &large)]);
    let (address, url) = (site.address, site.url("/large"));
    let slow: Vec<_> = (0..3).map(|_| start_curl(&url, &["--limit-rate", "8M"])).collect();
    // And one that keeps its connection, with nothing under way.
    let mut idle = TcpStream::connect(address).unwrap();
    idle.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n\r\n").unwrap();
    idle.read_exact(&mut [0; 12]).unwrap();
    wait_until("all had begun", || site.metric("shmferry_http_hits_total") == 4);
    let Site { place, cache, web, .. } = site;
    web.signal(Signal::TERM);
    wait_until("no connection was taken", || TcpStream::connect(address).is_err());
    assert!(web.is_running());
    idle.read_to_end(&mut Vec::new()).unwrap(); // it was closed
    for curl in slow {
        let output = curl.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Answer::parse(&output.stdout).assert(200, &large);
    }
    let exit = web.finish();
    exit.assert_code(0);
    assert!(!exit.stderr.contains("under way"), "{}", exit.stderr);
    assert_eq!(exit.count("bytes"), 3 * (24 << 20) + 10);
    place.wind_up([cache.unwrap()]);
}

#[test]
fn an_answer_that_takes_longer_ends_short_with_the_time_out_or_the_second_signal() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    for (timeout, signals) in [("3", 1), ("3600", 2)] {
        let site = Site::with(&["--timeout", timeout], &[]);
        site.add_hole("large", 256 << 20);
        // It takes a dozen seconds for all of it, and never stops for as long as the time-out.
        let slow = start_curl(&site.url("/large"), &["--limit-rate", "20M"]);
        wait_until("it had begun", || site.metric("shmferry_http_bytes_total") > 0);
        let Site { place, cache, web, address } = site;
        for _ in 0..signals {
            web.signal(Signal::TERM);
            wait_until("no connection was taken", || TcpStream::connect(address).is_err());
        }
        let exit = web.finish();
        exit.assert_code(0);
        exit.assert_said(&["leaving with transfers under way"]);
        let output = slow.wait_with_output().unwrap();
        assert!(!output.status.success(), "curl took it for whole");
        assert!(output.stdout.len() < 256 << 20);
        place.wind_up([cache.unwrap()]);
    }
}

#[test]
fn a_cache_that_does_not_answer_in_time_is_told_from_one_that_is_gone() {
    let _watchdog = watchdog();
    let place = shmferry_test_support::Place::new();
    place.write("files/a", b"hello");
    let cache = place.simplecached(["-c", "files", "-d", "2500000"]).listening();
    let web = site::run_web(&place, "127.0.0.1:0", &["--timeout", "0.5"]).listening();
    let address = web.address();
    let site = Site { place, cache: Some(cache), web, address };
    site.get("/a").assert_status(504);
    site.get("/healthz").assert_status(503);
    site.end();
}

#[test]
fn what_cannot_work_is_said_at_the_start() {
    let _watchdog = watchdog();
    let place = shmferry_test_support::Place::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    site::run_web(&place, &taken, &[]).finish().assert_failure(&["cannot listen on", &taken]);
    site::run_web(&place, "127.0.0.1", &[]).finish().assert_usage_error(&["--listen"]);
    let none = site::run_web(&place, "127.0.0.1:0", &["--segments", "0"]).finish();
    none.assert_failure(&["segments", "must be from 1"]);
    place.assert_nothing_left();
}
