//! How the programs start: what they refuse, what they hint at, and how a signal ends the start.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use shmferry_test_support::{
    Answer, PLAIN, Place, Program, Signal, Transport, ok, over_both, wait_until,
};

over_both! {
    a_signal_while_the_pool_is_made_ends_the_start_in_order,
    a_signal_while_the_manifest_is_read_ends_the_start_in_order,
}

// ---------------------------------------------------------------- numbers and addresses

#[test]
fn a_time_out_that_cannot_be_waited_for_is_refused_with_the_range() {
    let place = Place::new();
    let too_long = ["1e19", "1e300", "inf", "86401"];
    let too_short = ["-inf", "-1", "-0", "0", "1e-30", "0.0009"];
    let no_numbers = ["nan", "soon", ""];
    for program in ["webproxy", "simplecached"] {
        for value in too_long.iter().chain(&too_short).chain(&no_numbers) {
            let exit = place.run(program, [&format!("--timeout={value}")]).finish();
            exit.assert_usage_error(&["--timeout", "0.001 to 86400"]);
        }
    }
}

#[test]
fn the_longest_and_the_shortest_time_out_work() {
    let place = Place::new();
    place.write("files/a", "hello");
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.server_addr());
    std::thread::spawn(move || {
        for request in server.incoming_requests() {
            let _ = request.respond(tiny_http::Response::from_string("from the origin"));
        }
    });
    let cache = place.simplecached(["-c", "files", "--timeout", "86400"]).listening();
    let proxy = place.webproxy(["-s", &url, "--timeout", "86400"]).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    assert_eq!(proxy.get("/b"), ok("from the origin"));
    let hasty = place.webproxy(["-s", &url, "--timeout", "0.001"]).listening();
    // What it manages within a millisecond depends on the machine.
    let answer = hasty.get("/a");
    let others = [Answer::Invalid, ok("from the origin")];
    assert!(answer.is_honest(b"hello") || others.contains(&answer), "{answer:?}");
    place.wind_up([proxy, hasty, cache]);
}

#[test]
fn a_base_url_with_a_port_that_is_none_is_refused() {
    let place = Place::new();
    for url in [
        "http://host:99999",
        "http://host:65536/",
        "http://host:abc",
        "http://host:",
        "http://host:0",
        "http://host:80a/x",
        "http://[::1]:99999",
        "https://host:-1",
    ] {
        let exit = place.run("webproxy", ["-p", "0", "-s", url]).finish();
        exit.assert_usage_error(&["--server", url, "a port from 1 to 65535"]);
    }
    for url in ["http://[::1]:65535/x", "http://[::1]", "http://host:1", "https://host"] {
        place.bare_webproxy(["-s", url]).listening().terminate();
    }
}

#[test]
fn sizes_may_have_binary_units() {
    let place = Place::new();
    place.write("root/a", "hello");
    for (text, segment) in
        [("512k", 524_288), ("512K", 524_288), ("1M", 1 << 20), ("2m", 2 << 20), ("4096", 4096)]
    {
        let args = ["--root", "root", "-n", "1", "-z", text, "--spool-limit", "2G"];
        let proxy = place.bare_webproxy(args).listening();
        assert_eq!(proxy.get("/a"), ok("hello"));
        let line = proxy.wait_for("listening on ");
        assert!(line.contains(&format!("1 segments of {segment} bytes")), "{line}");
        assert!(line.contains("2147483648 bytes"), "{line}");
    }
    for flag in ["--segment-size", "--spool-limit"] {
        let no_numbers = ["512kk", "k", "", "1q", "0x10", "-1", "1.5M"];
        let too_large = ["99999999999G", "18446744073709551616"];
        for text in no_numbers.iter().chain(&too_large) {
            let exit = place.run("webproxy", [&format!("{flag}={text}")]).finish();
            exit.assert_usage_error(&[flag, "bytes"]);
        }
    }
    let exit = place.run("webproxy", ["-z", "0k"]).finish();
    exit.assert_usage_error(&["--segment-size", "at least 824 bytes"]);
}

// ---------------------------------------------------------------- signals

/// Whether a program catches this signal by now.
fn catches(program: &Program, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() >> (signal.as_raw() - 1) & 1 == 1
}

#[track_caller]
fn assert_ended_at_its_start(place: &Place, program: Program) {
    let exit = program.finish();
    exit.assert_code(0);
    assert!(!exit.stderr.contains("listening on "), "{}", exit.stderr);
    assert!(!exit.stderr.contains("panicked"), "{}", exit.stderr);
    exit.assert_said(&["stopped", "before it listened"]);
    place.assert_nothing_left();
}

/// A FIFO as the manifest: as long as it is open for writing, the program reads it.
fn a_signal_while_the_manifest_is_read_ends_the_start_in_order(over: Transport) {
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::over(over);
        place.write("a", "hello");
        place.write("fifo", "");
        fs::remove_file(place.path("fifo")).unwrap();
        mkfifoat(CWD, place.path("fifo"), Mode::RUSR | Mode::WUSR).unwrap();
        let cache = place.simplecached(["-c", "fifo"]);
        let mut writer: Option<File> = None;
        wait_until("it reads the manifest", || {
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
            writer = options.open(place.path("fifo")).ok();
            writer.is_some()
        });
        assert!(catches(&cache, signal));
        cache.signal(signal);
        assert_ended_at_its_start(&place, cache);
    }
}

