//! What the web server answers: parts, conditions, heads, odd names, errors; with real processes.

mod site;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::SystemTime;

use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{LARGE, noise, wait_until};
use site::{Answer, IDLE, Site, curl, has, start_curl};

#[test]
fn parts_are_served_as_asked_for_from_segments_and_from_loans() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let file = noise(1, 100_000);
    let site = Site::new(&[("a.bin", &file), ("empty", b"")]);
    for lent in [false, true] {
        if lent {
            wait_until("the file was lent", || {
                site.get("/a.bin").assert(200, &file);
                site.metric("shmferry_http_lent_total") > 0
            });
        }
        let before = site.metric("shmferry_http_lent_total");
        let parts = [
            ("0-4", 0, 5),
            ("0-0", 0, 1),
            ("5000-70000", 5000, 70_001),
            ("99990-", 99_990, 100_000),
            ("99999-99999", 99_999, 100_000),
            ("-7", 99_993, 100_000),
            ("-5000000", 0, 100_000),
            ("50000-18446744073709551615", 50_000, 100_000),
        ];
        for (part, start, end) in parts {
            let answer = site.curl("/a.bin", &["-r", part]);
            answer.assert(206, &file[start..end]);
            let range = format!("bytes {start}-{}/100000", end - 1);
            assert_eq!(answer.header("content-range"), Some(range), "{part}");
        }
        if lent {
            let lent = site.metric("shmferry_http_lent_total") - before;
            assert_eq!(lent, parts.len() as u64);
        }
    }
    for beyond in ["100000-", "100000-100001", "18446744073709551615-"] {
        let answer = site.curl("/a.bin", &["-r", beyond]);
        answer.assert_status(416);
        assert_eq!(answer.header("content-range").as_deref(), Some("bytes */100000"));
    }
    site.curl("/a.bin", &["-r", "9-8"]).assert(200, &file); // no range
    site.curl("/empty", &["-r", "0-"]).assert_status(416);
    site.curl("/empty", &["-r", "-5"]).assert_status(416);
    // What is not one range is no reason to send less.
    for odd in ["bytes=0-1,4-5", "bytes=abc", "bytes=", "lines=1-2", "bytes=0-4;head", "0-4"] {
        site.curl("/a.bin", &["-H", &format!("Range: {odd}")]).assert(200, &file);
    }
    let answer = site.get("/a.bin");
    assert_eq!(answer.header("accept-ranges").as_deref(), Some("bytes"));
    assert_eq!(answer.header("content-range"), None);
    let [_, cache] = site.end();
    assert_eq!(cache.count("errors"), 0);
}

#[test]
fn an_interrupted_download_resumes_and_a_changed_file_begins_anew() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let file = noise(2, 3_000_000);
    let site = Site::new(&[("a.bin", &file)]);
    let out = site.place.write("out", &file[..1_234_567]);
    let args = ["-sS", "-C", "-", "-o", out.to_str().unwrap()];
    let ended = std::process::Command::new("curl").args(args).arg(site.url("/a.bin")).status();
    assert!(ended.unwrap().success());
    assert!(fs::read(&out).unwrap() == file, "resumed wrongly");

    let tag = site.tag("/a.bin");
    let date = site.get("/a.bin").header("last-modified").unwrap();
    let part = |validator: &str| {
        site.curl("/a.bin", &["-r", "5-9", "-H", &format!("If-Range: {validator}")])
    };
    part(&tag).assert(206, &file[5..10]);
    part(&date).assert(206, &file[5..10]);
    part(&format!("W/{tag}")).assert(200, &file); // a weak one vouches for nothing
    part("Fri, 01 Jan 2100 00:00:00 GMT").assert(200, &file); // not the date that we gave
    part("\"another\"").assert(200, &file);

    let changed = noise(3, 2_000_000);
    site.place.write("files/a.bin", &changed);
    part(&tag).assert(200, &changed);
    // Beyond its new end, too.
    let condition = format!("If-Range: {tag}");
    let beyond = ["-r", "2500000-", "-H", &condition];
    site.curl("/a.bin", &beyond).assert(200, &changed);
    assert_ne!(site.tag("/a.bin"), tag);
    site.curl("/a.bin", &["-r", "2500000-"]).assert_status(416);
    site.end();
}

