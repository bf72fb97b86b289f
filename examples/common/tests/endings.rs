//! The real programs, asked to end in the middle of transfers.
//!
//! `--timeout 600` is ten times the watchdog: whoever waited for it would not live to see it.

use std::net::TcpStream;

use shmferry_examples::program::signals_that_end;
use shmferry_test_support::{
    Answer, LARGE, Place, Program, Signal, Transport, noise, over_both, wait_until,
};

over_both! {
    sigint_lets_a_transfer_end_and_leaves_a_stalled_one,
    sigterm_lets_a_transfer_end_and_leaves_a_stalled_one,
    sighup_lets_a_transfer_end_and_leaves_a_stalled_one,
    a_stopped_cache_does_not_keep_a_proxy_from_ending,
    a_stopped_proxy_does_not_keep_a_cache_from_ending,
    a_second_signal_ends_a_program_while_another_still_waits,
}

/// Both programs get a signal while one client reads, one stalls, and one has not even asked.
fn a_signal_in_the_middle(over: Transport, signal: Signal) {
    if !signals_that_end().unwrap().contains(&signal.as_raw()) {
        println!("left out: {signal:?}, which is ignored in this process and its children");
        return;
    }
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache =
        place.simplecached(["--loan-budget", "0", "-c", "files", "--timeout", "600"]).listening();
    let proxy = place.webproxy(["--timeout", "600"]).listening();
    let (address, active, stalled) =
        (proxy.address(), proxy.stall("/large"), proxy.stall("/large"));
    let mut silent = proxy.connect();
    wait_until("it was let in", || proxy.threads_named("proxy") > 3);
    for program in [&proxy, &cache] {
        program.signal(signal);
    }
    wait_until("no more clients are let in", || TcpStream::connect(address).is_err());
    active.resume().assert_whole(&large);
    let [proxy, cache] = [proxy, cache].map(Program::finish);
    proxy.assert_code(0);
    proxy.assert_said(&["leaving with transfers under way", "stopped: "]);
    cache.assert_code(0); // perhaps it saw the proxy leave first
    cache.assert_said(&["stopped: "]);
    stalled.resume().assert_short(&large);
    assert_eq!(silent.answer(), Answer::Nothing);
    place.assert_nothing_left();
}

fn sigint_lets_a_transfer_end_and_leaves_a_stalled_one(over: Transport) {
    a_signal_in_the_middle(over, Signal::INT);
}

fn sighup_lets_a_transfer_end_and_leaves_a_stalled_one(over: Transport) {
    a_signal_in_the_middle(over, Signal::HUP);
}

fn sigterm_lets_a_transfer_end_and_leaves_a_stalled_one(over: Transport) {
    a_signal_in_the_middle(over, Signal::TERM);
}

fn a_stopped_cache_does_not_keep_a_proxy_from_ending(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "2", "--timeout", "600"]).listening();
    let stalled = proxy.stall("/large");
    cache.signal(Signal::STOP);
    let mut pending = proxy.connect();
    pending.request("/large");
    wait_until("it was asked for", || pending.is_heard());
    proxy.terminate().assert_said(&["leaving with transfers under way"]);
    stalled.resume().assert_short(&large);
    assert_eq!(pending.answer(), Answer::Nothing);
    cache.signal(Signal::CONT);
    place.wind_up([cache]);
}

fn a_stopped_proxy_does_not_keep_a_cache_from_ending(over: Transport) {
    let place = Place::over(over);
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache =
        place.simplecached(["--loan-budget", "0", "-c", "files", "--timeout", "600"]).listening();
    let proxy = place.webproxy(["-n", "1", "--timeout", "600"]).listening();
    let stalled = proxy.stall("/large");
    proxy.signal(Signal::STOP);
    cache.terminate().assert_said(&["leaving with transfers under way"]);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    proxy.signal(Signal::CONT);
    stalled.resume().assert_short(&large);
    proxy.assert_pool_is_whole(1, "/large", &large);
    place.wind_up([proxy, cache]);
}

fn a_second_signal_ends_a_program_while_another_still_waits(over: Transport) {
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::INT)] {
        let place = Place::over(over);
        let large = noise(1, LARGE);
        place.write("files/large", &large);
        let debug = |name: &str, args: &[&str]| {
            let mut command = place.command(name);
            Program::spawn(command.env("RUST_LOG", "debug").args(args)).listening()
        };
        let address = place.cache_address();
        let cache = debug("simplecached", &["-c", "files", "--listen", &address]);
        let [waiting, hurried] =
            [0, 1].map(|_| debug("webproxy", &["-p", "0", "--cache", &address]));
        let stalled = [waiting.stall("/large"), hurried.stall("/large")];
        // The one that is asked first, and once, is given its time; that of the other would end
        // later.
        for program in [&waiting, &hurried] {
            program.signal(first);
            program.wait_for("stopping");
        }
        hurried.signal(second);
        hurried.finish().assert_code(0);
        assert!(waiting.is_running(), "it took the whole grace time");
        cache.signal(first);
        cache.wait_for("stopping");
        cache.signal(second);
        cache.finish().assert_code(0);
        for client in stalled {
            client.resume().assert_short(&large);
        }
        waiting.finish().assert_code(0);
        place.assert_nothing_left();
    }
}
