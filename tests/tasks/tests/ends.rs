//! Ends of all kinds: processes that are killed and stopped, servers that are replaced, runtimes
//! that are dropped, handlers that fail; and loans, which outlive their server.

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_core::Stream;
use rustix::process::{Pid, Signal, kill_process};
use shmferry::channel::InProcess;
use shmferry::error::Awaited;
use shmferry::loan::Loan;
use shmferry::tokio::{Body, Client, Incoming, Server, Serving};
use shmferry::{Error, Refusal, ServeError, Size};
use shmferry_tasks::{Alive, Spot, asked, back, key, noise, on_threads, serve_tasks, until};
use shmferry_test_support::watchdog::watchdog;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;

/// More than any segment here has room for.
const LARGE: usize = 200_000;
/// So long that nothing in these tests ends by it.
const EVER: Duration = Duration::from_secs(3600);
/// A wait that is to time out.
const SOON: Duration = Duration::from_millis(300);

fn small() -> shmferry::ClientBuilder {
    shmferry::Client::builder().segments(8).segment_len(16 << 10).slots(4)
}

// ---------------------------------------------------------------- the other process

const ROLE: &str = "SHMFERRY_TASKS_ROLE";
const ADDRESS: &str = "SHMFERRY_TASKS_ADDRESS";

/// This executable once more, in a role.
struct Process {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Process {
    fn start(role: &str, address: &Path) -> Process {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_process", "--nocapture"])
            .env(ROLE, role)
            .env(ADDRESS, address)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stdout.take().unwrap());
        Process { child, says }
    }

    /// Waits until it has said so.
    fn said(&mut self, word: &str) {
        let mut line = String::new();
        while self.says.read_line(&mut line).unwrap() > 0 {
            if line.trim_end().ends_with(word) {
                return;
            }
            line.clear();
        }
        panic!("it ended, and never said {word}");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it; returns when each of its threads has stopped.
    fn stop(&self) {
        self.signal(Signal::STOP);
        shmferry_test_support::wait_until("it is stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
            tasks.flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap();
                stat.rsplit(") ").next().unwrap().starts_with('T')
            })
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_process() {
    // Without a role this is the test run itself, in which there is nothing to do.
    let Ok(role) = env::var(ROLE) else { return };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]); // its end
        std::process::exit(1);
    });
    let spot = env::var(ADDRESS).unwrap();
    let address = Path::new(&spot);
    match &*role {
        "serve-tasks" => on_threads(2, async {
            let server = Server::bind(address).unwrap().timeout(EVER).on_error(|_| {});
            let _serving = server.serve(act_in_task).unwrap();
            println!("ready");
            std::future::pending::<()>().await;
        }),
        "serve-threads" => {
            let server = shmferry::Server::bind(address).unwrap().timeout(EVER).on_error(|_| {});
            let serving = server.serve(8, act_in_thread).unwrap();
            println!("ready");
            serving.wait();
        }
        "ask-tasks" => on_threads(2, async {
            let client = small().timeout(EVER).connect_tokio(address).unwrap();
            let mut held = Vec::new();
            for key in KEYS_OF_CLIENT {
                held.push(client.get(key).await.unwrap());
            }
            println!("ready");
            held.extend(client.get("silent").await);
            std::future::pending().await
        }),
        "ask-threads" => {
            let client = small().timeout(EVER).connect(address).unwrap();
            let mut held: Vec<_> = KEYS_OF_CLIENT.map(|key| client.get(key).unwrap()).into();
            println!("ready");
            held.extend(client.get("silent"));
            loop {
                std::thread::park();
            }
        }
        role => panic!("no such role: {role}"),
    }
}

/// What a client asks for, and does not read.
const KEYS_OF_CLIENT: [&str; 3] = ["1:200000", "middle", "written"];

async fn act_in_task(request: Incoming) -> shmferry::Result<()> {
    let key = request.key().to_vec();
    println!("taken {}", key.escape_ascii());
    match &*key {
        b"silent" => std::future::pending::<()>().await,
        b"accepted" => {
            let _accepted = request.accept(5u64)?;
            std::future::pending::<()>().await;
        }
        b"middle" => {
            let mut outgoing = request.accept(Size::Unknown)?;
            outgoing.send(&noise(1, 1000)).await?;
            tokio::io::AsyncWriteExt::flush(&mut outgoing).await?;
            std::future::pending::<()>().await;
        }
        _ => return request.send_bytes(&asked(&key).unwrap()).await,
    }
    Ok(())
}

