//! `simplecached` and `webproxy`, run for real: what they serve, refuse, and leave behind.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use shmferry_test_support::{
    Answer, Client, Place, Program, Signal, Transport, WATCHDOG, names_in, over_both, pattern,
    wait_until,
};

over_both! {
    either_starts_first,
    without_a_cache_there_is_an_error_in_the_end,
    the_cache_may_be_restarted_or_killed,
    a_second_cache_at_the_same_address_is_refused,
    stalled_clients_starve_nobody_and_are_cut,
    a_client_that_leaves_is_nobodys_error,
    idle_programs_end_at_once_and_leave_nothing,
    a_running_transfer_is_let_finish,
    a_transfer_that_stalls_is_left_when_the_grace_is_over,
    a_second_signal_ends_it_at_once,
}

/// No arguments.
const PLAIN: [&str; 0] = [];

/// More than the buffers of a socket take, so that a client that does not read stalls the transfer.
const LARGE: usize = 32 << 20;

fn ok(body: impl AsRef<[u8]>) -> Answer {
    Answer::Ok(body.as_ref().to_vec())
}

// ---------------------------------------------------------------- the cache's files

#[test]
fn a_manifest_names_what_is_served() {
    let place = Place::new();
    let sizes = [0, 1, 823, 824, 825, 4096, 1 << 20, (3 << 20) + 7];
    let mut manifest = String::from("\n");
    for (size, blanks) in sizes.into_iter().zip([" ", "\t", "  \t"].into_iter().cycle()) {
        place.write(&format!("files/{size} bytes"), pattern(size));
        manifest += &format!("/size/{size}{blanks}files/{size} bytes \t\r\n \n");
    }
    let elsewhere = Place::new();
    let absolute = elsewhere.write("absolute", "from elsewhere");
    manifest += &format!("/absolute {}", absolute.display()); // and no newline
    place.write("lists/manifest", manifest.replace("files/", "../files/"));

    let _cache = place.simplecached(["-c", "lists/manifest"]).listening();
    for args in
        [vec![], vec!["-n", "1", "-z", "824", "--slots", "1"], vec!["-z", "824", "--slots", "3"]]
    {
        let proxy = place.webproxy(args).listening();
        for size in sizes {
            assert_eq!(proxy.get(&format!("/size/{size}")), ok(pattern(size)));
        }
        assert_eq!(proxy.get("/absolute"), ok("from elsewhere"));
        assert_eq!(proxy.get("/size/2"), Answer::NotFound);
        assert_eq!(proxy.get("/files/1 bytes"), Answer::Invalid);
        assert_eq!(proxy.get("/lists/manifest"), Answer::NotFound);
    }
}

#[test]
fn the_default_manifest_and_the_default_address() {
    let place = Place::new();
    place.write("a", "hello");
    place.write("locals.txt", "/a a\n");
    let cache = place.run("simplecached", PLAIN).listening();
    let proxy = place.bare_webproxy(PLAIN).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    assert!(place.path("shmferry/simplecached.sock").exists());
    proxy.terminate();
    cache.terminate();
    assert_eq!(names_in(&place.path("")), ["a", "locals.txt"]);
}

#[test]
fn files_are_opened_anew_for_each_request() {
    let place = Place::new();
    place.write("files/a", "before");
    place.write("manifest", "/a files/a");
    for source in ["files", "manifest"] {
        let _cache = place.simplecached(["-c", source]).listening();
        let proxy = place.webproxy(PLAIN).listening();
        assert_eq!(proxy.get("/a"), ok("before"));
        fs::rename(place.write("new", "and after"), place.path("files/a")).unwrap();
        assert_eq!(proxy.get("/a"), ok("and after"));
        fs::remove_file(place.path("files/a")).unwrap();
        assert_eq!(proxy.get("/a"), Answer::NotFound);
        place.write("files/a", "before");
    }
}

/// A directory with something of every kind in it, and what is outside.
fn directory_of_everything(place: &Place) {
    place.write("secret", "outside");
    place.write("root/a", "inside");
    place.write("root/sub/b", pattern(5000));
    place.write("root/sub/%41", "not decoded");
    symlink("sub/b", place.path("root/link_inside")).unwrap();
    symlink("../secret", place.path("root/link_outside")).unwrap();
    symlink(place.path("root/a"), place.path("root/link_absolute")).unwrap();
    symlink("link_to_itself", place.path("root/link_to_itself")).unwrap();
    symlink("..", place.path("root/up")).unwrap();
    symlink("/dev/zero", place.path("root/zero")).unwrap();
    symlink("/proc/self/exe", place.path("root/magic")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, place.path("root/fifo"), rustix::fs::Mode::RUSR).unwrap();
    UnixListener::bind(place.path("root/socket")).unwrap();
}

