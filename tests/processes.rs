//! Two real processes and what befalls them, over both transports: killed, stopped, restarted,
//! misbehaving, foreign.
//!
//! The other process is this test's own executable, run again with a role in its environment.
#![cfg(all(feature = "posix-mq", not(feature = "raw-sync")))]

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::{Pid, Signal, kill_process};
use shmferry::channel::{
    Named, PosixMq, PosixMqQueue, PosixMqRequester, RequestQueue, Requester, Seqpacket,
    SeqpacketQueue, SeqpacketRequester,
};
use shmferry::error::{Awaited, Rejection};
use shmferry::protocol::{Receiver, Receiving, Reply, ShmTransfer};
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::workers::WorkerPool;
use shmferry::{Deadline, Error, Peer, Refusal, Size};
use shmferry_test_support::watchdog::watchdog;
use shmferry_test_support::{Place, Transport};

#[path = "processes/forks.rs"]
mod forks;
#[path = "processes/queues.rs"]
mod queues;

/// The library's types for one transport. Addresses are as the programs have them.
trait Carrier: 'static {
    type Backing: Backing;
    type Queue: RequestQueue + 'static;
    type Requester: Requester<Self::Backing>;
    const TRANSPORT: Transport;

    fn bind(address: &str) -> Result<Self::Queue, Error>;
    fn requester(address: &str, pool: &Pool<Self>) -> Self::Requester;
    /// One that does not wait for a server.
    fn hasty(address: &str, pool: &Pool<Self>) -> Self::Requester;
    fn connect(
        address: &str,
        pool: &Pool<Self>,
        deadline: Deadline,
    ) -> Result<Self::Requester, Error>;
    fn clients(queue: &Self::Queue) -> Vec<Peer>;
    fn server(requester: &Self::Requester) -> Option<Peer>;
}

type Pool<C> = SegmentPool<<C as Carrier>::Backing>;

/// Memfds over a Unix socket.
struct Unix;

impl Unix {
    fn at(address: &str) -> Seqpacket {
        Seqpacket::new(address.strip_prefix("unix:").unwrap())
    }
}

impl Carrier for Unix {
    type Backing = Memfd;
    type Queue = SeqpacketQueue;
    type Requester = SeqpacketRequester;
    const TRANSPORT: Transport = Transport::Unix;

    fn bind(address: &str) -> Result<SeqpacketQueue, Error> {
        Unix::at(address).bind()
    }

    fn requester(address: &str, pool: &SegmentPool<Memfd>) -> SeqpacketRequester {
        Unix::at(address).requester(pool).unwrap()
    }

    fn hasty(address: &str, pool: &SegmentPool<Memfd>) -> SeqpacketRequester {
        Unix::at(address).connect_timeout(Duration::ZERO).requester(pool).unwrap()
    }

    fn connect(
        address: &str,
        pool: &Pool<Unix>,
        deadline: Deadline,
    ) -> Result<SeqpacketRequester, Error> {
        Unix::at(address).connect(pool, deadline)
    }

    fn clients(queue: &SeqpacketQueue) -> Vec<Peer> {
        queue.clients()
    }

    fn server(requester: &SeqpacketRequester) -> Option<Peer> {
        requester.server()
    }
}

/// Named segments over a POSIX message queue.
struct Mq;

impl Mq {
    fn at(address: &str) -> PosixMq {
        PosixMq::new(address.strip_prefix("mq:").unwrap()).unwrap()
    }
}

impl Carrier for Mq {
    type Backing = Named;
    type Queue = PosixMqQueue;
    type Requester = PosixMqRequester;
    const TRANSPORT: Transport = Transport::Mq;

    fn bind(address: &str) -> Result<PosixMqQueue, Error> {
        Mq::at(address).bind()
    }

    fn requester(address: &str, pool: &SegmentPool<Named>) -> PosixMqRequester {
        Mq::at(address).requester(pool)
    }

    fn hasty(address: &str, pool: &SegmentPool<Named>) -> PosixMqRequester {
        Mq::at(address).connect_timeout(Duration::ZERO).requester(pool)
    }

    fn connect(
        address: &str,
        pool: &Pool<Mq>,
        deadline: Deadline,
    ) -> Result<PosixMqRequester, Error> {
        Mq::at(address).connect(pool, deadline)
    }

    fn clients(queue: &PosixMqQueue) -> Vec<Peer> {
        queue.clients()
    }

    fn server(requester: &PosixMqRequester) -> Option<Peer> {
        requester.server()
    }
}

