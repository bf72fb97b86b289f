//! `LoanStore`: what is lent, what is not, and that nothing stale ever is.
//!
//! Where another process is needed, it is this test's own executable, run again with a role.
#![cfg(feature = "loan-store")]

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shmferry::channel::InProcess;
use shmferry::files::Directory;
use shmferry::loan::{Loan, LoanStats, LoanStore};
use shmferry::{Body, Client, Refusal, Server, Serving};
use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{Dice, noise, wait_until};
use tempfile::TempDir;

const MB: u64 = 1 << 20;

/// A directory, a server of its files from a store, and a client.
struct Fixture {
    client: Client,
    _serving: Serving,
    store: LoanStore,
    dir: TempDir,
}

impl Fixture {
    fn new(store: LoanStore) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        let address = format!("unix:{}", dir.path().join("s").display());
        let server = Server::bind(address.as_str()).unwrap();
        let _serving = serve(server, Directory::open(dir.path().join("files")).unwrap(), &store);
        let client = Client::builder().segments(4).connect(address.as_str()).unwrap();
        Fixture { client, _serving, store, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("files").join(name)
    }

    fn get(&self, name: &str) -> Body {
        self.client.get(format!("/{name}")).unwrap()
    }

    #[track_caller]
    fn assert_serves(&self, name: &str, bytes: &[u8]) {
        assert!(self.get(name).read_all().unwrap() == bytes, "{name} is not as it should be");
    }

    /// Asks until it is lent; asserts that all answers are right.
    #[track_caller]
    fn assert_gets_lent(&self, name: &str, bytes: &[u8]) {
        wait_until("it was lent", || {
            let body = self.get(name);
            let is_lent = body.is_lent();
            assert!(body.read_all().unwrap() == bytes, "{name} is not as it should be");
            is_lent
        });
    }

    fn stats(&self) -> LoanStats {
        self.store.stats()
    }
}

fn serve(server: Server, files: Directory, store: &LoanStore) -> Serving {
    let store = store.clone();
    let serving = server.serve(4, move |request| match files.file(request.key())? {
        Some(file) => store.send_file_with(request, &file, &String::from("of a store")),
        None => request.refuse(Refusal::NotFound),
    });
    serving.unwrap()
}

/// So long that a file of a few bytes may be copied.
fn let_it_settle() {
    thread::sleep(Duration::from_millis(70));
}

#[test]
fn parts_are_those_of_the_file_and_lent_when_it_is() {
    let _watchdog = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let bytes = noise(1, 300_001);
    fs::write(&path, &bytes).unwrap();
    let_it_settle();
    let store = LoanStore::new(64 * MB);
    let address = format!("unix:{}", dir.path().join("s").display());
    let _serving = {
        let (store, path) = (store.clone(), path.clone());
        let server = Server::bind(address.as_str()).unwrap();
        server.serve(4, move |request| {
            let key = String::from_utf8(request.key().to_vec()).unwrap();
            let (start, end) = key.split_once(' ').unwrap();
            let range = start.parse().unwrap()..end.parse().unwrap();
            store.send_file_range_with(request, &File::open(&path)?, range, &key)
        })
    };
    let client = Client::builder().segments(2).connect(address.as_str()).unwrap();
    let assert_serves = |bytes: &[u8], range: std::ops::Range<usize>| {
        let body = client.get(format!("{} {}", range.start, range.end)).unwrap();
        let is_lent = body.is_lent();
        assert_eq!(body.metadata::<String>().unwrap(), format!("{} {}", range.start, range.end));
        assert_eq!(body.size().known(), Some(range.len() as u64));
        assert!(
            body.read_all().unwrap() == bytes[range.clone()],
            "{range:?} is not as it should be"
        );
        is_lent
    };
    let ranges = [0..300_001, 0..1, 300_000..300_001, 5..5, 4095..4097, 100..200_000];
    assert!(!assert_serves(&bytes, 1..2));
    // Answers are counted once they have been given.
    wait_until("it was counted", || (store.stats().streamed, store.stats().bytes) == (1, 1));
    wait_until("it was lent", || assert_serves(&bytes, 7..250_000));
    wait_until("that was counted", || store.stats().lent == 1);
    for range in &ranges {
        assert!(assert_serves(&bytes, range.clone()), "{range:?}");
    }
    wait_until("all were counted", || store.stats().lent == 1 + ranges.len() as u64);
    // From a file that has changed, nothing is lent; beyond its end, nothing comes.
    fs::write(&path, &bytes[..200_000]).unwrap();
    assert!(!assert_serves(&bytes, 100_000..200_000));
    let beyond = client.get("199999 200001").and_then(Body::read_all);
    assert!(beyond.is_err(), "{beyond:?}");
}