fn assert_only_what_is_beneath(place: &Place, proxy: &Program) {
    assert_eq!(proxy.get("/a"), ok("inside"));
    assert_eq!(proxy.get("/sub/b"), ok(pattern(5000)));
    assert_eq!(proxy.get("/link_inside"), ok(pattern(5000)));
    assert_eq!(proxy.get("/sub/%41"), ok("not decoded"));
    let absolute = place.path("secret").display().to_string();
    let long_name = format!("/{}", "n".repeat(300));
    let long_path = format!("/{}", "n/".repeat(2047));
    for path in [
        "/",
        "//",
        "/.",
        "/..",
        "/../secret",
        "/sub/../../secret",
        "//a",
        "/absent",
        "/a/",
        "/a/b",
        "/sub",
        "/sub/",
        "/link_outside",
        "/link_absolute",
        "/link_to_itself",
        "/up/secret",
        "/zero",
        "/magic",
        "/fifo",
        "/socket",
        &absolute,
        &format!("/{absolute}"),
        &long_name,
        &long_path,
    ] {
        assert_eq!(proxy.get(path), Answer::NotFound, "{path}");
    }
    // Keys are bytes.
    assert_eq!(Answer::parse(&proxy.ask(b"GETFILE GET /\xff\xfe\r\n\r\n")), Answer::NotFound);
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"root/\xff\xfe");
    fs::write(place.path("").join(name), "bytes").unwrap();
    assert_eq!(Answer::parse(&proxy.ask(b"GETFILE GET /\xff\xfe\r\n\r\n")), ok("bytes"));
}

#[test]
fn a_directory_is_served_and_nothing_outside() {
    let place = Place::new();
    directory_of_everything(&place);
    let cache = place.simplecached(["-c", "root", "-t", "2", "-d", "50"]).listening();
    let proxy = place.webproxy(PLAIN).listening();
    assert_only_what_is_beneath(&place, &proxy);
    proxy.terminate().assert_said(&["hits=5", "misses=25", "errors=0", "invalid=0"]);
    cache.terminate().assert_said(&[
        "requests=30",
        "hits=5",
        "misses=25",
        "errors=0",
        "bytes=10022",
    ]);
}

#[test]
fn a_root_is_served_without_a_second_program() {
    let place = Place::new();
    directory_of_everything(&place);
    place.write("root/large", pattern(LARGE));
    let proxy =
        place.bare_webproxy(["--root", "root", "--loan-budget", "0", "-n", "2"]).listening();
    assert_only_what_is_beneath(&place, &proxy);
    assert_eq!(proxy.get("/large"), ok(pattern(LARGE)));
    proxy.terminate().assert_said(&["requests=31", "retired=0"]);
}

#[test]
fn a_manifest_line_that_cannot_be_used_is_named() {
    let place = Place::new();
    place.write("a", "hello");
    fs::create_dir(place.path("directory")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, place.path("fifo"), rustix::fs::Mode::RUSR).unwrap();
    for (manifest, parts) in [
        ("/a a\n/b b\n", ["manifest:2: ", "b: No such file"]),
        ("/a a\n\n/b a\n/a a", ["manifest:4: ", "the key /a is taken already"]),
        ("/a\n", ["manifest:1: ", "expected KEY PATH"]),
        ("/a a\n/b \t\n", ["manifest:2: ", "expected KEY PATH"]),
        ("/d directory", ["manifest:1: ", "directory is not a regular file"]),
        ("/f fifo", ["manifest:1: ", "fifo is not a regular file"]),
        ("/a a/b", ["manifest:1: ", "Not a directory"]),
        ("/a a\0b", ["manifest:1: ", "Invalid argument"]),
    ] {
        place.write("manifest", manifest);
        place.simplecached(["-c", "manifest"]).finish().assert_failure(&parts);
        assert!(place.is_swept(), "{manifest}");
    }
}

// ---------------------------------------------------------------- requests

