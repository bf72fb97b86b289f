//! A cache that is restarted in order, under load: no request is lost that a successor can serve.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;

use shmferry_test_support::{
    Answer, LARGE, Place, Signal, Transport, noise, ok, over_both, wait_until,
};

over_both! {
    an_orderly_restart_under_load_fails_no_request,
    a_cache_that_winds_down_makes_room_for_its_successor_at_once,
    a_successor_that_starts_only_when_the_old_cache_has_ended_is_waited_for,
    a_cache_that_comes_late_is_waited_for_as_long_as_the_timeout,
}

/// Small requests all the while, and at each restart a large transfer under way, which ends whole.
fn an_orderly_restart_under_load_fails_no_request(over: Transport) {
    const RESTARTS: usize = 10;
    const REQUESTS: usize = 10_000;
    let place = Place::over(over);
    let large = noise(1, LARGE);
    let small = noise(2, 1000);
    place.write("files/large", &large);
    place.write("files/small", &small);
    let mut cache = Some(place.simplecached(["--loan-budget", "0", "-c", "files"]).listening());
    let proxy = place.webproxy(["-n", "16", "--timeout", "60"]).listening();
    let (asked, restarted) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    // On and on until all is restarted, and enough in all.
                    while !restarted.load(Relaxed) || asked.load(Relaxed) < REQUESTS {
                        proxy.get("/small").assert_whole(&small);
                        asked.fetch_add(1, Relaxed);
                    }
                })
            })
            .collect();
        for n in 0..RESTARTS {
            wait_until("some were asked", || {
                asked.load(Relaxed) >= n * REQUESTS / RESTARTS
                    || clients.iter().any(|client| client.is_finished())
            });
            let under_way = proxy.stall("/large");
            let leaving = cache.take().unwrap();
            leaving.signal(Signal::TERM);
            wait_until("it had left its address", || place.is_swept());
            // The successor comes at once, or when the old one has ended, as supervisors have it.
            if n % 2 == 0 {
                cache = Some(place.simplecached(["--loan-budget", "0", "-c", "files"]).listening());
            }
            assert!(leaving.is_running(), "it waits for its transfer");
            under_way.resume().assert_whole(&large);
            leaving.finish().assert_code(0);
            if n % 2 == 1 {
                cache = Some(place.simplecached(["--loan-budget", "0", "-c", "files"]).listening());
            }
        }
        restarted.store(true, Relaxed);
    });
    let [proxy, _] = place.wind_up([proxy, cache.unwrap()]);
    assert_eq!(proxy.count("errors"), 0, "{}", proxy.stderr);
    assert!(proxy.count("requests") as usize >= REQUESTS + RESTARTS);
}

/// The successor serves while the old one still sends.
fn a_cache_that_winds_down_makes_room_for_its_successor_at_once(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("old/large", &large);
    place.write("old/which", "old");
    place.write("new/which", "new");
    let old = place.simplecached(["--loan-budget", "0", "-c", "old"]).listening();
    let proxy = place.webproxy(["-n", "4", "--timeout", "60"]).listening();
    let under_way = proxy.stall("/large");
    assert_eq!(proxy.get("/which"), ok("old"));
    old.signal(Signal::TERM);
    wait_until("it had left its address", || place.is_swept());
    let new = place.simplecached(["--loan-budget", "0", "-c", "new"]).listening();
    assert_eq!(proxy.get("/which"), ok("new"));
    assert!(old.is_running(), "it waits for its transfer");
    assert_eq!(proxy.get("/which"), ok("new"));
    under_way.resume().assert_whole(&large);
    old.finish().assert_code(0);
    assert_eq!(proxy.get("/which"), ok("new"));
    place.wind_up([proxy, new]);
}

/// As supervisors restart programs, while the old one takes longer to end than a lost cache is
/// waited for: as long as it lives, its successor cannot be expected.
fn a_successor_that_starts_only_when_the_old_cache_has_ended_is_waited_for(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/a", "hello");
    let old = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "4", "--timeout", "120"]).listening();
    let under_way = proxy.stall("/large");
    old.signal(Signal::TERM);
    wait_until("it had left its address", || place.is_swept());
    let mut client = proxy.connect();
    client.request("/a");
    // Of the time that does not count there is nothing to see but the time.
    thread::sleep(std::time::Duration::from_millis(2500));
    assert!(client.hears_nothing() && old.is_running());
    under_way.resume().assert_whole(&large);
    old.finish().assert_code(0);
    let new = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    assert_eq!(client.answer(), ok("hello"));
    place.wind_up([proxy, new]);
}

/// Before a cache was ever there, a request waits for it; after a loss, for two seconds.
fn a_cache_that_comes_late_is_waited_for_as_long_as_the_timeout(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    let proxy = place.webproxy(["-n", "2", "--timeout", "120"]).listening();
    let mut client = proxy.connect();
    client.request("/a");
    // Longer than a lost cache is waited for: of that there is nothing to see but the time.
    thread::sleep(std::time::Duration::from_millis(2500));
    assert!(client.hears_nothing());
    let cache = place.simplecached(["-c", "files"]).listening();
    assert_eq!(client.answer(), ok("hello"));
    cache.kill();
    assert_eq!(proxy.get("/a"), Answer::Error);
    let cache = place.simplecached(["-c", "files"]).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    place.wind_up([proxy, cache]);
}