#[test]
fn what_is_asked_for_again_is_lent() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(64 * MB));
    let bytes = noise(1, 300_001);
    fs::write(fixture.path("a"), &bytes).unwrap();
    let_it_settle();
    let first = fixture.get("a");
    assert!(!first.is_lent());
    assert_eq!(first.metadata::<String>().unwrap(), "of a store");
    assert!(first.read_all().unwrap() == bytes);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(fixture.stats().filled, 0, "once is not again");
    assert_eq!((fixture.stats().streamed, fixture.stats().lent), (1, 0));
    fixture.assert_gets_lent("a", &bytes);
    let body = fixture.get("a");
    assert!(body.is_lent());
    assert_eq!(body.metadata::<String>().unwrap(), "of a store");
    // What was lent is a snapshot.
    let lent = body.into_bytes().unwrap();
    fs::write(fixture.path("a"), "other").unwrap();
    assert!(lent[..] == bytes[..]);
    fixture.assert_serves("a", b"other");
    let stats = fixture.stats();
    assert_eq!(stats.filled, 1);
    assert_eq!((stats.kept, stats.kept_bytes), (1, 300_001), "too short now: not looked up");
    // An answer is counted once it was sent, and a client can have read it before.
    wait_until("all is counted", || {
        let stats = fixture.stats();
        stats.bytes == (stats.lent + stats.streamed - 1) * 300_001 + 5
    });
}

/// How a file can change.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// All of its bytes, none more and none fewer.
    InPlace,
    OneByte,
    Renamed,
    Truncated,
    Appended,
    /// And written anew.
    Deleted,
    /// To another file of the same length, times included.
    RenamedWithTimes,
}

const CHANGES: [Change; 7] = [
    Change::InPlace,
    Change::OneByte,
    Change::Renamed,
    Change::Truncated,
    Change::Appended,
    Change::Deleted,
    Change::RenamedWithTimes,
];

/// Changes a file; returns what is in it now.
fn change(path: &Path, now: &[u8], how: Change, seed: usize) -> Vec<u8> {
    let writing = || OpenOptions::new().write(true).open(path).unwrap();
    let aside = path.with_extension("new");
    let mut new = noise(seed, now.len());
    match how {
        Change::InPlace => writing().write_all_at(&new, 0).unwrap(),
        Change::OneByte => {
            new = now.to_vec();
            new[4000] ^= 0x55;
            writing().write_all_at(&new[4000..4001], 4000).unwrap();
        }
        Change::Renamed => {
            fs::write(&aside, &new).unwrap();
            fs::rename(&aside, path).unwrap();
        }
        Change::Truncated => {
            new = now[..now.len() - 1].to_vec();
            writing().set_len(new.len() as u64).unwrap();
        }
        Change::Appended => {
            new = [now, b"one more"].concat();
            OpenOptions::new().append(true).open(path).unwrap().write_all(b"one more").unwrap();
        }
        Change::Deleted => {
            fs::remove_file(path).unwrap();
            fs::write(path, &new).unwrap();
        }
        Change::RenamedWithTimes => {
            let modified = fs::metadata(path).unwrap().modified().unwrap();
            fs::write(&aside, &new).unwrap();
            OpenOptions::new().write(true).open(&aside).unwrap().set_modified(modified).unwrap();
            fs::rename(&aside, path).unwrap();
        }
    }
    new
}

