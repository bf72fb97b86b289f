//! `webproxy` in front of an HTTP origin: what it asks for, what it believes, and what it keeps.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use shmferry_test_support::{Answer, Client, Place, Program, ok, pattern, wait_until};

// ---------------------------------------------------------------- an origin that records

/// A real HTTP server: answers each request with its path, and remembers what it was asked.
struct Recorder {
    server: Arc<tiny_http::Server>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// A request as the origin saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    path: String,
    authorization: Option<String>,
}

impl Recorder {
    fn start() -> Recorder {
        let server = Arc::new(tiny_http::Server::http("127.0.0.1:0").unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        thread::spawn({
            let (server, asked) = (Arc::clone(&server), Arc::clone(&asked));
            move || server.incoming_requests().for_each(|request| Recorder::answer(request, &asked))
        });
        Recorder { server, asked }
    }

    fn answer(request: tiny_http::Request, asked: &Mutex<Vec<Asked>>) {
        use tiny_http::{Header, Response, StatusCode};
        let path = request.url().to_owned();
        let header = |name| request.headers().iter().find(|header| header.field.equiv(name));
        let authorization = header("Authorization").map(|header| header.value.to_string());
        asked.lock().unwrap().push(Asked { path: path.clone(), authorization });
        // The proxy may have left: then nothing takes the reply.
        let _ = if path == "/redirect" {
            let location = Header::from_bytes("Location", "/found").unwrap();
            request.respond(Response::empty(StatusCode(302)).with_header(location))
        } else if path == "/broken" {
            request.respond(Response::empty(StatusCode(500)))
        } else {
            request.respond(Response::from_string(path))
        };
    }

    fn address(&self) -> String {
        self.server.server_addr().to_string()
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

#[test]
fn a_path_that_climbs_out_of_the_base_url_is_not_found_and_the_origin_is_never_asked() {
    let place = Place::new();
    let origin = Recorder::start();
    let url = format!("http://{}/public", origin.address());
    let proxy = place.bare_webproxy(["-s", &url]).listening();
    for path in [
        "/..",
        "/.",
        "/../private/x",
        "/./x",
        "/a/..",
        "/a/.",
        "/a/../../private/x",
        "//../private/x",
        "/%2e%2e/private/x",
        "/%2E%2e/private/x",
        "/%2e./private/x",
        "/.%2E/private/x",
        "/%2e/x",
        "/a/%2E%2e/b",
        "/a/%2e%2e",
        "/..%2fprivate/x",
        "/a%2f..%2fb",
        "/a%2F%2e%2E%2fb",
        "/%2f%2e%2e",
        // Some servers cut a segment's parameters off before they look at it.
        "/..;v=1/private/x",
        "/%2e%2e%3bv=1/private/x",
    ] {
        assert_eq!(proxy.get(path), Answer::NotFound, "{path}");
        assert_eq!(origin.asked(), [], "{path}");
    }
    for (path, asked) in [
        ("/..a", "/public/..a"),
        ("/a..", "/public/a.."),
        ("/...", "/public/..."),
        ("/.well-known/x", "/public/.well-known/x"),
        ("/%2e%2ea", "/public/%2e%2ea"),
        ("/a%2fb", "/public/a%2fb"),
        // Decoded once, these are names with a percent sign in them.
        ("/%252e%252e/x", "/public/%252e%252e/x"),
        ("/%%32e%%32e/x", "/public/%25%32e%25%32e/x"),
        ("/%2", "/public/%252"),
    ] {
        assert_eq!(proxy.get(path), ok(asked));
        assert_eq!(origin.asked(), [Asked { path: asked.to_owned(), authorization: None }]);
    }
    proxy.terminate().assert_said(&["requests=30", "from_origin=9", "errors=0"]);
}

// ---------------------------------------------------------------- credentials

#[test]
fn credentials_in_the_base_url_reach_the_origin_and_no_log_line() {
    let place = Place::new();
    let origin = Recorder::start();
    let url = format!("http://user:se%63ret%40@{}/", origin.address());
    let mut command = place.command("webproxy");
    command.args(["-p", "0", "-s", &url, "--timeout", "20"]);
    command.env("RUST_LOG", "trace,ureq=trace,ureq_proto=trace");
    let proxy = Program::spawn(&mut command).listening();
    assert_eq!(proxy.get("/a"), ok("/a"));
    assert_eq!(proxy.get("/redirect"), ok("/found"));
    assert_eq!(proxy.get("/broken"), Answer::Error);
    let basic = "Basic dXNlcjpzZWNyZXRA"; // user:secret@
    for asked in origin.asked() {
        assert_eq!(asked.authorization.as_deref(), Some(basic), "{}", asked.path);
    }
    let address = origin.address();
    drop(origin);
    wait_until("the origin was gone", || proxy.get("/a") == Answer::Error);
    let said = proxy.terminate().stderr;
    for secret in ["se%63ret", "secret", "dXNlcjpzZWNyZXRA"] {
        assert!(!said.contains(secret), "{secret} in:\n{said}");
    }
    assert!(said.contains(&format!("origin http://***@{address}")), "{said}");
}

#[test]
fn credentials_in_a_base_url_that_is_refused_are_not_shown() {
    let place = Place::new();
    for (url, why) in [
        ("http://user:secret@host:99999", "port"),
        ("http://user:secret@host:abc", "port"),
        ("ftp://user:secret@host", "http://HOST"),
        ("http://user:sec/ret@host", "port"),
        ("user:secret@host", "http://HOST"),
        ("http://user:secret@host/?query", "query"),
        ("http://user:sec ret@host", "not a URL"),
        ("http://user:%ff%ret@host", "percent"),
    ] {
        let exit = place.run("webproxy", ["-p", "0", "-s", url]).finish();
        exit.assert_usage_error(&["--server", why]);
        for secret in ["secret", "sec/", "ret@", "sec ret"] {
            assert!(!exit.stderr.contains(secret), "{}", exit.stderr);
        }
    }
}

// ---------------------------------------------------------------- bodies that do not end

/// An origin whose body has no length: chunk after chunk, until it is told to end it, or until its
/// connection is gone.
struct Endless {
    url: String,
    /// Connections that the proxy has let go before the end.
    dropped: Arc<AtomicUsize>,
    may_end: Arc<AtomicBool>,
}

/// Bytes in a chunk of [`Endless`].
const CHUNK: usize = 16 << 10;

impl Endless {
    /// `pause` lies between two chunks.
    fn start(pause: Duration) -> Endless {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (dropped, may_end) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let endless = Endless { url, dropped: Arc::clone(&dropped), may_end: Arc::clone(&may_end) };
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (dropped, may_end) = (Arc::clone(&dropped), Arc::clone(&may_end));
                thread::spawn(move || {
                    let mut request = Vec::new();
                    let mut byte = [0];
                    while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                        request.extend(byte);
                    }
                    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    let mut chunk = format!("{CHUNK:x}\r\n").into_bytes();
                    chunk.extend(pattern(CHUNK));
                    chunk.extend(b"\r\n");
                    let mut written = stream.write_all(head.as_bytes());
                    while written.is_ok() && !may_end.load(Ordering::SeqCst) {
                        written = stream.write_all(&chunk);
                        thread::sleep(pause);
                    }
                    if written.and_then(|()| stream.write_all(b"0\r\n\r\n")).is_err() {
                        dropped.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        endless
    }

    fn dropped(&self) -> usize {
        self.dropped.load(Ordering::SeqCst)
    }
}

/// Files without a name that a program has open.
fn unnamed_files(program: &Program) -> usize {
    let open = fs::read_dir(format!("/proc/{}/fd", program.pid())).unwrap().flatten();
    let targets = open.filter_map(|fd| fs::read_link(fd.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("/tmp/#")).count()
}

#[test]
fn a_body_without_length_or_end_is_an_error_at_the_spool_limit_and_its_origin_is_let_go() {
    let place = Place::new();
    let origin = Endless::start(Duration::ZERO);
    for (round, limit) in ["1M", "1000000", "10k"].iter().enumerate() {
        let proxy = place.bare_webproxy(["-s", &origin.url, "--spool-limit", limit]).listening();
        assert_eq!(proxy.get("/a"), Answer::Error, "{limit}");
        wait_until("the origin's connection was dropped", || origin.dropped() == round + 1);
        wait_until("the spool was gone", || unnamed_files(&proxy) == 0);
        let bytes = ["1048576 bytes", "1000000 bytes", "10240 bytes"][round];
        let said = ["WARN", "the origin failed for /a", bytes, "--spool-limit", "errors=1"];
        place.wind_up([proxy])[0].assert_said(&said);
    }
}

#[test]
fn a_body_as_long_as_the_spool_limit_is_sent() {
    let place = Place::new();
    let origin = Chunked::start();
    for limit in [0, 1, 5000, 64 << 10, (64 << 10) + 1, 200_000] {
        let args = ["-s", &origin.url, "--spool-limit", &limit.to_string()];
        let proxy = place.bare_webproxy(args).listening();
        assert_eq!(proxy.get(&format!("/{limit}")), ok(pattern(limit)), "{limit}");
        assert_eq!(proxy.get(&format!("/{}", limit + 1)), Answer::Error, "{limit}");
    }
}

/// An origin with bodies of a length that it does not announce.
struct Chunked {
    url: String,
}

impl Chunked {
    fn start() -> Chunked {
        let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
        let url = format!("http://{}", server.server_addr());
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let len = request.url()[1..].parse().unwrap();
                let body = std::io::Cursor::new(pattern(len));
                let status = tiny_http::StatusCode(200);
                let response = tiny_http::Response::new(status, Vec::new(), body, None, None);
                // The proxy hangs up on a body that is too long for it.
                let _ = request.respond(response.with_chunked_threshold(0));
            }
        });
        Chunked { url }
    }
}

/// Clients that leave in this way while their body is spooled end the spooling.
fn the_spool_ends_with_its_client(leave: impl Fn(Client)) {
    let place = Place::new();
    let origin = Endless::start(Duration::from_millis(5));
    let proxy = place.bare_webproxy(["-s", &origin.url, "--timeout", "600"]).listening();
    for round in 1..=3 {
        let mut client = proxy.connect();
        client.request("/a");
        wait_until("its body was spooled to disk", || unnamed_files(&proxy) == 1);
        leave(client);
        wait_until("the origin's connection was dropped", || origin.dropped() == round);
        wait_until("the spool was gone", || unnamed_files(&proxy) == 0);
    }
    let [exit] = place.wind_up([proxy]);
    assert!(!exit.stderr.contains("WARN"), "{}", exit.stderr);
    exit.assert_said(&["requests=3", "errors=0"]);
}

#[test]
fn a_client_that_resets_while_its_body_is_spooled_ends_the_spooling() {
    the_spool_ends_with_its_client(Client::reset);
}

#[test]
fn a_client_that_closes_while_its_body_is_spooled_ends_the_spooling() {
    the_spool_ends_with_its_client(drop);
}

#[test]
fn a_client_that_closes_its_half_while_its_body_is_spooled_gets_all_of_it() {
    let place = Place::new();
    let origin = Endless::start(Duration::from_millis(5));
    let proxy = place.bare_webproxy(["-s", &origin.url]).listening();
    let mut client = proxy.connect();
    client.request("/a");
    client.half_close();
    wait_until("its body was spooled to disk", || unnamed_files(&proxy) == 1);
    origin.may_end.store(true, Ordering::SeqCst);
    let answer = client.answer();
    let Answer::Ok(body) = &answer else { panic!("{answer:?}") };
    assert!(body.chunks(CHUNK).all(|chunk| *chunk == pattern(CHUNK)));
    assert!(body.len() > CHUNK);
    // So does one whose reply is no file.
    let origin = Endless::start(Duration::ZERO);
    let classic = ["--dialect", "classic"];
    let args = ["-s", &origin.url, "--spool-limit", "8M"];
    let proxy = place.bare_webproxy(args.into_iter().chain(classic)).listening();
    let mut client = proxy.connect();
    client.request("/a");
    client.half_close();
    assert_eq!(str::from_utf8(&client.read_all()), Ok("GETFILE ERROR 0\n"));
}

// ---------------------------------------------------------------- encodings

/// An origin that answers one request a connection with these bytes.
fn raw_origin(reply: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                request.extend(byte);
            }
            let _ = stream.write_all(reply.as_bytes());
        }
    });
    url
}

