//! `Client` and `Server`, over every way that requests can go: what a user of the crate meets first.

use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use shmferry::channel::InProcess;
use shmferry::error::{Awaited, Misuse};
use shmferry::{
    Address, Client, ClientBuilder, Deadline, Error, Fault, Incoming, Metadata, Refusal,
    ServeError, Server, Serving, Size,
};
use shmferry_test_support::watchdog::watchdog;
use tempfile::TempDir;

/// One way to go, and the place that it needs.
enum Way {
    At(Address, Option<TempDir>),
    InProcess(InProcess),
}

impl Way {
    fn all() -> Vec<Way> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let socket = Address::Unix(dir.path().join("queue.sock"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let queue = format!("mq:/shmferry-test-door-{}-{number}", std::process::id());
        let mut all = vec![Way::At(socket, Some(dir)), Way::InProcess(InProcess::bounded(8))];
        if cfg!(feature = "posix-mq") {
            all.push(Way::At(queue.parse().unwrap(), None));
        }
        all
    }

    fn bind(&self) -> Server {
        match self {
            Way::At(address, _) => Server::bind(address).unwrap(),
            Way::InProcess(queue) => Server::with(queue.clone()),
        }
    }

    fn client(&self, builder: ClientBuilder) -> Client {
        match self {
            Way::At(address, _) => builder.connect(address).unwrap(),
            Way::InProcess(queue) => builder.in_process(queue).unwrap(),
        }
    }
}

fn small() -> ClientBuilder {
    Client::builder().segments(2).segment_len(1024).slots(4).timeout(Duration::from_secs(60))
}

/// Serves with a handler, and asks.
fn with<F, E>(handler: F, ask: impl Fn(&Client, &Serving))
where
    F: Fn(Incoming) -> Result<(), E> + Clone + Send + Sync + 'static,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let _watchdog = watchdog();
    for way in Way::all() {
        let serving = way.bind().on_error(|_| {}).serve(2, handler.clone()).unwrap();
        let client = way.client(small());
        ask(&client, &serving);
        serving.stop();
        serving.wait();
        // One that was given back just before its sender left is looked at when it is next leased.
        let stats = client.stats();
        assert_eq!(stats.idle + stats.quarantined, 2, "every segment has come back");
    }
}

#[test]
fn bytes_files_and_streams_come_as_they_were_sent() {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    file.write_all(&content).unwrap();
    let file = Arc::new(file);
    with(
        move |request| -> shmferry::Result<()> {
            match request.key() {
                b"bytes" => request.send_bytes(b"hello"),
                b"nothing" => request.send_bytes(b""),
                b"file" => request.send_file(&file),
                b"status" => request.send_file(&File::open("/proc/self/status")?),
                b"stream" => {
                    let mut outgoing = request.accept(Size::Unknown)?;
                    for number in 0..1000 {
                        writeln!(outgoing, "line {number}")?;
                    }
                    outgoing.finish()
                }
                _ => request.refuse(Refusal::NotFound),
            }
        },
        |client, _| {
            assert_eq!(client.get("bytes").unwrap().read_all().unwrap(), b"hello");
            assert_eq!(client.get("nothing").unwrap().read_all().unwrap(), b"");
            let body = client.get("file").unwrap();
            assert_eq!(body.size(), Size::Known(100_000));
            assert_eq!(body.read_all().unwrap(), content);
            let mut sink = tempfile::tempfile().unwrap();
            assert_eq!(client.get("file").unwrap().copy_to(&sink).unwrap(), 100_000);
            io::Seek::rewind(&mut sink).unwrap();
            let mut copied = Vec::new();
            sink.read_to_end(&mut copied).unwrap();
            assert_eq!(copied, content);
            let status = client.get("status").unwrap();
            assert_eq!(status.size(), Size::Unknown, "procfs does not tell");
            assert!(status.read_all().unwrap().starts_with(b"Name:"));
            let mut text = String::new();
            client.get("stream").unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text.lines().count(), 1000);
        },
    );
}