#[test]
fn a_changed_file_is_served_as_it_is_now_from_the_next_request_on() {
    let _watchdog = watchdog();
    for lend_files in [false, true] {
        let fixture = Fixture::new(LoanStore::new(64 * MB).lend_files(lend_files));
        for (number, how) in CHANGES.into_iter().enumerate() {
            let name = number.to_string();
            let path = fixture.path(&name);
            let mut bytes = noise(number, 100_000);
            fs::write(&path, &bytes).unwrap();
            for round in 1..=3 {
                wait_until("it was copied", || {
                    fixture.assert_serves(&name, &bytes);
                    fixture.stats().filled == (number * 3 + round) as u64
                });
                fixture.assert_gets_lent(&name, &bytes);
                bytes = change(&path, &bytes, how, 100 * round + number);
                fixture.assert_serves(&name, &bytes);
                fixture.assert_serves(&name, &bytes);
            }
            fs::remove_file(&path).unwrap();
            assert!(fixture.client.get(format!("/{name}")).is_err(), "{how:?}");
        }
    }
}

/// Two changes within one tick of the file system's clock leave the same times.
#[test]
fn what_has_just_been_written_is_not_copied_yet() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(64 * MB));
    let path = fixture.path("a");
    let mut quick = 0;
    for round in 0..1000 {
        let written = Instant::now();
        fs::write(&path, noise(round, 5000)).unwrap();
        (0..4).for_each(|_| fixture.assert_serves("a", &noise(round, 5000)));
        // At once, in the same tick if the clock is a coarse one.
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"x", 77).unwrap();
        let mut bytes = noise(round, 5000);
        bytes[77] = b'x';
        for _ in 0..4 {
            fixture.assert_serves("a", &bytes);
            thread::sleep(Duration::from_millis(2)); // time for a copy
        }
        if written.elapsed() < Duration::from_millis(40) {
            assert_eq!(fixture.stats().filled, 0);
            quick += 1;
        }
        if quick == 50 {
            break;
        }
    }
    fixture.assert_gets_lent("a", &fs::read(&path).unwrap());
}

#[test]
fn a_file_with_a_modification_time_in_the_future_is_lent_too() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(64 * MB));
    let bytes = noise(1, 5000);
    fs::write(fixture.path("a"), &bytes).unwrap();
    let file = OpenOptions::new().write(true).open(fixture.path("a")).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(10_000)).unwrap();
    fixture.assert_gets_lent("a", &bytes);
    let new = change(&fixture.path("a"), &bytes, Change::InPlace, 2);
    fixture.assert_serves("a", &new);
}

#[test]
fn a_file_that_many_ask_for_at_once_is_copied_once() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(256 * MB));
    let bytes = noise(1, 12 << 20);
    for round in 1..=3 {
        let name = round.to_string();
        fs::write(fixture.path(&name), &bytes).unwrap();
        thread::sleep(Duration::from_millis(300));
        let start = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    (0..6).for_each(|_| fixture.assert_serves(&name, &bytes));
                });
            }
        });
        fixture.assert_gets_lent(&name, &bytes);
        assert_eq!(fixture.stats().filled, round);
    }
}

