//! The `getfile` program, run for real against small scripted servers.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixStream,
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use shmferry_examples::program::signals_that_end;
use tempfile::TempDir;

/// What nothing here may take, however busy the machine.
const WATCHDOG: Duration = Duration::from_secs(60);

const NOT_FOUND: &[u8] = b"GETFILE FILE_NOT_FOUND\r\n\r\n";

// ---------------------------------------------------------------- downloads

#[test]
fn stores_a_file_under_its_own_name() {
    let body = pattern(1 << 20);
    let server = Server::start({
        let body = body.clone();
        move |path, stream| {
            assert_eq!(path, "/some/where/a.jpg");
            send(stream, &[&*ok(body.len()), &*body].concat());
        }
    });
    let place = TempDir::new().unwrap();
    let run = server.getfile(&place, ["/some/where/a.jpg"]);
    run.assert_success();
    assert_eq!(run.stderr, "", "no progress bar where there is no terminal");
    assert_eq!(run.stdout, b"");
    assert_eq!(fs::read(place.path().join("a.jpg")).unwrap(), body);
    assert_eq!(names_in(&place), ["a.jpg"]);
    let ordinary = File::create(place.path().join("ordinary")).unwrap();
    let mode = fs::metadata(place.path().join("a.jpg")).unwrap().permissions().mode();
    assert_eq!(mode, ordinary.metadata().unwrap().permissions().mode());
}

#[test]
fn writes_to_standard_output() {
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let run = server.getfile(&place, ["-o", "-", "/a"]);
    run.assert_success();
    assert_eq!(run.stdout, b"hello");
    assert!(names_in(&place).is_empty());
}

#[test]
fn an_empty_file_is_a_file() {
    let server = Server::saying(ok(0));
    let place = TempDir::new().unwrap();
    server.getfile(&place, ["/empty"]).assert_success();
    assert_eq!(fs::read(place.path().join("empty")).unwrap(), b"");
}

#[test]
fn takes_a_reply_in_any_pieces() {
    for (dialect, reply) in [
        ("spec", &b"GETFILE OK 12\r\n\r\n 34\r\n\r\nhello"[..]),
        ("classic", b"GETFILE OK 12  34\r\n\r\nhello"),
    ] {
        let server = Server::start(move |_, stream| {
            stream.set_nodelay(true).unwrap();
            reply.iter().for_each(|byte| send(stream, &[*byte]));
        });
        let place = TempDir::new().unwrap();
        let run = server.getfile(&place, ["--dialect", dialect, "-o", "-", "/a"]);
        run.assert_success();
        assert_eq!(run.stdout, b" 34\r\n\r\nhello", "{dialect}");
    }
}

#[test]
fn a_body_that_ends_short_leaves_the_target_as_it_was() {
    let server = Server::saying([&*ok(10), b"short"].concat());
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("a"), "before").unwrap();
    let run = server.getfile(&place, ["/a"]);
    run.assert_failure(&["/a: ", "announced 10 bytes", "sent 5"]);
    assert_eq!(names_in(&place), ["a"]);
    assert_eq!(fs::read(place.path().join("a")).unwrap(), b"before");
}

/// This used to be an error, found at the end of the stream. That end is no longer waited for, so
/// what follows a body is seen only by chance; curl ignores bytes past `Content-Length` as well.
#[test]
fn bytes_past_the_announced_length_are_ignored() {
    for body in ["helloo", "hello and much more"] {
        let server = Server::saying([&*ok(5), body.as_bytes()].concat());
        let place = TempDir::new().unwrap();
        let run = server.getfile(&place, ["-o", "-", "/a"]);
        run.assert_success();
        assert_eq!(run.stdout, b"hello");
    }
    // Also when they come apart from the body's last bytes, or from all of it.
    let server = Server::start(|_, stream| {
        let body = pattern(1 << 20);
        send(stream, &ok(body.len()));
        send(stream, &[&*body, &pattern(1000)].concat());
    });
    let place = TempDir::new().unwrap();
    server.getfile(&place, ["/a"]).assert_success();
    assert_eq!(fs::read(place.path().join("a")).unwrap(), pattern(1 << 20));
}