/// Allocation is slow, by `strace`: the signal comes in the middle of the pool.
fn a_signal_while_the_pool_is_made_ends_the_start_in_order(over: Transport) {
    let traces = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).status();
    if !traces.is_ok_and(|exit| exit.success()) {
        eprintln!("left out: no strace, or it may not trace");
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::over(over);
        let mut slow = place.command_failing(&["fallocate:delay_enter=300000"], "webproxy");
        let args = ["-p", "0", "-n", "8", "--timeout", "5", "--cache", &place.cache_address()];
        let proxy = Program::spawn(slow.args(args));
        wait_until("it makes its pool", || proxy.segments() > 0);
        assert!(catches(&proxy, signal));
        proxy.signal(signal);
        assert_ended_at_its_start(&place, proxy);
    }
}

// ---------------------------------------------------------------- manifests

#[test]
fn a_manifest_may_begin_with_a_byte_order_mark_and_hold_comments() {
    let place = Place::new();
    place.write("a", "hello");
    let text = "\u{feff}/a a\r\n# /b b\n  #/c absent\n\t# \n/#d a\n/e#f a # g";
    place.write("manifest", text.replace("a # g", "a"));
    let _cache = place.simplecached(["-c", "manifest"]).listening();
    let proxy = place.webproxy(PLAIN).listening();
    for key in ["/a", "/#d", "/e#f"] {
        assert_eq!(proxy.get(key), ok("hello"), "{key}");
    }
    assert_eq!(proxy.get("/b"), Answer::NotFound);
}

#[test]
fn a_key_that_no_request_can_carry_is_named_with_its_line() {
    let place = Place::new();
    place.write("a", "hello");
    let long = format!("/a a\n/{} a\n", "k".repeat(4096));
    let (nul, carriage) = ("/a a\n\n/b\0c a\n", "/a\rb a\n");
    for (manifest, parts) in [
        ("k a\n", ["manifest:1: ", "k ", "start with \"/\""]),
        ("# keys\n/a a\n../a a\n", ["manifest:3: ", "../a ", "start with \"/\""]),
        (long.as_str(), ["manifest:2: ", "/kkk", "longer than 4096 bytes"]),
        (nul, ["manifest:3: ", "/b\\x00c ", "NUL"]),
        (carriage, ["manifest:1: ", "/a\\rb ", "line break"]),
        ("/a a\n\u{feff}/b a\n", ["manifest:2: ", "\\xef\\xbb\\xbf/b ", "start with \"/\""]),
    ] {
        place.write("manifest", manifest);
        let exit = place.simplecached(["-c", "manifest"]).finish();
        exit.assert_failure(&parts);
        assert!(exit.stderr.len() < 400, "{}", exit.stderr);
    }
    let longest = format!("/{}", "k".repeat(4095));
    place.write("manifest", format!("{longest} a"));
    let _cache = place.simplecached(["-c", "manifest"]).listening();
    assert_eq!(place.webproxy(PLAIN).listening().get(&longest), ok("hello"));
}

#[test]
fn a_manifest_that_names_no_file_is_an_error_that_says_so() {
    let place = Place::new();
    for text in ["", "\n\n", "# only a comment\n", "\u{feff}", "  \t \r\n"] {
        place.write("manifest", text);
        let exit = place.simplecached(["-c", "manifest"]).finish();
        exit.assert_failure(&["manifest: ", "names no file", "KEY PATH"]);
    }
}

#[test]
fn without_a_manifest_and_without_arguments_the_flag_is_hinted_at() {
    let place = Place::new();
    let exit = place.simplecached(PLAIN).finish();
    exit.assert_failure(&["locals.txt: No such file", "-c"]);
    // One that was asked for needs no such hint.
    let exit = place.simplecached(["-c", "locals.txt"]).finish();
    exit.assert_failure(&["locals.txt: No such file"]);
    assert!(!exit.stderr.contains("-c"), "{}", exit.stderr);
}

// ---------------------------------------------------------------- the log

#[test]
fn debug_lines_are_the_programs_own_and_not_the_http_clients() {
    let place = Place::new();
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.server_addr());
    std::thread::spawn(move || {
        for request in server.incoming_requests() {
            let _ = request.respond(tiny_http::Response::from_string("hello"));
        }
    });
    let said = |filter: &str| {
        let mut command = place.command("webproxy");
        command.env("RUST_LOG", filter).args(["-p", "0", "-s", &url]);
        let proxy = Program::spawn(&mut command);
        let levels = ["debug", "trace", "info", ""];
        if levels.contains(&filter) || filter.contains("debug") {
            proxy.wait_for("listening on ");
            assert_eq!(proxy.get("/a"), ok("hello"));
        } else {
            wait_until("it waits for a signal", || proxy.threads_named("proxy") > 0);
        }
        proxy.terminate().stderr
    };
    let lines = |text: &str| text.lines().count();
    let usual = said("debug");
    assert!(usual.contains("DEBUG stopping"), "{usual}");
    assert_eq!(lines(&usual), 3, "{usual}");
    assert_eq!(lines(&said("trace")), 3);
    assert_eq!(lines(&said("info")), 2);
    assert_eq!(lines(&said("")), 2);
    assert_eq!(said("off"), "");
    let asked_for = said("debug,ureq=debug");
    assert!(lines(&asked_for) > 3, "{asked_for}");
}