#[test]
fn the_budget_holds_and_one_file_may_take_nearly_all_of_it() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(MB));
    let names: Vec<String> = (0..30).map(|number| number.to_string()).collect();
    for (number, name) in names.iter().enumerate() {
        fs::write(fixture.path(name), noise(number, 100_000)).unwrap();
    }
    for (number, name) in names.iter().enumerate() {
        fixture.assert_gets_lent(name, &noise(number, 100_000));
        assert!(fixture.stats().kept_bytes <= MB, "{:?}", fixture.stats());
    }
    assert!(fixture.stats().kept >= 5, "{:?}", fixture.stats());
    for (len, is_kept) in [(MB * 31 / 32, true), (MB * 31 / 32 + 1, false), (4 * MB, false)] {
        let bytes = noise(len as usize, len as usize);
        let before = fixture.stats().filled;
        fs::write(fixture.path("large"), &bytes).unwrap();
        thread::sleep(Duration::from_millis(150));
        if is_kept {
            fixture.assert_gets_lent("large", &bytes);
        } else {
            for _ in 0..5 {
                assert!(!fixture.get("large").is_lent());
                thread::sleep(Duration::from_millis(20));
            }
        }
        assert_eq!(fixture.stats().filled - before, u64::from(is_kept));
        assert!(fixture.stats().kept_bytes <= MB, "{:?}", fixture.stats());
    }
}

#[test]
fn what_cannot_be_copied_is_streamed_or_lent_as_a_file() {
    let _watchdog = watchdog();
    for (budget, lend_files) in [(64 * MB, false), (0, false), (0, true)] {
        let store = LoanStore::new(budget).lend_files(lend_files);
        let (_dir, queue) = (tempfile::tempdir().unwrap(), InProcess::bounded(4));
        let dir = _dir.path().to_owned();
        fs::write(dir.join("short"), noise(1, 4095)).unwrap();
        fs::write(dir.join("empty"), "").unwrap();
        fs::write(dir.join("file"), noise(2, 50_000)).unwrap();
        File::create(dir.join("hollow")).unwrap().set_len(9000).unwrap();
        let handed = store.clone();
        let serving =
            Server::with(queue.clone()).serve(2, move |request| -> shmferry::Result<()> {
                let (name, how) =
                    std::str::from_utf8(request.key()).unwrap().split_once(' ').unwrap();
                let file =
                    OpenOptions::new().read(true).write(how == "to write").open(dir.join(name));
                handed.send_file(request, &file?)
            });
        let _serving = serving.unwrap();
        let client = Client::builder().segments(2).in_process(&queue).unwrap();
        let_it_settle();
        let ask = |key: &str, is_lent: bool| {
            let mut all = Vec::new();
            for _ in 0..5 {
                let mut body = client.get(key).unwrap();
                assert_eq!(body.is_lent(), is_lent, "{key}, {budget}, {lend_files}");
                all.clear();
                body.read_to_end(&mut all).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
            all
        };
        assert!(ask("short to read", false) == noise(1, 4095));
        assert!(ask("empty to read", false).is_empty());
        assert!(ask("hollow to read", false) == [0; 9000], "it has no blocks");
        assert!(ask("/proc/self/status to read", false).starts_with(b"Name:"));
        assert!(!ask("/sys/kernel/mm/transparent_hugepage/enabled to read", false).is_empty());
        if budget == 0 {
            assert!(ask("file to read", lend_files) == noise(2, 50_000));
            assert!(
                ask("file to write", lend_files) == noise(2, 50_000),
                "the one to read is kept"
            );
            fs::write(_dir.path().join("other"), noise(3, 50_000)).unwrap();
            assert!(ask("other to write", false) == noise(3, 50_000));
            assert_eq!(store.stats().filled, 0);
        }
    }
}

#[test]
fn a_file_that_is_lent_as_it_is_is_introduced_once_and_copied_later() {
    let _watchdog = watchdog();
    let fixture = Fixture::new(LoanStore::new(64 * MB).lend_files(true));
    let bytes = noise(1, 100_000);
    fs::write(fixture.path("a"), &bytes).unwrap();
    for _ in 0..5 {
        let body = fixture.get("a");
        assert!(body.is_lent());
        assert!(body.into_bytes().unwrap().memory().is_none(), "a file");
    }
    let path = fixture.path("a").canonicalize().unwrap();
    let targets = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|fd| fd.path().read_link());
    let open = targets.filter(|target| target.as_ref().is_ok_and(|target| *target == path)).count();
    assert!((2..=4).contains(&open), "the store's own, the client's, one of a request: {open}");
    wait_until("it was copied", || {
        let bytes = fixture.get("a").into_bytes().unwrap();
        bytes.memory().is_some()
    });
    fixture.assert_serves("a", &bytes);
}