/// Every test that is not about one transport, over either.
macro_rules! over_both {
    ($($test:ident,)*) => {
        mod unix {
            $(#[test] fn $test() { super::$test::<super::Unix>() })*
        }
        mod mq {
            $(#[test] fn $test() { super::$test::<super::Mq>() })*
        }
    };
}
over_both! {
    bytes_cross_and_either_side_starts_first,
    an_absent_server_is_waited_for_as_long_as_told,
    a_server_killed_before_its_reply,
    a_server_killed_between_chunks,
    a_server_killed_after_its_requester_was_dropped,
    a_request_that_a_killed_server_did_not_take_goes_to_its_successor,
    segments_of_a_killed_server_do_not_linger,
    a_server_killed_while_idle,
    a_receiver_killed_between_chunks,
    a_receiver_killed_before_its_request_is_taken_up,
    a_request_whose_transfer_is_gone_is_stale_and_harms_nobody,
    a_queue_that_is_dropped_hangs_up_and_aborts_nothing,
    a_stopped_sender_writes_to_nobody_afterwards,
    a_hang_up_on_a_sender_that_lives_is_not_taken_for_its_death,
    a_hundred_thousand_transfers_at_random,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// Another process in a role; killed at the latest when dropped.
struct Other {
    child: Child,
    says: BufReader<std::process::ChildStdout>,
}

const ROLE: &str = "SHMFERRY_TEST_ROLE";
const ADDRESS: &str = "SHMFERRY_TEST_ADDRESS";

/// Has this executable play a role.
const THE_OTHER: [&str; 4] = ["--exact", "other_process", "--nocapture", "--test-threads=1"];

impl Other {
    fn start(role: &str, place: &Place) -> Other {
        let other = Other::start_as(role, &place.cache_address(), None);
        place.is_run_in_by(other.child.id());
        other
    }

    fn start_as(role: &str, address: &str, uid: Option<u32>) -> Other {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(THE_OTHER);
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        Other::spawn(role, address, &mut command)
    }

    fn spawn(role: &str, address: &str, command: &mut Command) -> Other {
        command.env(ROLE, role).env(ADDRESS, address).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let says = BufReader::new(child.stdout.take().unwrap());
        Other { child, says }
    }

    /// Reads what it says until it has said this, at the end of a line.
    fn wait_for(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.says.read_line(&mut line).unwrap(),
                0,
                "it ended before it said {word:?}"
            );
            if let Some(said) = line.split("says ").nth(1).filter(|said| said.starts_with(word)) {
                return said.trim().to_owned();
            }
        }
    }

    /// Lets it go on.
    fn nudge(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// `kill -9`, and gone for certain.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(what: &str) {
    println!("says {what}");
}

/// Waits for the parent's word; `false` when it has ended.
fn is_nudged() -> bool {
    matches!(std::io::stdin().read(&mut [0]), Ok(1))
}

/// Waits for the parent to end, or to kill us.
fn linger() -> ! {
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0)
}

/// Not a test of its own: what the other process runs.
#[test]
fn other_process() {
    let Ok(role) = env::var(ROLE) else { return };
    let address = env::var(ADDRESS).unwrap();
    if address.starts_with("mq:") {
        play::<Mq>(&role, &address)
    } else {
        play::<Unix>(&role, &address)
    }
}

fn play<C: Carrier>(role: &str, address: &str) {
    match role {
        "serve" => serve::<C>(address, |sending, len| {
            let mut sending = sending;
            sending.write_all(&pattern(len)).unwrap();
            assert_eq!(sending.finish().unwrap(), len as u64);
        }),
        "take and halt" => {
            let queue = C::bind(address).unwrap();
            say("ready");
            let _taken = queue.recv(Deadline::NEVER).unwrap();
            say("taken");
            linger()
        }
        "send one chunk and halt" => serve::<C>(address, |mut sending, len| {
            sending.next_slot(soon()).unwrap().send(&pattern(len)[..10]).unwrap();
            say("sent");
            linger()
        }),
        "send when told" => {
            // One transfer in two steps, so that it can be stopped in between; then an honest server.
            let queue = C::bind(address).unwrap();
            say("ready");
            let mut old = queue.recv(Deadline::NEVER).unwrap().accept(Size::Unknown).unwrap();
            old.next_slot(soon()).unwrap().send(&[0xee; 10]).unwrap();
            say("sent");
            is_nudged();
            let error = loop {
                if let Err(error) = old.next_slot(soon()).and_then(|slot| slot.send(&[0xee; 10])) {
                    break error;
                }
            };
            say(&format!("old: {error}"));
            drop(old);
            answer(&queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap());
        }
        "ask and halt" => {
            let pool = pool::<C>(1, 2);
            let requester = C::requester(address, &pool);
            let mut body = ask::<C>(&requester, &pool, 1 << 20).unwrap();
            let _chunk = body.next_chunk(soon()).unwrap();
            say("holding");
            linger()
        }
        "ask whenever told" => {
            let pool = pool::<C>(2, 2);
            let requester = C::requester(address, &pool);
            while is_nudged() {
                assert!(read_all(ask::<C>(&requester, &pool, 9000).unwrap()) == pattern(9000));
                say("served");
            }
        }
        "connect" => {
            let pool = pool::<C>(1, 1);
            let requester = C::requester(address, &pool);
            match ask::<C>(&requester, &pool, 10) {
                Ok(_) => say("served"),
                Err(error) => say(&format!("error: {error}")),
            }
            linger()
        }
        "serve at random" => {
            let queue = Arc::new(C::bind(address).unwrap());
            let taking = Arc::clone(&queue);
            let next = move || taking.recv(Deadline::NEVER).ok();
            let workers = WorkerPool::start("server", 4, next, |transfer| {
                Errand::read(transfer.key()).serve(transfer)
            });
            say("ready");
            is_nudged();
            queue.close();
            assert!(workers.unwrap().join(soon()));
            drop(queue);
            say("ended");
        }
        "connect to any" => {
            // The server is root's; whether it takes us is what is asked.
            let pool = pool::<Unix>(1, 1);
            let requester = Unix::at(address).allow_user(0).requester(&pool).unwrap();
            match ask::<Unix>(&requester, &pool, 10) {
                Ok(_) => say("served"),
                Err(error) => say(&format!("error: {error}")),
            }
            linger()
        }
        forking if forking.starts_with("fork: ") => forks::play::<C>(forking, address),
        other => queues::play(other, address),
    }
}

type Sending = ShmTransfer<shmferry::protocol::Sender, shmferry::protocol::Sending>;

/// Answers requests, whose keys are lengths, for ever.
fn serve<C: Carrier>(address: &str, send: impl Fn(Sending, usize)) {
    let queue = C::bind(address).unwrap();
    say("ready");
    answer(&queue, send);
}

fn answer(queue: &impl RequestQueue, send: impl Fn(Sending, usize)) {
    while let Ok(transfer) = queue.recv(Deadline::NEVER) {
        let len: usize = std::str::from_utf8(transfer.key()).unwrap().parse().unwrap();
        if let Ok(sending) = transfer.accept(len as u64) {
            send(sending, len);
        }
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn pool<C: Carrier>(segments: u32, slots: u32) -> Pool<C> {
    SegmentPool::builder().segments(segments).segment_len(4096).slots(slots).create().unwrap()
}

type Body = ShmTransfer<Receiver, Receiving>;

fn ask<C: Carrier>(requester: &C::Requester, pool: &Pool<C>, len: usize) -> Result<Body, Error> {
    let (request, transfer) = pool.lease(soon())?.request(len.to_string())?;
    requester.send(request, soon())?;
    match transfer.reply(Deadline::NEVER)? {
        Reply::Found(body) => Ok(body),
        other => panic!("{other:?}"),
    }
}

fn read_all(mut body: Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).unwrap();
    bytes
}

/// For tests that are about the socket as a file.
fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sock");
    (dir, path)
}

fn bytes_cross_and_either_side_starts_first<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(2, 4);
    let requester = C::requester(address, &pool);
    let mut server = None;
    thread::scope(|scope| {
        // The request is out before there is anybody to take it.
        let early = scope.spawn(|| read_all(ask::<C>(&requester, &pool, 100_000).unwrap()));
        server = Some(Other::start("serve", &place));
        assert!(early.join().unwrap() == pattern(100_000));
    });
    for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
        assert!(read_all(ask::<C>(&requester, &pool, len).unwrap()) == pattern(len), "{len}");
    }
    assert_eq!(C::server(&requester).unwrap().pid, Some(server.unwrap().child.id()));
}