#[test]
fn a_body_is_done_at_its_announced_length_while_the_connection_stays_open() {
    let (all_closed, closed) = mpsc::channel();
    let server = Server::start(move |path, stream| {
        let len = path[1..].parse().unwrap();
        send(stream, &[&*ok(len), &*pattern(len)].concat());
        until_the_client_is_gone(stream); // as servers in the field do
        all_closed.send(()).unwrap();
    });
    let place = TempDir::new().unwrap();
    for len in [0, 1, 1 << 20] {
        server.getfile(&place, ["-o", "a", &format!("/{len}")]).assert_success();
        assert_eq!(fs::read(place.path().join("a")).unwrap(), pattern(len));
        closed.recv_timeout(WATCHDOG).unwrap();
    }
}

#[test]
fn says_what_the_server_said() {
    let cases: [(&str, &[u8], &str); 14] = [
        ("spec", NOT_FOUND, "file not found"),
        ("spec", b"GETFILE FILE_NOT_FOUND 0\r\n\r\n", "file not found"),
        ("spec", b"GETFILE FILE_NOT_FOUND \r\n\r\n", "file not found"),
        ("spec", b"GETFILE ERROR 0 \r\n\r\n", "the server reports an error"),
        ("spec", b"GETFILE ERROR\r\n\r\n", "the server reports an error"),
        ("spec", b"GETFILE INVALID\r\n\r\n", "invalid"),
        ("spec", b"HTTP/1.1 200 OK\r\n\r\n", "bad reply"),
        ("spec", b"GETFILE OK 5 hello", "bad reply for the spec dialect"),
        ("spec", b"GETFILE OK 18446744073709551616\r\n\r\n", "bad reply"),
        ("spec", b"GETFILE OK 5\r\n", "closed 14 bytes into the header"),
        ("spec", b"", "closed 0 bytes into the header"),
        ("classic", b"GETFILE FILE_NOT_FOUND 0\n", "file not found"),
        ("classic", b"GETFILE ERROR 0\n", "the server reports an error"),
        ("classic", b"GETFILE OK 5\r\n\r\nhello", "bad reply for the classic dialect"),
    ];
    for (dialect, reply, message) in cases {
        let server = Server::saying(reply);
        let place = TempDir::new().unwrap();
        let run = server.getfile(&place, ["--dialect", dialect, "/a"]);
        run.assert_failure(&["/a: ", message]);
        assert!(names_in(&place).is_empty(), "{message}");
    }
}

#[test]
fn a_server_that_hangs_up_before_reading_is_an_error() {
    let server = Server::start_raw(drop);
    let place = TempDir::new().unwrap();
    server.getfile(&place, ["/a"]).assert_failure(&["/a: bad reply: the connection closed"]);
    assert!(names_in(&place).is_empty());
}

#[test]
fn a_silent_server_times_out() {
    let place = TempDir::new().unwrap();
    for start in [&b""[..], b"GETFILE OK 10\r\n\r\nhalf"] {
        let server = Server::start(move |_, stream| {
            send(stream, start);
            until_the_client_is_gone(stream);
        });
        let run = server.getfile(&place, ["--timeout", "0.2", "/a"]);
        run.assert_failure(&["/a: timed out"]);
        assert!(names_in(&place).is_empty());
    }
}

#[test]
fn a_refused_connection_names_the_address() {
    // Bound, but not listening: nobody else can get the port meanwhile.
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let unheard = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&unheard, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&unheard).unwrap()).unwrap();
    let place = TempDir::new().unwrap();
    let port = address.port().to_string();
    let run = getfile(&place).args(["-s", "127.0.0.1", "-p", &port, "/a"]).run();
    run.assert_failure(&["/a: cannot connect to", &address.to_string(), "refused"]);
    assert!(names_in(&place).is_empty());
}