#[test]
fn a_refusal_comes_with_its_reason() {
    with(
        |request| match request.key() {
            b"other" => request.refuse(Refusal::other(7).with(&Version(3))),
            b"long" => request.refuse(Refusal::other(7).with(&"x".repeat(2000))),
            _ => request.refuse(Refusal::NotFound),
        },
        |client, _| {
            let error = client.get("absent").unwrap_err();
            assert!(matches!(error, Error::Refused(Refusal::NotFound)), "{error:?}");
            assert_eq!(error.to_string(), "refused: there is nothing by that key");
            let error = client.get("other").unwrap_err();
            let Error::Refused(why @ Refusal::Other { code: 7, .. }) = error else {
                panic!("{error}")
            };
            assert_eq!(why.metadata::<Version>().unwrap(), Version(3));
            assert!(matches!(why.metadata::<()>(), Err(Error::Peer(_))));
            let error = client.get("long").unwrap_err();
            assert!(matches!(error, Error::Aborted), "too long to be sent: {error:?}");
            // What an earlier refusal carried is not there in a later one.
            let Error::Refused(why) = client.get("absent").unwrap_err() else { panic!() };
            why.metadata::<()>().unwrap();
        },
    );
}

#[derive(Debug, PartialEq)]
struct Version(u64);

impl Metadata for Version {
    fn encode(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }

    fn decode(bytes: &[u8]) -> Option<Version> {
        Some(Version(u64::from_le_bytes(bytes.try_into().ok()?)))
    }
}

#[test]
fn metadata_travels_beside_the_size() {
    with(
        |request| -> shmferry::Result<()> {
            let mut outgoing = request.accept_with(2, &Version(9))?;
            outgoing.write_all(b"ok")?;
            outgoing.finish()
        },
        |client, _| {
            let body = client.get("key").unwrap();
            assert_eq!(body.metadata::<Version>().unwrap(), Version(9));
            assert!(matches!(body.metadata::<()>(), Err(Error::Peer(_))));
            assert_eq!(body.read_all().unwrap(), b"ok");
        },
    );
}

#[test]
fn a_handler_that_fails_or_panics_ends_its_own_transfer_only_and_is_told_of() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let (told, errors) = mpsc::channel();
        let told = Mutex::new(told);
        let server = way.bind().on_error(move |error| {
            told.lock().unwrap().send((error.to_string(), error.fault())).unwrap();
        });
        let handler = |request: Incoming| -> Result<(), Box<dyn StdError + Send + Sync>> {
            match request.key() {
                b"fails" => Err("no disk".into()),
                b"forgets" => Ok(()),
                b"panics" => panic!("meant to be seen in the test's output"),
                b"breaks off" => {
                    let mut outgoing = request.accept(10)?;
                    outgoing.write_all(b"12345")?;
                    outgoing.flush()?;
                    Err("half-way".into())
                }
                _ => Ok(request.send_bytes(b"well")?),
            }
        };
        let serving = server.serve(1, handler).unwrap();
        let client = way.client(small());
        for (key, text) in [
            ("fails", "serving fails failed: no disk"),
            ("forgets", "serving forgets failed: the handler gave no answer"),
            ("panics", "serving panics panicked: meant to be seen in the test's output"),
        ] {
            assert!(matches!(client.get(key), Err(Error::Aborted)), "{key}");
            assert_eq!(errors.recv().unwrap(), (text.to_owned(), Fault::Ours));
        }
        let mut body = client.get("breaks off").unwrap();
        let mut bytes = Vec::new();
        let error = Error::from(body.read_to_end(&mut bytes).unwrap_err());
        assert!(matches!(error, Error::Aborted), "{error:?}");
        assert_eq!(bytes, b"12345", "what was sent before");
        errors.recv().unwrap();

        assert_eq!(client.get("key").unwrap().read_all().unwrap(), b"well");
        drop(serving);
    }
}

#[test]
fn a_client_that_leaves_is_its_own_fault() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let (told, errors) = mpsc::channel();
        let told = Mutex::new(told);
        let server = way.bind().on_error(move |error| {
            assert!(matches!(error, ServeError::Handler { .. }));
            told.lock().unwrap().send(error.fault()).unwrap();
        });
        let serving = server.serve(1, |request| request.send_bytes(&[1; 100_000])).unwrap();
        let client = way.client(small());
        drop(client.get("key").unwrap());
        assert_eq!(errors.recv().unwrap(), Fault::Peer);
        drop(serving);
    }
}

