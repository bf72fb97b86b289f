//! Processes that fork and do not exec: what a child may do with its parent's things, and with its
//! own.
//!
//! Each test forks in a process that was started for it, on a thread that holds no lock of the
//! harness.

use std::io::ErrorKind;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use rustix::process::{getpid, getppid, set_parent_process_death_signal};
use shmferry::channel::InProcess;
use shmferry::error::Misuse;
use shmferry::workers::blocking;
use shmferry_test_support::{SHARED_MEMORY, names_in, queue_exists, wait_until};

use super::*;

/// The tests over one transport.
macro_rules! over {
    ($carrier:ident) => {
        over!($carrier:
            a_child_that_drops_a_clients_things_harms_none_of_them,
            a_child_that_drops_a_servers_things_harms_none_of_them,
            a_child_that_uses_its_parents_things_is_refused_and_told_why,
            a_child_has_pools_queues_and_requesters_of_its_own,
            a_server_that_forked_after_it_bound_writes_to_nobody_and_may_bind_anew,
            a_fork_at_any_moment_leaves_neither_process_stuck,
        );
    };
    ($carrier:ident: $($test:ident,)*) => {
        $(#[test] fn $test() { super::$test::<super::$carrier>() })*
    };
}

/// What a process does in each of these tests.
pub(super) fn play<C: Carrier>(role: &str, address: &str) {
    match role {
        "fork: a client whose child drops everything" => a_client_whose_child_drops::<C>(address),
        "fork: a server whose child drops everything" => a_server_whose_child_drops::<C>(address),
        "fork: a child that tries everything" => a_child_that_tries_everything::<C>(address),
        "fork: a child with things of its own" => a_child_with_its_own::<C>(address),
        "fork: become a daemon" => become_a_daemon::<C>(address),
        "fork: again and again" => fork_again_and_again::<C>(address),
        "fork: drop a requester" => drop_a_requester(address),
        "fork: in a workers" => fork_in_a_crew(),
        "fork: serve many" => {
            let queue = C::bind(address).unwrap();
            say("ready");
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        answer(&queue, |mut sending, len| drop(sending.write_all(&pattern(len))));
                    });
                }
            });
        }
        other => panic!("unknown role {other:?}"),
    }
}

/// How a child ends.
#[derive(Clone, Copy)]
enum Ending {
    /// `_exit`: at once.
    AtOnce,
    /// `exit`: with the handlers that were registered, by its parent too.
    InOrder,
    /// `_exit`, and not before it when its parent ends, as it would otherwise.
    AsDaemon,
}

/// A child of this process.
struct Fork(libc::pid_t);