#[test]
fn tries_every_address_of_a_name() {
    // `localhost`, the default, may well be ::1 first.
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let run = getfile(&place).args(["-p", &server.port, "-o", "-", "/a"]).run();
    run.assert_success();
    assert_eq!(run.stdout, b"hello");
}

#[test]
fn speaks_ipv6() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        return;
    };
    let server = Server::on(listener, |mut stream| {
        read_request(&mut stream);
        send(&mut stream, &[&*ok(5), b"hello"].concat());
    });
    let place = TempDir::new().unwrap();
    for host in ["::1", "[::1]"] {
        let run = getfile(&place).args(["-s", host, "-p", &server.port, "-o", "-", "/a"]).run();
        run.assert_success();
        assert_eq!(run.stdout, b"hello");
    }
}

#[test]
fn tries_each_of_several_paths() {
    let server = Server::start(|path, stream| match path {
        "/missing" => send(stream, NOT_FOUND),
        path => send(stream, &[&*ok(path.len()), path.as_bytes()].concat()),
    });
    let place = TempDir::new().unwrap();
    let run = server.getfile(&place, ["/a", "/missing", "relative", "/x/a", "/b", "/dir/", "/.."]);
    assert_eq!(run.status.code(), Some(1));
    let lines: Vec<_> = run.stderr.lines().collect();
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert_eq!(lines[0], "getfile: /missing: file not found");
    assert_eq!(lines[1], "getfile: relative: the path must start with \"/\"");
    assert_eq!(lines[2], "getfile: /x/a: an earlier path is stored as a");
    assert!(lines[3].starts_with("getfile: /dir/: "), "{lines:?}");
    assert!(lines[4].starts_with("getfile: /..: "), "{lines:?}");
    assert_eq!(names_in(&place), ["a", "b"]);
    assert_eq!(fs::read(place.path().join("a")).unwrap(), b"/a");
    let run = server.getfile(&place, ["-o", "c", "/a", "/b"]);
    run.assert_failure(&["-o goes with one PATH, but 2 are given"]);
    assert_eq!(names_in(&place), ["a", "b"]);
}

#[test]
fn pipes_stay_pipes_and_links_stay_links() {
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let at = |name| place.path().join(name);

    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), kind, 0o600.into(), 0).unwrap();
    let pipe = at("pipe");
    let reader = meanwhile(|| fs::read(pipe).unwrap());
    server.getfile(&place, ["-o", "pipe", "/a"]).assert_success();
    assert_eq!(reader.recv_timeout(WATCHDOG).unwrap(), b"hello");
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());

    fs::create_dir(at("elsewhere")).unwrap();
    fs::write(at("elsewhere/real"), "before").unwrap();
    symlink("elsewhere/real", at("link")).unwrap();
    server.getfile(&place, ["-o", "link", "/a"]).assert_success();
    assert_eq!(fs::read(at("elsewhere/real")).unwrap(), b"hello");
    assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("elsewhere/real"));

    server.getfile(&place, ["-o", "elsewhere", "/a"]).assert_failure(&["cannot write elsewhere"]);
    server.getfile(&place, ["-o", "no/where", "/a"]).assert_failure(&["cannot write no/where"]);
    assert_eq!(names_in(&place), ["elsewhere", "link", "pipe"]);
}

#[test]
fn a_file_that_is_replaced_keeps_its_mode_and_its_owner() {
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("left out: the owner, which only root can give away");
    }
    // Modes that no umask makes of 0666, and one that keeps others out.
    for mode in [0o600, 0o640, 0o751, 0o777] {
        let path = place.path().join("a");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        if is_root {
            std::os::unix::fs::chown(&path, Some(4321), Some(8765)).unwrap();
        }
        let before = fs::metadata(&path).unwrap();
        server.getfile(&place, ["/a"]).assert_success();
        let after = fs::metadata(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"hello");
        assert_ne!(after.ino(), before.ino(), "it was replaced, whole or not at all");
        assert_eq!(after.mode(), before.mode(), "{:o}", after.mode());
        assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
        assert_eq!(names_in(&place), ["a"]);
    }
}