fn act_in_thread(request: shmferry::Incoming) -> shmferry::Result<()> {
    let key = request.key().to_vec();
    println!("taken {}", key.escape_ascii());
    let wait = || loop {
        std::thread::park();
    };
    match &*key {
        b"silent" => wait(),
        b"accepted" => {
            let _accepted = request.accept(5u64)?;
            wait()
        }
        b"middle" => {
            let mut outgoing = request.accept(Size::Unknown)?;
            std::io::Write::write_all(&mut outgoing, &noise(1, 1000))?;
            std::io::Write::flush(&mut outgoing)?;
            wait()
        }
        _ => request.send_bytes(&asked(&key).unwrap()),
    }
}

// ---------------------------------------------------------------- kills and stops

#[test]
fn a_server_is_killed_while_tasks_wait_in_every_state() {
    let _watchdog = watchdog();
    for role in ["serve-tasks", "serve-threads"] {
        on_threads(2, async {
            let spot = Spot::new();
            let mut server = Process::start(role, &spot.address);
            server.said("ready");
            let builder = small().timeout(EVER).segments(4);
            let client = builder.connect_tokio(spot.address.as_path()).unwrap();
            let ask = |key: &'static str| {
                let client = client.clone();
                tokio::spawn(async move { client.get(key).await.map(drop) })
            };
            let silent = ask("silent");
            server.said("taken silent");
            let accepted = ask("accepted");
            server.said("taken accepted");
            let mut middle = client.get("middle").await.unwrap();
            let mut read = vec![0; 1000];
            middle.read_exact(&mut read).await.unwrap();
            assert!(read == noise(1, 1000));
            let middle = tokio::spawn(async move { middle.read_all().await.map(drop) });
            let unread = client.get(key(3, LARGE)).await.unwrap();
            let behind = ask("behind"); // waits for a segment
            tokio::task::yield_now().await;
            server.signal(Signal::KILL);
            for waiting in [accepted, middle] {
                let ended = waiting.await.unwrap();
                assert!(matches!(ended, Err(Error::Disconnected)), "{role}: {ended:?}");
            }
            let rest = unread.read_all().await.map(|bytes| bytes.len());
            assert!(matches!(rest, Err(Error::Disconnected)), "{role}: {rest:?}");
            drop(server);
            // A successor gets what was not accepted, and has all segments.
            let _serving = spot.serve_tasks();
            for waiting in [silent, behind] {
                let ended = waiting.await.unwrap();
                let is_refused = matches!(ended, Err(Error::Refused(Refusal::NotFound)));
                assert!(is_refused, "{role}: {ended:?}");
            }
            let mut bodies = Vec::new();
            for seed in 0..4 {
                bodies.push((seed, client.get(key(seed, LARGE)).await.unwrap()));
            }
            for (seed, body) in bodies {
                assert!(body.read_all().await.unwrap() == noise(seed, LARGE));
            }
            assert_eq!(back(client.stats()), 4);
        });
    }
}

/// The key of a request, and the error that it ended with.
type End = (String, String);

/// Whether a handler ended as it should whose client had gone: one that waits for its client is told
/// by the step that it waits in.
fn is_told((key, error): &End) -> bool {
    error == "Disconnected" || error == "Cancelled" || (key == "silent" && error == "Unwanted")
}