#[test]
fn what_the_client_has_is_not_sent_again() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let site = Site::new(&[("a.txt", b"hello")]);
    let new = site.get("/a.txt");
    new.assert(200, b"hello");
    assert_eq!(new.header("etag"), None, "a change of a file this new might not show");
    let tag = site.tag("/a.txt");
    let date = site.get("/a.txt").header("last-modified").unwrap();
    let fetch = |header: String| site.curl("/a.txt", &["-H", &header]);
    let had = [
        format!("If-None-Match: {tag}"),
        format!("If-None-Match: W/{tag}"),
        format!("If-None-Match: \"other\", {tag}"),
        "If-None-Match: *".to_owned(),
        format!("If-Modified-Since: {date}"),
        "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT".to_owned(),
    ];
    for header in had {
        let answer = fetch(header);
        answer.assert_status(304);
        assert_eq!((answer.header("etag"), &answer.body[..]), (Some(tag.clone()), &b""[..]));
        assert_eq!(answer.header("content-length"), None, "{}", answer.head);
    }
    for header in [
        "If-None-Match: \"other\"".to_owned(),
        "If-Modified-Since: Sat, 01 Jan 2000 00:00:00 GMT".to_owned(),
        "If-Modified-Since: yesterday".to_owned(),
    ] {
        fetch(header).assert(200, b"hello");
    }
    // The tag counts, and not the date.
    let both = ["-H", &format!("If-Modified-Since: {date}"), "-H", "If-None-Match: \"other\""];
    site.curl("/a.txt", &both).assert(200, b"hello");

    site.place.write("files/a.txt", b"HELLO"); // as long as before
    fetch(format!("If-None-Match: {tag}")).assert(200, b"HELLO");
    site.tag("/a.txt");
    fetch(format!("If-None-Match: {tag}")).assert(200, b"HELLO");
    // Even if its time is set back each time.
    let long_ago = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let write = |bytes: &[u8]| {
        let path = site.place.write("files/a.txt", bytes);
        fs::File::options().append(true).open(path).unwrap().set_modified(long_ago).unwrap();
    };
    write(b"hello");
    let tag = site.tag("/a.txt");
    write(b"HELLO");
    assert_ne!(site.tag("/a.txt"), tag);
    let date = site.get("/a.txt").header("last-modified").unwrap();
    assert_eq!(date, "Sun, 09 Sep 2001 01:46:40 GMT");
    site.end();
}

#[test]
fn heads_are_those_of_bodies() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let site = Site::new(&[("a.png", &[7; 5000]), ("page.html", b"<p>"), ("unknown.zzz", b"?")]);
    let _ = ["/a.png", "/page.html", "/unknown.zzz"].map(|path| site.tag(path));
    let dated = |head: &str| -> Vec<String> {
        let mut lines: Vec<_> = head.lines().skip(1).map(str::to_lowercase).collect();
        lines.retain(|line| !line.starts_with("date:"));
        lines.sort();
        lines
    };
    for (path, kind) in [
        ("/a.png", "image/png"),
        ("/page.html", "text/html; charset=utf-8"),
        ("/unknown.zzz", "application/octet-stream"),
        ("/", "text/html; charset=utf-8"),
        ("/metrics", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    ] {
        let (head, get) = (site.curl(path, &["-I"]), site.curl(path, &[]));
        assert_eq!((head.status, get.status), (200, 200));
        assert_eq!(head.body, b"");
        assert_eq!(get.header("content-type").as_deref(), Some(kind));
        if path != "/metrics" {
            assert_eq!(dated(&head.head), dated(&get.head));
        }
    }
    site.curl("/absent", &["-I"]).assert_status(404);
    // A range counts for GET alone.
    let head = site.curl("/a.png", &["-I", "-r", "0-1"]);
    assert_eq!((head.status, head.header("content-length")), (200, Some("5000".to_owned())));
    site.end();
}

#[test]
fn one_connection_serves_many_requests_and_old_clients_get_one_each() {
    let _watchdog = watchdog();
    let file = noise(4, 20_000);
    let site = Site::new(&[("a", b"hello"), ("b", &file)]);
    let mut stream = BufReader::new(TcpStream::connect(site.address).unwrap());
    for round in 0..300 {
        let (path, expected) =
            if round % 3 == 0 { ("/b", &file[..]) } else { ("/a", &b"hello"[..]) };
        let answer = ask_on(&mut stream, path);
        answer.assert(200, expected);
    }
    // Requests that are sent at once are answered in order.
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let many = [request("/a"), request("/b"), request("/absent"), request("/a")].concat();
    stream.get_mut().write_all(many.as_bytes()).unwrap();
    for (status, body) in [(200, &b"hello"[..]), (200, &file), (404, b"404 Not Found\n")] {
        read_answer(&mut stream).assert(status, body);
    }
    read_answer(&mut stream).assert(200, b"hello");

    // HTTP/1.0: the connection ends with the answer.
    site.ask("GET /b HTTP/1.0\r\n\r\n").assert(200, &file);
    if has("curl") {
        Answer::parse(&curl(&site.url("/b"), &["-0"])).assert(200, &file);
    }
    drop(stream);
    site.end();
}

