//! The system calls of a fetch of 1 KiB, of the server and of the client, counted by strace while both keep awake.
//!
//! `cargo bench --bench calls`; with `-- --write DIRECTORY`, `calls.md` is written there. strace stops a process at
//! what it counts, so `pread64`, one a fetch, is left out: the rest is counted at full speed. What starting and
//! ending take is taken off: it is in a run of few fetches as well as in one of many.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use shmferry::Deadline;
use shmferry::channel::{RequestQueue, Requester, Seqpacket};
use shmferry::protocol::Reply;
use shmferry::segment::{Memfd, SegmentPool};

const FEW: u64 = 2_000;
const MANY: u64 = 102_000;
const LEN: u64 = 1 << 10;

fn main() -> io::Result<()> {
    let place = env::current_dir()?;
    match env::var("SHMFERRY_BENCH_ROLE").as_deref() {
        Ok("server") => return serve(&place),
        Ok(fetches) => return ask(&place, fetches.parse().expect("a number of fetches")),
        Err(_) => {}
    }
    if Command::new("strace").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: strace is not installed");
        return Ok(());
    }
    let (few, many) = (count(FEW)?, count(MANY)?);
    let mut text = format!(
        "# System calls\n\n\
        For users who compare speeds.\n\n\
        Written by `cargo bench --bench calls -- --write docs`, from one run: calls a thousand fetches of 1 KiB, over {}\n\
        fetches, one at a time, over the socket. `pread64`, one a fetch in the server, is not among them.\n\n\
        Where nobody has to sleep there are next to none: the request goes through the ring, and both sides find what\n\
        they wait for while they spin. `epoll_pwait` is a worker's look at the connections, due once a millisecond\n\
        however busy the rings are; strace stops it there, for longer than a client waits before it asks whether the\n\
        server still stands, by `ppoll`. The rest comes of turns that another process took: `futex` is a client's\n\
        sleep or the wake-up for it, `sendmsg` and `recvmsg` the wake-up for a worker.\n",
        MANY - FEW
    );
    for (side, few, many) in [("server", &few[0], &many[0]), ("client", &few[1], &many[1])] {
        let _ = write!(text, "\n| {side} | calls a thousand fetches |\n| --- | --- |\n");
        let mut total = 0.0;
        for (name, calls) in many {
            let extra = calls.saturating_sub(*few.get(name).unwrap_or(&0));
            let rate = extra as f64 * 1e3 / (MANY - FEW) as f64;
            total += rate;
            if rate >= 0.01 {
                let _ = writeln!(text, "| `{name}` | {rate:.2} |");
            }
        }
        let _ = writeln!(text, "| all | {total:.2} |");
    }
    print!("{text}");
    let mut arguments = env::args().skip_while(|argument| argument != "--write");
    if let Some(directory) = arguments.nth(1) {
        fs::write(Path::new(&directory).join("calls.md"), text)?;
    }
    Ok(())
}

/// The calls of a server and of a client, by name, for so many fetches.
fn count(fetches: u64) -> io::Result<[BTreeMap<String, u64>; 2]> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("file"), vec![7; LEN as usize])?;
    let mut server = traced("server", dir.path())?;
    server.stdout.take().expect("piped").read_exact(&mut [0])?;
    let client = traced(&fetches.to_string(), dir.path())?.wait()?;
    drop(server.stdin.take());
    let server = server.wait()?;
    assert!(client.success() && server.success(), "client: {client}, server: {server}");
    Ok([
        calls(&dir.path().join("server.calls"))?,
        calls(&dir.path().join(format!("{fetches}.calls")))?,
    ])
}

/// This program in another role, under strace.
fn traced(role: &str, place: &Path) -> io::Result<Child> {
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "--seccomp-bpf",
        "-q",
        "-c",
        "-U",
        "calls,name",
        "-e",
        "trace=!pread64",
        "-o",
    ]);
    strace.arg(place.join(format!("{role}.calls"))).arg(env::current_exe()?);
    strace.env("SHMFERRY_BENCH_ROLE", role).current_dir(place);
    strace.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
}

/// What strace has counted.
fn calls(path: &Path) -> io::Result<BTreeMap<String, u64>> {
    let table = fs::read_to_string(path)?;
    let line = |line: &str| {
        let (calls, name) = line.trim().split_once(' ')?;
        Some((name.trim().to_owned(), calls.parse().ok()?))
    };
    // Beside the sum, strace may name what it let go of: `???( <detached ...>`.
    let is_call = |name: &str| name != "total" && !name.contains('?');
    Ok(table.lines().filter_map(line).filter(|(name, _)| is_call(name)).collect())
}

fn serve(place: &Path) -> io::Result<()> {
    let queue = Seqpacket::new(place.join("queue")).bind()?;
    let file = File::open(place.join("file"))?;
    io::stdout().write_all(b"!")?;
    io::stdout().flush()?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            queue.close();
        });
        while let Ok(transfer) = queue.recv(Deadline::NEVER) {
            transfer
                .accept(LEN)
                .and_then(|sending| sending.send_file(&file))
                .expect("a client that waits");
        }
    });
    Ok(())
}

fn ask(place: &Path, fetches: u64) -> io::Result<()> {
    let pool = SegmentPool::<Memfd>::builder().segments(1).create()?;
    let requester = Seqpacket::new(place.join("queue")).requester(&pool)?;
    for _ in 0..fetches {
        let (request, transfer) = pool.lease(Deadline::NEVER)?.request("file")?;
        requester.send(request, Deadline::NEVER).map_err(shmferry::Error::from)?;
        let Reply::Found(mut body) = transfer.reply(Deadline::NEVER)? else { panic!("refused") };
        let len = body.next_chunk(Deadline::NEVER)?.expect("one chunk").len();
        assert_eq!(len as u64, LEN);
    }
    Ok(())
}