#[test]
fn malformed_requests_are_invalid() {
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.bare_webproxy(["--root", "root"]).listening();
    let long = format!("GETFILE GET /{}\r\n\r\n", "n".repeat(4096));
    let nul = "GETFILE GET /a\0\r\n\r\n";
    let requests = [
        "PULLFILE GET /a\r\n\r\n",
        "getfile GET /a\r\n\r\n",
        "GETFILE FETCH /a\r\n\r\n",
        "GETFILE  GET /a\r\n\r\n",
        "GETFILE GET a\r\n\r\n",
        "GETFILE GET foo\r\n\r\n",
        "GETFILE GET \r\n\r\n",
        "GETFILE GET /a extra\r\n\r\n",
        "GETFILE GET /a  \r\n\r\n",
        "GETFILE GET /a\n\n",
        "\r\n\r\n",
        nul,
        &long,
    ];
    for request in requests {
        assert_eq!(Answer::parse(&proxy.ask(request)), Answer::Invalid, "{request}");
    }
    // The stream ends before the blank line does.
    for request in ["", "GETFILE", "GETFILE GET /a", "GETFILE GET /a\r\n\r"] {
        let mut client = proxy.connect();
        client.send(request);
        client.0.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.answer(), Answer::Invalid, "{request}");
    }
    let longest = format!("GETFILE GET /{}\r\n\r\n", "n".repeat(4095));
    assert_eq!(Answer::parse(&proxy.ask(longest)), Answer::NotFound);
    proxy.terminate().assert_said(&["requests=18", "invalid=17", "misses=1", "errors=0"]);
}