/// Some clients shut their side down once they have asked.
#[test]
fn a_client_that_has_said_all_gets_its_answer() {
    let _watchdog = watchdog();
    let bytes = noise(5, 8 << 20);
    let site = Site::new(&[("large", &bytes)]);
    for _ in 0..5 {
        let mut stream = TcpStream::connect(site.address).unwrap();
        stream.write_all(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.ends_with(&bytes), "{} bytes came", answer.len());
    }
    site.end();
}

fn ask_on(stream: &mut BufReader<TcpStream>, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    read_answer(stream)
}

fn read_answer(stream: &mut BufReader<TcpStream>) -> Answer {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        assert!(stream.read_until(b'\n', &mut bytes).unwrap() > 0, "the connection ended");
    }
    let mut answer = Answer::parse(&bytes);
    answer.body.resize(answer.header("content-length").unwrap().parse().unwrap(), 0);
    stream.read_exact(&mut answer.body).unwrap();
    answer
}

#[test]
fn bad_requests_are_told_apart() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let site = Site::new(&[("a", b"hello"), ("dir/b", b"there")]);
    for path in ["/absent", "/dir", "/dir/absent", "/absent/", "/a/", "/a/b", "/%ff", "/.../a"] {
        site.curl(path, &[]).assert_status(404);
    }
    let bad = [
        "/../a",
        "/dir/../a",
        "/..",
        "/.",
        "/./a",
        "//a",
        "/dir//b",
        "/%2e%2e/a",
        "/dir/%2E%2E/a",
        "/%2e/a",
        "/a%00",
        "/a%00head",
        "/dir/%00list",
        "/dir%2fb",
        "/dir/..%2fa",
        "/%zz",
        "/a%2",
        "/%",
        "//",
    ];
    for path in bad {
        site.curl(path, &[]).assert_status(400);
    }
    // Decoded once.
    site.curl("/%252e%252e/a", &[]).assert_status(404);
    site.curl("/a?query=/../", &[]).assert(200, b"hello");
    site.curl("/%61", &[]).assert(200, b"hello");
    site.curl(&format!("/{}", "x".repeat(5000)), &[]).assert_status(414);
    site.curl(&format!("/{}", "x".repeat(3000)), &[]).assert_status(404);
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
        let answer = site.curl("/a", &["-X", method]);
        answer.assert_status(405);
        assert_eq!(answer.header("allow").as_deref(), Some("GET, HEAD"));
    }
    site.curl("/a", &["-d", "a body"]).assert_status(405);
    site.curl("/metrics", &["-X", "POST"]).assert_status(405);
    site.ask("OPTIONS * HTTP/1.0\r\n\r\n").assert_status(405);
    site.ask("GET a HTTP/1.0\r\n\r\n").assert_status(400);
    site.ask("GET / / HTTP/1.0\r\n\r\n").assert_status(400);
    site.ask("GET http://elsewhere/a HTTP/1.0\r\n\r\n").assert(200, b"hello");
    // No name gets a line of its own into a head.
    let answer = site.curl("/a%0d%0aX-Made:%20up", &[]);
    answer.assert_status(404);
    assert_eq!(answer.header("x-made"), None);
    site.end();
}

