//! The real programs, killed, stopped, restarted, and deprived of their files, mostly in the middle
//! of a transfer.
//!
//! `--timeout 600` is ten times the watchdog: whoever waited for it would not live to see it.
#![cfg(not(feature = "raw-sync"))]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;

use shmferry_test_support::{
    Answer, Client, Dice, LARGE, PLAIN, Place, Program, Signal, Stalled, Transport, noise, ok,
    over_both, wait_until,
};

over_both! {
    a_cache_killed_before_its_reply_costs_an_error_at_once,
    a_cache_killed_before_its_reply_is_stood_in_for_by_the_origin,
    a_cache_killed_between_chunks_leaves_a_visibly_short_body,
    a_cache_killed_while_idle_is_missed_and_its_successor_found,
    a_killed_proxy_gives_the_caches_only_worker_back,
    a_proxy_killed_before_its_reply_holds_up_nobody,
    a_stopped_cache_writes_to_nobody_when_it_goes_on_with_one_segment,
    a_stopped_cache_writes_to_nobody_when_it_goes_on_with_four_segments,
    a_stopped_proxy_that_holds_transfers_keeps_nobody_from_being_served,
    a_proxy_stopped_past_the_caches_timeout_ends_its_bodies_short_and_goes_on,
    a_cache_stopped_past_timeouts_under_load_gives_whole_files_or_honest_failures,
    programs_stopped_for_moments_under_load_lose_nothing,
    proxies_killed_under_load_cost_the_others_nothing,
    a_file_truncated_while_it_is_sent_ends_the_body_short,
    a_file_that_grows_while_it_is_sent_is_sent_as_announced,
    a_file_replaced_while_it_is_sent_is_sent_to_its_end_and_the_new_one_next,
    a_cache_restarted_under_load_gives_whole_files_or_honest_failures,
    both_killed_at_once_leave_nothing_that_keeps_them_from_starting,
}

/// An HTTP server that has every file.
fn origin() -> String {
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.server_addr());
    thread::spawn(move || {
        for request in server.incoming_requests() {
            let _ = request.respond(tiny_http::Response::from_string("the origin's copy"));
        }
    });
    url
}

/// Waits until a cache is at so many requests. While it is idle, one of its threads waits for
/// requests; as soon as that takes one, another.
fn wait_until_taken(cache: &Program, requests: usize) {
    wait_until("the requests were taken", || cache.threads_named("shmferry-worker") > requests);
}

// ---------------------------------------------------------------- the cache is killed

fn a_cache_killed_before_its_reply_costs_an_error_at_once(over: Transport) {
    for segments in [1, 4] {
        let place = Place::over(over);
        let large = noise(1, LARGE);
        place.write("files/large", &large);
        let cache =
            place.simplecached(["--loan-budget", "0", "-c", "files", "-d", "2500000"]).listening();
        let proxy = place.webproxy(["-n", &segments.to_string(), "--timeout", "600"]).listening();
        let mut pending: Vec<Client> = (0..segments).map(|_| proxy.connect()).collect();
        pending.iter_mut().for_each(|client| client.request("/large"));
        wait_until_taken(&cache, segments);
        cache.kill();
        for mut client in pending {
            assert_eq!(client.answer(), Answer::Error);
        }
        let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
        proxy.assert_pool_is_whole(segments, "/large", &large);
        let [proxy, _] = place.wind_up([proxy, cache]);
        // It was dead for certain: its segments are used again as they are.
        assert_eq!((proxy.count("errors"), proxy.count("retired")), (segments as u64, 0));
    }
}

fn a_cache_killed_before_its_reply_is_stood_in_for_by_the_origin(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "the cache's copy");
    let cache = place.simplecached(["-c", "files", "-d", "2500000"]).listening();
    let proxy = place.webproxy(["-n", "1", "--timeout", "600", "-s", &origin()]).listening();
    let mut pending = proxy.connect();
    pending.request("/a");
    wait_until_taken(&cache, 1);
    cache.kill();
    assert_eq!(pending.answer(), ok("the origin's copy"));
    assert_eq!(proxy.get("/a"), ok("the origin's copy"));
    let cache = place.simplecached(["-c", "files"]).listening();
    assert_eq!(proxy.get("/a"), ok("the cache's copy"));
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!(
        (proxy.count("from_origin"), proxy.count("hits"), proxy.count("retired")),
        (2, 1, 0)
    );
}