/// A server of tasks that answer in every way, until their client is gone; how they ended, and how
/// many there are.
fn endless(server: Server) -> (Serving, Arc<Mutex<Vec<End>>>, Arc<AtomicUsize>) {
    let (ends, alive) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicUsize>::default());
    let (told, counted) = (Arc::clone(&ends), Arc::clone(&alive));
    let server = server.timeout(EVER).on_error(move |error| {
        let (key, error) = match error {
            ServeError::Handler { key, error, .. } => {
                (key, format!("{:?}", error.downcast_ref::<Error>().unwrap()))
            }
            ServeError::Unwanted { key, .. } => (key, "Unwanted".to_owned()),
            error => panic!("{error}"),
        };
        told.lock().unwrap().push((String::from_utf8(key.to_vec()).unwrap(), error));
    });
    let file = {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &noise(1, LARGE)).unwrap();
        Arc::new(file)
    };
    let serving = server.serve(move |request| {
        let (alive, file) = (Alive::among(&counted), Arc::clone(&file));
        async move {
            let _alive = alive;
            let key = request.key().to_vec();
            match &*key {
                b"middle" => request.send_file(&file).await,
                b"written" => {
                    let mut outgoing = request.accept(Size::Unknown)?;
                    loop {
                        tokio::io::AsyncWriteExt::write_all(&mut outgoing, &[7; 777]).await?;
                    }
                }
                b"silent" => {
                    let mut outgoing = request.accept(Size::Unknown)?;
                    // Nothing is seen of this before the slots are full.
                    loop {
                        outgoing.send(&[7]).await?;
                        tokio::task::yield_now().await;
                    }
                }
                key => request.send_bytes(&asked(key).unwrap()).await,
            }
        }
    });
    (serving.unwrap(), ends, alive)
}

#[test]
fn a_client_is_killed_while_handlers_wait_for_it() {
    let _watchdog = watchdog();
    for role in ["ask-tasks", "ask-threads"] {
        on_threads(2, async {
            let spot = Spot::new();
            let server = Server::bind(spot.address.as_path()).unwrap();
            let (_serving, ends, alive) = endless(server);
            let mut client = Process::start(role, &spot.address);
            client.said("ready");
            until("its last request is there", || alive.load(SeqCst) == 4).await;
            client.signal(Signal::KILL);
            until("all handlers are over", || ends.lock().unwrap().len() == 4).await;
            assert_eq!(alive.load(SeqCst), 0);
            let mut ends = ends.lock().unwrap().clone();
            ends.sort();
            let keys: Vec<_> = ends.iter().map(|(key, _)| &**key).collect();
            assert_eq!(keys, ["1:200000", "middle", "silent", "written"], "{role}");
            assert!(ends.iter().all(is_told), "{role}: {ends:?}");
        });
    }
}

#[test]
fn a_stopped_server_is_late_and_not_gone() {
    let _watchdog = watchdog();
    for role in ["serve-tasks", "serve-threads"] {
        on_threads(2, async {
            let spot = Spot::new();
            let mut server = Process::start(role, &spot.address);
            server.said("ready");
            let client = small().timeout(SOON).connect_tokio(spot.address.as_path()).unwrap();
            let mut middle = client.get("middle").await.unwrap();
            let mut read = vec![0; 1000];
            middle.read_exact(&mut read).await.unwrap();
            server.stop();
            let rest = middle.read_all().await;
            assert!(matches!(rest, Err(Error::Timeout(Awaited::FilledSlot))), "{role}: {rest:?}");
            let reply = client.get(key(1, 5)).await;
            assert!(matches!(reply, Err(Error::Timeout(Awaited::Reply))), "{role}: {reply:?}");
            server.signal(Signal::CONT);
            // What was asked before it went on is withdrawn; it answers what is asked now.
            let body = loop {
                match client.get(key(2, LARGE)).await {
                    Ok(body) => break body,
                    Err(Error::Timeout(Awaited::Reply)) => {} // the machine is busy
                    Err(error) => panic!("{role}: {error:?}"),
                }
            };
            assert!(body.read_all().await.unwrap() == noise(2, LARGE));
        });
    }
}

#[test]
fn a_stopped_client_is_late_and_not_gone() {
    let _watchdog = watchdog();
    for role in ["ask-tasks", "ask-threads"] {
        on_threads(2, async {
            let spot = Spot::new();
            let ends = Arc::<Mutex<Vec<String>>>::default();
            let told = Arc::clone(&ends);
            let server = Server::bind(spot.address.as_path()).unwrap().timeout(SOON);
            let unwanted = Arc::<AtomicUsize>::default();
            let counted = Arc::clone(&unwanted);
            let server = server.on_error(move |error| match error {
                ServeError::Handler { error, .. } => {
                    let error = error.downcast_ref::<Error>().unwrap();
                    told.lock().unwrap().push(format!("{error:?}"));
                }
                ServeError::Unwanted { .. } => _ = counted.fetch_add(1, SeqCst),
                error => panic!("{error}"),
            });
            let begun = Arc::<AtomicUsize>::default();
            let count = Arc::clone(&begun);
            let _serving = server.serve(move |request| {
                count.fetch_add(1, SeqCst);
                async move {
                    match request.key() {
                        b"silent" => std::future::pending().await,
                        _ => request.send_bytes(&noise(1, LARGE)).await,
                    }
                }
            });
            let mut client = Process::start(role, &spot.address);
            client.said("ready");
            until("its last request is there", || begun.load(SeqCst) == 4).await;
            client.stop();
            until("three have timed out", || ends.lock().unwrap().len() == 3).await;
            let late = format!("{:?}", Error::Timeout(Awaited::FreeSlot));
            assert!(ends.lock().unwrap().iter().all(|end| *end == late), "{role}: {ends:?}");
            assert_eq!(unwanted.load(SeqCst), 0, "{role}");
            client.signal(Signal::KILL);
            until("the last handler is dropped", || unwanted.load(SeqCst) == 1).await;
        });
    }
}