#[test]
fn an_ordinary_user_replaces_what_may_be_written_only() {
    use std::os::unix::{fs::chown, process::CommandExt};
    const USER: u32 = 4321;
    if !rustix::process::geteuid().is_root() {
        println!("left out: files of root and of another user, which take root to make");
        return;
    }
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let at = |name| place.path().join(name);
    // As another user may not get to where the programs are built. By another process, so that none
    // of ours holds it open for writing when it is run.
    let copied = Command::new("cp").arg(getfile(&place).get_program()).arg(at("getfile")).status();
    assert!(copied.unwrap().success());
    for (name, mode, owner) in [("closed", 0o444, USER), ("foreign", 0o644, 0), ("open", 0o662, 0)]
    {
        fs::write(at(name), "before").unwrap();
        fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
        chown(at(name), Some(owner), Some(owner)).unwrap();
    }
    fs::set_permissions(at("getfile"), Permissions::from_mode(0o755)).unwrap();
    chown(place.path(), Some(USER), Some(USER)).unwrap();
    let run = |name: &str| {
        let mut command = Command::new(at("getfile"));
        command.current_dir(place.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.uid(USER).gid(USER).to(&server).args(["-o", name, "/a"]).run()
    };
    for name in ["closed", "foreign"] {
        run(name).assert_failure(&[&format!("/a: cannot write {name}: Permission denied")]);
        assert_eq!(fs::read(at(name)).unwrap(), b"before");
    }
    run("open").assert_success();
    assert_eq!(fs::read(at("open")).unwrap(), b"hello");
    let after = fs::metadata(at("open")).unwrap();
    assert_eq!(after.uid(), USER, "an ordinary user cannot give it back to root");
    assert_eq!(after.mode() & 0o777, 0o622, "a group that it was not for gets no more than all");
    assert_eq!(names_in(&place), ["closed", "foreign", "getfile", "open"]);
}

#[test]
fn a_file_that_is_being_replaced_is_no_more_open_to_others_than_it_was() {
    let server = Server::start(|_, stream| {
        send(stream, &[&*ok(1000), &*pattern(500)].concat());
        until_the_client_is_gone(stream);
    });
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("a"), "secret").unwrap();
    fs::set_permissions(place.path().join("a"), Permissions::from_mode(0o600)).unwrap();
    let mut child = getfile(&place).to(&server).arg("/a").start();
    let temporary = half_written(&place);
    assert_eq!(fs::metadata(temporary).unwrap().mode() & 0o777, 0o600);
    child.kill(Signal::TERM);
    child.finish();
}

#[test]
fn a_link_that_leads_nowhere_is_written_through() {
    let server = Server::saying([&*ok(5), b"hello"].concat());
    let place = TempDir::new().unwrap();
    let at = |name| place.path().join(name);
    fs::create_dir_all(at("elsewhere/deeper")).unwrap();
    symlink("elsewhere/second", at("first")).unwrap();
    symlink("deeper/../deeper/new", at("elsewhere/second")).unwrap();
    server.getfile(&place, ["-o", "first", "/a"]).assert_success();
    assert_eq!(fs::read(at("elsewhere/deeper/new")).unwrap(), b"hello");
    assert_eq!(fs::read_link(at("first")).unwrap(), Path::new("elsewhere/second"));
    assert_eq!(fs::read_link(at("elsewhere/second")).unwrap(), Path::new("deeper/../deeper/new"));
    // What cannot be made there is an error, and the link stays.
    symlink("no/where", at("astray")).unwrap();
    symlink("round", at("round")).unwrap();
    server
        .getfile(&place, ["-o", "astray", "/a"])
        .assert_failure(&["cannot write astray: No such file"]);
    server
        .getfile(&place, ["-o", "round", "/a"])
        .assert_failure(&["cannot write round: Too many levels"]);
    assert_eq!(names_in(&place), ["astray", "elsewhere", "first", "round"]);
}

