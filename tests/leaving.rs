//! A socket queue after its `close`: without descriptors, dropped by its own thread, in a child of `fork`.
//! Each in a process of its own, since limits and forks are a process's.

use std::env;
use std::process::Command;
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shmferry::channel::{RequestQueue, Requester, Seqpacket, SeqpacketQueue};
use shmferry::protocol::Reply;
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error, Refusal};
use shmferry_test_support::watchdog::watchdog;

/// Names the test that a child of this test runs; it is told so by its environment.
const ALONE: &str = "SHMFERRY_TEST_ALONE";

/// Runs a test in a process of its own.
fn alone(name: &str, test: impl FnOnce()) {
    let _watchdog = watchdog();
    if env::var_os(ALONE).is_some() {
        return test();
    }
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ALONE, name);
    assert!(command.status().unwrap().success(), "see above");
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

#[test]
fn a_queue_that_closes_without_a_descriptor_left_still_answers() {
    alone("a_queue_that_closes_without_a_descriptor_left_still_answers", || {
        let dir = tempfile::tempdir().unwrap();
        let address = Seqpacket::new(dir.path().join("queue.sock"));
        let queue = address.clone().bind().unwrap();
        let pool =
            SegmentPool::<Memfd>::builder().segments(2).segment_len(64).slots(1).create().unwrap();
        let requester = address.requester(&pool).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| queue.recv(soon()).unwrap().refuse(Refusal::NotFound).unwrap());
            requester.ask(pool.lease(soon()).unwrap(), b"key", soon()).unwrap();
        });
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..before }).unwrap();
        queue.close();
        let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        requester.send(request, soon()).unwrap();
        let reply = transfer.reply(soon());
        assert!(matches!(reply, Ok(Reply::Refused(Refusal::Leaving))), "{reply:?}");
        assert!(matches!(queue.recv(soon()), Err(Error::Closed)));
        setrlimit(Resource::Nofile, before).unwrap();
    });
}

/// The application may hold the last of it in its report of a client that was turned away, which the
/// queue's own thread calls.
#[test]
fn a_closed_queue_may_be_dropped_by_its_own_report() {
    alone("a_closed_queue_may_be_dropped_by_its_own_report", || {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("queue.sock");
        let last: Arc<Mutex<Weak<SeqpacketQueue>>> = Arc::default();
        let (reported, report) = mpsc::channel();
        let (dropped, drops) = mpsc::channel::<()>();
        let drops = Mutex::new(drops);
        let queue = Seqpacket::new(&path).on_rejected({
            let last = Arc::clone(&last);
            move |_, _| {
                let held = last.lock().unwrap().upgrade();
                reported.send(()).unwrap();
                // The other has gone: this one is the last.
                let _ = drops.lock().unwrap().recv();
                drop(held);
                reported.send(()).unwrap();
            }
        });
        let queue = Arc::new(queue.bind().unwrap());
        *last.lock().unwrap() = Arc::downgrade(&queue);
        let connect = || {
            let kind = SocketType::SEQPACKET;
            let socket = rustix::net::socket(AddressFamily::UNIX, kind, None).unwrap();
            rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            socket
        };
        let (hostile, other) = (connect(), connect());
        queue.close();
        rustix::net::send(&hostile, b"nonsense", rustix::net::SendFlags::empty()).unwrap();
        report.recv().unwrap();
        drop(queue);
        dropped.send(()).unwrap();
        report.recv().unwrap();
        // All of its end has happened: the other client is hung up on.
        let mut byte = [0];
        let heard = rustix::net::recv(&other, &mut byte, rustix::net::RecvFlags::empty());
        assert!(matches!(heard, Ok((0, _)) | Err(rustix::io::Errno::CONNRESET)), "{heard:?}");
    });
}

/// The thread of a closed queue does not exist in a child, where its number may be that of another.
#[test]
fn a_child_that_drops_a_closed_queue_keeps_its_own_threads() {
    alone("a_child_that_drops_a_closed_queue_keeps_its_own_threads", || {
        let dir = tempfile::tempdir().unwrap();
        let queue = Seqpacket::new(dir.path().join("queue.sock")).bind().unwrap();
        queue.close();
        // SAFETY: the child makes threads and joins them, which glibc allows after a fork of a process
        // whose other threads hold none of its locks: the queue's thread sleeps.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let own: Vec<_> = (0..8).map(|n| thread::spawn(move || n)).collect();
            drop(queue);
            let joined = own.into_iter().map(|thread| thread.join().unwrap_or(100)).sum::<i32>();
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(i32::from(joined != 28)) }
        }
        let mut status = 0;
        // SAFETY: `status` is alive for the call.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status:#x}");
    });
}