fn an_absent_server_is_waited_for_as_long_as_told<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 1);
    let hasty = C::hasty(address, &pool);
    let (request, _transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
    let failed = hasty.send(request, Deadline::NEVER).unwrap_err();
    assert!(matches!(failed.error, Error::Timeout(Awaited::Server)), "{failed:?}");
    let connected = C::connect(address, &pool, Deadline::after(Duration::from_millis(5)));
    assert!(matches!(connected, Err(Error::Timeout(Awaited::Server))));
    let _server = Other::start("serve", &place);
    drop(C::connect(address, &pool, soon()).unwrap());
    drop(_transfer);
    assert!(read_all(ask::<C>(&hasty, &pool, 10).unwrap()) == pattern(10));
}

fn a_server_killed_before_its_reply<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 2);
    let requester = C::requester(address, &pool);
    let mut server = Other::start("take and halt", &place);
    server.wait_for("ready");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ask::<C>(&requester, &pool, 10));
        server.wait_for("taken");
        server.kill();
        // The wait has no deadline: only the death can end it (rule P7).
        assert!(matches!(waiting.join().unwrap(), Err(Error::Disconnected)));
    });
    // Nobody had accepted, so the segment itself is back; the next server finds the same client.
    let _server = Other::start("serve", &place);
    assert!(read_all(ask::<C>(&requester, &pool, 5000).unwrap()) == pattern(5000));
    assert_eq!(pool.stats().retired, 0);
}

fn a_request_that_a_killed_server_did_not_take_goes_to_its_successor<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let pool = pool::<C>(2, 2);
    let requester = C::requester(&place.cache_address(), &pool);
    let mut server = Other::start("take and halt", &place);
    server.wait_for("ready");
    // The only request that it takes, though it never answers.
    let (request, taken) = pool.lease(soon()).unwrap().request("5").unwrap();
    requester.send(request, soon()).unwrap();
    server.wait_for("taken");
    thread::scope(|scope| {
        let untaken = scope.spawn(|| {
            let lease = pool.lease(soon()).unwrap();
            requester.ask(lease, b"5", Deadline::NEVER)
        });
        server.kill();
        assert!(matches!(taken.reply(Deadline::NEVER), Err(Error::Disconnected)));
        let _successor = Other::start("serve", &place);
        let Ok(Reply::Found(body)) = untaken.join().unwrap() else {
            panic!("it was not asked again")
        };
        assert!(read_all(body) == pattern(5));
    });
}

fn a_server_killed_after_its_requester_was_dropped<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let pool = pool::<C>(1, 2);
    let requester = C::requester(&place.cache_address(), &pool);
    let mut server = Other::start("take and halt", &place);
    server.wait_for("ready");
    let (request, transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
    requester.send(request, soon()).unwrap();
    server.wait_for("taken");
    // The transfer goes on, and is still told.
    drop(requester);
    server.kill();
    let reply = transfer.reply(Deadline::NEVER);
    assert!(matches!(reply, Err(Error::Disconnected)), "{reply:?}");
}

fn a_server_killed_between_chunks<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 2);
    let requester = C::requester(address, &pool);
    let mut server = Other::start("send one chunk and halt", &place);
    let mut body = ask::<C>(&requester, &pool, 5000).unwrap();
    server.wait_for("sent");
    server.kill();
    // What was filled stays readable; then the death is told, and not as an end.
    let mut bytes = vec![0; 10];
    body.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, pattern(10));
    let error = body.next_chunk(Deadline::NEVER).map(drop).unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error}");
    drop(body);
    // The sender is dead for certain: its segment can be used again as it is (rule P6).
    let _server = Other::start("serve", &place);
    assert!(read_all(ask::<C>(&requester, &pool, 5000).unwrap()) == pattern(5000));
    assert_eq!(pool.stats().retired, 0);
}

