//! Loans in the programs: what is asked for again goes to clients from sealed memory or the file
//! itself, and is never stale. `sendfile` is seen by `strace`: where that is not installed, or may
//! not trace, the test says so and checks the rest.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use shmferry_test_support::{
    Dice, Exit, LARGE, PLAIN, Place, Program, Signal, Transport, noise, ok, over_both, wait_until,
};

over_both! {
    a_file_that_changes_all_the_while_is_never_stale,
    a_cache_that_comes_anew_lends_anew,
}

/// Enough requests for a copy to be made, and made use of.
#[track_caller]
fn ask_until_lent(proxy: &Program, path: &str, file: &[u8]) {
    // A copy is made of a file that has been left alone for so long, and a second for 100 MB.
    let (tries, pause) = (20, 20 + file.len() as u64 / 2_000_000);
    for _ in 0..tries {
        proxy.get(path).assert_whole(file);
        std::thread::sleep(std::time::Duration::from_millis(pause));
    }
}

/// Has `strace` note the calls of a program.
struct Strace(Child);

impl Strace {
    /// `None` where that is not possible.
    fn attach(program: &Program, call: &str, notes: &Path) -> Option<Strace> {
        let spawned = Command::new("strace")
            .args(["-f", "-qq", "-e", &format!("trace={call}"), "-p", &program.pid().to_string()])
            .arg("-o")
            .arg(notes)
            .stderr(Stdio::null())
            .spawn();
        let mut strace = spawned.ok()?;
        let mut ended = false;
        wait_until("strace was attached", || {
            ended = strace.try_wait().unwrap().is_some();
            ended || program.is_traced()
        });
        if ended { None } else { Some(Strace(strace)) }
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // SIGTERM has it let go of the program; both fail only on one that has ended.
        let _ =
            rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
fn lent_bodies_are_the_file_and_lent_files_go_by_sendfile() {
    let place = Place::new();
    let sizes = [4096, 5001, 300_000, (3 << 20) + 7];
    for size in sizes {
        place.write(&format!("files/{size}"), noise(size, size));
    }
    let ways = [(vec![], "memfd"), (vec!["--loan-budget", "0", "--loan-files"], "file")];
    for (args, way) in ways {
        let cache = place.simplecached([&["-c", "files"][..], &args].concat()).listening();
        let proxy = place.webproxy(PLAIN).listening();
        for size in sizes {
            ask_until_lent(&proxy, &format!("/{size}"), &noise(size, size));
        }
        let notes = place.path("run/notes");
        match Strace::attach(&proxy, "sendfile", &notes) {
            Some(strace) => {
                for size in sizes {
                    proxy.get(&format!("/{size}")).assert_whole(&noise(size, size));
                }
                drop(strace);
                let calls = fs::read_to_string(&notes).unwrap();
                let sent: usize = calls
                    .lines()
                    .filter_map(|line| line.rsplit_once(" = ")?.1.parse::<usize>().ok())
                    .sum();
                // Sealed memory goes to a client on this machine by `send`.
                let all = if way == "file" { sizes.iter().sum::<usize>() } else { 0 };
                assert_eq!(sent, all, "{way}: {calls}");
            }
            None => eprintln!("left out: no strace, or it may not trace"),
        }
        let _ = fs::remove_file(&notes);
        let [proxy, cache] = place.wind_up([proxy, cache]);
        let asked = proxy.count("requests");
        assert!(proxy.count("lent") >= asked / 2, "{way}: {}", proxy.stderr);
        assert_eq!(proxy.count("lent") + proxy.count("streamed"), asked);
        assert_counts_agree(&proxy, &cache);
        assert_eq!(cache.count("copied"), if way == "file" { 0 } else { sizes.len() as u64 });
        if way == "file" {
            assert_eq!(cache.count("streamed"), 0, "lent from the first on");
        }
    }
}

#[track_caller]
fn assert_counts_agree(proxy: &Exit, cache: &Exit) {
    for name in ["lent", "streamed", "hits", "bytes"] {
        assert_eq!(proxy.count(name), cache.count(name), "{name}");
    }
}

#[test]
fn without_a_budget_or_mappings_everything_is_streamed() {
    let place = Place::new();
    let file = noise(1, 100_000);
    place.write("files/a", &file);
    for (of_cache, of_proxy) in [(&["--loan-budget", "0"][..], &[][..]), (&[], &["--mapped", "0"])]
    {
        let cache = place.simplecached([&["-c", "files"], of_cache].concat()).listening();
        let proxy = place.webproxy(of_proxy).listening();
        ask_until_lent(&proxy, "/a", &file);
        let [proxy, cache] = place.wind_up([proxy, cache]);
        assert_eq!((proxy.count("lent"), cache.count("lent")), (0, 0));
        assert_eq!(proxy.count("streamed"), proxy.count("requests"));
        assert_counts_agree(&proxy, &cache);
    }
    for (args, is_lent) in [(&[][..], true), (&["--loan-budget", "0"], false)] {
        let proxy = place.bare_webproxy([&["--root", "files"], args].concat()).listening();
        ask_until_lent(&proxy, "/a", &file);
        let [proxy] = place.wind_up([proxy]);
        assert_eq!(proxy.count("lent") > 0, is_lent, "{}", proxy.stderr);
    }
}

/// Over mq nothing is lent.
fn a_file_that_changes_all_the_while_is_never_stale(over: Transport) {
    let place = Place::over(over);
    let mut file = noise(0, 50_000);
    let path = place.write("files/a", &file);
    let aside = place.write("aside/a", "");
    let cache = place.simplecached(["-c", "files", "--loan-files"]).listening();
    let proxies = [place.webproxy(PLAIN).listening(), place.webproxy(["-n", "1"]).listening()];
    let mut dice = Dice::new(1);
    for round in 1..=60 {
        let len = 40_000 + dice.roll(3) * 5000;
        match dice.roll(3) {
            0 => {
                file = noise(round, file.len());
                let writing = OpenOptions::new().write(true).open(&path).unwrap();
                writing.write_all_at(&file, 0).unwrap();
            }
            1 => {
                file = noise(round, len);
                fs::write(&path, &file).unwrap();
            }
            _ => {
                file = noise(round, len);
                fs::write(&aside, &file).unwrap();
                fs::rename(&aside, &path).unwrap();
            }
        }
        for _ in 0..2 + dice.roll(2) * 5 {
            proxies.iter().for_each(|proxy| proxy.get("/a").assert_whole(&file));
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
    }
    let [first, second] = proxies;
    let [first, second, cache] = place.wind_up([first, second, cache]);
    assert_eq!((first.count("errors"), second.count("errors"), cache.count("errors")), (0, 0, 0));
    assert_eq!(cache.count("lent"), first.count("lent") + second.count("lent"));
    assert_eq!(cache.count("lent") > 0, over == Transport::Unix);
    assert_eq!(cache.count("copied") > 0, over == Transport::Unix, "nobody would take it");
}

/// Its loans have the numbers that its predecessor's had.
fn a_cache_that_comes_anew_lends_anew(over: Transport) {
    let place = Place::over(over);
    for name in 0..4 {
        place.write(&format!("files/{name}"), noise(name, 100_000));
    }
    let proxy = place.webproxy(PLAIN).listening();
    for round in 0..4 {
        let cache = place.simplecached(["-c", "files"]).listening();
        for name in 0..4 {
            let name = (name + round) % 4;
            ask_until_lent(&proxy, &format!("/{name}"), &noise(name, 100_000));
        }
        match round % 2 {
            0 => cache.kill(),
            _ => assert_eq!(cache.terminate().count("lent") > 0, over == Transport::Unix),
        }
    }
    assert_eq!(proxy.terminate().count("errors"), 0);
}

#[test]
fn a_stalled_client_of_a_lent_body_holds_no_segment() {
    let place = Place::new();
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    place.write("files/a", "hello");
    let cache = place.simplecached(["-c", "files", "-t", "1"]).listening();
    let proxy = place
        .webproxy(["-n", "1", "-t", "1", "--timeout", "600", "--spool-limit", "0"])
        .listening();
    ask_until_lent(&proxy, "/large", &large);
    let stalled: Vec<_> = (0..3).map(|_| proxy.stall("/large")).collect();
    assert_eq!(proxy.get("/a"), ok("hello"));
    // What was lent is a snapshot.
    fs::write(place.path("files/large"), "short").unwrap();
    assert_eq!(proxy.get("/large"), ok("short"));
    for client in stalled {
        client.resume().assert_whole(&large);
    }
    let [proxy, _] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), proxy.count("set_aside")), (0, 0));
}