#[test]
fn requests_arrive_as_they_like() {
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy = place.bare_webproxy(["--root", "root"]).listening();
    // One tolerance, and bytes after the blank line.
    assert_eq!(Answer::parse(&proxy.ask("GETFILE GET /a \r\n\r\n")), ok("hello"));
    assert_eq!(Answer::parse(&proxy.ask("GETFILE GET /a\r\n\r\n\0")), ok("hello"));
    // So many that closing on them would reset the connection.
    let surplus = vec![b'x'; 300 << 10];
    for _ in 0..20 {
        let request = [b"GETFILE GET /a\r\n\r\n", &surplus[..]].concat();
        assert_eq!(Answer::parse(&proxy.ask(request)), ok("hello"));
        let request = [b"GETFILE PUT /a\r\n\r\n", &surplus[..]].concat();
        assert_eq!(Answer::parse(&proxy.ask(request)), Answer::Invalid);
    }
    // Byte by byte, of a good request and of a bad one.
    for (request, answer) in
        [("GETFILE GET /a\r\n\r\n", ok("hello")), ("HTTP GET /\r\n\r\n", Answer::Invalid)]
    {
        let mut client = proxy.connect();
        for byte in request.as_bytes() {
            client.0.write_all(&[*byte]).unwrap(); // nobody hangs up before the end
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(client.answer(), answer);
    }
}

#[test]
fn an_unfinished_request_costs_its_own_connection_only() {
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy =
        place.bare_webproxy(["--root", "root", "-t", "1", "-n", "1", "--timeout", "3"]).listening();
    let mut unfinished: Vec<Client> = (0..20).map(|_| proxy.connect()).collect();
    unfinished.iter_mut().for_each(|client| client.send("GETFILE GET /"));
    assert_eq!(proxy.get("/a"), ok("hello"));
    // One that trickles does not gain time: it never gets to the end of its path.
    let mut trickling = proxy.connect();
    trickling.send("GETFILE GET /");
    let mut sent = 0;
    while trickling.0.write_all(b"n").is_ok() && sent < 4000 {
        sent += 1;
        thread::sleep(Duration::from_millis(20));
    }
    assert!(sent < 4000, "the deadline moved");
    for mut client in unfinished {
        assert_eq!(client.answer(), Answer::Invalid);
    }
}

#[test]
fn the_classic_dialect() {
    let place = Place::new();
    place.write("root/a", "hello");
    place.write("root/empty", "");
    let proxy = place.bare_webproxy(["--root", "root", "--dialect", "classic"]).listening();
    for (path, reply) in [
        ("/a", "GETFILE OK 5 hello"),
        ("/empty", "GETFILE OK 0 "),
        ("/absent", "GETFILE FILE_NOT_FOUND 0\n"),
        ("absent", "GETFILE ERROR 0\n"),
    ] {
        let answer = proxy.ask(format!("GETFILE GET {path}\r\n\r\n"));
        assert_eq!(str::from_utf8(&answer), Ok(reply));
    }
}

// ---------------------------------------------------------------- two processes

fn either_starts_first(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    let proxy = place.webproxy(PLAIN).listening();
    // Asked before the cache is there: it is waited for, though not for long.
    let mut cache = None;
    wait_until("an early request was answered", || {
        drop(cache.take());
        let mut early = proxy.connect();
        early.request("/a");
        cache = Some(place.simplecached(["-c", "files"]).listening());
        early.answer() == ok("hello")
    });
    assert_eq!(proxy.get("/a"), ok("hello"));
    let second = place.webproxy(PLAIN).listening();
    assert_eq!(second.get("/a"), ok("hello"));
}

fn without_a_cache_there_is_an_error_in_the_end(over: Transport) {
    let place = Place::over(over);
    let proxy = place.webproxy(PLAIN).listening();
    assert_eq!(proxy.get("/a"), Answer::Error);
    let exit = proxy.terminate();
    exit.assert_said(&[
        "WARN",
        "the cache failed for /a: timed out waiting for a server",
        "errors=1",
    ]);
}

fn the_cache_may_be_restarted_or_killed(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", pattern(100_000));
    let proxy = place.webproxy(PLAIN).listening();
    for round in 0..4 {
        let cache = place.simplecached(["-c", "files"]).listening();
        for _ in 0..10 {
            assert_eq!(proxy.get("/a"), ok(pattern(100_000)));
        }
        match round % 2 {
            0 => {
                cache.kill();
                assert!(!place.is_swept(), "leftovers for the next one to take over");
            }
            _ => {
                cache.terminate();
                assert!(place.is_swept(), "the directory that the killed one made, included");
            }
        }
    }
}

fn a_second_cache_at_the_same_address_is_refused(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    let cache = place.simplecached(["-c", "files"]).listening();
    let pid = cache.pid().to_string();
    let second = place.simplecached(["-c", "files"]).finish();
    second.assert_failure(&[
        "cannot listen on ",
        &place.cache_address(),
        "is being served by process",
        &pid,
    ]);
    let proxy = place.webproxy(PLAIN).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
}

/// Over mq, a segment is mapped when it is used, and the limit is on what stays mapped.
#[test]
fn a_proxy_with_many_segments_has_few_of_them_mapped_by_the_cache() {
    let place = Place::over(Transport::Mq);
    let large = pattern(LARGE);
    place.write("files/large", &large);
    let cache = place
        .simplecached(["--loan-budget", "0", "-c", "files", "--max-segments", "3"])
        .listening();
    let proxy = place.webproxy(["-n", "8"]).listening();
    for _ in 0..3 {
        proxy.assert_pool_is_whole(8, "/large", &large);
        assert!((1..=3).contains(&cache.segments()), "{}", cache.segments());
    }
    place.wind_up([proxy, cache]);
}

#[test]
fn a_proxy_with_too_many_segments_is_turned_away() {
    let place = Place::new();
    place.write("files/a", "hello");
    let cache = place.simplecached(["-c", "files", "--max-segments", "3"]).listening();
    let greedy = place.webproxy(["-n", "4"]).listening();
    assert_eq!(greedy.get("/a"), Answer::Error);
    cache.wait_for("turned process");
    let modest = place.webproxy(["-n", "3"]).listening();
    assert_eq!(modest.get("/a"), ok("hello"));
    cache.terminate().assert_said(&["a pool of more than 3 segments"]);
}

fn stalled_clients_starve_nobody_and_are_cut(over: Transport) {
    let place = Place::over(over);
    place.write("files/large", pattern(LARGE));
    place.write("files/a", "hello");
    let _cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "1"]).listening();
    let proxy = place.webproxy(["-t", "1", "-n", "4", "--timeout", "3"]).listening();
    let stall = || {
        let mut client = proxy.connect();
        client.request("/large");
        client.read_exactly(1 << 10);
        client
    };
    // All but one segment.
    let mut stalled: Vec<Client> = (0..3).map(|_| stall()).collect();
    for _ in 0..10 {
        assert_eq!(proxy.get("/a"), ok("hello"));
    }
    // All of them: the next waits until one is cut.
    stalled.push(stall());
    assert_eq!(proxy.get("/a"), ok("hello"));
    for mut client in stalled {
        assert!(client.read_all().len() < LARGE, "cut short");
    }
    let exit = proxy.terminate();
    assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
    exit.assert_said(&["errors=0"]);
}