/// What lingers holds on to its dead sender's descriptor: it must not wait until nothing else is idle.
fn segments_of_a_killed_server_do_not_linger<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(3, 2);
    let requester = C::requester(address, &pool);
    let mut server = Other::start("send one chunk and halt", &place);
    let body = ask::<C>(&requester, &pool, 5000).unwrap();
    server.wait_for("sent");
    drop(body);
    server.kill();
    assert_eq!(pool.stats().quarantined, 1);
    let limit = soon();
    while pool.stats().quarantined > 0 {
        assert!(!limit.has_passed(), "it lingers, though its sender is dead");
        drop(pool.lease(soon()).unwrap());
        thread::yield_now();
    }
    let _server = Other::start("serve", &place);
    assert!(read_all(ask::<C>(&requester, &pool, 5000).unwrap()) == pattern(5000));
}

fn a_server_killed_while_idle<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 2);
    let requester = C::requester(address, &pool);
    for round in 0..5 {
        let server = Other::start("serve", &place);
        assert!(read_all(ask::<C>(&requester, &pool, round).unwrap()) == pattern(round));
        assert_eq!(C::server(&requester).unwrap().pid, Some(server.child.id()));
        server.kill();
    }
    assert_eq!(pool.stats().retired, 0);
}

fn a_receiver_killed_between_chunks<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let queue = C::bind(address).unwrap();
    let mut receiver = Other::start("ask and halt", &place);
    let mut sending = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
    sending.next_slot(soon()).unwrap().send(b"first").unwrap();
    receiver.wait_for("holding");
    sending.next_slot(soon()).unwrap().send(b"second").unwrap();
    let blocked = thread::spawn(move || sending.next_slot(Deadline::NEVER).map(drop));
    receiver.kill();
    let error = blocked.join().unwrap().unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error}");
    // The worker finds that out by itself too, and forgets the client.
    assert!(matches!(queue.recv(Deadline::after(Duration::ZERO)), Err(Error::Timeout(_))));
    assert_eq!(C::clients(&queue), []);
}

fn a_receiver_killed_before_its_request_is_taken_up<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let queue = C::bind(address).unwrap();
    let receiver = Other::start("ask and halt", &place);
    let taken = queue.recv(soon()).unwrap();
    let peer = taken.peer().unwrap();
    assert_eq!(
        (peer.pid, peer.uid),
        (Some(receiver.child.id()), rustix::process::getuid().as_raw())
    );
    receiver.kill();
    let mut sending = taken.accept(Size::Unknown).unwrap();
    let error = loop {
        match sending.next_slot(Deadline::NEVER).and_then(|slot| slot.send(b"to nobody")) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Disconnected), "{error}");
}

fn a_request_whose_transfer_is_gone_is_stale_and_harms_nobody<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let _server = Other::start("serve", &place);
    let pool = pool::<C>(1, 1);
    let requester = C::requester(address, &pool);
    let (request, transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
    drop(transfer);
    let failed = requester.send(request, soon()).unwrap_err();
    assert!(matches!(failed.error, Error::Stale), "{failed:?}");
    assert!(read_all(ask::<C>(&requester, &pool, 10).unwrap()) == pattern(10));
}

fn a_queue_that_is_dropped_hangs_up_and_aborts_nothing<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 1);
    for round in 0..50 {
        let queue = C::bind(address).unwrap();
        let requester = C::requester(address, &pool);
        let (request, transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
        requester.send(request, soon()).unwrap();
        let mut held = queue.recv(soon()).unwrap().accept(Size::Unknown).unwrap();
        drop(queue);
        if round % 2 == 0 {
            let slot = held.next_slot(Deadline::NEVER).map(drop);
            assert!(
                matches!(slot, Err(Error::Disconnected)),
                "told before its client was: {slot:?}"
            );
        }
        let reply = transfer.reply(Deadline::NEVER).map(drop);
        assert!(matches!(reply, Err(Error::Disconnected)), "{reply:?}");
        let slot = held.next_slot(Deadline::NEVER).map(drop);
        assert!(matches!(slot, Err(Error::Disconnected | Error::Cancelled)), "{slot:?}");
    }
    assert_eq!(pool.stats().retired, 0, "each sender left in time");
}

fn a_stopped_sender_writes_to_nobody_afterwards<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 2);
    let requester = C::requester(address, &pool);
    let mut server = Other::start("send when told", &place);
    server.wait_for("ready");
    let mut old = ask::<C>(&requester, &pool, 0).unwrap();
    server.wait_for("sent");
    server.signal(Signal::STOP);
    drop(old.next_chunk(soon()).unwrap());
    let late = old.next_chunk(Deadline::after(Duration::from_millis(50))).map(drop);
    assert!(matches!(late, Err(Error::Timeout(_))), "alive, but late: {late:?}");
    let id_of = |pool: &Pool<C>| pool.lease(soon()).unwrap().segment().id();
    drop(old);

    // It may still write: so the pool's only segment is replaced (rule P6), and the next transfer
    // goes through the new one, byte for byte.
    let fresh = id_of(&pool);
    assert_eq!((fresh.index(), pool.stats().retired), (1, 1));
    server.signal(Signal::CONT);
    server.nudge();
    assert_eq!(server.wait_for("old"), "old: the receiver cancelled the transfer");
    for len in [1, 5000, 100_000] {
        assert!(read_all(ask::<C>(&requester, &pool, len).unwrap()) == pattern(len), "{len}");
    }
    assert_eq!((id_of(&pool), pool.stats().retired), (fresh, 1));
}

