//! The control path alone: what it takes to ask another process something and hear a refusal, beside the bare
//! means of the system.
//!
//! `cargo bench --bench control`; with `-- --write DIRECTORY`, `control.md` is written there. Methods are
//! interleaved, round by round.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::mqueue::{MQ_OFlag, MqAttr, MqdT, mq_open, mq_receive, mq_send, mq_unlink};
use nix::sys::stat::Mode;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::thread::futex;
use shmferry::channel::{InProcess, Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::{Deadline, Refusal};

const ROUNDS: usize = 7;
const TRIPS: usize = 3000;
const WARM_UP: usize = 300;

/// One trip there and back.
type Trip = Box<dyn FnMut() -> io::Result<()>>;

struct Method {
    name: &'static str,
    /// What runs in the other process, until its standard input ends.
    serve: fn(&Path) -> io::Result<()>,
    connect: fn(&Path) -> io::Result<Trip>,
}

const METHODS: [Method; 7] = [
    Method { name: "bare futex, both sleep", serve: serve_words::<true>, connect: words::<true> },
    Method { name: "bare words, both spin", serve: serve_words::<false>, connect: words::<false> },
    Method { name: "bare seqpacket socket", serve: serve_seqpacket, connect: seqpacket },
    Method { name: "bare POSIX queues", serve: serve_queues, connect: queues },
    Method {
        name: "shmferry, socket and ring",
        serve: |place| refuse(&Seqpacket::new(place.join("queue")).bind()?),
        connect: |place| {
            let pool = pool::<Memfd>()?;
            let requester = Seqpacket::new(place.join("queue")).requester(&pool)?;
            Ok(ask(pool, requester))
        },
    },
    Method {
        name: "shmferry, message queue",
        serve: |place| refuse(&PosixMq::new(queue_name(place))?.bind()?),
        connect: |place| {
            let pool = pool::<Named>()?;
            let requester = PosixMq::new(queue_name(place))?.requester(&pool);
            Ok(ask(pool, requester))
        },
    },
    Method {
        name: "shmferry, in process",
        serve: |_| ready(),
        connect: |_| {
            let queue = InProcess::bounded(1);
            let taking = queue.clone();
            thread::spawn(move || answer(&taking));
            Ok(ask(pool::<Memfd>()?, queue))
        },
    },
];

fn main() -> io::Result<()> {
    if let Ok(name) = env::var("SHMFERRY_BENCH_ROLE") {
        let method =
            METHODS.into_iter().find(|method| method.name == name).expect("a method's name");
        return (method.serve)(&env::current_dir()?);
    }
    let dir = tempfile::tempdir()?;
    let mut contenders = Vec::new();
    for method in METHODS {
        let place = dir.path().join(method.name.replace([' ', ','], "-"));
        fs::create_dir(&place)?;
        let server = start(method.name, &place)?;
        contenders.push((method.name, (method.connect)(&place)?, server, Vec::new()));
    }
    for _ in 0..ROUNDS {
        for (_, trip, _, times) in &mut contenders {
            for n in 0..WARM_UP + TRIPS {
                let start = Instant::now();
                trip()?;
                if n >= WARM_UP {
                    times.push(start.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
    }
    let mut text = format!(
        "# The control path\n\nFor users who compare speeds.\n\n\
         Written by `cargo bench --bench control -- --write docs`, from one run: one trip to \
         another\nprocess and back (in process: another thread), in µs, {ROUNDS} rounds of {TRIPS}, interleaved. With \
         shmferry, a segment\nis leased, asked for, refused, and given back; the bare means carry 16 bytes each \
         way.\n\n| method | p10 | p50 | p99 |\n| --- | --- | --- | --- |\n"
    );
    for (name, trip, mut server, mut times) in contenders {
        times.sort_unstable_by(f64::total_cmp);
        let at = |part: usize| times[times.len() * part / 100];
        let _ = writeln!(text, "| {name} | {:.2} | {:.2} | {:.1} |", at(10), at(50), at(99));
        drop((trip, server.stdin.take()));
        server.wait()?;
    }
    print!("{text}");
    let mut arguments = env::args().skip_while(|argument| argument != "--write");
    if let Some(directory) = arguments.nth(1) {
        fs::write(Path::new(&directory).join("control.md"), text)?;
    }
    Ok(())
}

fn start(name: &str, place: &Path) -> io::Result<Child> {
    let mut command = Command::new(env::current_exe()?);
    command.env("SHMFERRY_BENCH_ROLE", name).current_dir(place);
    let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    server.stdout.take().expect("piped").read_exact(&mut [0])?;
    Ok(server)
}

fn until_told() {
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}

/// For servers that hold nothing which has to be cleared up.
fn end_when_told() {
    thread::spawn(|| {
        until_told();
        std::process::exit(0)
    });
}

fn ready() -> io::Result<()> {
    io::stdout().write_all(b"!")?;
    io::stdout().flush()
}

// ---------------------------------------------------------------- ours

fn pool<B: Backing>() -> io::Result<SegmentPool<B>> {
    Ok(SegmentPool::builder().segments(1).create()?)
}

fn ask<B: Backing>(pool: SegmentPool<B>, requester: impl Requester<B> + 'static) -> Trip {
    Box::new(move || {
        let (request, transfer) = pool.lease(Deadline::NEVER)?.request("sixteen bytes, .")?;
        requester.send(request, Deadline::NEVER).map_err(shmferry::Error::from)?;
        match transfer.reply(Deadline::NEVER)? {
            Reply::Refused(_) => Ok(()),
            other => panic!("{other:?}"),
        }
    })
}

fn refuse(queue: &dyn RequestQueue) -> io::Result<()> {
    ready()?;
    thread::scope(|scope| {
        scope.spawn(|| {
            until_told();
            queue.close();
        });
        answer(queue);
    });
    Ok(())
}

fn answer(queue: &dyn RequestQueue) {
    while let Ok(transfer) = queue.recv(Deadline::NEVER) {
        // A client that left early is no failure of ours.
        let _ = transfer.refuse(Refusal::NotFound);
    }
}

/// A name that both sides know: of the server's directory, which is new.
fn queue_name(place: &Path) -> String {
    let parent = place.parent().and_then(Path::file_name).expect("made beneath a new directory");
    format!("/shmferry-bench-{}", parent.to_string_lossy().trim_start_matches('.'))
}

// ---------------------------------------------------------------- two words

/// Turns: the client's and the server's.
fn map_words(place: &Path) -> io::Result<[&'static AtomicU32; 2]> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(place.join("words"))?;
    file.set_len(4096)?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: fresh addresses, never unmapped, and nobody shortens the file.
    let base = unsafe { mmap(ptr::null_mut(), 4096, prot, MapFlags::SHARED, file.as_fd(), 0)? };
    // SAFETY: within the mapping, aligned, atomics only.
    Ok([0, 128].map(|at| unsafe { AtomicU32::from_ptr(base.cast::<u8>().add(at).cast()) }))
}

fn await_change<const SLEEPS: bool>(word: &AtomicU32, from: u32) {
    while word.load(SeqCst) == from {
        if SLEEPS {
            let _ = futex::wait(word, futex::Flags::empty(), from, None);
        } else {
            std::hint::spin_loop();
        }
    }
}

fn change<const SLEEPS: bool>(word: &AtomicU32) {
    word.fetch_add(1, SeqCst);
    if SLEEPS {
        let _ = futex::wake(word, futex::Flags::empty(), 1);
    }
}

fn serve_words<const SLEEPS: bool>(place: &Path) -> io::Result<()> {
    let [asked, answered] = map_words(place)?;
    end_when_told();
    ready()?;
    for turn in 0.. {
        // Nobody asks for a while, while others are measured: do not spin then.
        let begin = Instant::now();
        while !SLEEPS && asked.load(SeqCst) == turn && begin.elapsed() > Duration::from_millis(5) {
            thread::sleep(Duration::from_millis(1));
        }
        await_change::<SLEEPS>(asked, turn);
        change::<SLEEPS>(answered);
    }
    Ok(())
}

fn words<const SLEEPS: bool>(place: &Path) -> io::Result<Trip> {
    let [asked, answered] = map_words(place)?;
    let mut turn = 0;
    Ok(Box::new(move || {
        change::<SLEEPS>(asked);
        await_change::<SLEEPS>(answered, turn);
        turn += 1;
        Ok(())
    }))
}

// ---------------------------------------------------------------- messages

fn socket() -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?)
}

fn serve_seqpacket(place: &Path) -> io::Result<()> {
    let listener = socket()?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(place.join("socket"))?)?;
    rustix::net::listen(&listener, 1)?;
    ready()?;
    let connection = rustix::net::accept(&listener)?;
    let mut message = [0; 16];
    while rustix::net::recv(&connection, &mut message, RecvFlags::empty())?.1 > 0 {
        rustix::net::send(&connection, &message, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

fn seqpacket(place: &Path) -> io::Result<Trip> {
    let connection = socket()?;
    rustix::net::connect(&connection, &SocketAddrUnix::new(place.join("socket"))?)?;
    Ok(Box::new(move || {
        let mut message = [0; 16];
        rustix::net::send(&connection, &message, SendFlags::NOSIGNAL)?;
        rustix::net::recv(&connection, &mut message, RecvFlags::empty())?;
        Ok(())
    }))
}

/// Two queues, there and back, whose names are gone as soon as both sides have them open.
fn open_queues(place: &Path) -> io::Result<[MqdT; 2]> {
    let attributes = MqAttr::new(0, 4, 16, 0);
    let open = |end: &str| {
        let flags = MQ_OFlag::O_CREAT | MQ_OFlag::O_RDWR | MQ_OFlag::O_CLOEXEC;
        let name = format!("{}-{end}", queue_name(place));
        mq_open(&*name, flags, Mode::S_IRUSR | Mode::S_IWUSR, Some(&attributes))
            .map_err(io::Error::from)
    };
    Ok([open("there")?, open("back")?])
}

fn serve_queues(place: &Path) -> io::Result<()> {
    let [there, back] = open_queues(place)?;
    end_when_told();
    ready()?;
    let (mut message, mut priority) = ([0; 16], 0);
    loop {
        mq_receive(&there, &mut message, &mut priority)?;
        mq_send(&back, &message, 0)?;
    }
}

fn queues(place: &Path) -> io::Result<Trip> {
    let [there, back] = open_queues(place)?;
    for end in ["there", "back"] {
        mq_unlink(&*format!("{}-{end}", queue_name(place)))?;
    }
    let (mut message, mut priority) = ([0; 16], 0);
    Ok(Box::new(move || {
        mq_send(&there, &message, 0)?;
        mq_receive(&back, &mut message, &mut priority)?;
        Ok(())
    }))
}
