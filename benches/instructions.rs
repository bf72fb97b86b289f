//! Instructions that each step of a transfer takes in user space: figures that a busy machine cannot blur.
//!
//! `cargo bench --bench instructions`; with `-- --check`, it fails where a step takes more than its limit. Both
//! sides are one thread of one process, so that nobody ever waits. Counted by callgrind; left out, and said
//! so, where there is no valgrind.

use std::env;
use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::process::{Command, ExitCode, Stdio};

use shmferry::Deadline;
use shmferry::channel::{InProcess, Request, RequestQueue, Requester, Seqpacket};
use shmferry::protocol::{
    Chunk, Offered, Receiver, Receiving, Reply, Sender, Sending, ShmTransfer, Starting,
};
use shmferry::segment::{Lease, Memfd, SegmentPool};

/// How often each step is taken, with a ring and within a process each.
const TIMES: u64 = 500;

/// The function of a step below, and the most instructions that it may take: about a quarter more than it
/// took when the limit was set.
const LIMITS: [(&str, u64); 11] = [
    ("lease", 200),
    ("request", 500),
    ("send_within_the_process", 1600),
    ("receive_within_the_process", 750),
    ("post_to_the_ring", 1800),
    ("take_from_the_ring", 1300),
    ("accept", 400),
    ("wait_for_a_slot_fill_it_and_post", 800),
    ("reply", 260),
    ("next_chunk", 140),
    ("end", 920),
];

fn main() -> ExitCode {
    if env::var_os("SHMFERRY_BENCH_ROLE").is_some() {
        transfers();
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("left out: there is no valgrind");
        return ExitCode::SUCCESS;
    }
    match count() {
        Ok(within) if within || !env::args().any(|argument| argument == "--check") => {
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what each step takes; whether all keep to their limits.
fn count() -> Result<bool, Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let counts = dir.path().join("counts");
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", "--toggle-collect=instructions::counted"])
        .arg(format!("--callgrind-out-file={}", counts.display()))
        .arg(env::current_exe()?)
        .env("SHMFERRY_BENCH_ROLE", "transfers")
        .status()?;
    if !run.success() {
        return Err(format!("valgrind: {run}").into());
    }
    let told = Command::new("callgrind_annotate")
        .args(["--inclusive=yes", "--threshold=100", "--show-percs=no", "--auto=no"])
        .arg(&counts)
        .stderr(Stdio::inherit())
        .output()?;
    let told = String::from_utf8(told.stdout)?;

    let mut within = true;
    println!("| step | instructions | limit |\n| --- | ---: | ---: |");
    for (step, limit) in LIMITS {
        let function = format!(":instructions::steps::{step} ");
        let line = told.lines().find(|line| line.contains(&function));
        let line = line.ok_or_else(|| format!("callgrind saw no {step}"))?;
        let sum: u64 =
            line.trim().split(' ').next().unwrap_or_default().replace(',', "").parse()?;
        let only_once = ["process", "ring"].iter().any(|word| step.ends_with(word));
        let taken = sum / if only_once { TIMES } else { 2 * TIMES };
        within &= taken <= limit;
        let verdict = if taken <= limit { "" } else { " exceeded" };
        println!("| {} | {taken} | {limit}{verdict} |", step.replace('_', " "));
    }
    Ok(within)
}

/// What callgrind watches: files of 1 KiB, asked for and sent by one thread.
fn transfers() {
    let dir = tempfile::tempdir().expect("a place for the socket");
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 1024]).expect("a file");
    let file = File::open(&path).expect("the file");
    let pool = || SegmentPool::<Memfd>::builder().segments(2).create().expect("two segments");

    let (pool_within, within) = (pool(), InProcess::bounded(1));
    let (pool_of_ring, address) = (pool(), Seqpacket::new(dir.path().join("queue")));
    let queue = address.clone().bind().expect("a server");
    let requester = address.requester(&pool_of_ring).expect("a client");
    let both = || {
        let (request, transfer) = steps::request(steps::lease(&pool_within));
        steps::send_within_the_process(&within, request);
        answer(steps::receive_within_the_process(&within), transfer, &file);

        let (request, transfer) = steps::request(steps::lease(&pool_of_ring));
        steps::post_to_the_ring(&requester, request);
        answer(steps::take_from_the_ring(&queue), transfer, &file);
    };
    // Connected, mapped, and at the right place in the ring.
    (0..100).for_each(|_| both());
    counted(&both);
}

#[inline(never)]
fn counted(both: &dyn Fn()) {
    (0..TIMES).for_each(|_| both());
}

fn answer(
    asked: ShmTransfer<Sender, Starting>,
    transfer: ShmTransfer<Receiver, Offered>,
    file: &File,
) {
    let mut sending = steps::accept(asked);
    steps::wait_for_a_slot_fill_it_and_post(&mut sending, file);
    let mut body = steps::reply(transfer);
    drop(black_box(steps::next_chunk(&mut body)));
    steps::end(body, sending);
}

mod steps {
    use super::*;

    const DEADLINE: Deadline = Deadline::NEVER;

    #[inline(never)]
    pub fn lease(pool: &SegmentPool<Memfd>) -> Lease<Memfd> {
        pool.lease(DEADLINE).expect("an idle segment")
    }

    #[inline(never)]
    pub fn request(lease: Lease<Memfd>) -> (Request<Memfd>, ShmTransfer<Receiver, Offered>) {
        lease.request("/a.jpg").expect("a short key")
    }

    #[inline(never)]
    pub fn send_within_the_process(queue: &InProcess, request: Request<Memfd>) {
        queue.send(request, DEADLINE).expect("room");
    }

    #[inline(never)]
    pub fn receive_within_the_process(queue: &InProcess) -> ShmTransfer<Sender, Starting> {
        queue.recv(DEADLINE).expect("a request")
    }

    #[inline(never)]
    pub fn post_to_the_ring(requester: &impl Requester<Memfd>, request: Request<Memfd>) {
        requester.send(request, DEADLINE).expect("a server");
    }

    #[inline(never)]
    pub fn take_from_the_ring(queue: &impl RequestQueue) -> ShmTransfer<Sender, Starting> {
        queue.recv(DEADLINE).expect("a request")
    }

    #[inline(never)]
    pub fn accept(asked: ShmTransfer<Sender, Starting>) -> ShmTransfer<Sender, Sending> {
        asked.accept(1024).expect("a request that stands")
    }

    #[inline(never)]
    pub fn wait_for_a_slot_fill_it_and_post(
        sending: &mut ShmTransfer<Sender, Sending>,
        file: &File,
    ) {
        sending.next_slot(DEADLINE).expect("a free slot").send_from(file, 0).expect("a file");
    }

    #[inline(never)]
    pub fn reply(transfer: ShmTransfer<Receiver, Offered>) -> ShmTransfer<Receiver, Receiving> {
        match transfer.reply(DEADLINE).expect("a reply") {
            Reply::Found(body) => body,
            other => panic!("{other:?}"),
        }
    }

    #[inline(never)]
    pub fn next_chunk(body: &mut ShmTransfer<Receiver, Receiving>) -> Chunk<'_> {
        body.next_chunk(DEADLINE).expect("no failure").expect("a chunk")
    }

    /// Both sides let go, and the segment goes back to its pool.
    #[inline(never)]
    pub fn end(body: ShmTransfer<Receiver, Receiving>, sending: ShmTransfer<Sender, Sending>) {
        drop((body, sending));
    }
}
