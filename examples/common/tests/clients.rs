//! Clients of the real programs that stall, vanish, dawdle or say nothing, and what the others
//! notice of it.

use std::io::{Read, Write};
use std::thread;

use shmferry_test_support::{
    Answer, Client, LARGE, Place, Program, Stalled, Transport, noise, ok, over_both, wait_until,
};

over_both! {
    clients_that_stall_do_not_slow_down_those_that_read,
    clients_that_hold_every_segment_are_cut_and_those_that_wait_are_served_in_order,
    clients_that_reset_mid_body_leave_the_only_segment_usable,
    clients_that_close_mid_body_leave_the_only_segment_usable,
    clients_that_leave_before_their_reply_leave_the_only_segment_usable,
    a_client_that_has_closed_its_half_gets_its_whole_reply,
    clients_that_send_and_read_byte_by_byte_hold_up_nobody,
    clients_that_say_nothing_hold_up_nobody_and_may_still_ask,
}

/// A place with a large file, and small ones that are named by their numbers.
fn furnished(over: Transport) -> (Place, Vec<u8>, Vec<Vec<u8>>) {
    let place = Place::over(over);
    let large = noise(1000, LARGE);
    place.write("files/large", &large);
    let files: Vec<Vec<u8>> = (0..20).map(|i| noise(i, i * i * 1009)).collect();
    for (i, file) in files.iter().enumerate() {
        place.write(&format!("files/{i}"), file);
    }
    (place, large, files)
}

/// Fetches all files with several clients, and compares them.
fn fetch_all(proxy: &Program, files: &[Vec<u8>]) {
    thread::scope(|scope| {
        for client in 0..4 {
            scope.spawn(move || {
                for i in 0..files.len() {
                    let i = (i + 5 * client) % files.len();
                    proxy.get(&format!("/{i}")).assert_whole(&files[i]);
                }
            });
        }
    });
}

// ---------------------------------------------------------------- stalled

fn clients_that_stall_do_not_slow_down_those_that_read(over: Transport) {
    let (place, large, files) = furnished(over);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "2"]).listening();
    let proxy = place.webproxy(["-t", "2", "-n", "8", "--timeout", "600"]).listening();
    let stalled: Vec<Stalled> = (0..4).map(|_| proxy.stall("/large")).collect();
    for _ in 0..5 {
        fetch_all(&proxy, &files);
    }
    proxy.get("/large").assert_whole(&large);
    // Nothing was lost to those that waited.
    for client in stalled {
        client.resume().assert_whole(&large);
    }
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), proxy.count("retired")), (0, 0));
}

fn clients_that_hold_every_segment_are_cut_and_those_that_wait_are_served_in_order(
    over: Transport,
) {
    let (place, large, files) = furnished(over);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "2"]).listening();
    // Without a spool, that is: it would free the segments at once.
    let proxy =
        place.webproxy(["-t", "2", "-n", "2", "--timeout", "10", "--spool-limit", "0"]).listening();
    let holding = [proxy.stall("/large"), proxy.stall("/large")];
    let mut waiting = Vec::new();
    for _ in 0..5 {
        let mut client = proxy.connect();
        client.request("/large");
        // With its request read, there is nothing left that could hold up its thread but the line.
        wait_until("it stood in line", || client.is_heard() && proxy.is_asleep());
        waiting.push(client);
    }
    assert!(waiting.iter().all(Client::hears_nothing));
    let mut waiting = waiting.into_iter();
    let mut served: Vec<Stalled> = waiting.by_ref().take(2).map(Stalled::begin).collect();
    // Two have taken the places of the two that were cut; the next comes when one of them is done.
    loop {
        assert!(waiting.as_slice().iter().all(Client::hears_nothing), "somebody pushed in");
        if served.is_empty() {
            break;
        }
        served.remove(0).resume().assert_whole(&large);
        served.extend(waiting.next().map(Stalled::begin));
    }
    for client in holding {
        client.resume().assert_short(&large);
    }
    fetch_all(&proxy, &files);
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), proxy.stderr.contains("WARN")), (0, false));
}

// ---------------------------------------------------------------- gone