#[test]
fn the_thread_ends_with_the_store() {
    let _watchdog = watchdog();
    child("thread").wait_successfully();
}

fn the_thread_ends() {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim_end() == "shmferry-loans").count()
    };
    let fixture = Fixture::new(LoanStore::new(64 * MB));
    assert_eq!(threads(), 0);
    fs::write(fixture.path("a"), noise(1, 5000)).unwrap();
    fixture.assert_gets_lent("a", &noise(1, 5000));
    assert_eq!(threads(), 1);
    drop(fixture);
    wait_until("it ended", || threads() == 0);
}

#[test]
fn without_descriptors_answers_are_streamed() {
    let _watchdog = watchdog();
    child("descriptors").wait_successfully();
}

#[test]
fn copies_leave_descriptors_to_those_who_open_files() {
    let _watchdog = watchdog();
    child("few descriptors").wait_successfully();
}

fn open_files_with_few_descriptors() {
    std::panic::set_hook(Box::new(|panic| {
        println!("{panic}");
        std::process::exit(1)
    }));
    for lend_files in [false, true] {
        let store = LoanStore::new(64 * MB).lend_files(lend_files);
        let dir = tempfile::tempdir().unwrap();
        let files = Directory::open(dir.path()).unwrap();
        let name = |number: usize| format!("f{number}");
        (0..40).for_each(|n| fs::write(dir.path().join(name(n)), noise(n, 10_000)).unwrap());
        let queue = InProcess::bounded(4);
        let _serving = serve(Server::with(queue.clone()), files, &store);
        let client = Client::builder().segments(4).in_process(&queue).unwrap();
        let_it_settle();
        let before = getrlimit(Resource::Nofile);
        let open = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        // The last quarter: for four handlers, each with its file and for a moment a second descriptor
        // of it, and for the copy that is being made. Far less than the 40 copies would take.
        let most = (open + 4 * 2 + 4) * 4 / 3;
        setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..before }).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..500 {
                        let number = round * 7 % 40;
                        let body = client.get(name(number)).unwrap();
                        assert!(body.read_all().unwrap() == noise(number, 10_000));
                    }
                });
            }
        });
        setrlimit(Resource::Nofile, before).unwrap();
    }
}

#[test]
fn a_limit_on_file_sizes_ends_no_server() {
    let _watchdog = watchdog();
    child("file size").wait_successfully();
}

/// A write beyond the limit would end this process by `SIGXFSZ`: the limit holds for memfds, too.
fn meet_the_limit_on_file_sizes() {
    std::panic::set_hook(Box::new(|panic| {
        println!("{panic}");
        std::process::exit(1)
    }));
    let store = LoanStore::new(64 * MB);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let bytes = noise(1, 5_000_000);
    fs::write(&path, &bytes).unwrap();
    let file = Arc::new(File::open(&path).unwrap());
    let queue = InProcess::bounded(4);
    let handed = (store.clone(), Arc::clone(&file));
    let _serving = Server::with(queue.clone())
        .serve(2, move |request| handed.0.send_file(request, &handed.1))
        .unwrap();
    let client = Client::builder().segments(1).segment_len(MB).in_process(&queue).unwrap();
    thread::sleep(Duration::from_millis(150)); // so long that a file of that length may be copied
    let before = getrlimit(Resource::Fsize);
    setrlimit(Resource::Fsize, Rlimit { current: Some(3 * MB), ..before }).unwrap();
    for _ in 0..10 {
        let body = client.get("a").unwrap();
        assert!(!body.is_lent());
        assert!(body.read_all().unwrap() == bytes);
        thread::sleep(Duration::from_millis(10));
    }
    let error = Loan::from_reader(&bytes[..]).unwrap_err();
    assert!(error.to_string().contains("File too large"), "{error}");
    assert_eq!(store.stats().filled, 0);
    setrlimit(Resource::Fsize, before).unwrap();
    wait_until("it was lent", || client.get("a").unwrap().is_lent());
}

