//! The example `epoll`: one thread, no runtime, 1,000 clients, of which some are slow and some are
//! killed.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shmferry::tokio::Client;
use shmferry::{Error, Refusal};
use shmferry_tasks::{Spot, on_threads};
use shmferry_test_support::wait_until;
use shmferry_test_support::watchdog::watchdog;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;

const CLIENTS: u64 = 1000;
/// A client has sockets, segments, a ring, and what waits for them.
const DESCRIPTORS: u64 = 10 * CLIENTS;
/// Of those, this many are slow.
const SLOW: u64 = 50;
/// In each process that is killed.
const KILLED: usize = 20;

const ADDRESS: &str = "SHMFERRY_EPOLL_ADDRESS";

/// The example, which this builds if nothing has yet.
fn example() -> PathBuf {
    let test = env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let example = profile.join("examples/epoll");
    if !example.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "shmferry", "--example", "epoll"]);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        build.arg("--target-dir").arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the example is not built");
    }
    example
}

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client(address: &Path) -> Client {
    let builder = shmferry::Client::builder().segments(1).segment_len(16 << 10).slots(4);
    builder.connect_tokio(address).unwrap()
}

fn expected(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

#[test]
fn a_process() {
    // Without an address this is the test run itself, in which there is nothing to ask.
    let Ok(address) = env::var(ADDRESS) else { return };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]); // its end
        std::process::exit(1);
    });
    on_threads(1, async {
        let mut held = Vec::new();
        for _ in 0..KILLED {
            let client = client(address.as_ref());
            let mut body = client.get("1000000").await.unwrap();
            assert_eq!(body.read_u8().await.unwrap(), 0);
            held.push(body);
        }
        println!("held");
        std::future::pending::<()>().await;
    });
}

/// A process that has answers under way, and does not read them.
fn holder(address: &Path) -> Process {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_process", "--nocapture"])
        .env(ADDRESS, address)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.trim_end().ends_with("held") {
        line.clear();
        assert!(says.read_line(&mut line).unwrap() > 0, "it ended, and held nothing");
    }
    Process(child)
}

/// The names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap());
    let mut names: Vec<_> = names.map(|name| name.trim_end().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_thousand_clients_are_served_by_one_thread() {
    let _watchdog = watchdog();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    if maximum.is_some_and(|maximum| maximum < DESCRIPTORS) {
        println!("skipped: the limit of descriptors (ulimit -Hn) is too low for {CLIENTS} clients");
        return;
    }
    let spot = Spot::new();
    let mut server = Command::new(example());
    let server = server.arg(format!("unix:{}", spot.address.display())).spawn().unwrap();
    let server = Process(server);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", server.0.id())).unwrap().count();
    on_threads(1, async {
        let first = client(&spot.address);
        assert!(first.get("0").await.unwrap().read_all().await.unwrap().is_empty());
        let invalid = first.get("no number").await;
        assert!(matches!(invalid, Err(Error::Refused(Refusal::Invalid))), "{invalid:?}");
        let before = descriptors();

        let mut all = JoinSet::new();
        for number in 0..CLIENTS {
            let client = client(&spot.address);
            all.spawn(async move {
                for round in 0..3 {
                    let len = (number * 97 + round * 20_011) as usize;
                    let mut body = client.get(len.to_string()).await.unwrap();
                    if number < SLOW {
                        let mut head = vec![0; len.min(3000)];
                        body.read_exact(&mut head).await.unwrap();
                        tokio::time::sleep(Duration::from_millis(20)).await; // being slow
                        let rest = body.read_all().await.unwrap();
                        assert!([head, rest].concat() == expected(len), "{len}, slowly");
                    } else {
                        assert!(body.read_all().await.unwrap() == expected(len), "{len}");
                    }
                }
                client
            });
        }
        // Meanwhile others die.
        let address = spot.address.clone();
        let killing = tokio::task::spawn_blocking(move || {
            for _ in 0..3 {
                drop(holder(&address));
            }
        });
        let mut clients = Vec::new();
        while let Some(client) = all.join_next().await {
            clients.push(client.unwrap());
        }
        killing.await.unwrap();
        assert_eq!(clients.len() as u64, CLIENTS);
        assert_eq!(threads(server.0.id()), ["epoll", "shmferry-watch"]);
        // All are still connected, and nothing is left of those that were killed.
        wait_until("the server has let go of the dead", || {
            descriptors() == before + CLIENTS as usize
        });
        drop(clients);
        wait_until("the server has let go of all", || descriptors() == before);
        let last = first.get("100000").await.unwrap().read_all().await.unwrap();
        assert!(last == expected(100_000));
    });
}