fn a_client_that_leaves_is_nobodys_error(over: Transport) {
    let place = Place::over(over);
    place.write("files/large", pattern(LARGE));
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "2"]).listening();
    for _ in 0..10 {
        let mut client = proxy.connect();
        client.request("/large");
        client.read_exactly(100);
    }
    assert_eq!(proxy.get("/large"), ok(pattern(LARGE)));
    for exit in [proxy.terminate(), cache.terminate()] {
        assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
        exit.assert_said(&["errors=0"]);
    }
}

// ---------------------------------------------------------------- the end

fn idle_programs_end_at_once_and_leave_nothing(over: Transport) {
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::over(over);
        place.write("files/a", "hello");
        let cache = place.simplecached(["-c", "files"]).listening();
        let proxy = place.webproxy(["-n", "4"]).listening();
        assert_eq!(proxy.get("/a"), ok("hello"));
        let address = proxy.address();
        for program in [proxy, cache] {
            program.signal(signal);
            let exit = program.finish();
            exit.assert_code(0);
            exit.assert_said(&["stopped: requests=1 hits=1 misses=0", "bytes=5"]);
            assert_eq!(exit.stderr.lines().count(), 2, "{}", exit.stderr);
        }
        assert!(TcpStream::connect(address).is_err());
        place.assert_nothing_left();
    }
}

fn a_running_transfer_is_let_finish(over: Transport) {
    let place = Place::over(over);
    place.write("files/large", pattern(LARGE));
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(PLAIN).listening();
    let address = proxy.address();
    let mut client = proxy.connect();
    client.request("/large");
    let start = client.read_exactly(100);
    proxy.signal(Signal::TERM);
    cache.signal(Signal::TERM);
    wait_until("no more clients are let in", || TcpStream::connect(address).is_err());
    let answer = [start, client.read_all()].concat();
    assert_eq!(Answer::parse(&answer), ok(pattern(LARGE)));
    for program in [proxy, cache] {
        let exit = program.finish();
        exit.assert_code(0);
        assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
    }
    assert!(place.is_swept());
}

fn a_transfer_that_stalls_is_left_when_the_grace_is_over(over: Transport) {
    let place = Place::over(over);
    place.write("files/large", pattern(LARGE));
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let proxy = place.webproxy(PLAIN).listening();
    let mut client = proxy.connect();
    client.request("/large");
    client.read_exactly(100);
    cache.terminate().assert_said(&["leaving with transfers under way"]);
    assert!(place.is_swept());
    proxy.terminate();
    assert!(client.read_all().len() < LARGE);
}

fn a_second_signal_ends_it_at_once(over: Transport) {
    let place = Place::over(over);
    place.write("files/large", pattern(LARGE));
    let address = place.cache_address();
    let debug = |name: &str, args: &[&str]| {
        let mut command = place.command(name);
        Program::spawn(command.env("RUST_LOG", "debug").args(args)).listening()
    };
    let cache = debug("simplecached", &["-c", "files", "--listen", &address]);
    let proxy = debug("webproxy", &["-p", "0", "--cache", &address]);
    let mut client = proxy.connect();
    client.request("/large");
    client.read_exactly(100);
    for program in [cache, proxy] {
        program.signal(Signal::TERM);
        program.wait_for("stopping");
        program.signal(Signal::INT);
        let exit = program.finish();
        exit.assert_code(0);
        exit.assert_said(&["stopped: "]);
    }
    place.assert_nothing_left();
}

#[test]
fn names_in_shared_memory_are_for_this_user_only_and_the_successors_clear_up() {
    let place = Place::over(Transport::Mq);
    place.write("files/a", "hello");
    let mut ends: Vec<(bool, bool)> = vec![(true, false), (false, true), (true, true)];
    ends.extend(ends.clone());
    for (kill_cache, kill_proxy) in ends {
        let cache = place.simplecached(["-c", "files"]).listening();
        let proxy = place.webproxy(["-n", "3"]).listening();
        assert_eq!(proxy.get("/a"), ok("hello"));
        // The lock and the lifeline of the queue; the lifeline and the segments of the pool.
        wait_until("those of the killed were swept", || place.names_left().len() == 4);
        let (files, names) = (place.queue_files(), place.names_left());
        assert_eq!(files.len(), 2, "{files:?}");
        let paths =
            files.into_iter().chain(names.iter().map(|name| Path::new("/dev/shm").join(name)));
        for path in paths {
            assert_eq!(
                fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o600,
                "{path:?}"
            );
        }
        let end =
            |program: Program, kill| if kill { program.kill() } else { drop(program.terminate()) };
        end(cache, kill_cache);
        assert_eq!(place.queue_files().len(), if kill_cache { 2 } else { 0 });
        end(proxy, kill_proxy);
    }
    place.wind_up([place.simplecached(["-c", "files"]).listening()]);
}