#[test]
fn an_encoded_body_is_an_error_and_never_handed_on_as_the_file() {
    let place = Place::new();
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    for (headers, body, answer) in [
        ("Content-Encoding: gzip\r\nContent-Length: 5", "hello", Answer::Error),
        ("content-encoding: BR\r\nContent-Length: 5", "hello", Answer::Error),
        ("Content-Encoding: identity, gzip\r\nContent-Length: 5", "hello", Answer::Error),
        ("Content-Encoding:\r\nContent-Encoding: x\r\nContent-Length: 5", "hello", Answer::Error),
        ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", chunked, Answer::Error),
        ("Transfer-Encoding: gzip, chunked", chunked, Answer::Error),
        ("Content-Encoding: identity\r\nContent-Length: 5", "hello", ok("hello")),
        ("Content-Encoding:\r\nContent-Length: 5", "hello", ok("hello")),
        ("Transfer-Encoding: Chunked", chunked, ok("hello")),
    ] {
        let start = "HTTP/1.1 200 OK\r\nConnection: close";
        let url = raw_origin(format!("{start}\r\n{headers}\r\n\r\n{body}"));
        let proxy = place.bare_webproxy(["-s", &url]).listening();
        assert_eq!(proxy.get("/a"), answer, "{headers}");
        let exit = proxy.terminate();
        if answer == Answer::Error {
            exit.assert_said(&["the origin failed for /a", "ncoding", "errors=1"]);
        }
    }
}
