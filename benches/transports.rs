//! The two transports between processes side by side, in one run: round trips, throughput, and how soon
//! a killed peer is noticed. `cargo bench --bench transports`
//!
//! The other process is this program, run again with a role in its environment. Rounds are interleaved,
//! so that whatever else the machine does meets both.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use shmferry::channel::{InProcess, Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::protocol::{Receiver, Receiving, Reply, ShmTransfer};
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::{Deadline, Size};

/// Round trips of 1 KiB that are measured in each round, and those before them that are not.
const TRIPS: usize = 4000;
const WARM_UP: usize = 500;
const ROUNDS: usize = 5;
const KILLS: usize = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Seqpacket,
    PosixMq,
    InProcess,
}

fn main() {
    if let Ok(role) = env::var("SHMFERRY_BENCH_ROLE") {
        let address = env::var("SHMFERRY_BENCH_ADDRESS").expect("set with the role");
        return match role.as_str() {
            "serve" => {
                let queue = bind(&address);
                say("ready");
                serve(&*queue)
            }
            "halt" => take_and_halt(&*bind(&address)),
            _ => ask_and_halt(&address),
        };
    }
    println!(
        "1 KiB round trips (us), {ROUNDS} rounds of {TRIPS}, interleaved; throughput one transfer at a time"
    );
    println!("transport    p50    p99    1 MiB (MiB/s)  64 MiB (MiB/s)");
    let mut trips = [const { Vec::new() }; 3];
    let mut speeds = [const { (Vec::new(), Vec::new()) }; 3];
    for _ in 0..ROUNDS {
        for (i, transport) in
            [Transport::Seqpacket, Transport::PosixMq, Transport::InProcess].into_iter().enumerate()
        {
            let (mut times, small, large) = measure(transport);
            trips[i].append(&mut times);
            speeds[i].0.push(small);
            speeds[i].1.push(large);
        }
    }
    for (i, name) in ["seqpacket", "posix_mq", "in process"].into_iter().enumerate() {
        let times = &mut trips[i];
        times.sort_unstable();
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        println!(
            "{name:<11} {:>5.1} {:>6.1} {:>14.0} {:>15.0}",
            micros(times[times.len() / 2]),
            micros(times[times.len() * 99 / 100]),
            median(&mut speeds[i].0),
            median(&mut speeds[i].1),
        );
    }

    println!("\nfrom kill -9 to the error at the other side (us), {KILLS} times each, interleaved");
    println!("transport    killed    median    worst");
    let mut found = [const { Vec::new() }; 4];
    for _ in 0..KILLS {
        for (i, transport) in [Transport::Seqpacket, Transport::PosixMq].into_iter().enumerate() {
            found[2 * i].push(kill_the_sender(transport));
            found[2 * i + 1].push(kill_the_receiver(transport));
        }
    }
    drop(pool::<Named>()); // sweeps what the last of those killed has left
    for (i, times) in found.iter_mut().enumerate() {
        times.sort_unstable();
        let (name, who) = (["seqpacket", "posix_mq"][i / 2], ["sender", "receiver"][i % 2]);
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        println!(
            "{name:<11} {who:>8} {:>8.0} {:>8.0}",
            micros(times[KILLS / 2]),
            micros(times[KILLS - 1])
        );
    }
}

/// Round trips of 1 KiB, and MiB a second at 1 MiB and at 64 MiB.
fn measure(transport: Transport) -> (Vec<Duration>, f64, f64) {
    match transport {
        Transport::InProcess => {
            let queue = InProcess::bounded(8);
            let pool = pool::<Memfd>();
            let server = thread::spawn({
                let queue = queue.clone();
                move || serve(&queue)
            });
            let measured = drive(&pool, &queue);
            queue.close();
            server.join().expect("the server's own panic has been told");
            measured
        }
        Transport::Seqpacket => {
            let (address, _dir) = address(transport);
            let _other = Other::start("serve", &address);
            let pool = pool::<Memfd>();
            let requester = Seqpacket::new(&address["unix:".len()..]).connect(&pool, soon());
            drive(&pool, &requester.expect("a server"))
        }
        Transport::PosixMq => {
            let (address, _dir) = address(transport);
            let _other = Other::start("serve", &address);
            let pool = pool::<Named>();
            let requester =
                PosixMq::new(&address["mq:".len()..]).expect("a name").connect(&pool, soon());
            drive(&pool, &requester.expect("a server"))
        }
    }
}