// ---------------------------------------------------------------- replaced, and dropped

/// Servers that follow each other, of tasks and of threads.
enum Reign {
    Tasks(Serving),
    Threads(shmferry::Serving),
}

impl Reign {
    fn begin(spot: &Spot, number: usize) -> Reign {
        match number % 2 {
            0 => Reign::Tasks(spot.serve_tasks()),
            _ => Reign::Threads(spot.serve_threads()),
        }
    }

    fn stop(&self) {
        match self {
            Reign::Tasks(serving) => serving.stop(),
            Reign::Threads(serving) => serving.stop(),
        }
    }

    async fn wait(self) {
        match self {
            Reign::Tasks(serving) => serving.wait().await,
            Reign::Threads(serving) => {
                tokio::task::spawn_blocking(move || serving.wait()).await.unwrap();
            }
        }
    }
}

#[test]
fn successors_take_over_under_load_and_no_request_is_lost() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let mut reign = Reign::begin(&spot, 0);
        let client = small().connect_tokio(spot.address.as_path()).unwrap();
        let (answered, is_over) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let mut asking = JoinSet::new();
        for task in 0..32 {
            let (client, answered) = (client.clone(), Arc::clone(&answered));
            let is_over = Arc::clone(&is_over);
            asking.spawn(async move {
                let mut round = 0;
                while is_over.load(SeqCst) == 0 {
                    let (seed, len) = (task * 1_000_000 + round, [10, 5_000, 40_000][round % 3]);
                    let body = client.get(key(seed, len)).await.unwrap();
                    assert!(body.read_all().await.unwrap() == noise(seed, len));
                    answered.fetch_add(1, SeqCst);
                    round += 1;
                }
            });
        }
        for number in 1..9 {
            let goal = answered.load(SeqCst) + 400;
            until("many are answered", || answered.load(SeqCst) >= goal).await;
            reign.stop();
            let successor = Reign::begin(&spot, number);
            std::mem::replace(&mut reign, successor).wait().await;
        }
        is_over.store(1, SeqCst);
        while let Some(ended) = asking.join_next().await {
            ended.unwrap();
        }
        assert!(answered.load(SeqCst) > 3000);
        until("all segments are back", || back(client.stats()) == 8).await;
    });
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_clients_runtime_is_dropped_in_the_middle() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (_serving, ends, alive) = endless(Server::bind(spot.address.as_path()).unwrap());
        for round in 0..5 {
            let theirs = runtime();
            let client = {
                let _inside = theirs.enter();
                small().timeout(EVER).connect_tokio(spot.address.as_path()).unwrap()
            };
            for key in KEYS_OF_CLIENT.into_iter().chain(["silent"]) {
                let client = client.clone();
                theirs.spawn(async move {
                    let mut body = client.get(key).await.unwrap();
                    let _ = body.read_u8().await;
                    std::future::pending::<()>().await;
                });
            }
            until("all are asked", || alive.load(SeqCst) == 4).await;
            theirs.shutdown_background();
            let what = format!("all handlers are over, round {round}");
            until(&what, || alive.load(SeqCst) == 0 && ends.lock().unwrap().len() == 4).await;
            let ends = std::mem::take(&mut *ends.lock().unwrap());
            assert!(ends.iter().all(is_told), "{ends:?}");
        }
        let client = small().connect_tokio(spot.address.as_path()).unwrap();
        let body = client.get(key(1, LARGE)).await.unwrap();
        assert!(body.read_all().await.unwrap() == noise(1, LARGE));
    });
}