fn a_hang_up_on_a_sender_that_lives_is_not_taken_for_its_death<C: Carrier>() {
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let pool = pool::<C>(1, 2);
    let requester = C::requester(address, &pool);
    let mut server = Other::start("send when told", &place);
    server.wait_for("ready");
    let old = ask::<C>(&requester, &pool, 0).unwrap();
    server.wait_for("sent");
    drop((old, requester));

    // The connection is gone, but the sender's process is not. It may still write to the
    // segment, which is therefore replaced (rule P6).
    let fresh = pool.lease(soon()).unwrap().segment().id();
    assert_eq!((fresh.index(), pool.stats().retired), (1, 1));
    server.nudge();
    server.wait_for("old");
    let requester = C::requester(address, &pool);
    for len in [1, 5000, 100_000] {
        assert!(read_all(ask::<C>(&requester, &pool, len).unwrap()) == pattern(len), "{len}");
    }
    assert_eq!(pool.stats().retired, 1);
}

#[test]
fn one_server_at_an_address_and_leftovers_taken_over() {
    let _watchdog = watchdog();
    let (dir, path) = socket();
    let mut first = Other::start_as("serve", &address(&path), None);
    first.wait_for("ready");
    let error = Seqpacket::new(&path).bind().map(drop).unwrap_err();
    let told = format!("unix:{} is being served by process {}", path.display(), first.child.id());
    assert_eq!(error.to_string(), told);
    first.kill();
    assert!(path.exists(), "a killed server cannot clean up");
    let second = Seqpacket::new(&path).bind().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(second);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a server that ends leaves nothing");

    // A directory that is missing is made, for this user only, and removed again.
    let deeper = dir.path().join("own/queue.sock");
    let third = Seqpacket::new(&deeper).bind().unwrap();
    assert_eq!(fs::metadata(deeper.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    drop(third);
    assert!(!deeper.parent().unwrap().exists());

    // So is one that a killed server made.
    let mut third = Other::start_as("serve", &address(&deeper), None);
    third.wait_for("ready");
    third.kill();
    drop(Seqpacket::new(&deeper).bind().unwrap());
    assert!(!deeper.parent().unwrap().exists());

    // What is no socket is not ours to remove.
    fs::write(&path, "precious").unwrap();
    let error = Seqpacket::new(&path).bind().map(drop).unwrap_err();
    assert!(matches!(error, Error::NameTaken { kind: "a regular file", .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

    let long = dir.path().join("x".repeat(200));
    let error = Seqpacket::new(&long).bind().map(drop).unwrap_err();
    assert!(error.to_string().ends_with("the system takes at most 107"), "{error}");
}

#[test]
fn another_user_is_turned_away_unless_allowed() {
    let _watchdog = watchdog();
    if !rustix::process::getuid().is_root() {
        eprintln!("not run: only root can start a process of another user");
        return;
    }
    const NOBODY: u32 = 65_534;
    let (dir, path) = socket();
    let open_up =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let queue = Seqpacket::new(&path)
        .on_rejected({
            let reports = Arc::clone(&reports);
            move |peer, error| reports.lock().unwrap().push((peer.unwrap().uid, error.to_string()))
        })
        .bind()
        .unwrap();

    // The file itself keeps others out.
    open_up(dir.path(), 0o755);
    let mut other = Other::start_as("connect", &address(&path), Some(NOBODY));
    assert_eq!(other.wait_for("error"), "error: connect: Permission denied (os error 13)");

    // If it does not, the server does.
    open_up(&path, 0o666);
    let stop = Arc::new(queue);
    let serving = thread::spawn({
        let queue = Arc::clone(&stop);
        move || answer(&*queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap())
    });
    let mut other = Other::start_as("connect to any", &address(&path), Some(NOBODY));
    assert_eq!(other.wait_for("error"), "error: turned away: user 65534 may not connect");
    assert_eq!(reports.lock().unwrap()[0].0, NOBODY);
    stop.close();
    serving.join().unwrap();
    drop(stop);

    let queue = Arc::new(Seqpacket::new(&path).allow_user(NOBODY).bind().unwrap());
    open_up(&path, 0o666);
    let serving = thread::spawn({
        let queue = Arc::clone(&queue);
        move || answer(&*queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap())
    });
    let mut other = Other::start_as("connect to any", &address(&path), Some(NOBODY));
    other.wait_for("served");
    queue.close();
    serving.join().unwrap();
}

/// As the programs have it.
fn address(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A client of our own making, which says what it likes.
struct Stranger(OwnedFd);

impl Stranger {
    fn connect(path: &Path) -> Stranger {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Stranger(socket)
    }

    fn say(&self, bytes: &[u8], fd: Option<&OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let fds = [fd.unwrap_or(&self.0).as_fd()];
        if fd.is_some() {
            control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags).unwrap();
    }

    /// What it hears last: the farewell's code, or nothing but the end.
    fn last_words(&self) -> Option<u32> {
        let mut buffer = [0; 64];
        let mut code = None;
        loop {
            let mut control = rustix::net::RecvAncillaryBuffer::default();
            let flags = rustix::net::RecvFlags::empty();
            let heard = rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut control,
                flags,
            );
            match heard.map(|heard| heard.bytes) {
                Ok(0) => return code,
                // Told once, when the server hung up on something unread; its words come after.
                Err(rustix::io::Errno::CONNRESET) => {}
                Ok(len) => {
                    assert_eq!((len, buffer[0]), (13, 5));
                    code = Some(u32::from_le_bytes(buffer[1..5].try_into().unwrap()));
                }
                Err(errno) => panic!("{errno}"),
            }
        }
    }
}

/// Of the layout.
const VERSION: u32 = 3;

fn hello(version: u32, slots: u32, slot_len: u32) -> Vec<u8> {
    let mut bytes = vec![1];
    bytes.extend(b"shmferry");
    bytes.extend(version.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(slots.to_le_bytes());
    bytes.extend(slot_len.to_le_bytes());
    bytes.extend([0; 4 + 8 + 4]); // it takes no loans
    bytes
}

#[test]
fn nonsense_costs_its_own_connection_only() {
    let _watchdog = watchdog();
    let (_dir, path) = socket();
    let queue = Seqpacket::new(&path).max_segments(4).max_clients(6).bind().unwrap();
    thread::scope(|scope| {
        // However this ends, the workers do.
        let closing = Closing(&queue);
        let workers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    answer(&queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap())
                })
            })
            .collect();
        let honest_pool = pool::<Unix>(2, 2);
        let honest = Seqpacket::new(&path).requester(&honest_pool).unwrap();
        let honestly = || {
            assert!(read_all(ask::<Unix>(&honest, &honest_pool, 9000).unwrap()) == pattern(9000))
        };
        honestly();

        const PROTOCOL: Option<u32> = Some(6);
        let segment = [&[2u8][..], &0u32.to_le_bytes()].concat();
        let request = [&[4u8][..], &0u32.to_le_bytes(), &1u64.to_le_bytes(), &[0], b"10"].concat();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let says = |messages: &[(&[u8], Option<&OwnedFd>)]| {
            let stranger = Stranger::connect(&path);
            messages.iter().for_each(|(bytes, fd)| stranger.say(bytes, *fd));
            stranger.last_words()
        };
        assert_eq!(says(&[(b"GET / HTTP/1.1\r\n\r\n", None)]), PROTOCOL);
        assert_eq!(says(&[(&hello(9, 2, 2048), None)]), Some(1), "the version is named");
        assert_eq!(says(&[(&hello(VERSION, 0, 2048), None)]), PROTOCOL, "no such geometry");
        assert_eq!(says(&[(&hello(VERSION, 512, u32::MAX), None)]), PROTOCOL);
        assert_eq!(says(&[(&request, None)]), PROTOCOL, "no hello");
        // A request for a segment that is not there, perhaps no more, is passed over.
        let passed_over = Stranger::connect(&path);
        passed_over.say(&hello(VERSION, 2, 2048), None);
        passed_over.say(&request, None);
        passed_over.say(&[9], None);
        assert_eq!(passed_over.last_words(), PROTOCOL, "the message after it was read");
        assert_eq!(
            says(&[(&hello(VERSION, 2, 2048), None), (&segment, None)]),
            PROTOCOL,
            "no descriptor"
        );
        assert_eq!(
            says(&[(&hello(VERSION, 2, 2048), None), (&segment, Some(&file))]),
            PROTOCOL,
            "no memfd"
        );
        assert_eq!(
            says(&[(&hello(VERSION, 2, 2048), None), (&hello(VERSION, 2, 2048), None)]),
            PROTOCOL
        );
        assert_eq!(says(&[(&vec![4; 5000], None)]), PROTOCOL, "too long");
        assert_eq!(says(&[(&[3, 0, 0, 0, 0], None)]), PROTOCOL);

        // Those who say nothing make room for those who do.
        let silent: Vec<_> = (0..20).map(|_| Stranger::connect(&path)).collect();
        honestly();
        let newcomers: Vec<_> = (0..3).map(|_| (pool::<Unix>(1, 1), 1000)).collect();
        for (pool, len) in &newcomers {
            let requester = Seqpacket::new(&path).requester(pool).unwrap();
            assert!(read_all(ask::<Unix>(&requester, pool, *len).unwrap()) == pattern(*len));
        }
        drop(silent);

        // A pool beyond the policy is refused with the number that works.
        let greedy_pool = pool::<Unix>(5, 1);
        let greedy = Seqpacket::new(&path).requester(&greedy_pool).unwrap();
        let error = ask::<Unix>(&greedy, &greedy_pool, 10).map(drop).unwrap_err();
        assert!(matches!(error, Error::Rejected(Rejection::TooManySegments(4))), "{error}");

        honestly();
        drop(closing);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

#[test]
fn limits_are_what_works() {
    let _watchdog = watchdog();
    let (_dir, path) = socket();
    let len = |segments: u64| segments * 2 * 4096; // each a page of header, and its slots
    let queue =
        Seqpacket::new(&path).max_clients(2).max_segments(3).max_bytes(len(2)).bind().unwrap();
    thread::scope(|scope| {
        let closing = Closing(&queue);
        scope
            .spawn(|| answer(&queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap()));
        let connected = |segments| {
            let pool = pool::<Unix>(segments, 1);
            let requester = Seqpacket::new(&path).requester(&pool).unwrap();
            let asked = ask::<Unix>(&requester, &pool, 10).map(read_all);
            asked.map(|bytes| (assert!(bytes == pattern(10)), requester, pool))
        };
        let rejection = |segments| match connected(segments).map(drop) {
            Err(Error::Rejected(rejection)) => rejection,
            other => panic!("{segments} segments: {other:?}"),
        };
        let first = connected(2).unwrap();
        assert!(matches!(rejection(3), Rejection::TooManyBytes(limit) if limit == len(2)));
        let second = connected(1).unwrap();
        assert!(matches!(rejection(1), Rejection::TooManyClients(2)));
        drop((first, second, closing));
    });
    drop(queue);
    let queue = Seqpacket::new(&path).max_segments(2).max_bytes(len(2)).bind().unwrap();
    thread::scope(|scope| {
        let closing = Closing(&queue);
        scope
            .spawn(|| answer(&queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap()));
        let pools = [pool::<Unix>(2, 1), pool::<Unix>(3, 1)];
        let [reached, passed] = pools.each_ref().map(|pool| {
            let requester = Seqpacket::new(&path).requester(pool).unwrap();
            ask::<Unix>(&requester, pool, 10).map(read_all)
        });
        assert!(reached.unwrap() == pattern(10));
        assert!(
            matches!(passed, Err(Error::Rejected(Rejection::TooManySegments(2)))),
            "{passed:?}"
        );
        drop(closing);
    });
}

/// Whoever waits for room at the door does it until its deadline.
#[test]
fn a_server_that_lets_nobody_in_is_waited_for_as_long_as_told() {
    use rustix::net::{accept, bind, connect, listen};
    let _watchdog = watchdog();
    let (_dir, path) = socket();
    let address = SocketAddrUnix::new(&path).unwrap();
    let socket = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let door = socket();
    bind(&door, &address).unwrap();
    listen(&door, 1).unwrap();
    let mut crowd = Vec::new();
    loop {
        crowd.push(socket());
        match connect(crowd.last().unwrap(), &address) {
            Ok(()) => {}
            Err(errno) => break assert_eq!(errno, rustix::io::Errno::AGAIN),
        }
    }
    let pool = pool::<Unix>(1, 1);
    let requester = Seqpacket::new(&path).requester(&pool).unwrap();
    let (request, _transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
    let failed = requester.send(request, Deadline::after(Duration::from_millis(20))).unwrap_err();
    assert!(matches!(failed.error, Error::Timeout(Awaited::QueueRoom)), "{failed:?}");
    // Let in by and by, and then left alone: it is connected, and waits for an answer in vain.
    thread::scope(|scope| {
        let asked = scope.spawn(|| requester.send(failed.request, soon()));
        let mut let_in = Vec::new();
        while !asked.is_finished() {
            match accept(&door) {
                Ok(one) => let_in.push(one),
                Err(_) => thread::yield_now(),
            }
        }
        asked.join().unwrap().unwrap();
    });
}

#[test]
fn a_server_of_named_segments_keeps_as_many_mapped_as_told() {
    let _watchdog = watchdog();
    let place = Place::over(Transport::Mq);
    let address = &place.cache_address();
    assert_eq!(format!("mq:{}", Mq::at(address).name()), *address);
    let queue = Mq::at(address).max_segments(2).bind().unwrap();
    thread::scope(|scope| {
        let closing = Closing(&queue);
        scope
            .spawn(|| answer(&queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap()));
        let pool = pool::<Mq>(5, 1);
        let requester = Mq::requester(address, &pool);
        for _ in 0..3 {
            let bodies: Vec<_> =
                (0..5).map(|_| ask::<Mq>(&requester, &pool, 10).unwrap()).collect();
            bodies.into_iter().for_each(|body| assert!(read_all(body) == pattern(10)));
            // Header and slots in one piece: a server's. A client may not write to its slots.
            let name = format!("shmferry-{}-{}", std::process::id(), pool.id());
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let of_server = |line: &&str| {
                line.contains(&name) && {
                    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                    let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).unwrap());
                    end - start == 2 * 4096
                }
            };
            assert_eq!(maps.lines().filter(of_server).count(), 2, "{maps}");
        }
        drop(closing);
    });
}

struct Closing<'q, Q: RequestQueue>(&'q Q);

impl<Q: RequestQueue> Drop for Closing<'_, Q> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A child that is started while everything is open gets nothing of it.
#[test]
fn no_descriptor_outlives_an_exec() {
    let _watchdog = watchdog();
    let mut listing = Command::new("ls");
    let (_dir, path) = socket();
    let place = Place::over(Mq::TRANSPORT);
    let seqpacket = Seqpacket::new(&path).bind().unwrap();
    let posix_mq = Mq::bind(&place.cache_address()).unwrap();
    let (memfds, named) = (pool::<Unix>(2, 1), pool::<Mq>(2, 1));
    let requester = Seqpacket::new(&path).requester(&memfds).unwrap();
    let other = Mq::requester(&place.cache_address(), &named);
    thread::scope(|scope| {
        scope.spawn(|| seqpacket.recv(soon()).unwrap().accept(1).unwrap().write_all(b"1").unwrap());
        scope.spawn(|| posix_mq.recv(soon()).unwrap().accept(1).unwrap().write_all(b"1").unwrap());
        read_all(ask::<Unix>(&requester, &memfds, 1).unwrap());
        read_all(ask::<Mq>(&other, &named, 1).unwrap());
    });
    let listed = listing.args(["-l", "/proc/self/fd"]).stdin(Stdio::null()).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let ours: Vec<_> = listed
        .lines()
        .filter(|line| {
            ["shmferry", "socket:", "anon_inode:"].iter().any(|word| line.contains(word))
        })
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
}

#[test]
fn a_client_that_frees_nothing_ties_up_a_bounded_number_of_transfers() {
    let _watchdog = watchdog();
    let (_dir, path) = socket();
    let queue = Seqpacket::new(&path).bind().unwrap();
    let pool = pool::<Unix>(1, 1);
    let requester = Seqpacket::new(&path).requester(&pool).unwrap();
    // Withdrawn one after the other, each leaves a request behind that a worker may still take.
    let taken: Vec<_> = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for _ in 0..100 {
                let (request, transfer) = pool.lease(soon()).unwrap().request("1").unwrap();
                requester.send(request, soon()).unwrap();
                drop(transfer);
            }
        });
        asking.join().unwrap();
        let shortly = || Deadline::after(Duration::from_millis(50));
        std::iter::from_fn(|| queue.recv(shortly()).ok()).collect()
    });
    assert_eq!(taken.len(), 2 + 8, "one segment: two for it, and eight to spare");
    drop(taken);
    // Once those are over, the rest is read.
    assert!(queue.recv(soon()).is_ok());
}