fn a_cache_killed_between_chunks_leaves_a_visibly_short_body(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let url = origin();
    // Nothing can be made up for once the header is out, not even by an origin.
    for stand_in in [&PLAIN[..], &["-s", &url]] {
        for segments in [1, 4] {
            let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
            let n = segments.to_string();
            let args = [&["-n", &n, "--timeout", "600"], stand_in].concat();
            let proxy = place.webproxy(args).listening();
            let stalled: Vec<Stalled> = (0..segments).map(|_| proxy.stall("/large")).collect();
            cache.kill();
            for client in stalled {
                client.resume().assert_short(&large);
            }
            let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
            proxy.assert_pool_is_whole(segments, "/large", &large);
            let [proxy, _] = place.wind_up([proxy, cache]);
            assert_eq!((proxy.count("errors"), proxy.count("retired")), (segments as u64, 0));
        }
    }
}

fn a_cache_killed_while_idle_is_missed_and_its_successor_found(over: Transport) {
    for stand_in in [false, true] {
        let place = Place::over(over);
        place.write("files/a", "the cache's copy");
        let url = origin();
        let args = ["-n", "1", "--timeout", "600", "-s", &url];
        let proxy = place.webproxy(&args[..if stand_in { 6 } else { 4 }]).listening();
        for _ in 0..3 {
            let cache = place.simplecached(["-c", "files"]).listening();
            assert_eq!(proxy.get("/a"), ok("the cache's copy"));
            cache.kill();
            let missed = if stand_in { ok("the origin's copy") } else { Answer::Error };
            assert_eq!(proxy.get("/a"), missed);
        }
        let cache = place.simplecached(["-c", "files"]).listening();
        assert_eq!(proxy.get("/a"), ok("the cache's copy"));
        let [proxy, _] = place.wind_up([proxy, cache]);
        assert_eq!((proxy.count("hits"), proxy.count("retired")), (4, 0));
    }
}

// ---------------------------------------------------------------- the proxy is killed

fn a_killed_proxy_gives_the_caches_only_worker_back(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache = place
        .simplecached(["--loan-budget", "0", "-c", "files", "-t", "1", "--timeout", "600"])
        .listening();
    let other = place.webproxy(["-n", "1"]).listening();
    assert_eq!(other.get("/absent"), Answer::NotFound);
    let (segments, descriptors) = (cache.segments(), cache.descriptors());
    for round in 0..5 {
        let proxy = place.webproxy(["-n", "4"]).listening();
        let stalled: Vec<Stalled> = (0..4).map(|_| proxy.stall("/large")).collect();
        proxy.kill();
        other.get("/large").assert_whole(&large);
        if round == 0 {
            for client in stalled {
                client.resume().assert_short(&large);
            }
        }
    }
    wait_until("the cache let go of the dead proxies' segments and connections", || {
        (cache.segments(), cache.descriptors()) == (segments, descriptors)
    });
    let restarted = place.webproxy(["-n", "4"]).listening();
    restarted.assert_pool_is_whole(4, "/large", &large);
    let [_, _, cache] = place.wind_up([restarted, other, cache]);
    assert_eq!(cache.count("errors"), 0);
}

fn a_proxy_killed_before_its_reply_holds_up_nobody(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    let cache = place.simplecached(["-c", "files", "-t", "1", "-d", "500000"]).listening();
    let proxy = place.webproxy(["-n", "8"]).listening();
    let mut pending: Vec<Client> = (0..8).map(|_| proxy.connect()).collect();
    pending.iter_mut().for_each(|client| client.request("/a"));
    wait_until_taken(&cache, 8);
    proxy.kill();
    let other = place.webproxy(["-n", "1"]).listening();
    assert_eq!(other.get("/a"), ok("hello"));
    for mut client in pending {
        assert_eq!(client.answer(), Answer::Nothing);
    }
    place.wind_up([other, cache]);
}

// ---------------------------------------------------------------- one side is stopped