#[test]
fn a_servers_runtime_is_dropped_in_the_middle() {
    let _watchdog = watchdog();
    for within in [false, true] {
        on_threads(2, async {
            let (spot, queue) = (Spot::new(), InProcess::bounded(4));
            let theirs = runtime();
            let serving = {
                let _inside = theirs.enter();
                let server = if within {
                    Server::in_process(queue.clone())
                } else {
                    Server::bind(spot.address.as_path()).unwrap()
                };
                server.on_error(|_| {}).serve(act_in_task).unwrap()
            };
            let client = if within {
                small().timeout(EVER).in_process_tokio(&queue).unwrap()
            } else {
                small().timeout(EVER).connect_tokio(spot.address.as_path()).unwrap()
            };
            let mut middle = client.get("middle").await.unwrap();
            let mut read = vec![0; 1000];
            middle.read_exact(&mut read).await.unwrap();
            let unread = client.get(key(1, LARGE)).await.unwrap();
            theirs.shutdown_background();
            for body in [middle, unread] {
                let read = body.read_all().await.map(|bytes| bytes.len());
                assert!(matches!(read, Err(Error::Aborted)), "within: {within}, {read:?}");
            }
            serving.wait().await;
            // `serving` is still there, and takes no requests: a successor does.
            if within {
                let closed = client.get(key(1, 5)).await;
                assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
            } else {
                let _successor = spot.serve_tasks();
                let body = client.get(key(2, LARGE)).await.unwrap();
                assert!(body.read_all().await.unwrap() == noise(2, LARGE));
            }
            drop(serving);
        });
    }
}

// ---------------------------------------------------------------- handlers that fail

#[test]
fn a_refusal_brings_its_metadata() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let server = Server::bind(spot.address.as_path()).unwrap();
        let _serving = server
            .serve(|request| async move {
                request.refuse(Refusal::other(77).with(&"tomorrow".to_owned()))
            })
            .unwrap();
        let client = Client::connect(spot.address.as_path()).unwrap();
        for _ in 0..3 {
            match client.get("key").await {
                Err(Error::Refused(why @ Refusal::Other { code: 77, .. })) => {
                    assert_eq!(why.metadata::<String>().unwrap(), "tomorrow");
                }
                other => panic!("{other:?}"),
            }
        }
        until("all segments are back", || back(client.stats()) == 8).await;
    });
}

#[test]
fn handlers_that_fail_are_told_of_and_the_server_goes_on() {
    let _watchdog = watchdog();
    for within in [false, true] {
        on_threads(2, async {
            let (spot, queue) = (Spot::new(), InProcess::bounded(4));
            let server = if within {
                Server::in_process(queue.clone())
            } else {
                Server::bind(spot.address.as_path()).unwrap()
            };
            let told = Arc::<Mutex<Vec<String>>>::default();
            let tells = Arc::clone(&told);
            let server = server.on_error(move |error| {
                tells.lock().unwrap().push(match error {
                    ServeError::Panic { key, message, .. } => {
                        format!("{} panicked: {message}", key.escape_ascii())
                    }
                    ServeError::Handler { key, error, .. } => {
                        format!("{} failed: {error}", key.escape_ascii())
                    }
                    ServeError::Unanswered { key, .. } => {
                        format!("{} unanswered", key.escape_ascii())
                    }
                    other => format!("{other:?}"),
                });
            });
            let _serving = server
                .serve(|request| {
                    assert!(request.key() != b"at once", "this is meant");
                    async move {
                        match request.key() {
                            b"later" => {
                                tokio::task::yield_now().await;
                                panic!("so is this");
                            }
                            b"middle" => {
                                let mut outgoing = request.accept(9u64).unwrap();
                                outgoing.send(b"half").await.unwrap();
                                panic!("and this");
                            }
                            b"error" => return Err(std::io::Error::other("no luck")),
                            b"dropped" => drop(request),
                            _ => request.send_bytes(b"right").await?,
                        }
                        Ok(())
                    }
                })
                .unwrap();
            let client = if within {
                small().in_process_tokio(&queue).unwrap()
            } else {
                small().connect_tokio(spot.address.as_path()).unwrap()
            };
            let read = async |key: &str| client.get(key).await?.read_all().await;
            for key in ["at once", "later", "middle", "error", "dropped"] {
                let failed = read(key).await;
                assert!(matches!(failed, Err(Error::Aborted)), "{key}: {failed:?}");
                assert_eq!(read("else").await.unwrap(), b"right");
            }
            until("all is told", || told.lock().unwrap().len() == 5).await;
            let mut told = told.lock().unwrap().clone();
            told.sort();
            let expected = [
                "at once panicked: this is meant",
                "dropped unanswered",
                "error failed: no luck",
                "later panicked: so is this",
                "middle panicked: and this",
            ];
            assert_eq!(told, expected, "within: {within}");
        });
    }
}