#[test]
fn a_time_out_consumes_nothing_that_can_be_tried_again() {
    let (let_go, held) = mpsc::channel::<()>();
    drop(let_go);
    let held = Arc::new(Mutex::new(held));
    with(
        move |request| {
            let _ = held.lock().unwrap().recv(); // at once: its other end is gone
            request.send_bytes(&[7; 10])
        },
        |client, _| {
            let hasty = client.clone().with_timeout(Duration::from_millis(5));
            // All segments in use: the client says so, and works again once one is free.
            let (one, two) = (client.get("a").unwrap(), client.get("b").unwrap());
            let error = hasty.get("c").unwrap_err();
            assert!(matches!(error, Error::Timeout(Awaited::Lease)), "{error:?}");
            assert_eq!(error.fault(), Fault::Time);
            drop(one);
            assert_eq!(client.get("c").unwrap().read_all().unwrap(), [7; 10]);
            drop(two);
        },
    );
}

#[test]
fn a_chunk_that_is_late_can_be_waited_for_again() {
    let (let_go, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    with(
        move |request| -> shmferry::Result<()> {
            let mut outgoing = request.accept(Size::Unknown)?;
            outgoing.write_all(b"first")?;
            outgoing.flush()?;
            held.lock().unwrap().recv().unwrap();
            outgoing.write_all(b"second")?;
            outgoing.finish()
        },
        move |client, _| {
            let mut body = client.get("key").unwrap();
            let soon = || Deadline::after(Duration::from_millis(5));
            let mut bytes = [0; 5];
            let mut chunk = body.next_chunk(soon()).unwrap().unwrap();
            assert_eq!(chunk.copy_to(&mut bytes), 5);
            drop(chunk);
            for _ in 0..3 {
                let error = body.next_chunk(soon()).unwrap_err();
                assert!(matches!(error, Error::Timeout(Awaited::FilledSlot)), "{error:?}");
            }
            let_go.send(()).unwrap();
            assert_eq!(body.read_all().unwrap(), b"second");
        },
    );
}

#[test]
fn a_client_may_be_there_before_its_server_and_after_a_restart() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let Way::At(address, _dir) = &way else { continue };
        let client = way.client(small());
        let mut asking = {
            let client = client.clone();
            Some(thread::spawn(move || client.get("key").unwrap().read_all().unwrap()))
        };
        for answer in [&b"one"[..], b"two"] {
            let handler = move |request: Incoming| request.send_bytes(answer);
            let serving = Server::bind(address).unwrap().serve(1, handler).unwrap();
            if let Some(asking) = asking.take() {
                assert_eq!(asking.join().unwrap(), b"one");
            }
            assert_eq!(client.get("key").unwrap().read_all().unwrap(), answer);
            serving.stop();
            serving.wait();
        }
        let hasty = small().connect_timeout(Duration::ZERO).connect(address).unwrap();
        let error = hasty.get("key").unwrap_err();
        assert!(matches!(error, Error::Timeout(Awaited::Server)), "{error:?}");
    }
}

/// A handler that sends one part, and the other when it is let go.
fn in_two_steps(
    let_go: mpsc::Receiver<()>,
) -> impl Fn(Incoming) -> shmferry::Result<()> + Send + Sync + 'static {
    let let_go = Mutex::new(let_go);
    move |request| {
        let mut outgoing = request.accept(Size::Unknown)?;
        outgoing.write_all(b"begun, ")?;
        outgoing.flush()?;
        let_go.lock().unwrap().recv().unwrap();
        outgoing.write_all(b"and ended")?;
        outgoing.finish()
    }
}

#[test]
fn stopping_lets_what_is_under_way_end() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let (let_go, held) = mpsc::channel::<()>();
        let serving = way.bind().serve(1, in_two_steps(held));
        let serving = serving.unwrap();
        let client = way.client(small());
        let body = client.get("key").unwrap();
        serving.stop();
        assert!(!serving.wait_until(Deadline::after(Duration::from_millis(5))));
        let_go.send(()).unwrap();
        assert_eq!(body.read_all().unwrap(), b"begun, and ended");
        serving.wait();
    }
}

#[test]
fn more_clients_than_workers_and_segments_are_all_served() {
    with(
        |request| {
            let key = request.key().to_vec();
            request.send_bytes(&key.repeat(500))
        },
        |client, _| {
            thread::scope(|scope| {
                for number in 0..64 {
                    scope.spawn(move || {
                        for round in 0..20 {
                            let key = format!("{number}-{round}");
                            let bytes = client.get(&key).unwrap().read_all().unwrap();
                            assert_eq!(bytes, key.as_bytes().repeat(500));
                        }
                    });
                }
            });
        },
    );
}