// ---------------------------------------------------------------- the origin

/// A real HTTP server; answers by path, and remembers what it was asked for.
struct HttpServer {
    server: Arc<tiny_http::Server>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl HttpServer {
    fn start() -> HttpServer {
        let server = Arc::new(tiny_http::Server::http("127.0.0.1:0").unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        thread::spawn({
            let (server, asked) = (Arc::clone(&server), Arc::clone(&asked));
            move || server.incoming_requests().for_each(|request| answer(request, &asked))
        });
        HttpServer { server, asked }
    }

    fn url(&self) -> String {
        format!("http://{}", self.server.server_addr())
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

fn answer(request: tiny_http::Request, asked: &Mutex<Vec<String>>) {
    use tiny_http::{Header, Response, StatusCode};
    let url = request.url().to_owned();
    asked.lock().unwrap().push(url.clone());
    let (command, argument) = url.trim_start_matches('/').split_once('/').unwrap_or(("", ""));
    let outcome = match command {
        "length" => request.respond(Response::from_data(pattern(argument.parse().unwrap()))),
        "chunked" => {
            let body = std::io::Cursor::new(pattern(argument.parse().unwrap()));
            request.respond(
                Response::new(StatusCode(200), Vec::new(), body, None, None)
                    .with_chunked_threshold(0),
            )
        }
        "status" => {
            let status = StatusCode(argument.parse().unwrap());
            request.respond(Response::from_string("no file").with_status_code(status))
        }
        "redirect" => {
            let location = Header::from_bytes("Location", format!("/{argument}")).unwrap();
            request.respond(Response::empty(StatusCode(302)).with_header(location))
        }
        _ => request.respond(Response::from_string(url)),
    };
    // The client may have left.
    let _ = outcome;
}

#[test]
fn an_origin_alone() {
    let place = Place::new();
    let http = HttpServer::start();
    let proxy = place.bare_webproxy(["-s", &http.url()]).listening();
    for size in [0, 1, 5000, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 5 << 20] {
        assert_eq!(proxy.get(&format!("/length/{size}")), ok(pattern(size)));
        assert_eq!(proxy.get(&format!("/chunked/{size}")), ok(pattern(size)));
    }
    assert_eq!(proxy.get("/redirect/length/7"), ok(pattern(7)));
    for (status, answer) in [
        (404, Answer::NotFound),
        (410, Answer::NotFound),
        (500, Answer::Error),
        (503, Answer::Error),
        (403, Answer::Error),
        (201, Answer::Error),
        (204, Answer::Error),
        (304, Answer::Error),
    ] {
        assert_eq!(proxy.get(&format!("/status/{status}")), answer, "{status}");
    }
    assert_eq!(proxy.get("/redirect/status/404"), Answer::NotFound);
    let exit = proxy.terminate();
    exit.assert_said(&["requests=24", "hits=0", "from_origin=15", "errors=6", "retired=0"]);
}

#[test]
fn paths_stay_paths_at_the_origin() {
    let place = Place::new();
    let http = HttpServer::start();
    let proxy = place.bare_webproxy(["-s", &format!("{}/base/", http.url())]).listening();
    http.asked();
    for (path, asked) in [
        ("/", "/base/"),
        ("/a.b-c_d~e/!$&'()*+,;=:@", "/base/a.b-c_d~e/!$&'()*+,;=:@"),
        ("/a?b#c", "/base/a%3Fb%23c"),
        ("/100%", "/base/100%25"),
        ("/%2f%zz%4", "/base/%2f%25zz%254"),
        ("/\"<>[]\\^`{|}\t\x7f", "/base/%22%3C%3E%5B%5D%5C%5E%60%7B%7C%7D%09%7F"),
        ("/\u{e9}", "/base/%C3%A9"),
    ] {
        assert_eq!(proxy.get(path), ok(asked), "{path}");
        assert_eq!(http.asked(), [asked]);
    }
}

#[test]
fn the_cache_comes_before_the_origin() {
    let place = Place::new();
    place.write("files/length/3", "ours");
    let http = HttpServer::start();
    let proxy = place.webproxy(["-s", &http.url()]).listening();
    // Without a cache, which is not waited for.
    assert_eq!(proxy.get("/length/3"), ok(pattern(3)));
    let cache = place.simplecached(["-c", "files"]).listening();
    http.asked();
    assert_eq!(proxy.get("/length/3"), ok("ours"));
    assert!(http.asked().is_empty());
    assert_eq!(proxy.get("/length/4"), ok(pattern(4)));
    assert_eq!(http.asked(), ["/length/4"]);
    assert_eq!(proxy.get("/status/404"), Answer::NotFound);
    assert_eq!(proxy.get("/status/500"), Answer::Error);
    cache.kill();
    assert_eq!(proxy.get("/length/3"), ok(pattern(3)));
    let exit = proxy.terminate();
    exit.assert_said(&["requests=6", "hits=1", "misses=3", "from_origin=3", "errors=1"]);
    // Embedded, too.
    let proxy = place.bare_webproxy(["--root", "files", "-s", &http.url()]).listening();
    assert_eq!(proxy.get("/length/3"), ok("ours"));
    assert_eq!(proxy.get("/length/4"), ok(pattern(4)));
}

#[test]
fn an_origin_that_refuses_connections_is_an_error() {
    // Bound, but not listening: nobody else can get the port meanwhile.
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let unheard = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&unheard, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&unheard).unwrap()).unwrap();
    let place = Place::new();
    place.write("root/a", "hello");
    let proxy =
        place.bare_webproxy(["--root", "root", "-s", &format!("http://{address}")]).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    assert_eq!(proxy.get("/b"), Answer::Error);
}

#[derive(Clone, Copy)]
enum Then {
    Close,
    CloseSoon,
    Stall,
}

/// An origin that answers one request a connection with these bytes.
fn raw_origin(reply: &'static [u8], then: Then) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            stream.set_read_timeout(Some(WATCHDOG)).unwrap();
            thread::spawn(move || {
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                    request.extend(byte);
                }
                let _ = stream.write_all(reply);
                match then {
                    Then::Close => {}
                    Then::CloseSoon => thread::sleep(Duration::from_micros(300)),
                    Then::Stall => drop(stream.read(&mut byte)), // until the proxy hangs up
                }
            });
        }
    });
    url
}