/// The cache is stopped with every segment of the proxy in its hands, and goes on when all of them
/// have been given up and replaced. What it then still writes, nobody may see.
fn a_stopped_cache_writes_to_nobody(over: Transport, segments: usize) {
    let place = Place::over(over);
    let old = noise(1, LARGE);
    place.write("files/old", &old);
    let files: Vec<Vec<u8>> = (0..40).map(|i| noise(100 + i, 1000 + i * 20_011)).collect();
    for (i, file) in files.iter().enumerate() {
        place.write(&format!("files/{i}"), file);
    }
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "4"]).listening();
    let n = segments.to_string();
    let proxy = place.webproxy(["-n", &n, "-t", "4", "--timeout", "1"]).listening();
    let stalled: Vec<Stalled> = (0..segments).map(|_| proxy.stall("/old")).collect();
    cache.signal(Signal::STOP);
    thread::scope(|scope| {
        for client in stalled {
            scope.spawn(|| client.resume().assert_short(&old));
        }
    });
    thread::scope(|scope| {
        for i in 0..=segments {
            let proxy = &proxy;
            scope.spawn(move || assert_eq!(proxy.get(&format!("/{i}")), Answer::Error));
        }
    });
    cache.signal(Signal::CONT);
    thread::scope(|scope| {
        for client in 0..4 {
            let (proxy, files) = (&proxy, &files);
            scope.spawn(move || {
                for i in (0..files.len()).chain((0..files.len()).rev()) {
                    let i = (i + client * 10) % files.len();
                    proxy.get(&format!("/{i}")).assert_whole(&files[i]);
                }
            });
        }
    });
    proxy.get("/old").assert_whole(&old);
    assert_eq!((proxy.segments(), cache.segments()), (segments, segments));
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!(proxy.count("retired"), segments as u64);
}

fn a_stopped_cache_writes_to_nobody_when_it_goes_on_with_one_segment(over: Transport) {
    a_stopped_cache_writes_to_nobody(over, 1);
}

fn a_stopped_cache_writes_to_nobody_when_it_goes_on_with_four_segments(over: Transport) {
    a_stopped_cache_writes_to_nobody(over, 4);
}

fn a_stopped_proxy_that_holds_transfers_keeps_nobody_from_being_served(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let files: Vec<Vec<u8>> = (0..10).map(|i| noise(100 + i, i * 100_003)).collect();
    for (i, file) in files.iter().enumerate() {
        place.write(&format!("files/{i}"), file);
    }
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "2"]).listening();
    let stopped = place.webproxy(["-n", "8"]).listening();
    let stalled: Vec<Stalled> = (0..8).map(|_| stopped.stall("/large")).collect();
    stopped.signal(Signal::STOP);
    let others = [0, 1, 2].map(|_| place.webproxy(["-n", "2"]).listening());
    thread::scope(|scope| {
        for (proxy, client) in others.iter().zip(0..).chain(others.iter().zip(3..)) {
            let files = &files;
            scope.spawn(move || {
                let mut dice = Dice::new(client);
                for _ in 0..100 {
                    let i = dice.roll(files.len());
                    proxy.get(&format!("/{i}")).assert_whole(&files[i]);
                }
            });
        }
    });
    stopped.signal(Signal::CONT);
    for client in stalled {
        client.resume().assert_whole(&large);
    }
    let [first, second, third] = others;
    for exit in place.wind_up([stopped, first, second, third, cache]) {
        assert_eq!(exit.count("errors"), 0);
    }
}

fn a_proxy_stopped_past_the_caches_timeout_ends_its_bodies_short_and_goes_on(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/a", "hello");
    let mut talkative = place.command("simplecached");
    talkative.env("RUST_LOG", "debug").args(["--listen", &place.cache_address()]);
    let cache = Program::spawn(talkative.args(["-c", "files", "--timeout", "1"])).listening();
    let proxy = place.webproxy(["-n", "2", "--timeout", "600"]).listening();
    let stalled: Vec<Stalled> = (0..2).map(|_| proxy.stall("/large")).collect();
    proxy.signal(Signal::STOP);
    wait_until("the cache gave up", || {
        cache.stderr().matches("/large failed: timed out").count() == 2
    });
    proxy.signal(Signal::CONT);
    for client in stalled {
        client.resume().assert_short(&large);
    }
    assert_eq!(proxy.get("/a"), ok("hello"));
    // Reading a large file may take a busy machine longer than that cache waits.
    cache.terminate();
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    proxy.assert_pool_is_whole(2, "/large", &large);
    place.wind_up([proxy, cache]);
}