#[test]
fn names_of_all_kinds_are_listed_and_can_be_fetched() {
    let _watchdog = watchdog();
    let site = Site::new(&[("sub/inner", b"inner")]);
    let names: [&[u8]; 18] = [
        b"with blank",
        b" leading",
        b"quote\"s",
        b"apostrophe's",
        b"\"><script>alert(1).png",
        b"100%",
        b"%41",
        b"sharp#fragment",
        b"query?x=1",
        b"a&amp;b",
        b"line\nbreak",
        b"tab\t",
        b"\xff\xfe not UTF-8",
        "Grüße 漢字".as_bytes(),
        b"a:b",
        b"back\\slash",
        b"..dots",
        b"+plus;",
    ];
    for name in names {
        let path = site.place.path("files").join(OsStr::from_bytes(name));
        fs::write(path, name).unwrap();
    }
    fs::create_dir(site.place.path("files/<b>&")).unwrap();
    fs::write(site.place.path("files/<b>&/x\"y"), "deep").unwrap();
    // What leads out of the directory, and what is no file, is not there.
    std::os::unix::fs::symlink("/etc/hostname", site.place.path("files/outside")).unwrap();
    std::os::unix::fs::symlink("a:b", site.place.path("files/inside")).unwrap();

    let page = site.get("/");
    page.assert_status(200);
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    let page = String::from_utf8(page.body).unwrap();
    assert!(!page.contains("<script") && !page.contains("outside"), "{page}");
    let links = links_of(&page);
    let mut fetched: Vec<Vec<u8>> = links
        .iter()
        .filter(|link| !link.ends_with('/') && !["/made", "/inside"].contains(&link.as_str()))
        .map(|link| {
            let answer = site.get(link);
            answer.assert_status(200);
            answer.body
        })
        .collect();
    fetched.sort();
    let mut expected = names.map(<[u8]>::to_vec);
    expected.sort();
    assert_eq!(fetched, expected);
    site.get("/inside").assert(200, b"a:b");
    site.get("/outside").assert_status(404);

    let directories: Vec<_> = links.iter().filter(|link| link.ends_with('/')).collect();
    assert_eq!(directories, ["/%3Cb%3E%26/", "/sub/"]);
    let inner = String::from_utf8(site.get(directories[0]).body).unwrap();
    assert_eq!(links_of(&inner), ["../", "/%3Cb%3E%26/x%22y"]);
    site.get("/%3Cb%3E%26/x%22y").assert(200, b"deep");
    site.end();
}

fn links_of(page: &str) -> Vec<String> {
    page.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

#[test]
fn a_file_that_changes_is_never_mixed() {
    let _watchdog = watchdog();
    let (long, short) = (noise(5, 300_000), noise(6, 70_000));
    let site = Site::new(&[("a", &long)]);
    let (next, at) = (site.place.path("files/next"), site.place.path("files/a"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for content in [&long, &short].into_iter().cycle() {
                if done.load(Relaxed) {
                    break;
                }
                fs::write(&next, content).unwrap();
                fs::rename(&next, &at).unwrap();
            }
        });
        let mut seen = [0, 0];
        for _ in 0..10_000 {
            let answer = site.get("/a");
            let is_short = answer.body.len() == short.len();
            answer.assert(200, if is_short { &short } else { &long });
            seen[usize::from(is_short)] += 1;

            let answer = site.ask("GET /a HTTP/1.0\r\nRange: bytes=60000-\r\n\r\n");
            let is_short = answer.header("content-range").unwrap() == "bytes 60000-69999/70000";
            answer.assert(206, if is_short { &short[60_000..] } else { &long[60_000..] });

            let answer = site.ask("GET /a HTTP/1.0\r\nRange: bytes=200000-200009\r\n\r\n");
            match answer.status {
                416 => assert_eq!(answer.header("content-range").unwrap(), "bytes */70000"),
                _ => answer.assert(206, &long[200_000..200_010]),
            }
            if seen.iter().all(|count| *count > 100) {
                break;
            }
        }
        done.store(true, Relaxed);
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    });
    let _ = fs::remove_file(&next);
    site.end();
}

#[test]
fn slow_readers_more_than_segments_get_everything() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let file = noise(7, 3_000_000);
    let site = Site::with(&["--segments", "2"], &[("a", &file), ("small", b"hello")]);
    let url = site.url("/a");
    let slow: Vec<_> = (0..12).map(|_| start_curl(&url, &["--limit-rate", "1M"])).collect();
    for _ in 0..20 {
        site.get("/small").assert(200, b"hello");
    }
    for curl in slow {
        let output = curl.wait_with_output().unwrap();
        assert!(output.status.success());
        Answer::parse(&output.stdout).assert(200, &file);
    }
    wait_until("all segments were back", || site.metric(IDLE) == 2);
    site.end();
}