/// What one transfer of the stress test is to do, decided by a random word that both sides know.
#[derive(Clone, Copy, Debug)]
struct Errand {
    word: u64,
}

impl Errand {
    fn read(key: &[u8]) -> Errand {
        Errand { word: std::str::from_utf8(key).unwrap().parse().unwrap() }
    }

    /// One in eight is refused, in three ways.
    fn refusal(self) -> Option<Refusal> {
        match self.word % 24 {
            0 => Some(Refusal::NotFound),
            1 => Some(Refusal::Failed),
            2 => Some(Refusal::other(77)),
            _ => None,
        }
    }

    /// One in sixteen breaks off half-way, one in sixteen is cancelled half-way.
    fn breaks_off(self) -> bool {
        self.word >> 8 & 15 == 0
    }

    fn is_cancelled(self) -> bool {
        self.word >> 8 & 15 == 1
    }

    fn is_stream(self) -> bool {
        self.word >> 12 & 3 == 0
    }

    /// Small ones mostly, around the slot's and the segment's length at times.
    fn len(self) -> usize {
        let [small, large] =
            [(self.word >> 16) as usize % 3000, (self.word >> 16) as usize % 20_000];
        match self.word >> 14 & 3 {
            0 => [0, 1, 1023, 1024, 1025, 4095, 4096, 4097][small % 8],
            1 => large,
            _ => small,
        }
    }