#[test]
fn an_origin_that_hangs_up_between_requests() {
    let place = Place::new();
    // It does not say that it will, so that its connections are taken for reusable.
    let url = raw_origin(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Then::CloseSoon);
    let proxy = place.bare_webproxy(["-s", &url]).listening();
    for _ in 0..300 {
        assert_eq!(proxy.get("/a"), ok("hello"));
    }
}

#[test]
fn an_origin_that_cuts_its_body() {
    let place = Place::new();
    let short = Answer::Short { announced: 10, received: b"hello".to_vec() };
    for (reply, answer) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"[..], short),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Answer::Error),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n", Answer::Error),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", ok("hello")), // its end is the connection's
        (b"HTTP/1.1 200 OK\r\nContent-Len", Answer::Error),
        (b"", Answer::Error),
        (b"nonsense\r\n\r\n", Answer::Error),
    ] {
        let proxy = place.bare_webproxy(["-s", &raw_origin(reply, Then::Close)]).listening();
        assert_eq!(proxy.get("/a"), answer, "{}", reply.escape_ascii());
    }
}

#[test]
fn an_origin_that_stalls_is_cut_and_holds_up_nobody() {
    let place = Place::new();
    place.write("root/a", "hello");
    let short = Answer::Short { announced: 10, received: b"hello".to_vec() };
    for (reply, answer) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"[..], short),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Answer::Error),
        (b"HTTP/1.1 200", Answer::Error),
        (b"", Answer::Error),
    ] {
        let url = raw_origin(reply, Then::Stall);
        let proxy = place
            .bare_webproxy(["--root", "root", "-t", "1", "--timeout", "3", "-s", &url])
            .listening();
        let mut waiting: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
        waiting.iter_mut().for_each(|client| client.request("/b"));
        assert_eq!(proxy.get("/a"), ok("hello"));
        for mut client in waiting {
            assert_eq!(client.answer(), answer, "{}", reply.escape_ascii());
        }
    }
}

// ---------------------------------------------------------------- command lines