#[test]
fn errors_convert_both_ways() {
    let back = Error::from(io::Error::from(Error::Refused(Refusal::NotFound)));
    assert!(matches!(back, Error::Refused(Refusal::NotFound)));
    let plain = Error::from(io::Error::from(io::ErrorKind::UnexpectedEof));
    assert!(matches!(&plain, Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof));
    assert_eq!(io::Error::from(plain).kind(), io::ErrorKind::UnexpectedEof);
    let kind = |error| io::Error::from(error).kind();
    assert_eq!(kind(Error::Refused(Refusal::NotFound)), io::ErrorKind::NotFound);
    assert_eq!(kind(Error::Disconnected), io::ErrorKind::ConnectionReset);
}

#[test]
fn an_address_that_cannot_be_right_is_told_what_one_looks_like() {
    assert!(matches!(Address::of_user("../x"), Err(Error::Misuse(_))));
    for text in ["unix:a\0b", "", "cache.sock", "unix:", "tcp:localhost", "UNIX:/a"] {
        let error = Client::connect(text).unwrap_err();
        assert!(matches!(error, Error::Misuse(Misuse::Address(_))), "{text}: {error:?}");
        assert!(error.to_string().ends_with("an address is unix:PATH or mq:/NAME"), "{error}");
    }
    for text in ["mq:", "mq:name", "mq:/", "mq:/..", "mq:/a/b"] {
        let error = Server::bind(text).unwrap_err();
        assert!(matches!(error, Error::Misuse(Misuse::QueueName(_))), "{text}: {error:?}");
    }
    let long = format!("unix:/{}", "n".repeat(200));
    let error = Server::bind(&long).unwrap_err();
    assert!(matches!(error, Error::Misuse(Misuse::PathTooLong { .. })), "{error:?}");
}

#[test]
fn a_key_that_is_too_long_costs_no_segment() {
    with(
        |request| request.send_bytes(b"x"),
        |client, _| {
            let key = vec![b'k'; 4097];
            assert!(matches!(client.get(&key), Err(Error::Misuse(Misuse::KeyTooLong { .. }))));
            assert_eq!(client.get(&key[..4096]).unwrap().read_all().unwrap(), b"x");
        },
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_directory_hands_out_its_own_regular_files_and_nothing_else() {
    use shmferry::files::{Directory, open_regular};
    use std::fs;
    use std::os::unix::fs::symlink;

    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/a"), "hello").unwrap();
    fs::write(place.path().join("secret"), "secret").unwrap();
    symlink("sub/a", root.join("inside")).unwrap();
    symlink("../secret", root.join("outside")).unwrap();
    symlink(place.path().join("secret"), root.join("far-outside")).unwrap();
    let fifo = std::process::Command::new("mkfifo").arg(root.join("fifo")).status().unwrap();
    assert!(fifo.success());

    let directory = Directory::open(&root).unwrap();
    for key in ["sub/a", "/sub/a", "inside", "sub/../sub/a"] {
        let file = directory.file(key).unwrap().expect(key);
        assert_eq!(io::read_to_string(file).unwrap(), "hello", "{key}");
    }
    let long = "n".repeat(300);
    let absent = ["", ".", "sub", "b", "sub/a/b", "../secret", "/../secret", "fifo", "a\0b", &long];
    for key in absent.into_iter().chain(["outside", "far-outside", "//etc/passwd"]) {
        assert!(directory.file(key).unwrap().is_none(), "{key}");
    }
    assert!(open_regular(root.join("outside")).unwrap().is_some(), "its path is trusted");
    assert!(open_regular(root.join("fifo")).unwrap().is_none());
    assert!(Directory::open(root.join("sub/a")).is_err());
    // It is the directory, and not its name.
    fs::rename(&root, place.path().join("moved")).unwrap();
    assert!(directory.file("sub/a").unwrap().is_some());
}

#[cfg(target_os = "linux")]
#[test]
fn a_directory_lists_what_it_hands_out_and_its_own_directories() {
    use shmferry::files::Directory;
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    fs::create_dir_all(root.join("sub/deep")).unwrap();
    fs::create_dir(place.path().join("elsewhere")).unwrap();
    fs::write(root.join("sub/a"), "hello").unwrap();
    fs::write(root.join("sub").join(OsStr::from_bytes(b"\xff\n")), "").unwrap();
    symlink("../sub/a", root.join("sub/link")).unwrap();
    symlink("deep", root.join("sub/linked")).unwrap();
    symlink("../../elsewhere", root.join("sub/outside")).unwrap();
    symlink("nothing", root.join("sub/dangling")).unwrap();
    let fifo = std::process::Command::new("mkfifo").arg(root.join("sub/fifo")).status().unwrap();
    assert!(fifo.success());

    let directory = Directory::open(&root).unwrap();
    let list = |key: &str| {
        let found = directory.list(key).unwrap()?;
        let line = |it: shmferry::files::Entry| (it.name, it.is_directory.then_some(()), it.len);
        Some(found.into_iter().map(line).collect::<Vec<_>>())
    };
    for key in ["/sub/", "sub", "/sub", "sub//", "sub/deep/.."] {
        let found = list(key).expect(key);
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_bytes()).collect();
        assert_eq!(names, [&b"a"[..], b"deep", b"link", b"linked", b"\xff\n"], "{key}");
        let is_directory: Vec<_> = found.iter().map(|(_, it, _)| it.is_some()).collect();
        assert_eq!(is_directory, [false, true, false, true, false]);
        assert_eq!((found[0].2, found[2].2, found[4].2), (5, 5, 0));
    }
    for key in ["", "/"] {
        let names: Vec<_> = list(key).unwrap().into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["sub"], "{key:?}");
    }
    assert_eq!(list("sub/linked"), Some(Vec::new()));
    for key in
        ["absent", "sub/a", "sub/a/", "..", "/../", "sub/outside", "sub/fifo", "a\0", "//etc"]
    {
        assert_eq!(list(key), None, "{key:?}");
    }
}