fn drive<B: Backing>(
    pool: &SegmentPool<B>,
    requester: &dyn Requester<B>,
) -> (Vec<Duration>, f64, f64) {
    let mut buffer = vec![0; 128 << 10];
    let mut fetch = |len: usize| {
        let start = Instant::now();
        let mut body = ask(pool, requester, len);
        let mut seen = 0;
        while let Some(mut chunk) = body.next_chunk(soon()).expect("a living server") {
            seen += chunk.copy_to(&mut buffer);
        }
        assert_eq!(seen, len);
        start.elapsed()
    };
    for _ in 0..WARM_UP {
        fetch(1024);
    }
    let trips = (0..TRIPS).map(|_| fetch(1024)).collect();
    let mut speed = |mib: usize, times: usize| {
        let mut speeds: Vec<f64> =
            (0..times).map(|_| mib as f64 / fetch(mib << 20).as_secs_f64()).collect();
        median(&mut speeds)
    };
    let (small, large) = (speed(1, 100), speed(64, 5));
    (trips, small, large)
}

fn kill_the_sender(transport: Transport) -> Duration {
    let (address, _dir) = address(transport);
    let other = Other::start("halt", &address);
    let wait = match transport {
        Transport::Seqpacket => {
            let pool = pool::<Memfd>();
            let requester =
                Seqpacket::new(&address["unix:".len()..]).connect(&pool, soon()).expect("a server");
            let (request, transfer) =
                pool.lease(soon()).expect("a segment").request("0").expect("a short key");
            requester.send(request, soon()).expect("a server");
            thread::spawn(move || {
                (transfer.reply(Deadline::NEVER).map(drop), Instant::now(), drop(requester))
            })
        }
        _ => {
            let pool = pool::<Named>();
            let requester = PosixMq::new(&address["mq:".len()..]).expect("a name");
            let requester = requester.connect(&pool, soon()).expect("a server");
            let (request, transfer) =
                pool.lease(soon()).expect("a segment").request("0").expect("a short key");
            requester.send(request, soon()).expect("a server");
            thread::spawn(move || {
                (transfer.reply(Deadline::NEVER).map(drop), Instant::now(), drop(requester))
            })
        }
    };
    let killed = other.kill_once_it_says("taken");
    let (reply, noticed, ()) = wait.join().expect("no panic");
    assert!(matches!(reply, Err(shmferry::Error::Disconnected)), "{reply:?}");
    noticed - killed
}

fn kill_the_receiver(transport: Transport) -> Duration {
    let (address, _dir) = address(transport);
    let queue = bind(&address);
    let other = Other::start("ask", &address);
    let mut sending =
        queue.recv(soon()).expect("a request").accept(Size::Unknown).expect("still wanted");
    let wait = thread::spawn(move || {
        let error = loop {
            let sent = sending.next_slot(Deadline::NEVER).and_then(|slot| slot.send(b"x"));
            if let Err(error) = sent {
                break error;
            }
        };
        (error, Instant::now())
    });
    let killed = other.kill_once_it_says("holding");
    let (error, noticed) = wait.join().expect("no panic");
    assert!(matches!(error, shmferry::Error::Disconnected), "{error}");
    noticed - killed
}

// ---------------------------------------------------------------- roles of the other process

