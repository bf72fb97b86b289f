//! System calls that fail in a running program. They fail by `strace`: where it is not installed,
//! or may not trace, these tests say so and check nothing.

use std::process::{Child, Command, Stdio};

use shmferry_test_support::{
    Answer, LARGE, Place, Program, Signal, Transport, noise, ok, over_both, wait_until,
};

/// Has calls fail from now on, until it is dropped.
struct Strace(Child);

impl Strace {
    /// `None` where that is not possible.
    fn attach(program: &Program, call: &str, injection: &str) -> Option<Strace> {
        let spawned = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e"])
            .args([&format!("inject={call}:{injection}"), "-p", &program.pid().to_string()])
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

/// One call after the other: of what is not armed in an epoll, nobody hears again.
#[test]
fn a_kernel_that_lacks_memory_for_a_moment_leaves_no_client_unheard() {
    let queue = format!("mq:/shmferry-test-failing-calls-{}", std::process::id());
    for transport in ["unix", "mq"] {
        let place = Place::new();
        place.write("files/a", "hello");
        let address = if transport == "unix" { place.cache_address() } else { queue.clone() };
        let cache =
            place.run("simplecached", ["-c", "files", "-t", "2", "--listen", &address]).listening();
        let proxy =
            place.bare_webproxy(["--cache", &address, "-n", "2", "--timeout", "5"]).listening();
        assert_eq!(proxy.get("/a"), ok("hello"));
        for errno in ["ENOMEM", "ENOSPC"] {
            let Some(strace) =
                Strace::attach(&cache, "epoll_ctl", &format!("error={errno}:when=1..9+2"))
            else {
                eprintln!("left out: no strace, or it may not trace");
                return;
            };
            for n in 0..20 {
                assert_eq!(proxy.get("/a"), ok("hello"), "{transport}, {errno}, {n}");
            }
            drop(strace);
            assert_eq!(proxy.get("/a"), ok("hello"), "{transport}, {errno}");
        }
        place.wind_up([proxy, cache]);
    }
}

over_both! {
    a_start_that_fails_leaves_a_dead_servers_leftovers_to_the_next,
}

/// Found by chaos: no cache could be started any more at the name of one that had been killed.
fn a_start_that_fails_leaves_a_dead_servers_leftovers_to_the_next(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    place.simplecached(["-c", "files"]).listening().kill();
    for call in ["ftruncate", "epoll_ctl"] {
        let mut failing =
            place.command_failing(&[&format!("{call}:error=EIO:when=1")], "simplecached");
        let exit =
            Program::spawn(failing.args(["-c", "files", "--listen", &place.cache_address()]))
                .finish();
        if exit.stderr.contains("strace") {
            eprintln!("left out: {}", exit.stderr);
            break;
        }
        exit.assert_failure(&["cannot listen", "Input/output error"]);
    }
    let cache = place.simplecached(["-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "1"]).listening();
    assert_eq!(proxy.get("/a"), ok("hello"));
    place.wind_up([proxy, cache]);
}

/// An older kernel does not know a flag; one with too many descriptors on their way takes no more
/// for now.
#[test]
fn what_the_kernel_refuses_at_first_is_tried_otherwise_or_again() {
    if !Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "true"])
        .status()
        .is_ok_and(|exit| exit.success())
    {
        eprintln!("left out: no strace, or it may not trace");
        return;
    }
    let place = Place::new();
    place.write("files/a", "hello");
    let cache = place.simplecached(["-c", "files"]).listening();
    let address = place.cache_address();
    let proxy = |refusals: &str, timeout: &str| {
        let too_many = format!("sendmsg:error=ETOOMANYREFS:when={refusals}");
        let mut failing =
            place.command_failing(&["memfd_create:error=EINVAL:when=1", &too_many], "webproxy");
        failing.args(["-p", "0", "-n", "2", "--timeout", timeout, "--cache", &address]);
        Program::spawn(&mut failing).listening()
    };
    let (at_first, always) = (proxy("1..3", "20"), proxy("1+", "1"));
    assert_eq!(at_first.get("/a"), ok("hello"));
    assert_eq!(always.get("/a"), Answer::Error, "at its deadline");
    place.wind_up([at_first, always, cache]);
}

/// The only worker at the queue takes a request that stalls, and no thread can be had to wait for
/// the next one: three times in a row.
#[test]
fn a_thread_that_cannot_be_spawned_leaves_no_request_unheard() {
    let place = Place::new();
    place.write("files/small", "hello");
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "1"]).listening();
    let proxy = place.webproxy(["-n", "4", "--timeout", "600"]).listening();
    assert_eq!(proxy.get("/small"), ok("hello"));
    wait_until("one worker was left", || cache.threads_named("shmferry-worker") == 1);
    let Some(strace) = Strace::attach(&cache, "clone3", "error=EAGAIN:when=1..3") else {
        eprintln!("left out: no strace, or it may not trace");
        return;
    };
    let stalled = proxy.stall("/large");
    for _ in 0..5 {
        assert_eq!(proxy.get("/small"), ok("hello"));
    }
    drop(strace);
    stalled.resume().assert_whole(&large);
    place.wind_up([proxy, cache]);
}