// ---------------------------------------------------------------- loans

/// The loan of a key.
type Find = Arc<dyn Fn(&[u8]) -> Loan + Send + Sync>;

async fn pieces(body: Body) -> Vec<bytes::Bytes> {
    let mut stream = body.into_stream();
    let mut pieces = Vec::new();
    let mut stream = std::pin::Pin::new(&mut stream);
    while let Some(piece) = std::future::poll_fn(|c| stream.as_mut().poll_next(c)).await {
        pieces.push(piece.unwrap());
    }
    pieces
}

async fn loans_arrive(client: &Client, bytes: &[u8]) {
    let get = async |key: &str| client.get(key).await.unwrap();
    let body = get("sealed").await;
    assert!(body.is_lent());
    assert_eq!(client.stats().idle, 8, "a loan needs no segment");
    let first = body.into_bytes().await.unwrap();
    let second = get("sealed").await.into_bytes().await.unwrap();
    assert!(first == bytes && second == bytes);
    assert_eq!(first.as_ptr(), second.as_ptr(), "copied");
    let part = get("part").await.into_bytes().await.unwrap();
    assert!(part == bytes[5..1005]);
    assert_eq!(part.as_ptr(), first[5..].as_ptr(), "copied");
    let streamed = pieces(get("sealed").await).await;
    assert_eq!(streamed.len(), 1);
    assert!(streamed[0] == bytes);
    assert_eq!(streamed[0].as_ptr(), first.as_ptr(), "copied");

    let mut read = Vec::new();
    get("sealed").await.read_to_end(&mut read).await.unwrap();
    assert!(read == bytes);
    let mut body = get("sealed").await;
    let mut head = vec![0; 1000];
    body.read_exact(&mut head).await.unwrap();
    let rest = body.into_bytes().await.unwrap();
    assert!([&head[..], &rest].concat() == bytes);

    let body = get("file").await;
    assert!(body.is_lent());
    assert!(body.into_bytes().await.unwrap() == bytes);
    assert!(get("file").await.read_all().await.unwrap() == bytes);
    assert!(pieces(get("file").await).await.concat() == bytes);
    let mut body = get("file").await;
    body.read_exact(&mut head).await.unwrap();
    assert!([&head[..], &body.read_all().await.unwrap()].concat() == bytes);
    assert!(get("empty").await.into_bytes().await.unwrap().is_empty());
    assert!(pieces(get("empty").await).await.is_empty());
    drop(get("file").await.into_stream());
}