#[test]
fn errors_name_the_file_that_was_asked_for_only() {
    let server = Server::saying([&*ok(1 << 20), &*pattern(1 << 20)].concat());
    let place = TempDir::new().unwrap();
    let run = server.getfile(&place, ["-o", "no/where", "/a"]);
    run.assert_failure(&["/a: cannot write no/where: No such file or directory"]);
    assert!(!run.stderr.contains(".getfile-"), "{}", run.stderr);
    // A limit on the size of files: writing fails in the middle.
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
        .arg(getfile(&place).get_program());
    shell
        .current_dir(place.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let run = shell.to(&server).args(["-o", "large", "/a"]).run();
    run.assert_failure(&["/a: cannot write large: File too large"]);
    assert!(!run.stderr.contains(".getfile-"), "{}", run.stderr);
    assert!(names_in(&place).is_empty());
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let heeded = signals_that_end().unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        if !heeded.contains(&signal.as_raw()) {
            println!("left out: {signal:?}, which is ignored in this process and its children");
            continue;
        }
        let server = Server::start(|_, stream| {
            send(stream, &[&*ok(1000), &*pattern(500)].concat());
            until_the_client_is_gone(stream);
        });
        let place = TempDir::new().unwrap();
        fs::write(place.path().join("a"), "before").unwrap();
        let mut child = getfile(&place).to(&server).arg("/a").start();
        half_written(&place);
        child.kill(signal);
        let run = child.finish();
        assert_eq!(run.status.signal(), Some(signal.as_raw()));
        assert_eq!(names_in(&place), ["a"]);
        assert_eq!(fs::read(place.path().join("a")).unwrap(), b"before");
    }
}