fn run_out_of_descriptors() {
    // In any thread.
    std::panic::set_hook(Box::new(|panic| {
        println!("{panic}");
        std::process::exit(1)
    }));
    // None for a duplicate; for that, but not for the memory.
    run_out_of_all_but(0, true);
    run_out_of_all_but(0, false);
    run_out_of_all_but(1, false);
}

fn run_out_of_all_but(left: u64, lend_files: bool) {
    let store = LoanStore::new(64 * MB).lend_files(lend_files);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, noise(1, 50_000)).unwrap();
    let file = Arc::new(File::open(&path).unwrap());
    let queue = InProcess::bounded(4);
    let handed = (store.clone(), Arc::clone(&file));
    let serving = Server::with(queue.clone())
        .serve(2, move |request| handed.0.send_file(request, &handed.1))
        .unwrap();
    let client = Client::builder().segments(2).in_process(&queue).unwrap();
    let_it_settle();
    let before = getrlimit(Resource::Nofile);
    let next_free = u64::from(rustix::fd::AsRawFd::as_raw_fd(&file.try_clone().unwrap()) as u32);
    setrlimit(Resource::Nofile, Rlimit { current: Some(next_free + left), ..before }).unwrap();
    for _ in 0..10 {
        let body = client.get("a").unwrap();
        assert!(!body.is_lent());
        assert!(body.read_all().unwrap() == noise(1, 50_000));
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(store.stats().filled, 0);
    setrlimit(Resource::Nofile, before).unwrap();
    wait_until("it was copied", || {
        assert!(client.get("a").unwrap().read_all().unwrap() == noise(1, 50_000));
        store.stats().filled == 1
    });
    drop(serving);
}

#[test]
fn a_child_of_fork_lends_nothing_of_its_parents_and_is_not_stuck() {
    let _watchdog = watchdog();
    child("fork").wait_successfully();
}

fn fork_with_a_store() {
    let store = LoanStore::new(64 * MB).lend_files(true);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, noise(1, 50_000)).unwrap();
    let serve = || {
        let (queue, path, store) = (InProcess::bounded(4), path.clone(), store.clone());
        let serving = Server::with(queue.clone()).serve(2, move |request| {
            let file = File::open(&path)?;
            store.send_file(request, &file)
        });
        (serving.unwrap(), Client::builder().segments(2).in_process(&queue).unwrap())
    };
    let (_serving, client) = serve();
    wait_until("it was copied", || {
        assert!(client.get("a").unwrap().read_all().unwrap() == noise(1, 50_000));
        store.stats().filled == 1
    });
    // SAFETY: the child uses only what works after a fork, which is what is tested, and ends
    // without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            assert_eq!(store.stats(), LoanStats::default());
            let (_serving, client) = serve();
            for _ in 0..5 {
                let body = client.get("a").unwrap();
                assert!(!body.is_lent());
                assert!(body.read_all().unwrap() == noise(1, 50_000));
            }
            drop(store.clone());
        }));
        // SAFETY: ends the child without running its parent's handlers.
        unsafe { libc::_exit(i32::from(ended.is_err())) };
    }
    let mut status = -1;
    // SAFETY: `status` is valid for one write.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    assert!(client.get("a").unwrap().is_lent());
}

// ---------------------------------------------------------------- many requests, small budgets

/// As many files as fit into each budget.
const FILES_OF_BUDGET: u64 = 100;
/// On average.
const FILE: u64 = 12 << 10;
const BUDGET: u64 = FILES_OF_BUDGET * FILE;