#[test]
fn without_a_segment_it_is_busy() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let site = Site::with(&["--segments", "1", "--timeout", "4"], &[("small", b"hello")]);
    site.add_hole("large", 256 << 20);
    // It has the only segment for a dozen seconds, and never stops for as long as the time-out.
    let mut slow = start_curl(&site.url("/large"), &["--limit-rate", "20M"]);
    wait_until("it had begun", || site.metric("shmferry_http_bytes_total") > 0);
    site.get("/small").assert_status(503);
    assert!(site.web.stderr().contains("/small: 503"), "{}", site.web.stderr());
    assert!(slow.try_wait().unwrap().is_none(), "it was over before");
    slow.kill().unwrap();
    slow.wait().unwrap();
    wait_until("the segment was back", || site.get("/small").status == 200);
    site.end();
}

#[test]
fn who_stops_reading_is_cut_off_and_gives_the_segment_back() {
    let _watchdog = watchdog();
    let large = noise(8, 2 * LARGE);
    let args = ["--segments", "1", "--timeout", "1"];
    let site = Site::with(&args, &[("large", &large), ("small", b"hello")]);
    let mut stalled = TcpStream::connect(site.address).unwrap();
    stalled.write_all(b"GET /large HTTP/1.0\r\n\r\n").unwrap();
    stalled.read_exact(&mut [0; 12]).unwrap();
    wait_until("the segment was back", || site.get("/small").status == 200);
    let mut rest = Vec::new();
    let ended = stalled.read_to_end(&mut rest);
    assert!(ended.is_err() || rest.len() < large.len(), "it was not cut off");
    site.end();
}

#[test]
fn numbers_are_told() {
    let _watchdog = watchdog();
    let file = noise(9, 50_000);
    let site = Site::with(&["--segments", "3"], &[("a", &file)]);
    site.get("/healthz").assert(200, b"200 OK\n");
    for _ in 0..4 {
        site.get("/a").assert(200, &file);
    }
    site.get("/absent").assert_status(404);
    site.get("/../a").assert_status(400);
    site.ask("GET /a HTTP/1.0\r\nIf-None-Match: \"other\"\r\n\r\n").assert(200, &file);
    site.get("/").assert_status(200);
    let text = String::from_utf8(site.get("/metrics").body).unwrap();
    for line in [
        "shmferry_http_requests_total{status=\"200\"} 7",
        "shmferry_http_requests_total{status=\"404\"} 1",
        "shmferry_http_hits_total 6",
        "shmferry_http_bytes_total 250000",
        "shmferry_http_latency_seconds_count 9",
        "shmferry_http_segments{state=\"retired\"} 0",
        "# EOF",
    ] {
        assert!(text.lines().any(|it| it == line), "no {line} in:\n{text}");
    }
    let sum = ["lent", "streamed"].map(|it| site.metric(&format!("shmferry_http_{it}_total")));
    assert_eq!(sum.iter().sum::<u64>(), 5);
    wait_until("all segments were back", || site.metric(IDLE) == 3);
    assert_eq!(site.metric("shmferry_http_segments{state=\"quarantined\"}"), 0);
    let [web, cache] = site.end();
    assert_eq!((web.count("hits"), web.count("bytes")), (6, 250_000));
    assert_eq!((cache.count("hits"), cache.count("misses")), (6, 2)); // of the misses, one for /healthz
}

#[test]
fn a_file_whose_length_is_not_known_arrives_whole() {
    let _watchdog = watchdog();
    if !has("curl") {
        return;
    }
    let place = shmferry_test_support::Place::new();
    let site = Site::over(place, "/proc/sys/kernel", &[]);
    let answer = site.curl("/ostype", &["-r", "1-2"]);
    answer.assert(200, b"Linux\n");
    assert_eq!(answer.header("transfer-encoding").as_deref(), Some("chunked"));
    // Nothing vouches for what the system makes up.
    let of = ["content-length", "accept-ranges", "etag", "last-modified"];
    assert_eq!(of.map(|name| answer.header(name)), [None, None, None, None]);
    site.get("/ostype").assert(200, b"Linux\n"); // HTTP/1.0
    let head = site.curl("/ostype", &["-I"]);
    assert_eq!((head.status, head.header("content-length")), (200, None), "{}", head.head);
    site.end();
}

#[test]
fn a_manifest_is_served_too_without_a_list() {
    let _watchdog = watchdog();
    let place = shmferry_test_support::Place::new();
    place.write("one", b"hello");
    place.write("locals.txt", b"/greeting one\n");
    let site = Site::over(place, "locals.txt", &[]);
    site.get("/greeting").assert(200, b"hello");
    site.get("/").assert_status(404);
    site.get("/healthz").assert_status(200);
    site.end();
}