/// Small files and larger ones, named by their numbers.
fn furnish(place: &Place) -> Vec<Vec<u8>> {
    let files: Vec<Vec<u8>> = (0..30).map(|i| noise(i, i * i * 1009)).collect();
    for (i, file) in files.iter().enumerate() {
        place.write(&format!("files/{i}"), file);
    }
    files
}

/// Six clients ask a proxy for these files, at random, while `trouble` goes on. It is given the
/// number of answers so far: whole files, and honest failures. Any other answer is a panic.
fn under_load(
    proxy: &Program,
    files: &[Vec<u8>],
    trouble: impl FnOnce(&dyn Fn() -> (usize, usize)),
) {
    let (over, whole, failed) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..6 {
            let (over, whole, failed) = (&over, &whole, &failed);
            scope.spawn(move || {
                let mut dice = Dice::new(client);
                while !over.load(Relaxed) {
                    let i = dice.roll(files.len());
                    let answer = proxy.get(&format!("/{i}"));
                    assert!(answer.is_honest(&files[i]), "{answer:?}");
                    let count = if let Answer::Ok(_) = answer { whole } else { failed };
                    count.fetch_add(1, Relaxed);
                }
            });
        }
        let end = OnDrop(&over); // a panic in here must end the clients, too
        trouble(&|| (whole.load(Relaxed), failed.load(Relaxed)));
        drop(end);
    });
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn a_cache_stopped_past_timeouts_under_load_gives_whole_files_or_honest_failures(over: Transport) {
    let place = Place::over(over);
    let files = furnish(&place);
    let cache = place.simplecached(["-c", "files", "-t", "2"]).listening();
    let proxy =
        place.webproxy(["-n", "4", "-t", "4", "-z", "16384", "--timeout", "0.5"]).listening();
    under_load(&proxy, &files, |answers| {
        for _ in 0..5 {
            let (whole, failed) = answers();
            wait_until("more was served", || answers().0 > whole + 50);
            cache.signal(Signal::STOP);
            // Enough for every segment to have been leased again.
            wait_until("timeouts came", || answers().1 >= failed + 8);
            cache.signal(Signal::CONT);
        }
    });
    for (i, file) in files.iter().enumerate() {
        proxy.get(&format!("/{i}")).assert_whole(file);
    }
    wait_until("no replaced segment was mapped", || (proxy.segments(), cache.segments()) == (4, 4));
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert!(proxy.count("retired") > 0, "{}", proxy.stderr);
}

fn programs_stopped_for_moments_under_load_lose_nothing(over: Transport) {
    let place = Place::over(over);
    let files = furnish(&place);
    let cache = place.simplecached(["-c", "files", "-t", "2"]).listening();
    let proxy = place.webproxy(["-n", "2", "-t", "4", "-z", "16384"]).listening();
    under_load(&proxy, &files, |answers| {
        for round in 0..300 {
            let stopped = if round % 2 == 0 { &cache } else { &proxy };
            let whole = answers().0;
            stopped.signal(Signal::STOP);
            wait_until("it was stopped", || stopped.is_stopped());
            stopped.signal(Signal::CONT);
            wait_until("more was served", || answers().0 > whole);
        }
        assert_eq!(answers().1, 0);
    });
    let [proxy, cache] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), cache.count("errors")), (0, 0));
}

fn proxies_killed_under_load_cost_the_others_nothing(over: Transport) {
    let place = Place::over(over);
    let files = furnish(&place);
    place.write("files/large", noise(1000, LARGE));
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "2"]).listening();
    let survivor = place.webproxy(["-n", "2", "-z", "16384", "--timeout", "600"]).listening();
    under_load(&survivor, &files, |answers| {
        for _ in 0..10 {
            let victim = place.webproxy(["-n", "3"]).listening();
            let _stalled = [victim.stall("/large"), victim.stall("/large")];
            let mut active = victim.connect();
            active.request("/large");
            active.read_exactly(1 << 20);
            let whole = answers().0;
            victim.kill();
            wait_until("more was served", || answers().0 > whole + 20);
        }
        assert_eq!(answers().1, 0);
    });
    wait_until("the dead proxies' segments were let go of", || cache.segments() == 2);
    // Over mq, names of the last victim are left to whoever starts next.
    let successor = place.webproxy(["-n", "1"]).listening();
    let [survivor, _, cache] = place.wind_up([survivor, successor, cache]);
    assert_eq!((survivor.count("retired"), cache.count("errors")), (0, 0));
}

// ---------------------------------------------------------------- the file changes

