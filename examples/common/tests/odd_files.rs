//! Files that are not as plain as they look: leased ones, and those whose size is not their length.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use shmferry_test_support::{PLAIN, Place, Program, ok, wait_until};

/// A write lease on a file: a program that opens it is held up until the lease is given back.
struct Lease {
    file: File,
    /// The kernel has asked for the lease, by `SIGIO`.
    asked: Arc<AtomicBool>,
}

impl Lease {
    fn take(path: &Path) -> Lease {
        let asked = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(libc::SIGIO, Arc::clone(&asked)).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let lease = Lease { file, asked };
        lease.set(libc::F_WRLCK);
        lease
    }

    fn set(&self, kind: i32) {
        // SAFETY: `fcntl` takes an open descriptor and two numbers, and touches no memory of ours.
        let set = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, kind) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }

    /// Gives the lease back, once it is asked for, as holders do after they have written.
    fn give_back(self) {
        wait_until("the lease was asked for", || self.asked.load(Ordering::SeqCst));
        self.set(libc::F_UNLCK);
    }
}

/// In one test: `SIGIO` is the process's.
#[test]
fn a_file_under_a_write_lease_is_served_when_the_lease_is_given_back() {
    let place = Place::new();
    let path = place.write("files/a", "hello");
    place.write("files/b", "beside");
    place.write("manifest", "/a files/a\n/b files/b\n");
    let serve = |proxy: &Program| {
        let lease = Lease::take(&path);
        let mut client = proxy.connect();
        client.request("/a");
        // The worker's place is lent while it waits: there is only one.
        for _ in 0..3 {
            assert_eq!(proxy.get("/b"), ok("beside"));
        }
        lease.give_back();
        assert_eq!(client.answer(), ok("hello"));
        assert_eq!(proxy.get("/a"), ok("hello"));
    };
    for source in ["files", "manifest"] {
        let cache = place.simplecached(["-c", source, "-t", "1"]).listening();
        let proxy = place.webproxy(PLAIN).listening();
        serve(&proxy);
        place.wind_up([proxy, cache]);
    }
    let proxy = place.bare_webproxy(["--root", "files", "-t", "1"]).listening();
    serve(&proxy);
    place.wind_up([proxy]);

    // Leased while the manifest is read: it is there, and nothing has to be waited for.
    let lease = Lease::take(&path);
    let cache = place.simplecached(["-c", "manifest"]).listening();
    lease.give_back();
    let proxy = place.webproxy(PLAIN).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    place.wind_up([proxy, cache]);
}

/// Files that exist, with what is in them.
fn readable(paths: &[&'static str]) -> Vec<(&'static str, Vec<u8>)> {
    let read = |path: &&'static str| fs::read(path).ok().map(|bytes| (*path, bytes));
    paths.iter().filter_map(read).filter(|(_, bytes)| !bytes.is_empty()).collect()
}

fn serve_by_manifest(files: &[(&'static str, Vec<u8>)]) {
    let place = Place::new();
    place.write("empty", "");
    let lines: String = files.iter().map(|(path, _)| format!("{path} {path}\n")).collect();
    place.write("manifest", format!("{lines}/empty empty\n"));
    let cache = place.simplecached(["-c", "manifest"]).listening();
    for args in [vec![], vec!["-n", "1", "-z", "824", "--slots", "1"]] {
        let proxy = place.webproxy(args).listening();
        for (path, bytes) in files {
            assert_eq!(proxy.get(path), ok(bytes), "{path}");
        }
        assert_eq!(proxy.get("/empty"), ok(""));
        proxy.terminate().assert_said(&["errors=0"]);
    }
    place.wind_up([cache]);
}

#[test]
fn files_whose_size_is_said_to_be_zero_arrive_with_what_they_hold() {
    let files = readable(&[
        "/proc/version",
        "/proc/filesystems",
        "/proc/sys/kernel/ostype",
        "/proc/sys/kernel/osrelease",
        "/proc/config.gz",
        "/proc/kallsyms", // longer than what is spooled in memory
    ]);
    assert!(files.len() >= 3, "{files:?}");
    serve_by_manifest(&files);
    let place = Place::new();
    let proxy = place.bare_webproxy(["--root", "/proc/sys/kernel"]).listening();
    assert_eq!(proxy.get("/ostype"), ok(fs::read("/proc/sys/kernel/ostype").unwrap()));
    place.wind_up([proxy]);
}

#[test]
fn files_that_are_shorter_than_their_size_says_arrive_with_what_they_hold() {
    let files = readable(&[
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/devices/system/cpu/online",
        "/sys/devices/system/cpu/possible",
        "/sys/devices/system/node/online",
        "/sys/class/net/lo/mtu",
    ]);
    if files.is_empty() {
        eprintln!("left out: there is no sysfs");
        return;
    }
    serve_by_manifest(&files);
}

/// All of it is holes: nothing is allocated, and yet it is as long as it says.
#[test]
fn a_sparse_file_arrives_whole() {
    let place = Place::new();
    place.write("files/sparse", "");
    File::options().write(true).open(place.path("files/sparse")).unwrap().set_len(300_000).unwrap();
    let cache = place.simplecached(["-c", "files"]).listening();
    let proxy = place.webproxy(PLAIN).listening();
    assert_eq!(proxy.get("/sparse"), ok(vec![0; 300_000]));
    place.wind_up([proxy, cache]);
}
