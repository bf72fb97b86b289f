//! nginx as a caching reverse proxy in front of the web server, and `wrk` at both.

mod site;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{Program, Signal, noise, wait_until};
use site::{Answer, IDLE, Site, curl, has};

#[test]
fn behind_nginx_with_a_cache_everything_arrives() {
    let _watchdog = watchdog();
    if !has("nginx") || !has("curl") {
        return;
    }
    let (large, file) = (noise(1, 64 << 20), noise(2, 100_000));
    let site = Site::new(&[("large.bin", &large), ("a.png", &file), ("dir/b c", b"hello")]);
    site.tag("/a.png");
    let dir = tempfile::tempdir().unwrap();
    let (nginx, front) = start_nginx(dir.path(), site.address);
    let get =
        |path: &str, args: &[&str]| Answer::parse(&curl(&format!("http://{front}{path}"), args));
    let state = |answer: &Answer| answer.header("x-cache").unwrap();

    get("/large.bin", &[]).assert(200, &large);
    let first = get("/a.png", &[]);
    first.assert(200, &file);
    assert_eq!(state(&first), "MISS");
    assert_eq!(first.header("content-type").as_deref(), Some("image/png"));
    let before = site.metric("shmferry_http_bytes_total");
    let second = get("/a.png", &[]);
    second.assert(200, &file);
    assert_eq!(state(&second), "HIT");
    get("/large.bin", &["-r", "1000000-1999999"]).assert(206, &large[1_000_000..2_000_000]);
    let tag = second.header("etag").unwrap();
    get("/a.png", &["-H", &format!("If-None-Match: {tag}")]).assert_status(304);
    assert_eq!(site.metric("shmferry_http_bytes_total"), before, "nginx had asked again");
    get("/dir/b%20c", &[]).assert(200, b"hello");
    assert!(String::from_utf8(get("/dir/", &[]).body).unwrap().contains("b c"));
    get("/absent", &[]).assert_status(404);

    // What it has kept too long it asks for again, and is told that nothing has changed.
    let expired = |path: &str| get(path, &["-H", "X-Expired: 1"]);
    let mut again = expired("/revalidated/a.png");
    assert_eq!(state(&again), "MISS");
    wait_until("nginx asked whether it has changed", || {
        again = expired("/revalidated/a.png");
        state(&again) == "REVALIDATED"
    });
    again.assert(200, &file);
    assert!(site.metric("shmferry_http_requests_total{status=\"304\"}") > 0);

    nginx.signal(Signal::QUIT);
    nginx.finish().assert_code(0);
    site.end();
}

/// nginx with its cache in a directory; where it listens.
fn start_nginx(dir: &Path, behind: SocketAddr) -> (Program, SocketAddr) {
    let front = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = format!(
        "daemon off; master_process off; pid {dir}/pid; error_log stderr warn;
        events {{}}
        http {{
            access_log off;
            client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;
            uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;
            proxy_cache_path {dir}/cache levels=1 keys_zone=all:1m max_size=256m;
            proxy_cache all; proxy_cache_key $request_uri; proxy_http_version 1.1; proxy_set_header Connection '';
            add_header X-Cache $upstream_cache_status;
            upstream web {{ server {behind}; keepalive 4; }}
            server {{
                listen {front};
                location / {{ proxy_pass http://web; proxy_cache_valid 200 206 1h; }}
                location /revalidated/ {{
                    proxy_pass http://web/; proxy_cache_valid 200 1s; proxy_cache_revalidate on;
                }}
            }}
        }}",
        dir = dir.display(),
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-p").arg(dir).arg("-c").arg(&path).args(["-e", "stderr"]);
    let nginx = Program::spawn(&mut command);
    wait_until("nginx listened", || {
        assert!(nginx.is_running(), "{}", nginx.stderr());
        std::net::TcpStream::connect(front).is_ok()
    });
    (nginx, front)
}

#[test]
fn a_burst_of_requests_meets_no_error() {
    let _watchdog = watchdog();
    if !has("wrk") {
        return;
    }
    let site = Site::new(&[("small", &noise(3, 1000)), ("a", &noise(4, 100_000))]);
    for path in ["/small", "/a", "/"] {
        let args = ["-t", "2", "-c", "64", "-d", "2s", "--timeout", "60s"];
        let output = Command::new("wrk").args(args).arg(site.url(path)).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && said.contains("Requests/sec"), "{said}");
        let is_bad = said.contains("Non-2xx") || said.contains("Socket errors");
        assert!(!is_bad, "{path}: {said}");
    }
    let sum: u64 = site.metric("shmferry_http_hits_total");
    assert!(sum > 100, "{sum}");
    wait_until("all segments were back", || site.metric(IDLE) == 32);
    site.end();
}