fn a_file_truncated_while_it_is_sent_ends_the_body_short(over: Transport) {
    for (left, segments) in [(0, "1"), (LARGE - 1, "1"), (LARGE / 2, "4")] {
        let place = Place::over(over);
        let large = noise(1, LARGE);
        let path = place.write("files/large", &large);
        place.write("files/a", "hello");
        let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
        let proxy = place.webproxy(["-n", segments, "--timeout", "600"]).listening();
        let stalled = proxy.stall("/large");
        OpenOptions::new().write(true).open(path).unwrap().set_len(left as u64).unwrap();
        stalled.resume().assert_short(&large);
        assert_eq!(proxy.get("/a"), ok("hello"));
        proxy.get("/large").assert_whole(&large[..left]);
        let [proxy, cache] = place.wind_up([proxy, cache]);
        assert_eq!(
            (proxy.count("errors"), proxy.count("retired"), cache.count("errors")),
            (1, 0, 1)
        );
    }
}

fn a_file_that_grows_while_it_is_sent_is_sent_as_announced(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    let path = place.write("files/large", &large);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "1"]).listening();
    let stalled = proxy.stall("/large");
    OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
    stalled.resume().assert_whole(&large);
    proxy.get("/large").assert_whole(&[&large[..], b"more"].concat());
    place.wind_up([proxy, cache]);
}

fn a_file_replaced_while_it_is_sent_is_sent_to_its_end_and_the_new_one_next(over: Transport) {
    let place = Place::over(over);
    let (old, new) = (noise(1, LARGE), noise(2, LARGE));
    let path = place.write("files/large", &old);
    place.write("manifest", "/manifest files/large\n");
    for (source, key) in [("files", "/large"), ("manifest", "/manifest")] {
        fs::rename(place.write("next", &old), &path).unwrap();
        let cache = place.simplecached(["--loan-budget", "0", "-c", source]).listening();
        let proxy = place.webproxy(["-n", "3"]).listening();
        let stalled = proxy.stall(key);
        fs::rename(place.write("next", &new), &path).unwrap();
        let after = proxy.stall(key);
        fs::remove_file(&path).unwrap();
        assert_eq!((proxy.get(key), stalled.resume()), (Answer::NotFound, ok(&old)));
        after.resume().assert_whole(&new);
        place.wind_up([proxy, cache]);
    }
}

// ---------------------------------------------------------------- restarts

fn a_cache_restarted_under_load_gives_whole_files_or_honest_failures(over: Transport) {
    let place = Place::over(over);
    let files = furnish(&place);
    // The proxy comes first, and stays.
    let proxy =
        place.webproxy(["-n", "3", "-t", "4", "-z", "16384", "--timeout", "600"]).listening();
    under_load(&proxy, &files, |answers| {
        for round in 0..10 {
            let cache = place.simplecached(["-c", "files", "-t", "2"]).listening();
            let whole = answers().0;
            wait_until("more was served", || answers().0 > whole + 100);
            if round % 2 == 0 { cache.kill() } else { drop(cache.terminate()) }
        }
    });
    let cache = place.simplecached(["-c", "files"]).listening();
    for (i, file) in files.iter().enumerate() {
        proxy.get(&format!("/{i}")).assert_whole(file);
    }
    let [proxy, _] = place.wind_up([proxy, cache]);
    // Some were hits at first, and errors in the end.
    assert!(
        proxy.count("hits") + proxy.count("errors") >= proxy.count("requests"),
        "{}",
        proxy.stderr
    );
    assert_eq!((proxy.count("misses"), proxy.count("invalid")), (0, 0));
}

fn both_killed_at_once_leave_nothing_that_keeps_them_from_starting(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    for _ in 0..3 {
        let proxy = place.webproxy(["-n", "2"]).listening();
        let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
        let stalled = [proxy.stall("/large"), proxy.stall("/large")];
        for program in [&proxy, &cache] {
            program.signal(Signal::KILL);
        }
        for program in [proxy, cache] {
            program.finish();
        }
        for client in stalled {
            client.resume().assert_short(&large);
        }
    }
    let (proxy, cache) = (
        place.webproxy(PLAIN).listening(),
        place.simplecached(["--loan-budget", "0", "-c", "files"]).listening(),
    );
    proxy.get("/large").assert_whole(&large);
    place.wind_up([proxy, cache]);
}