#[test]
fn flags_out_of_range_are_refused() {
    let place = Place::new();
    place.write("locals.txt", "");
    for (program, args, parts) in [
        ("webproxy", &["-t", "0"][..], &["--thread-count", "0 is not in 1..=1024"][..]),
        ("webproxy", &["-t", "1025"], &["1025 is not in 1..=1024"]),
        ("webproxy", &["-n", "0"], &["--segment-count", "0 is not in 1.."]),
        ("webproxy", &["-z", "823"], &["--segment-size", "at least 824 bytes"]),
        ("webproxy", &["-z", "big"], &["--segment-size", "not a number"]),
        ("webproxy", &["--slots", "0"], &["--slots", "0 is not in 1.."]),
        ("webproxy", &["-p", "65536"], &["--listen-port", "0..=65535"]),
        ("webproxy", &["--listen", "here"], &["--listen", "invalid IP address"]),
        ("webproxy", &["--dialect", "latin"], &["--dialect", "spec, classic"]),
        ("webproxy", &["--timeout", "0"], &["--timeout", "0.001 to 86400"]),
        ("webproxy", &["--timeout", "-1"], &["-1"]),
        ("webproxy", &["--cache", "mq:cache"], &["--cache", "names no message queue"]),
        ("webproxy", &["--cache", "/cache"], &["--cache", "unix:PATH"]),
        ("webproxy", &["--cache", "unix:"], &["--cache", "unix:PATH"]),
        ("webproxy", &["--cache", "unix:/a", "--root", "/"], &["cannot be used with"]),
        ("webproxy", &["-s", "ftp://host"], &["--server", "http://HOST"]),
        ("webproxy", &["-s", "host"], &["--server", "http://HOST"]),
        ("webproxy", &["-s", "http://host/?a"], &["--server", "query"]),
        ("webproxy", &["--mapped", "much"], &["--mapped", "not a number"]),
        ("webproxy", &["--root", "/", "--loan-budget", "-1"], &["-1"]),
        ("webproxy", &["--loan-budget", "1M"], &["--root"]),
        ("simplecached", &["--loan-budget", "1T"], &["--loan-budget", "not a number"]),
        ("webproxy", &["--nonsense"], &["--nonsense"]),
        ("simplecached", &["-t", "0"], &["--nthreads", "0 is not in 1..=1024"]),
        ("simplecached", &["-t", "1025"], &["1025 is not in 1..=1024"]),
        ("simplecached", &["-d", "2500001"], &["--delay", "0..=2500000"]),
        ("simplecached", &["--max-segments", "0"], &["--max-segments", "1..=65536"]),
        ("simplecached", &["--listen", "mq:/a/b"], &["--listen", "names no message queue"]),
    ] {
        place.run(program, args).finish().assert_usage_error(parts);
    }
    for program in ["webproxy", "simplecached"] {
        for flag in ["-h", "--help", "-V", "--version"] {
            place.run(program, [flag]).finish().assert_code(0);
        }
    }
}

#[test]
fn what_keeps_a_program_from_starting_is_named() {
    let place = Place::new();
    place.write("a", "hello");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let terabytes = ["-n", "65536", "-z", "1073741824"];
    let long_path = format!("unix:/{}", "n".repeat(200));
    for (program, args, parts) in [
        (
            "webproxy",
            &["-p", &port, "--listen", "127.0.0.1"][..],
            &["127.0.0.1:", &port, "Address already in use"][..],
        ),
        ("webproxy", &terabytes, &["cannot make the pool", "70369012613120 bytes", "available"]),
        ("webproxy", &["-n", "65537"], &["the number of segments is 65537", "from 1 to 65536"]),
        ("webproxy", &["--slots", "513"], &["the number of slots is 513", "from 1 to 512"]),
        ("webproxy", &["--root", "absent"], &["absent: No such file"]),
        ("webproxy", &["--root", "a"], &["a: Not a directory"]),
        ("webproxy", &["--cache", &long_path], &["at most 107"]),
        ("simplecached", &[], &["locals.txt: No such file"]),
        ("simplecached", &["-c", "absent"], &["absent: No such file"]),
        (
            "simplecached",
            &["-c", ".", "--listen", "unix:absent/absent/cache.sock"],
            &["cannot listen on unix:absent"],
        ),
    ] {
        let exit = place.run(program, args).finish();
        exit.assert_failure(parts);
        assert!(exit.stderr.starts_with(program), "{}", exit.stderr);
    }
}