#[test]
fn a_signal_that_the_caller_has_had_ignored_stays_ignored() {
    let (go_on, may_go_on) = mpsc::channel();
    let may_go_on = Arc::new(Mutex::new(may_go_on));
    let server = Server::start(move |_, stream| {
        send(stream, &[&*ok(1000), &pattern(1000)[..500]].concat());
        may_go_on.lock().unwrap().recv_timeout(WATCHDOG).unwrap();
        send(stream, &pattern(1000)[500..]);
    });
    let place = TempDir::new().unwrap();
    let mut shell = Command::new("/bin/sh"); // as nohup does
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(getfile(&place).get_program());
    shell
        .current_dir(place.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = shell.to(&server).arg("/a").start();
    half_written(&place);
    child.kill(Signal::HUP);
    go_on.send(()).unwrap();
    child.finish().assert_success();
    assert_eq!(fs::read(place.path().join("a")).unwrap(), pattern(1000));
}

/// Waits until 500 bytes are in a temporary file; says which that is.
fn half_written(place: &TempDir) -> PathBuf {
    let mut found = None;
    wait_until("half of it is in the temporary file", || {
        let mut paths = names_in(place).into_iter().map(|name| place.path().join(name));
        found = paths.find(|path| fs::metadata(path).is_ok_and(|data| data.len() == 500));
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_wrong_command_line_is_refused() {
    let place = TempDir::new().unwrap();
    for wrong in [&[][..], &["--dialect", "http", "/a"], &["--timeout", "0", "/a"], &["bench"]] {
        assert_eq!(getfile(&place).args(wrong).run().status.code(), Some(2), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["bench", "--help"]] {
        let run = getfile(&place).args(right).run();
        run.assert_success();
        assert!(!String::from_utf8_lossy(&run.stdout).contains("serve-unix"));
    }
}

// ---------------------------------------------------------------- bench

#[test]
fn bench_cycles_through_the_workload() {
    let server = Server::start(|path, stream| match path {
        "/missing" => send(stream, NOT_FOUND),
        _ => send(stream, &[&*ok(1000), &*pattern(1000)].concat()),
    });
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("load"), "/a\n\n/b,\"c\"\r\n/missing").unwrap();
    let bench = ["bench", "-w", "load", "-t", "3", "-r", "10", "--csv", "rows.csv"];
    let run = server.getfile(&place, bench);
    assert_eq!(run.status.code(), Some(1), "what is missing is no success");
    assert_eq!(run.stderr, "");
    let report = String::from_utf8(run.stdout).unwrap();
    for part in ["7 ok, 3 not found, 0 failed", "requests/s", "MiB/s", "min", "p50", "p99", "max"] {
        assert!(report.contains(part), "{part} is not in {report}");
    }

    let rows = fs::read_to_string(place.path().join("rows.csv")).unwrap();
    let mut rows = rows.lines();
    assert_eq!(rows.next(), Some("path,status,bytes,microseconds"));
    let rows: Vec<_> = rows.map(|row| row.rsplit_once(',').unwrap()).collect();
    assert!(rows.iter().all(|(_, micros)| micros.parse::<u64>().is_ok()));
    let rows: Vec<_> = rows.into_iter().map(|(row, _)| row).collect();
    let cycle = ["/a,ok,1000", "\"/b,\"\"c\"\"\",ok,1000", "/missing,not_found,0"];
    let expected: Vec<_> = cycle.into_iter().cycle().take(10).collect();
    assert_eq!(rows, expected);

    let run = server.getfile(&place, bench.into_iter().chain(["--allow-missing"]));
    run.assert_success();
}

#[test]
fn bench_counts_a_body_at_its_announced_length() {
    let server = Server::start(|_, stream| {
        send(stream, &[&*ok(1000), &*pattern(1000)].concat());
        until_the_client_is_gone(stream);
    });
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("load"), "/a").unwrap();
    let run =
        server.getfile(&place, ["bench", "-w", "load", "-t", "2", "-r", "6", "--timeout", "5"]);
    run.assert_success();
    let report = String::from_utf8(run.stdout).unwrap();
    assert!(report.contains("6 ok, 0 not found, 0 failed"), "{report}");
}

#[test]
fn bench_checks_lengths() {
    let server = Server::saying([&*ok(1000), &*pattern(999)].concat());
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("load"), "/a").unwrap();
    let run = server.getfile(&place, ["bench", "-w", "load", "-r", "4", "--csv", "rows.csv"]);
    assert_eq!(run.status.code(), Some(1));
    let report = String::from_utf8(run.stdout).unwrap();
    assert!(report.contains("0 ok, 0 not found, 4 failed"), "{report}");
    assert!(report.contains("4 times: the server announced 1000 bytes and sent 999"), "{report}");
    let rows = fs::read_to_string(place.path().join("rows.csv")).unwrap();
    assert_eq!(rows.lines().filter(|row| row.starts_with("/a,failed,999,")).count(), 4);
}

#[test]
fn bench_reads_the_workload_before_it_starts() {
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("load"), "/a\n\nb\n").unwrap();
    fs::write(place.path().join("empty"), "\n \n").unwrap();
    let bench = |load| getfile(&place).args(["bench", "-p", "1", "-w", load]).run();
    bench("load").assert_failure(&["load:3: the path must start with \"/\""]);
    bench("empty").assert_failure(&["empty: no path in it"]);
    bench("none").assert_failure(&["cannot read none: "]);
}

#[test]
fn bench_compares_with_a_unix_socket() {
    for dialect in ["spec", "classic"] {
        let place = TempDir::new().unwrap();
        let temporary = TempDir::new().unwrap();
        fs::create_dir_all(place.path().join("root/sub")).unwrap();
        fs::write(place.path().join("root/empty"), "").unwrap();
        fs::write(place.path().join("root/sub/large"), pattern(1 << 20)).unwrap();
        fs::write(place.path().join("load"), "/empty\n/sub/large\n").unwrap();
        let root = place.path().join("root");
        let server = Server::start(move |path, stream| {
            let body = fs::read(root.join(&path[1..])).unwrap();
            let end = if dialect == "spec" { "\r\n\r\n" } else { " " };
            send(stream, format!("GETFILE OK {}{end}", body.len()).as_bytes());
            send(stream, &body);
        });
        let bench = ["bench", "-w", "load", "-t", "2", "-r", "20", "--csv", "rows.csv"];
        let run = getfile(&place)
            .args(bench)
            .to(&server)
            .args(["--against-unix", "root", "--dialect", dialect])
            .env("TMPDIR", temporary.path())
            .run();
        run.assert_success();
        let report = String::from_utf8(run.stdout).unwrap();
        for part in ["server: 60 ok", "unix: 60 ok", "medians of rounds", "server / unix: "] {
            assert!(report.contains(part), "{part} is not in {report}");
        }
        let rows = fs::read_to_string(place.path().join("rows.csv")).unwrap();
        let of = |end: &str| rows.lines().filter(|row| row.ends_with(end)).count();
        assert_eq!((of(",side"), of(",server"), of(",unix")), (1, 60, 60));
        assert!(names_in(&temporary).is_empty());
    }
}

#[test]
fn the_unix_server_goes_with_a_killed_parent() {
    for signal in [Signal::KILL, Signal::TERM] {
        let server = Server::start(|_, stream| until_the_client_is_gone(stream));
        let place = TempDir::new().unwrap();
        let temporary = TempDir::new().unwrap();
        fs::write(place.path().join("load"), "/load").unwrap();
        let mut child = getfile(&place)
            .args(["bench", "-w", "load", "--against-unix", "."])
            .to(&server)
            .env("TMPDIR", temporary.path())
            .start();
        let mut directory = PathBuf::new();
        wait_until("the socket is there", || {
            let names = names_in(&temporary);
            directory = names.first().map(|name| temporary.path().join(name)).unwrap_or_default();
            directory.join("socket").exists()
        });
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        child.kill(signal);
        assert_eq!(child.finish().status.signal(), Some(signal.as_raw()));
        wait_until("socket and directory are gone", || names_in(&temporary).is_empty());
    }
}

#[test]
fn no_unix_server_without_a_directory() {
    let server = Server::saying(NOT_FOUND);
    let place = TempDir::new().unwrap();
    let temporary = TempDir::new().unwrap();
    fs::write(place.path().join("load"), "/load").unwrap();
    let run = getfile(&place)
        .args(["bench", "-w", "load", "--against-unix", "load"])
        .to(&server)
        .env("TMPDIR", temporary.path())
        .run();
    assert_eq!(run.status.code(), Some(1));
    assert!(run.stderr.contains("cannot serve load: not a directory"), "{}", run.stderr);
    assert!(names_in(&temporary).is_empty());
}

#[test]
fn the_unix_server_keeps_to_the_protocol() {
    let place = TempDir::new().unwrap();
    fs::create_dir(place.path().join("root")).unwrap();
    fs::write(place.path().join("root/a"), "hello").unwrap();
    fs::write(place.path().join("secret"), "secret").unwrap();
    let mut child = getfile(&place).args(["serve-unix", "root"]).stdin(Stdio::piped()).start();
    let mut stdout = BufReader::new(child.0.stdout.take().unwrap());
    let socket = meanwhile(move || {
        let mut line = String::new();
        stdout.read_line(&mut line).map(|_| line).unwrap()
    });
    let socket = socket.recv_timeout(WATCHDOG).unwrap();
    let ask = |request: &[u8]| {
        let mut stream = UnixStream::connect(socket.trim_end()).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        String::from_utf8(reply).unwrap()
    };
    assert_eq!(ask(b"GETFILE GET /a\r\n\r\n"), "GETFILE OK 5\r\n\r\nhello");
    for missing in ["/b", "/", "/../secret", "/a/b", "//.."] {
        let request = format!("GETFILE GET {missing}\r\n\r\n");
        assert_eq!(ask(request.as_bytes()).as_bytes(), NOT_FOUND, "{missing}");
    }
    for malformed in [&b""[..], b"GETFILE GET /a\r\n", b"GETFILE GET a", b"\n"] {
        assert_eq!(ask(malformed), "GETFILE INVALID\r\n\r\n", "{}", malformed.escape_ascii());
    }
    drop(child.0.stdin.take());
    child.finish().assert_success();
    assert!(!Path::new(socket.trim_end()).parent().unwrap().exists());
}

// ---------------------------------------------------------------- servers

/// A scripted server; a thread for each connection, all gone with the test process.
struct Server {
    port: String,
}

impl Server {
    /// Reads the request, hands its path and the connection to `script`, and closes.
    fn start(script: impl Fn(&str, &mut TcpStream) + Clone + Send + 'static) -> Self {
        Self::start_raw(move |mut stream| {
            let path = read_request(&mut stream);
            script(&path, &mut stream);
        })
    }

    fn saying(reply: impl AsRef<[u8]> + Clone + Send + 'static) -> Self {
        Self::start(move |_, stream| send(stream, reply.as_ref()))
    }

    fn start_raw(script: impl Fn(TcpStream) + Clone + Send + 'static) -> Self {
        Self::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), script)
    }

    fn on(listener: TcpListener, script: impl Fn(TcpStream) + Clone + Send + 'static) -> Self {
        let port = listener.local_addr().unwrap().port().to_string();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let script = script.clone();
                thread::spawn(move || script(stream));
            }
        });
        Self { port }
    }

    /// Runs `getfile` in `place` against this server.
    fn getfile(&self, place: &TempDir, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        getfile(place).args(args).to(self).run()
    }
}