    fn bytes(self) -> Vec<u8> {
        let mut state = self.word | 1;
        (0..self.len())
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect()
    }

    fn serve(
        self,
        transfer: ShmTransfer<shmferry::protocol::Sender, shmferry::protocol::Starting>,
    ) {
        if let Some(why) = self.refusal() {
            return transfer.refuse(why).unwrap();
        }
        let bytes = self.bytes();
        let size = if self.is_stream() { Size::Unknown } else { Size::Known(bytes.len() as u64) };
        let mut sending = transfer.accept(size).unwrap();
        let send = if self.breaks_off() { &bytes[..bytes.len() / 2] } else { &bytes[..] };
        let sent = sending.write_all(send).and_then(|()| sending.flush());
        match sent {
            Ok(()) if self.breaks_off() => drop(sending),
            Ok(()) => match sending.finish() {
                Ok(_) | Err(Error::Cancelled) => {}
                Err(error) => panic!("{self:?}: {error}"),
            },
            Err(error) => assert!(self.is_cancelled(), "{self:?}: {error}"),
        }
    }

    /// Takes the transfer and compares all that comes; `true` for one that came whole.
    fn run<C: Carrier>(self, requester: &C::Requester, pool: &Pool<C>) -> bool {
        let (request, transfer) =
            pool.lease(soon()).unwrap().request(self.word.to_string()).unwrap();
        requester.send(request, soon()).unwrap();
        let mut body = match (transfer.reply(soon()), self.refusal()) {
            (Ok(Reply::Refused(why)), Some(expected)) if why == expected => return false,
            (Ok(Reply::Found(body)), None) => body,
            (Err(Error::Aborted), None) if self.breaks_off() => return false,
            (other, _) => panic!("{self:?}: {other:?}"),
        };
        let expected = self.bytes();
        let mut bytes = vec![0; expected.len() + 1];
        let mut got = 0;
        loop {
            if self.is_cancelled() && got >= expected.len() / 2 {
                return false;
            }
            match body.read(&mut bytes[got..]) {
                Ok(0) => {
                    assert!(
                        !self.breaks_off() || expected.is_empty(),
                        "{self:?}: a short body, taken for whole"
                    );
                    assert!(bytes[..got] == expected, "{self:?}: wrong bytes");
                    return true;
                }
                Ok(read) => got += read,
                Err(error) => {
                    let cause = error.get_ref().unwrap().downcast_ref();
                    assert!(
                        self.breaks_off() && matches!(cause, Some(Error::Aborted)),
                        "{self:?}: {error}"
                    );
                    assert!(
                        bytes[..got] == expected[..expected.len() / 2],
                        "{self:?}: wrong bytes"
                    );
                    return false;
                }
            }
        }
    }
}