/// Clients that leave in this way in the middle of their bodies, again and again, cost nothing.
fn clients_that_leave(over: Transport, leave: impl Fn(Client)) {
    let (place, large, files) = furnished(over);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "1"]).listening();
    let proxy = place.webproxy(["-t", "1", "-n", "1", "--timeout", "600"]).listening();
    assert_eq!(proxy.get("/0"), ok(""));
    wait_until("it was idle", || proxy.is_asleep());
    let descriptors = proxy.descriptors();
    for round in 0..20 {
        leave(proxy.stall("/large").client);
        proxy.get("/19").assert_whole(&files[19]);
        if round % 10 == 9 {
            proxy.get("/large").assert_whole(&large);
        }
    }
    wait_until("their connections were closed", || proxy.descriptors() == descriptors);
    for exit in place.wind_up([proxy, cache]) {
        assert_eq!((exit.count("errors"), exit.stderr.contains("WARN")), (0, false));
    }
}

fn clients_that_reset_mid_body_leave_the_only_segment_usable(over: Transport) {
    clients_that_leave(over, Client::reset);
}

fn clients_that_close_mid_body_leave_the_only_segment_usable(over: Transport) {
    clients_that_leave(over, drop);
}

fn clients_that_leave_before_their_reply_leave_the_only_segment_usable(over: Transport) {
    let (place, _, files) = furnished(over);
    let cache = place.simplecached(["-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "1", "--timeout", "600"]).listening();
    for round in 0..200 {
        let mut client = proxy.connect();
        match round % 4 {
            0 => {}
            1 => client.send("GETFILE GET /1"),
            2 => client.request("/19"),
            _ => client.request("/absent"),
        }
        if round % 8 < 4 { client.reset() } else { drop(client) }
    }
    fetch_all(&proxy, &files);
    for exit in place.wind_up([proxy, cache]) {
        assert_eq!((exit.count("errors"), exit.stderr.contains("WARN")), (0, false));
    }
}

// ---------------------------------------------------------------- slow

fn a_client_that_has_closed_its_half_gets_its_whole_reply(over: Transport) {
    let (place, large, files) = furnished(over);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "1"]).listening();
    let ask = |path: &str| {
        let mut client = proxy.connect();
        client.request(path);
        client.half_close();
        client
    };
    for (i, file) in files.iter().enumerate() {
        ask(&format!("/{i}")).answer().assert_whole(file);
    }
    Stalled::begin(ask("/large")).resume().assert_whole(&large);
    assert_eq!(ask("/absent").answer(), Answer::NotFound);
    assert_eq!(ask("absent").answer(), Answer::Invalid);
    place.wind_up([proxy, cache]);
}

fn clients_that_send_and_read_byte_by_byte_hold_up_nobody(over: Transport) {
    let (place, _, files) = furnished(over);
    let cache = place.simplecached(["-c", "files", "-t", "2"]).listening();
    let proxy = place.webproxy(["-t", "2", "-n", "2", "--timeout", "600"]).listening();
    let mut slow: Vec<Client> = (0..30).map(|_| proxy.connect()).collect();
    for byte in b"GETFILE GET /3\r\n\r\n" {
        slow.iter_mut().for_each(|client| client.0.write_all(&[*byte]).unwrap());
        proxy.get("/19").assert_whole(&files[19]);
    }
    let mut replies = vec![Vec::new(); slow.len()];
    let mut byte = [0];
    while replies.iter().all(|reply| reply.len() < 2000) {
        for (client, reply) in slow.iter_mut().zip(&mut replies) {
            client.0.read_exact(&mut byte).unwrap();
            reply.push(byte[0]);
        }
    }
    fetch_all(&proxy, &files);
    for (client, mut reply) in slow.iter_mut().zip(replies) {
        while client.0.read(&mut byte).unwrap() > 0 {
            reply.push(byte[0]);
        }
        Answer::parse(&reply).assert_whole(&files[3]);
    }
    place.wind_up([proxy, cache]);
}

fn clients_that_say_nothing_hold_up_nobody_and_may_still_ask(over: Transport) {
    let (place, _, files) = furnished(over);
    let cache = place.simplecached(["-c", "files", "-t", "2"]).listening();
    let proxy = place.webproxy(["-t", "2", "-n", "2", "--timeout", "600"]).listening();
    let mut silent: Vec<Client> = (0..50).map(|_| proxy.connect()).collect();
    wait_until("all were let in", || proxy.threads_named("proxy") > 50);
    for _ in 0..3 {
        fetch_all(&proxy, &files);
    }
    silent.iter_mut().for_each(|client| client.request("/7"));
    for mut client in silent {
        client.answer().assert_whole(&files[7]);
    }
    place.wind_up([proxy, cache]);
}