/// The path that is asked for. What is asked must be a well-formed request.
fn read_request(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        request.extend(byte);
    }
    let request = String::from_utf8(request).unwrap();
    let path = request.strip_prefix("GETFILE GET ").unwrap();
    path.strip_suffix("\r\n\r\n").unwrap().to_owned()
}

/// Sends to a client that may have had enough already.
fn send(stream: &mut TcpStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

fn until_the_client_is_gone(stream: &mut TcpStream) {
    let _ = io::copy(stream, &mut io::sink());
}

fn ok(len: usize) -> Vec<u8> {
    format!("GETFILE OK {len}\r\n\r\n").into_bytes()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + index / 251) as u8).collect()
}

// ---------------------------------------------------------------- processes

/// The program, to be run in `place`.
fn getfile(place: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_getfile"));
    command.current_dir(place.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

trait RunCommand {
    fn to(&mut self, server: &Server) -> &mut Self;
    fn start(&mut self) -> Watched;
    fn run(&mut self) -> Run;
}

impl RunCommand for Command {
    fn to(&mut self, server: &Server) -> &mut Self {
        self.args(["-s", "127.0.0.1", "-p", &server.port])
    }

    fn start(&mut self) -> Watched {
        Watched(self.spawn().unwrap())
    }

    fn run(&mut self) -> Run {
        self.start().finish()
    }
}

/// A child that does not outlive the test, even if that fails.
struct Watched(Child);

impl Watched {
    fn kill(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Waits for the child to end, and for everyone who holds its outputs.
    fn finish(mut self) -> Run {
        let stdout = self.0.stdout.take().map(read_all);
        let stderr = self.0.stderr.take().map(read_all);
        let mut status = None;
        wait_until("the program ended", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        let text = |output: Option<mpsc::Receiver<Vec<u8>>>| {
            output.map(|output| output.recv_timeout(WATCHDOG).unwrap()).unwrap_or_default()
        };
        let stderr = String::from_utf8(text(stderr)).unwrap();
        Run { status: status.unwrap(), stdout: text(stdout), stderr }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_all(mut output: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    meanwhile(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Does what may block for ever on a thread of its own; the receiver need not wait that long.
fn meanwhile<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(act()));
    receiver
}

/// How a program ended and what it said.
struct Run {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: String,
}

impl Run {
    fn assert_success(&self) {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
    }

    /// Asserts that it failed with one line that has all these parts.
    fn assert_failure(&self, parts: &[&str]) {
        assert_eq!(self.status.code(), Some(1), "{}", self.stderr);
        assert!(self.stderr.starts_with("getfile: "), "{}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "{part} is not in {}", self.stderr);
        }
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn names_in(place: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(place.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