impl Fork {
    /// Forks. The child runs `child`, and ends with it.
    fn running(ending: Ending, child: impl FnOnce()) -> Fork {
        // SAFETY: the child runs on a copy of this thread, which holds no lock of the C library.
        // What else it may meet in a lock that another thread held is what these tests are about.
        match unsafe { libc::fork() } {
            0 => {
                if !matches!(ending, Ending::AsDaemon) {
                    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
                }
                let code = i32::from(catch_unwind(AssertUnwindSafe(child)).is_err());
                match ending {
                    // SAFETY: it only ends this process.
                    Ending::AtOnce | Ending::AsDaemon => unsafe { libc::_exit(code) },
                    // SAFETY: as above, and no other thread of this process is ending it.
                    Ending::InOrder => unsafe { libc::exit(code) },
                }
            }
            -1 => panic!("{}", std::io::Error::last_os_error()),
            pid => Fork(pid),
        }
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    fn ends_well(self) {
        let mut status = 0;
        // SAFETY: `status` is ours, and alive.
        assert_eq!(unsafe { libc::waitpid(self.0, &mut status, 0) }, self.0);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status:#x}");
    }
}

/// Names of pools and segments of a process.
fn names_of(pid: u32) -> Vec<String> {
    let mut names = names_in(SHARED_MEMORY.as_ref());
    names.retain(|name| name.starts_with(&format!("shmferry-{pid}-")));
    names.sort();
    names
}

/// Asserts that a call was refused because what it was called on belongs to process `made_by`.
#[track_caller]
fn refused<T>(outcome: Result<T, Error>, made_by: u32) {
    match outcome.map(drop) {
        Err(error @ Error::Misuse(Misuse::Forked { made_by: named })) => {
            assert_eq!(named, made_by);
            assert!(error.to_string().contains(&format!("process {made_by}")), "{error}");
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[track_caller]
fn refused_io<T>(outcome: std::io::Result<T>, made_by: u32) {
    let error = outcome.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    refused::<()>(Err(*error.into_inner().unwrap().downcast().unwrap()), made_by);
}

impl Other {
    /// Waits until it has ended, as it should.
    #[track_caller]
    fn ends_well(&mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

/// Two ends of a transfer within this process, the sender's accepted.
fn transfer_within<B: Backing>(
    pool: &SegmentPool<B>,
    queue: &InProcess,
    len: u64,
) -> (ShmTransfer<Receiver, shmferry::protocol::Offered>, Sending) {
    let (request, transfer) = pool.lease(soon()).unwrap().request("within").unwrap();
    queue.send(request, soon()).unwrap();
    (transfer, queue.recv(soon()).unwrap().accept(len).unwrap())
}

// ---------------------------------------------------------------- dropping

fn a_client_whose_child_drops<C: Carrier>(address: &str) {
    let pool = pool::<C>(5, 2);
    let requester = C::requester(address, &pool);
    let queue = InProcess::bounded(4);
    let workers = WorkerPool::start(
        "test",
        1,
        || {
            thread::park();
            Some(())
        },
        |()| {},
    )
    .unwrap();

    let mut body = ask::<C>(&requester, &pool, 9000).unwrap();
    body.read_exact(&mut [0; 10]).unwrap();
    let lease = pool.lease(soon()).unwrap();
    let unsent = pool.lease(soon()).unwrap().request("20").unwrap();
    let within = transfer_within(&pool, &queue, 4);
    let (request, waiting) = pool.lease(soon()).unwrap().request("waiting").unwrap();
    queue.send(request, soon()).unwrap();

    let names = names_of(std::process::id());
    let stats = pool.stats();
    let mut all = Some((body, lease, unsent, within, waiting, queue, requester, pool, workers));
    for ending in [Ending::AtOnce, Ending::InOrder] {
        Fork::running(ending, || drop(all.take())).ends_well();
    }
    // A chunk that is lent, and a slot.
    let (
        mut body,
        lease,
        (request, transfer),
        (offered, mut sending),
        waiting,
        queue,
        requester,
        pool,
        _crew,
    ) = all.unwrap();
    {
        let mut slot = Some(sending.next_slot(soon()).unwrap());
        let mut chunk = Some(body.next_chunk(soon()).unwrap());
        Fork::running(Ending::AtOnce, || drop((slot.take(), chunk.take()))).ends_well();
    }

    // Nothing has happened to any of them.
    assert_eq!(names_of(std::process::id()), names);
    assert_eq!(pool.stats(), stats);
    let mut rest = Vec::new();
    body.read_to_end(&mut rest).unwrap();
    assert!(rest == pattern(9000)[2048..], "the chunk that was lent is consumed, and nothing else");
    drop(body);
    requester.send(request, soon()).unwrap();
    let Reply::Found(asked) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    assert!(read_all(asked) == pattern(20));
    sending.write_all(b"four").unwrap();
    let Reply::Found(body) = offered.reply(soon()).unwrap() else { panic!("refused") };
    assert_eq!(read_all(body), b"four");
    queue.recv(soon()).unwrap().accept(0).unwrap().finish().unwrap();
    let Reply::Found(body) = waiting.reply(soon()).unwrap() else { panic!("refused") };
    assert_eq!(read_all(body), b"");
    drop(lease);
    assert_eq!((pool.stats().idle, pool.stats().retired), (5, 0));

    // And the server is still watched.
    let mut body = ask::<C>(&requester, &pool, 1 << 20).unwrap();
    body.read_exact(&mut [0; 10]).unwrap();
    say("under way");
    wait_until("the end of the server was told", || C::server(&requester).is_none());
    body.set_timeout(Duration::MAX);
    let error = body.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    say("told");
}

fn a_child_that_drops_a_clients_things_harms_none_of_them<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let server = Other::start("serve", &place);
    let mut client = Other::start("fork: a client whose child drops everything", &place);
    client.wait_for("under way");
    server.kill();
    client.wait_for("told");
    client.ends_well();
}

fn a_server_whose_child_drops<C: Carrier>(address: &str) {
    let queue = C::bind(address).unwrap();
    say("ready");
    let mut sending = queue.recv(soon()).unwrap().accept(9000).unwrap();
    sending.write_all(&pattern(9000)[..3000]).unwrap();
    let starting = queue.recv(soon()).unwrap();
    let mut all = Some((sending, starting, queue));
    for ending in [Ending::AtOnce, Ending::InOrder] {
        Fork::running(ending, || drop(all.take())).ends_well();
    }
    let (mut sending, starting, queue) = all.unwrap();
    let again = C::bind(address).map(drop).unwrap_err();
    assert!(
        matches!(again, Error::AddressInUse { pid, .. } if pid == std::process::id()),
        "{again}"
    );
    sending.write_all(&pattern(9000)[3000..]).unwrap();
    drop(sending);
    starting.accept(10).unwrap().write_all(&pattern(10)).unwrap();
    answer(&queue, |mut sending, len| {
        let _ = sending.write_all(&pattern(len)); // its client may leave
    });
}

fn a_child_that_drops_a_servers_things_harms_none_of_them<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let mut server = Other::start("fork: a server whose child drops everything", &place);
    server.wait_for("ready");
    let pool_ = pool::<C>(2, 2);
    let requester = C::requester(address, &pool_);
    thread::scope(|scope| {
        let long = scope.spawn(|| read_all(ask::<C>(&requester, &pool_, 9000).unwrap()));
        let short = scope.spawn(|| read_all(ask::<C>(&requester, &pool_, 10).unwrap()));
        // Either may be the first to be taken; the server sends by that order.
        let mut lens = [long.join().unwrap(), short.join().unwrap()].map(|bytes| bytes.len());
        lens.sort();
        assert_eq!(lens, [10, 9000]);
    });
    match C::TRANSPORT {
        Transport::Unix => assert!(place.path("run/cache.sock").exists()),
        Transport::Mq => assert!(queue_exists(place.queue()) && place.queue_files().len() == 2),
    }
    let newcomer = pool::<C>(1, 2);
    let requester = C::requester(address, &newcomer);
    assert!(read_all(ask::<C>(&requester, &newcomer, 100_000).unwrap()) == pattern(100_000));
    let mut body = ask::<C>(&requester, &newcomer, 1 << 20).unwrap();
    server.kill();
    body.set_timeout(Duration::MAX);
    let error = body.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

/// Closing a socket does not hang up while a child has it open as well.
fn drop_a_requester(address: &str) {
    let pool = pool::<Unix>(1, 2);
    let requester = Unix::requester(address, &pool);
    drop(read_all(ask::<Unix>(&requester, &pool, 10).unwrap()));
    let _child = Fork::running(Ending::AtOnce, || while is_nudged() {});
    drop(requester);
    say("dropped");
    linger()
}

#[test]
fn a_requester_that_is_dropped_hangs_up_though_a_child_of_its_process_lives() {
    let _watchdog = watchdog();
    let place = Place::new();
    let queue = Unix::bind(&place.cache_address()).unwrap();
    let mut client = Other::start("fork: drop a requester", &place);
    let mut sending = queue.recv(soon()).unwrap().accept(10).unwrap();
    sending.write_all(&pattern(10)).unwrap();
    client.wait_for("dropped");
    wait_until("the server was told", || {
        let nothing = queue.recv(Deadline::after(Duration::ZERO));
        assert!(matches!(nothing, Err(Error::Timeout(_))));
        queue.clients().is_empty()
    });
}

// ---------------------------------------------------------------- using

fn a_child_that_tries_everything<C: Carrier>(address: &str) {
    let us = std::process::id();
    let queue = C::bind(address).unwrap();
    let pool_ = pool::<C>(8, 2);
    let requester = C::connect(address, &pool_, soon()).unwrap();
    let within = InProcess::bounded(4);
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap();
    let workers = {
        let gate = Arc::clone(&gate);
        WorkerPool::start("test", 1, move || gate.lock().map_or(None, |_| None::<()>), |()| {})
            .unwrap()
    };
    let send = |key: &str| {
        let (request, transfer) = pool_.lease(soon()).unwrap().request(key).unwrap();
        requester.send(request, soon()).unwrap();
        transfer
    };
    let started = ["0", "1", "2"].map(|key| (send(key), queue.recv(soon()).unwrap()));
    let [(accepted, to_accept), (turned_down, to_refuse), (asked, sending)] = started;
    let mut sending = sending.accept(Size::Unknown).unwrap();
    sending.next_slot(soon()).unwrap().send(&pattern(10)).unwrap();
    let Reply::Found(mut body) = asked.reply(soon()).unwrap() else { panic!("refused") };
    let unanswered = send("3");
    let lease = pool_.lease(soon()).unwrap();
    let (unsent, unsent_transfer) = pool_.lease(soon()).unwrap().request("4").unwrap();
    let (other, other_transfer) = pool_.lease(soon()).unwrap().request("5").unwrap();

    let mut all = Some((to_accept, to_refuse, unanswered, lease, unsent, other));
    Fork::running(Ending::AtOnce, || {
        let (to_accept, to_refuse, unanswered, lease, unsent, other) = all.take().unwrap();
        refused(pool_.lease(soon()), us);
        refused(lease.request("6"), us);
        refused(requester.send(unsent, soon()).map_err(Error::from), us);
        refused(unanswered.reply(soon()), us);
        refused(body.next_chunk(soon()), us);
        refused_io(body.read(&mut [0; 10]), us);
        refused_io(body.read_to_end(&mut Vec::new()), us);
        refused(body.copy_to(tempfile::tempfile().unwrap()), us);
        refused(to_accept.accept(1), us);
        refused(to_refuse.refuse(Refusal::NotFound), us);
        refused(sending.next_slot(soon()), us);
        refused_io(sending.write(b"x"), us);
        refused(queue.recv(soon()), us);
        refused(within.recv(soon()), us);
        // A queue of the child's own takes no request of its parent's.
        let own = InProcess::bounded(1);
        let back = own.send(other, soon()).unwrap_err();
        let back = within.send(back.request, soon()).unwrap_err();
        let error = match C::TRANSPORT {
            // Nor does a requester of its own hand its parent's segments over.
            Transport::Unix => C::connect(address, &pool_, soon()).map(drop).unwrap_err(),
            Transport::Mq => back.error,
        };
        refused::<()>(Err(error), us);
        // These cannot fail, and say that there is nothing, or do nothing.
        assert!(!workers.join(Deadline::NEVER));
        assert_eq!((pool_.stats().segments, pool_.stats().idle), (0, 0));
        assert_eq!((C::clients(&queue), C::server(&requester)), (Vec::new(), None));
        queue.close();
        RequestQueue::close(&within);
        assert!(format!("{pool_:?} {within:?}").contains("segments: 0"));
        refused(pool_.lease(soon()), us);
    })
    .ends_well();
    let (to_accept, to_refuse, unanswered, lease, unsent, other) = all.unwrap();
    {
        let mut slot = Some(sending.next_slot(soon()).unwrap());
        let mut chunk = body.next_chunk(soon()).unwrap();
        Fork::running(Ending::AtOnce, || {
            refused(slot.take().unwrap().send(b"child"), us);
            refused(chunk.as_mut().unwrap().write_to(tempfile::tempfile().unwrap()), us);
        })
        .ends_well();
    }
    let mut finishing = Some(sending);
    Fork::running(Ending::AtOnce, || refused(finishing.take().unwrap().finish(), us)).ends_well();

    // The parent goes on with all of them, as if nothing had been tried.
    let mut sending = finishing.unwrap();
    assert_eq!(C::clients(&queue).len(), 1);
    sending.write_all(b"parent").unwrap();
    sending.finish().unwrap();
    assert_eq!(read_all(body), b"parent");
    to_accept.accept(0).unwrap().finish().unwrap();
    let Reply::Found(body) = accepted.reply(soon()).unwrap() else { panic!("refused") };
    assert_eq!(read_all(body), b"");
    to_refuse.refuse(Refusal::NotFound).unwrap();
    assert!(matches!(turned_down.reply(soon()).unwrap(), Reply::Refused(Refusal::NotFound)));
    requester.send(unsent, soon()).unwrap();
    for (key, transfer) in [("3", unanswered), ("4", unsent_transfer)] {
        let starting = queue.recv(soon()).unwrap();
        assert_eq!(starting.key(), key.as_bytes());
        starting.refuse(Refusal::Invalid).unwrap();
        assert!(matches!(transfer.reply(soon()).unwrap(), Reply::Refused(Refusal::Invalid)));
    }
    within.send(other, soon()).unwrap();
    within.recv(soon()).unwrap().refuse(Refusal::Failed).unwrap();
    assert!(matches!(other_transfer.reply(soon()).unwrap(), Reply::Refused(Refusal::Failed)));
    drop(lease);
    assert_eq!((pool_.stats().idle, pool_.stats().retired), (8, 0));
    drop(closed);
    assert!(workers.join(soon()));
    say("done");
}

fn a_child_that_uses_its_parents_things_is_refused_and_told_why<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let mut other = Other::start("fork: a child that tries everything", &place);
    other.wait_for("done");
    other.ends_well();
}

/// Ports of one address.
fn second(address: &str) -> String {
    address.replace("cache.sock", "second.sock")
        + if address.starts_with("mq:") { "-second" } else { "" }
}

fn a_child_with_its_own<C: Carrier>(address: &str) {
    // All that a process makes but once exists already.
    let parents = pool::<C>(2, 2);
    let requester = C::requester(address, &parents);
    assert!(read_all(ask::<C>(&requester, &parents, 9000).unwrap()) == pattern(9000));
    let names = names_of(std::process::id());

    let child = Fork::running(Ending::InOrder, || {
        assert_eq!(names_of(getpid().as_raw_nonzero().get() as u32), [""; 0]);
        let own = pool::<C>(2, 2);
        let requester = C::connect(address, &own, soon()).unwrap();
        for len in [0, 10, 100_000] {
            assert!(read_all(ask::<C>(&requester, &own, len).unwrap()) == pattern(len));
        }
        // It serves, too.
        let queue = Arc::new(C::bind(&second(address)).unwrap());
        let taking = Arc::clone(&queue);
        let next = move || taking.recv(Deadline::NEVER).ok();
        let workers = WorkerPool::start("child", 2, next, |transfer| {
            let len: usize = std::str::from_utf8(transfer.key()).unwrap().parse().unwrap();
            transfer.accept(len as u64).unwrap().write_all(&pattern(len)).unwrap();
        });
        let others = pool::<C>(1, 2);
        let client = C::requester(&second(address), &others);
        assert!(read_all(ask::<C>(&client, &others, 9000).unwrap()) == pattern(9000));
        // A hang-up is told in the child.
        let mut body = ask::<C>(&requester, &own, 1 << 20).unwrap();
        say("under way");
        wait_until("the end of the server was told", || C::server(&requester).is_none());
        body.set_timeout(Duration::MAX);
        let error = body.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        drop(body);
        queue.close();
        assert!(workers.unwrap().join(soon()));
        drop(queue);
        mem::forget((own, others)); // their names are for the handler at exit
    });
    let pid = child.0 as u32;
    child.ends_well();
    assert_eq!(names_of(pid), [""; 0], "the child's names went with it");
    assert_eq!(names_of(std::process::id()), names, "and the parent's did not");
    say("done");
}

fn a_child_has_pools_queues_and_requesters_of_its_own<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let mut server = Other::start("serve", &place);
    server.wait_for("ready");
    let mut other = Other::start("fork: a child with things of its own", &place);
    other.wait_for("under way");
    server.kill();
    other.wait_for("done");
    other.ends_well();
}

// ---------------------------------------------------------------- becoming a daemon

fn become_a_daemon<C: Carrier>(address: &str) {
    let queue = C::bind(address).unwrap();
    say("ready");
    let us = std::process::id();
    let mut old = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
    old.next_slot(soon()).unwrap().send(&[b'X'; 100]).unwrap();
    let mut all = Some((old, queue));
    let parent = getpid();
    Fork::running(Ending::AsDaemon, || {
        let (mut old, queue) = all.take().unwrap();
        wait_until("the parent has ended", || getppid() != Some(parent));
        assert!(is_nudged());
        for _ in 0..3 {
            refused(old.next_slot(soon()).and_then(|slot| slot.send(&[b'X'; 100])), us);
        }
        refused(queue.recv(soon()), us);
        say("refused");
        assert!(is_nudged());
        drop((old, queue));
        let queue = C::bind(address).unwrap();
        say("bound anew");
        let starting = queue.recv(soon()).unwrap();
        starting.accept(5).unwrap().write_all(b"hello").unwrap();
        while is_nudged() {}
        drop(queue);
        say("ended");
    });
    // As the parent of a daemon: it ends, and drops nothing.
    assert!(is_nudged());
    // SAFETY: ends this process.
    unsafe { libc::_exit(0) }
}

fn a_server_that_forked_after_it_bound_writes_to_nobody_and_may_bind_anew<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let mut server = Other::start("fork: become a daemon", &place);
    server.wait_for("ready");
    let pool_ = SegmentPool::<C::Backing>::builder()
        .segments(1)
        .segment_len(400)
        .slots(4)
        .create()
        .unwrap();
    let requester = C::requester(address, &pool_);
    let mut body = ask::<C>(&requester, &pool_, 100).unwrap();
    body.read_exact(&mut [0; 100]).unwrap();
    server.nudge();
    let stdin = server.child.stdin.take(); // which waiting would close, and the daemon needs
    server.ends_well();
    server.child.stdin = stdin;
    drop(body);
    drop(requester);

    // The next transfer over what was the old one's segment, with an honest sender.
    let queue = InProcess::bounded(1);
    let (transfer, mut new) = transfer_within(&pool_, &queue, 400);
    new.write_all(&[b'b'; 100]).unwrap();
    server.nudge();
    server.wait_for("refused");
    new.write_all(&[b'b'; 300]).unwrap();
    let Reply::Found(body) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    assert!(read_all(body) == [b'b'; 400], "another transfer's bytes");

    server.nudge();
    server.wait_for("bound anew");
    let requester = C::requester(address, &pool_);
    let hello = read_all(ask::<C>(&requester, &pool_, 5).unwrap());
    assert_eq!(hello, b"hello");
    drop(server.child.stdin.take()); // and the daemon ends
    server.wait_for("ended");
}

// ---------------------------------------------------------------- at any moment

/// Forks while other threads are in the midst of everything, with whatever locks they hold.
fn fork_again_and_again<C: Carrier>(address: &str) {
    let pool_ = pool::<C>(6, 2);
    let requester = Arc::new(C::requester(address, &pool_));
    let (within, over) = (InProcess::bounded(2), AtomicBool::new(false));
    let run: [Box<dyn Fn() + Send + Sync>; 4] = [
        Box::new(|| drop(pool_.lease(soon()).unwrap())),
        Box::new(|| {
            let (transfer, mut sending) = transfer_within(&pool_, &within, 3);
            sending.write_all(b"abc").unwrap();
            drop((sending, transfer));
        }),
        Box::new(|| {
            assert!(read_all(ask::<C>(&requester, &pool_, 5000).unwrap()) == pattern(5000));
        }),
        Box::new(|| {
            // A connection, a watch, and for some the names of a pool come and go.
            let pool = pool::<C>(1, 1);
            drop(C::connect(address, &pool, soon()).unwrap());
        }),
    ];
    thread::scope(|scope| {
        for run in &run {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    run();
                }
            });
        }
        for round in 0..60 {
            let mut body = Some(ask::<C>(&requester, &pool_, 9000).unwrap());
            let mut all = Some((Arc::clone(&requester), pool_.clone(), within.clone()));
            Fork::running(Ending::AtOnce, || {
                drop((body.take(), all.take()));
                let own = pool::<C>(1, 2);
                let requester = C::requester(address, &own);
                assert!(
                    read_all(ask::<C>(&requester, &own, 5000).unwrap()) == pattern(5000),
                    "{round}"
                );
            })
            .ends_well();
            assert!(read_all(body.unwrap()) == pattern(9000), "{round}");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(pool_.stats().retired, 0);
    say("done");
}

fn a_fork_at_any_moment_leaves_neither_process_stuck<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let mut server = Other::start("fork: serve many", &place);
    server.wait_for("ready");
    let mut other = Other::start("fork: again and again", &place);
    other.wait_for("done");
    other.ends_well();
}

/// Workers that fork, in a job and while they lend their place, and whose children come back from
/// it.
fn fork_in_a_crew() {
    let (forked, children) = mpsc::channel();
    // SAFETY: the child goes on on a copy of this thread, and ends with it.
    let fork = move || match unsafe { libc::fork() } {
        0 => {}
        pid => forked.send(Fork(pid)).unwrap(),
    };
    // More places than workers: one that is done goes back for the next job, and another is there.
    let (jobs, inbox) = mpsc::channel();
    let inbox = Mutex::new(inbox);
    let forks = fork.clone();
    let next = move || inbox.lock().unwrap().recv().ok();
    let workers = WorkerPool::start("test", 4, next, move |()| forks()).unwrap();
    for _ in 0..4 {
        jobs.send(()).unwrap();
        children.recv().unwrap().ends_well();
    }
    drop(jobs);
    assert!(workers.join(soon()));

    // One place, which another has taken when this one would have it back.
    let (jobs, inbox) = mpsc::channel();
    let inbox = Mutex::new(inbox);
    let (lent, is_lent) = mpsc::channel();
    let (taken, is_taken) = mpsc::channel();
    let (leave, may_leave) = mpsc::channel();
    let (is_taken, may_leave) = (Mutex::new(is_taken), Mutex::new(may_leave));
    let next = move || inbox.lock().unwrap().recv().ok();
    let workers = WorkerPool::start("test", 1, next, move |lends: bool| {
        if lends {
            blocking(|| {
                lent.send(()).unwrap();
                is_taken.lock().unwrap().recv().unwrap();
                fork();
            });
        } else {
            taken.send(()).unwrap();
            may_leave.lock().unwrap().recv().unwrap();
        }
    });
    jobs.send(true).unwrap();
    is_lent.recv().unwrap();
    jobs.send(false).unwrap();
    children.recv().unwrap().ends_well();
    leave.send(()).unwrap();
    drop(jobs);
    assert!(workers.unwrap().join(soon()));
    say("done");
}

#[test]
fn a_child_that_a_worker_forks_ends_with_that_worker() {
    let _watchdog = watchdog();
    let mut other = Other::start("fork: in a workers", &Place::new());
    other.wait_for("done");
    other.ends_well();
}

mod unix {
    over!(Unix);
}
mod mq {
    over!(Mq);
}