fn a_hundred_thousand_transfers_at_random<C: Carrier>() {
    const THREADS: u64 = 16;
    const EACH: u64 = 100_000 / THREADS;
    let _watchdog = watchdog();
    let place = Place::over(C::TRANSPORT);
    let address = &place.cache_address();
    let mut server = Other::start("serve at random", &place);
    server.wait_for("ready");
    let pool = pool::<C>(3, 4);
    let requester = C::requester(address, &pool);
    let whole: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (requester, pool) = (&requester, &pool);
                scope.spawn(move || {
                    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(thread + 1);
                    let mut random = || {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state
                    };
                    (0..EACH)
                        .filter(|_| Errand { word: random() }.run::<C>(requester, pool))
                        .count() as u64
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    // 7 in 8 are not refused, and 14 in 16 of those neither break off nor are cancelled.
    assert!((70_000..84_000).contains(&whole), "{whole} came whole");
    // No segment was lost: all can be leased at once.
    let leases: Vec<_> = (0..3).map(|_| pool.lease(soon()).unwrap()).collect();
    drop(leases);
    let stats = pool.stats();
    assert_eq!((stats.segments, stats.idle), (3, 3));
    println!("{whole} of 100,000 came whole; {} segments were retired", stats.retired);
    drop(requester);
    server.nudge();
    server.wait_for("ended");
}