/// `LOAN_REQUESTS` of them, 20,000 by default.
fn requests() -> usize {
    env::var("LOAN_REQUESTS").map_or(20_000, |count| count.parse().unwrap())
}

/// The server is a process of its own, and so is the client, which writes the files as well.
#[test]
fn many_requests_of_many_files_within_small_budgets_are_never_stale_and_cost_nothing_that_stays() {
    let _watchdog = (requests() <= 20_000).then(watchdog);
    println!("{}", child("ask for many").wait_successfully());
}

/// A file for every hundred requests, but 1,000 at least.
fn ask_for_many() {
    let requests = requests();
    let count = (requests / 100).max(1000);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("files");
    fs::create_dir(&root).unwrap();
    /// What is in each file: its number of the seed, its length.
    struct Known {
        seed: usize,
        len: usize,
    }
    let files: Vec<RwLock<Known>> = (0..count)
        .map(|number| {
            let len = 4096 + number * 7919 % (FILE as usize * 2 - 8192);
            fs::write(root.join(number.to_string()), noise(number, len)).unwrap();
            RwLock::new(Known { seed: number, len })
        })
        .collect();
    let mut server = child_with("serve", dir.path());
    server.heard("ready");
    let address = format!("unix:{}", dir.path().join("s").display());
    let client = Client::builder()
        .segments(4)
        .keep_loans(BUDGET, FILES_OF_BUDGET as u32)
        .connect(address.as_str())
        .unwrap();

    let (done, changes, lent, wrong) =
        (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let samples = thread::scope(|scope| {
        for number in 0..4 {
            let (client, files, root) = (&client, &files, &root);
            let (done, changes, lent, wrong) = (&done, &changes, &lent, &wrong);
            scope.spawn(move || {
                let mut dice = Dice::new(number);
                while done.fetch_add(1, Relaxed) < requests {
                    // Most requests are for few files: half as many as a budget has room for.
                    let many = dice.roll(10) < 2;
                    let hot = FILES_OF_BUDGET as usize / 2;
                    let number = dice.roll(if many { files.len() } else { hot });
                    if dice.roll(100) == 0 {
                        let mut known = files[number].write().unwrap();
                        let seed = files.len() + changes.fetch_add(1, Relaxed);
                        let how = CHANGES[[0, 2, 5, 6][dice.roll(4)]];
                        let now = noise(known.seed, known.len);
                        change(&root.join(number.to_string()), &now, how, seed);
                        known.seed = seed;
                    }
                    let known = files[number].read().unwrap();
                    let body = client.get(format!("/{number}")).unwrap();
                    lent.fetch_add(body.is_lent().into(), Relaxed);
                    if body.read_all().unwrap() != noise(known.seed, known.len) {
                        wrong.fetch_add(1, Relaxed);
                    }
                }
            });
        }
        // After a fifth, and so on.
        let sample = |part: usize| {
            wait_until_long(|| done.load(Relaxed) >= requests * part / 5);
            [Sample::of(server.pid()), Sample::of(std::process::id())]
        };
        (1..=5).map(sample).collect::<Vec<_>>()
    });
    let stats = server.ask("stats");
    println!("{requests} requests of {count} files, {} changes", changes.load(Relaxed));
    println!("lent {}, wrong or stale {}", lent.load(Relaxed), wrong.load(Relaxed));
    println!("{stats}");
    for (part, [server, client]) in samples.iter().enumerate() {
        println!("{}/5: server {server:?}\n     client {client:?}", part + 1);
    }
    assert_eq!(wrong.load(Relaxed), 0);
    assert!(lent.load(Relaxed) > requests / 4, "hot files are lent");
    for samples in [0, 1].map(|side| samples.iter().map(move |both| &both[side])) {
        let first = samples.clone().next().unwrap();
        for sample in samples {
            // One copy is being made, one is held by each thread of a client or introduced to it.
            assert!(sample.loans <= FILES_OF_BUDGET * 3 / 2 + 5, "{sample:?}");
            assert!(sample.loan_bytes <= BUDGET + 5 * 2 * FILE, "{sample:?}");
            assert!(sample.descriptors <= FILES_OF_BUDGET as usize * 3 / 2 + 100, "{sample:?}");
            assert!(sample.mappings <= first.mappings + FILES_OF_BUDGET as usize, "{sample:?}");
            assert!(sample.resident <= first.resident + 8 * MB, "{sample:?}, {first:?}");
        }
    }
    drop(client);
    server.ask("end");
    server.wait_successfully();
}

/// The server of that.
fn serve_until_told(dir: &Path) {
    let store = LoanStore::new(BUDGET);
    let files = Directory::open(dir.join("files")).unwrap();
    let address = format!("unix:{}", dir.join("s").display());
    let server = Server::builder().lend_at_most(BUDGET, FILES_OF_BUDGET as u32);
    let serving = serve(server.bind(address.as_str()).unwrap(), files, &store);
    println!("ready");
    for line in std::io::stdin().lines() {
        println!("{:?}", store.stats());
        if line.unwrap() == "end" {
            break;
        }
    }
    drop(serving);
}

/// What a process holds.
#[derive(Debug)]
#[allow(dead_code)]
struct Sample {
    descriptors: usize,
    mappings: usize,
    resident: u64,
    /// Descriptors of loans, and their bytes.
    loans: u64,
    loan_bytes: u64,
}

impl Sample {
    fn of(pid: u32) -> Sample {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident: u64 = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        let mut loans = (0, 0);
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            if target.to_string_lossy().contains("memfd:shmferry-loan") {
                loans.0 += 1;
                loans.1 += fs::metadata(fd.path()).map_or(0, |found| found.size());
            }
        }
        Sample {
            descriptors: descriptors(pid),
            mappings: fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count(),
            resident: resident << 10,
            loans: loans.0,
            loan_bytes: loans.1,
        }
    }
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Without a limit: so many requests can take long.
fn wait_until_long(holds: impl Fn() -> bool) {
    while !holds() {
        thread::sleep(Duration::from_millis(2));
    }
}

// ---------------------------------------------------------------- the other process

const ROLE: &str = "SHMFERRY_LOAN_STORE_ROLE";
const DIR: &str = "SHMFERRY_LOAN_STORE_DIR";

/// Not a test, but what another process does.
#[test]
fn play_a_role() {
    let Ok(role) = env::var(ROLE) else { return };
    match role.as_str() {
        "thread" => the_thread_ends(),
        "descriptors" => run_out_of_descriptors(),
        "few descriptors" => open_files_with_few_descriptors(),
        "file size" => meet_the_limit_on_file_sizes(),
        "fork" => fork_with_a_store(),
        "ask for many" => ask_for_many(),
        "serve" => serve_until_told(env::var(DIR).unwrap().as_ref()),
        other => panic!("unknown role {other}"),
    }
}

struct Process {
    child: Child,
    says: BufReader<std::process::ChildStdout>,
}

fn child(role: &str) -> Process {
    child_with(role, "/".as_ref())
}

fn child_with(role: &str, dir: &Path) -> Process {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["play_a_role", "--exact", "--nocapture"])
        .env(ROLE, role)
        .env(DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let says = BufReader::new(child.stdout.take().unwrap());
    Process { child, says }
}

impl Process {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Reads up to a line with this in it, and returns that.
    fn heard(&mut self, part: &str) -> String {
        let lines = self.says.by_ref().lines().map(Result::unwrap);
        lines.into_iter().find(|line| line.contains(part)).expect("it ended")
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
        self.heard("LoanStats")
    }

    /// Returns the rest of what it says.
    #[track_caller]
    fn wait_successfully(mut self) -> String {
        let mut said = String::new();
        self.says.read_to_string(&mut said).unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
        said
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