fn serve(queue: &dyn RequestQueue) {
    let bytes = vec![7; 128 << 10];
    while let Ok(transfer) = queue.recv(Deadline::NEVER) {
        let len: usize =
            str::from_utf8(transfer.key()).expect("a number").parse().expect("a number");
        let Ok(mut sending) = transfer.accept(len as u64) else { continue };
        let mut left = len;
        while left > 0 {
            let Ok(slot) = sending.next_slot(soon()) else { break };
            let part = left.min(slot.capacity());
            if slot.send(&bytes[..part]).is_err() {
                break;
            }
            left -= part;
        }
    }
}

fn take_and_halt(queue: &dyn RequestQueue) {
    say("ready");
    let _taken = queue.recv(Deadline::NEVER).expect("a request");
    say("taken");
    linger()
}

fn ask_and_halt(address: &str) {
    let hold = |mut body: ShmTransfer<Receiver, Receiving>| {
        let _chunk = body.next_chunk(soon()).expect("a living server");
        say("holding");
        linger()
    };
    match address.split_once(':') {
        Some(("unix", path)) => {
            let pool = pool::<Memfd>();
            hold(ask(&pool, &Seqpacket::new(path).requester(&pool).expect("a short path"), 1))
        }
        Some((_, name)) => {
            let pool = pool::<Named>();
            hold(ask(&pool, &PosixMq::new(name).expect("a name").requester(&pool), 1))
        }
        None => unreachable!("made by `address`"),
    }
}

// ---------------------------------------------------------------- small things

fn ask<B: Backing>(
    pool: &SegmentPool<B>,
    requester: &dyn Requester<B>,
    len: usize,
) -> ShmTransfer<Receiver, Receiving> {
    let lease = pool.lease(soon()).expect("a segment");
    let (request, transfer) = lease.request(len.to_string()).expect("a short key");
    requester.send(request, soon()).expect("a server");
    match transfer.reply(soon()).expect("a living server") {
        Reply::Found(body) => body,
        other => panic!("{other:?}"),
    }
}

fn pool<B: Backing>() -> SegmentPool<B> {
    SegmentPool::builder().segments(2).segment_len(512 << 10).slots(4).create().expect("memory")
}

fn address(transport: Transport) -> (String, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let name = match transport {
        Transport::PosixMq => format!("mq:/shmferry-bench-{}", std::process::id()),
        _ => format!("unix:{}", dir.path().join("queue.sock").display()),
    };
    (name, dir)
}

fn bind(address: &str) -> Box<dyn RequestQueue> {
    match address.split_once(':') {
        Some(("mq", name)) => {
            Box::new(PosixMq::new(name).expect("a name").bind().expect("a free name"))
        }
        Some((_, path)) => Box::new(Seqpacket::new(path).bind().expect("a free path")),
        None => unreachable!("made by `address`"),
    }
}

fn median(of: &mut [f64]) -> f64 {
    of.sort_unstable_by(f64::total_cmp);
    of[of.len() / 2]
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn say(what: &str) {
    println!("{what}");
    std::io::stdout().flush().expect("a parent that listens");
}

/// Waits to be killed, or for the parent to end.
fn linger() -> ! {
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0)
}

/// The other process; killed at the latest when dropped.
struct Other(Child, BufReader<ChildStdout>);

impl Other {
    /// Starts it, and waits until it is ready, if it says so.
    fn start(role: &str, address: &str) -> Other {
        let mut command = Command::new(env::current_exe().expect("our own path"));
        command.env("SHMFERRY_BENCH_ROLE", role).env("SHMFERRY_BENCH_ADDRESS", address);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let says = BufReader::new(child.stdout.take().expect("piped"));
        let mut other = Other(child, says);
        if role != "ask" {
            other.wait_for("ready");
        }
        other
    }

    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim() != word {
            line.clear();
            assert_ne!(self.1.read_line(&mut line).expect("a pipe"), 0, "it never said {word}");
        }
    }

    fn kill_once_it_says(mut self, word: &str) -> Instant {
        self.wait_for(word);
        thread::sleep(Duration::from_millis(2)); // not a wait for a state: has both sides asleep
        let killed = Instant::now();
        self.0.kill().expect("a child of ours");
        killed
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
