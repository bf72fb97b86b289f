//! Who reaches a `webproxy`: from where, and past how many others that say nothing.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Instant;

use rustix::process::{Resource, getrlimit, setrlimit};
use shmferry_test_support::{Answer, Client, LARGE, Place, Program, ok, pattern, wait_until};

// ---------------------------------------------------------------- from where

#[test]
fn only_this_machine_reaches_a_webproxy_that_was_not_told_otherwise() {
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.run("webproxy", ["-p", "0", "--root", "root"]).listening();
    let address = proxy.address();
    assert_eq!(address.ip(), Ipv4Addr::LOCALHOST);
    let line = proxy.wait_for("listening on ");
    assert!(line.contains("--listen 0.0.0.0 or --listen ::"), "{line}");
    assert_eq!(proxy.get("/a"), ok("hello"));
    // An address of this machine that it would also hear on, did it listen on all of them.
    let another = SocketAddr::from(([127, 0, 0, 2], address.port()));
    assert!(TcpStream::connect(another).is_err());

    let args = ["-p", "0", "--root", "root", "--listen", "0.0.0.0"];
    let open = place.run("webproxy", args).listening();
    let another = SocketAddr::from(([127, 0, 0, 2], open.address().port()));
    let mut client = Client::to(another);
    client.request("/a");
    assert_eq!(client.answer(), ok("hello"));
    let line = open.wait_for("listening on ");
    assert!(!line.contains("--listen"), "{line}");
}

#[test]
fn both_address_families_reach_a_webproxy_that_listens_on_all_of_ipv6() {
    if TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, 1)))
        .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrNotAvailable)
    {
        eprintln!("left out: this host has no IPv6");
        return;
    }
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.run("webproxy", ["-p", "0", "--root", "root", "--listen", "::"]).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    let mut client = Client::to(SocketAddr::from((Ipv6Addr::LOCALHOST, proxy.address().port())));
    client.request("/a");
    assert_eq!(client.answer(), ok("hello"));
}

// ---------------------------------------------------------------- past how many

/// More than a crew has threads.
const SILENT: usize = 5000;

/// Raises this process's limit on descriptors; returns whether it is enough.
fn many_descriptors() -> bool {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let enough = limit.maximum.is_none_or(|most| most > SILENT as u64 + 1000);
    if !enough {
        eprintln!("left out: RLIMIT_NOFILE does not allow {SILENT} connections");
    }
    enough
}

/// So many connections, each of which has sent this and no more.
fn connect_many(proxy: &Program, said: &str) -> Vec<Client> {
    let connect = || {
        let mut client = proxy.connect();
        client.send(said);
        client
    };
    (0..SILENT).map(|_| connect()).collect()
}

#[test]
fn a_client_that_asks_is_served_past_more_silent_connections_than_there_are_threads() {
    if !many_descriptors() {
        return;
    }
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.bare_webproxy(["--root", "root", "--timeout", "600"]).listening();
    let mut silent = connect_many(&proxy, "");
    for _ in 0..20 {
        assert_eq!(proxy.get("/a"), ok("hello"));
    }
    // The oldest made room; the youngest may still ask.
    assert_eq!(silent[0].answer(), Answer::Invalid);
    for client in &mut silent[SILENT - 1000..] {
        client.request("/a");
        assert_eq!(client.answer(), ok("hello"));
    }
    drop(silent);
    let exit = proxy.terminate();
    assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
    exit.assert_said(&["errors=0"]);
}

#[test]
fn a_client_that_asks_is_served_past_more_half_asked_requests_than_there_are_threads() {
    if !many_descriptors() {
        return;
    }
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.bare_webproxy(["--root", "root", "--timeout", "600"]).listening();
    let mut half = connect_many(&proxy, "GETFILE GET /a");
    for _ in 0..20 {
        assert_eq!(proxy.get("/a"), ok("hello"));
    }
    assert_eq!(half[0].answer(), Answer::Invalid);
    for client in &mut half[SILENT - 900..] {
        client.send("\r\n\r\n");
        assert_eq!(client.answer(), ok("hello"));
    }
}

#[test]
fn a_client_that_asks_is_served_past_more_silent_connections_than_there_are_descriptors() {
    let place = Place::new();
    place.write("root/a", "hello");
    let mut limited = place.command_limited("-n 100", "webproxy");
    limited.args(["-p", "0", "--root", "root", "--timeout", "600", "-n", "2"]);
    let proxy = Program::spawn(&mut limited).listening();
    let mut silent: Vec<Client> = (0..300).map(|_| proxy.connect()).collect();
    // All have been let in before it, and the oldest make room for the file that it asks for.
    wait_until("a client was served", || proxy.get("/a") == ok("hello"));
    wait_until("the oldest had made room", || proxy.descriptors() < 90);
    for _ in 0..20 {
        assert_eq!(proxy.get("/a"), ok("hello"));
    }
    for client in &mut silent[285..] {
        client.request("/a");
        assert_eq!(client.answer(), ok("hello"));
    }
    drop(silent);
    place.wind_up([proxy]);
}

#[test]
fn a_lack_of_descriptors_that_lasts_is_told_once_a_second_with_what_was_held_back() {
    let place = Place::new();
    place.write("files/large", pattern(LARGE));
    let start = Instant::now();
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let mut limited = place.command_limited("-n 60", "webproxy");
    let address = place.cache_address();
    limited.args(["-p", "0", "--timeout", "600", "-n", "1", "--cache", &address]);
    let proxy = Program::spawn(&mut limited).listening();
    // All have asked, so that none may be cut; they stand in line for the only segment.
    let stalled = proxy.stall("/large");
    let mut waiting: Vec<Client> = (0..100).map(|_| proxy.connect()).collect();
    waiting.iter_mut().for_each(|client| client.request("/large"));
    let lines = || proxy.stderr().lines().filter(|line| line.contains("cannot accept")).count();
    wait_until("it was told several times", || {
        let (told, seconds) = (lines(), start.elapsed().as_secs() as usize + 1);
        assert!(told <= seconds, "{told} lines in {seconds} seconds:\n{}", proxy.stderr());
        told >= 4
    });
    let held_back = "cannot accept: Too many open files (os error 24), and ";
    let line = proxy.wait_for(held_back);
    assert!(line.contains("more times since the last such line"), "{line}");
    drop((stalled, waiting));
    assert_eq!(proxy.get("/absent"), Answer::NotFound);
    place.wind_up([proxy, cache]);
}