#[test]
fn loans_arrive_without_a_copy_and_outlive_their_server() {
    let _watchdog = watchdog();
    let bytes = noise(9, 1_000_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    let loans = Arc::new([
        ("sealed", Loan::from_bytes(&bytes).unwrap()),
        ("part", Loan::from_bytes(&bytes).unwrap()),
        ("file", Loan::file(File::open(&path).unwrap()).unwrap()),
        ("empty", Loan::from_bytes(b"").unwrap()),
    ]);
    let find = {
        let loans = Arc::clone(&loans);
        move |key: &[u8]| {
            let find = |wanted: &str| loans.iter().find(|(key, _)| *key == wanted).unwrap();
            match key {
                b"part" => find("sealed").1.slice(5..1005).unwrap(),
                key => find(str::from_utf8(key).unwrap()).1.clone(),
            }
        }
    };
    on_threads(2, async {
        let (spot, queue) = (Spot::new(), InProcess::bounded(4));
        let client = small().connect_tokio(spot.address.as_path()).unwrap();
        let in_task = |find: Find| {
            move |request: Incoming| {
                let loan = find(request.key());
                async move { request.lend(&loan).await }
            }
        };
        let find: Find = Arc::new(find);

        let server = Server::bind(spot.address.as_path()).unwrap();
        let serving = server.serve(in_task(Arc::clone(&find))).unwrap();
        loans_arrive(&client, &bytes).await;
        let kept = client.get("sealed").await.unwrap();
        serving.stop();
        serving.wait().await;
        drop(serving);
        assert!(kept.into_bytes().await.unwrap() == bytes);

        let server = shmferry::Server::bind(spot.address.as_path()).unwrap();
        let lend = Arc::clone(&find);
        let _serving = server.serve(2, move |request| {
            let loan = lend(request.key());
            request.lend(&loan)
        });
        loans_arrive(&client, &bytes).await;

        let _within = Server::in_process(queue.clone()).serve(in_task(find)).unwrap();
        loans_arrive(&small().in_process_tokio(&queue).unwrap(), &bytes).await;

        // A client that takes no loans gets the bytes.
        let poor = small().keep_loans(0, 0).connect_tokio(spot.address.as_path()).unwrap();
        for key in ["sealed", "file"] {
            let body = poor.get(key).await.unwrap();
            assert!(!body.is_lent());
            assert!(body.read_all().await.unwrap() == bytes);
        }
    });
}

// ---------------------------------------------------------------- time

/// All waits end by tokio's clock, which goes on by itself whenever nothing is to be done.
#[tokio::test(start_paused = true)]
async fn deadlines_are_by_the_clock_of_tokio() {
    let _watchdog = watchdog();
    let queue = InProcess::bounded(4);
    let ends = Arc::<Mutex<Vec<String>>>::default();
    let told = Arc::clone(&ends);
    let server = Server::in_process(queue.clone()).timeout(Duration::from_secs(700));
    let server = server.on_error(move |error| {
        if let ServeError::Handler { error, .. } = error {
            told.lock().unwrap().push(format!("{:?}", error.downcast_ref::<Error>().unwrap()));
        }
    });
    let serving = server.serve(act_in_task).unwrap();
    let builder = small().segments(3).timeout(Duration::from_secs(500));
    let builder = builder.lease_timeout(Duration::from_secs(90));
    let client = builder.in_process_tokio(&queue).unwrap();
    let seconds = |since: tokio::time::Instant| since.elapsed().as_secs();

    let start = tokio::time::Instant::now();
    let reply = client.get("silent").await;
    assert!(matches!(reply, Err(Error::Timeout(Awaited::Reply))), "{reply:?}");
    assert_eq!(seconds(start), 500);

    let start = tokio::time::Instant::now();
    let mut middle = client.get("middle").await.unwrap();
    let read = middle.read_to_end(&mut Vec::new()).await.map_err(Error::from);
    assert!(matches!(read, Err(Error::Timeout(Awaited::FilledSlot))), "{read:?}");
    assert_eq!(seconds(start), 500);

    let start = tokio::time::Instant::now();
    let unread =
        [client.get(key(1, LARGE)).await.unwrap(), client.get(key(2, LARGE)).await.unwrap()];
    let lease = client.get("more").await;
    assert!(matches!(lease, Err(Error::Timeout(Awaited::Lease))), "{lease:?}");
    assert_eq!(seconds(start), 90);
    until("both have timed out", || ends.lock().unwrap().len() == 2).await;
    assert!((700..702).contains(&seconds(start)), "{}", seconds(start));
    let late = format!("{:?}", Error::Timeout(Awaited::FreeSlot));
    assert_eq!(*ends.lock().unwrap(), [late.clone(), late]);
    for body in unread {
        let rest = body.read_all().await.map(|bytes| bytes.len());
        assert!(matches!(rest, Err(Error::Aborted)), "{rest:?}");
    }
    serving.stop();
}

/// One that reads slowly, but reads, is never given up.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_has_all_the_time_that_it_needs() {
    let _watchdog = watchdog();
    let queue = InProcess::bounded(4);
    let server = Server::in_process(queue.clone()).timeout(Duration::from_secs(20));
    let _serving = serve_tasks(server);
    let client = small().in_process_tokio(&queue).unwrap();
    let mut body = client.get(key(5, LARGE)).await.unwrap();
    let mut read = Vec::new();
    let mut buffer = [0; 1000];
    loop {
        match body.read(&mut buffer).await.unwrap() {
            0 => break,
            len => read.extend_from_slice(&buffer[..len]),
        }
        tokio::time::sleep(Duration::from_secs(15)).await;
    }
    assert!(read == noise(5, LARGE));
}