#[test]
fn a_path_where_something_else_stands_is_told_what_it_is_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (file, missing) = (dir.path().join("file"), dir.path().join("a/b/queue.sock"));
    std::fs::write(&file, "precious").unwrap();
    let error = Server::bind(file.as_path()).unwrap_err();
    let told = format!("{file:?} is taken by a regular file of user ");
    assert!(error.to_string().starts_with(&told), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let error = Server::bind(missing.as_path()).unwrap_err();
    let parent = missing.parent().unwrap().display().to_string();
    assert!(error.to_string().contains(&parent), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_hook_that_panics_ends_nothing_else() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let server = way.bind().on_error(|_| panic!("meant to be seen in the test's output"));
        let serving = server.serve(1, |request| match request.key() {
            b"fails" => Err(Error::Closed),
            _ => request.send_bytes(b"well"),
        });
        let serving = serving.unwrap();
        let client = way.client(small());
        for _ in 0..3 {
            assert!(matches!(client.get("fails"), Err(Error::Aborted)));
            if let Way::At(Address::Unix(path), _) = &way {
                talk_nonsense(path); // its rejection is told to the hook, too
            }
            assert_eq!(client.get("key").unwrap().read_all().unwrap(), b"well");
        }
        assert!(!serving.wait_until(Deadline::after(Duration::ZERO)), "it goes on");
    }
}

/// Sends what is no message, and waits until the server has hung up.
fn talk_nonsense(path: &std::path::Path) {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, socket};
    let nonsense = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&nonsense, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::send(&nonsense, &[0xaa; 100], SendFlags::NOSIGNAL).unwrap();
    while matches!(rustix::net::recv(&nonsense, &mut [0; 256], RecvFlags::empty()), Ok((1.., _))) {}
}

#[test]
fn a_serving_that_is_dropped_lets_what_is_under_way_end() {
    let _watchdog = watchdog();
    for way in Way::all() {
        let (let_go, held) = mpsc::channel::<()>();
        let serving = way.bind().serve(1, in_two_steps(held));
        let client = way.client(small());
        let body = client.get("key").unwrap();
        drop(serving.unwrap());
        let_go.send(()).unwrap();
        assert_eq!(body.read_all().unwrap(), b"begun, and ended");
    }
}

#[test]
fn a_socket_that_another_program_listens_at_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.sock");
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = Server::bind(path.as_path()).unwrap_err();
    assert!(matches!(error, Error::NameTaken { kind: "a socket", .. }), "{error}");
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    drop(other);
    drop(Server::bind(path.as_path()).unwrap()); // a dead one's is taken over
}
