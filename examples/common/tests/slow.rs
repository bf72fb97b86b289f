//! Clients that read slowly: never cut as long as they read, and not in the way of others.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use shmferry_test_support::{
    Answer, Client, LARGE, Place, Program, Stalled, Transport, noise, ok, over_both, wait_until,
};

over_both! {
    a_client_that_reads_slowly_but_steadily_is_never_cut,
    slow_clients_that_hold_every_segment_do_not_keep_others_waiting,
    a_spool_that_is_full_sets_nothing_aside,
    a_disk_without_room_leaves_bodies_where_they_are,
}

/// Reads as many bytes a second, a hundredth of them at a time, for so long; then all the rest.
fn read_slowly(mut client: Client, a_second: usize, span: Duration) -> Answer {
    let start = Instant::now();
    let mut all = Vec::new();
    while start.elapsed() < span {
        // Paced by the clock: that is what makes it slow.
        let due = (start.elapsed().as_secs_f64() * a_second as f64) as usize;
        if all.len() >= due {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        let mut some = vec![0; (a_second / 100).max(1)];
        match client.0.read(&mut some).unwrap() {
            0 => return Answer::parse(&all),
            read => all.extend(&some[..read]),
        }
    }
    all.extend(client.read_all());
    Answer::parse(&all)
}

/// Several time-outs long, with large slots: no whole slot goes within one of them, and the socket
/// is never writable to the sender's eyes.
fn a_client_that_reads_slowly_but_steadily_is_never_cut(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache =
        place.simplecached(["--loan-budget", "0", "-c", "files", "--timeout", "4"]).listening();
    let segments = ["-n", "2", "-z", "16777216", "--slots", "2", "--timeout", "4"];
    let proxy = place.webproxy(segments).listening();
    let mut client = proxy.connect();
    client.request("/large");
    // And one that stops, which is cut, though not before.
    let stalled = proxy.stall("/large");
    let slow = read_slowly(client, 60_000, Duration::from_secs(16));
    slow.assert_whole(&large);
    stalled.resume().assert_short(&large);
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!(proxy.count("errors"), 0, "{}", proxy.stderr);
}

/// Eight segments, ten slow clients, and others that want six bytes.
fn slow_clients_that_hold_every_segment_do_not_keep_others_waiting(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/small", "sixsix");
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    // With a time-out that none of this comes near.
    let proxy = place.webproxy(["-n", "8", "--timeout", "600"]).listening();
    thread::scope(|scope| {
        let slow: Vec<_> = (0..10)
            .map(|_| {
                let mut client = proxy.connect();
                client.request("/large");
                let large = &large;
                scope.spawn(move || {
                    read_slowly(client, 100_000, Duration::from_secs(5)).assert_whole(large);
                })
            })
            .collect();
        let stalled: Vec<Stalled> = (0..10).map(|_| proxy.stall("/large")).collect();
        for _ in 0..20 {
            assert_eq!(proxy.get("/small"), ok("sixsix"));
        }
        // Those that were set aside lose nothing.
        for client in stalled {
            client.resume().assert_whole(&large);
        }
        slow.into_iter().for_each(|client| client.join().unwrap());
    });
    wait_until("all was idle again", || proxy.is_asleep());
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!(proxy.count("errors"), 0, "{}", proxy.stderr);
    assert!(proxy.count("set_aside") >= 12, "20 clients in 8 segments: {}", proxy.stderr);
}

/// What does not fit the limit stays in its segment, as before.
fn a_spool_that_is_full_sets_nothing_aside(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/small", "sixsix");
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    // Room for one of them.
    let limit = (LARGE + LARGE / 2).to_string();
    let proxy =
        place.webproxy(["-n", "2", "--timeout", "600", "--spool-limit", &limit]).listening();
    let held = [proxy.stall("/large"), proxy.stall("/large")];
    let next = proxy.stall("/large"); // in the place of one that was set aside
    let mut waiting = proxy.connect();
    waiting.request("/small");
    wait_until("it stood in line", || waiting.is_heard() && proxy.is_asleep());
    assert!(waiting.hears_nothing());
    for client in held {
        client.resume().assert_whole(&large);
    }
    assert_eq!(waiting.answer(), ok("sixsix"));
    next.resume().assert_whole(&large);
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!(proxy.count("errors"), 0, "{}", proxy.stderr);
    // One at a time: another may have been once the first was read to its end.
    assert!((1..=2).contains(&proxy.count("set_aside")), "{}", proxy.stderr);
}

/// Neither lost nor cut: the client that reads gets all of it.
fn a_disk_without_room_leaves_bodies_where_they_are(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/small", "sixsix");
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    // Files, segments included, of up to 8 MiB (`ulimit -f` counts 512 bytes).
    let mut limited = place.command_limited("-f 16384", "webproxy");
    let address = place.cache_address();
    limited.args(["-p", "0", "-n", "2", "--timeout", "5", "--cache", &address]);
    let proxy = Program::spawn(&mut limited).listening();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let mut client = proxy.connect();
                client.request("/large");
                scope.spawn(|| read_slowly(client, 4_000_000, Duration::from_secs(5)))
            })
            .collect();
        // In line all the while, and served in the end.
        assert_eq!(proxy.get("/small"), ok("sixsix"));
        for reader in readers {
            reader.join().unwrap().assert_whole(&large);
        }
    });
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), proxy.count("set_aside")), (0, 0), "{}", proxy.stderr);
}
