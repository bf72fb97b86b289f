//! The memory that both processes map, how a word in it is posted, and the process that posts.

use std::array;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, fence};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::net::{SendFlags, send};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use rustix::thread::futex::{self, Timespec};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// The most waiters at once.
pub const MOST: usize = 256;
/// The most round trips whose times are kept.
const TIMES: usize = 1 << 16;
/// A wait that takes longer has lost its wake-up.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A semaphore: what the crate's own is, without poison.
#[repr(C, align(128))]
pub struct Word {
    /// Permits. The futex word.
    pub count: AtomicU32,
    /// Who sleeps in the kernel until there is a permit, or is about to.
    pub sleepers: AtomicU32,
}

impl Word {
    /// Takes a permit if there is one. Each word has one waiter, so that nobody else takes it.
    pub fn take(&self) -> bool {
        let has_one = self.count.load(Acquire) != 0;
        if has_one {
            self.count.fetch_sub(1, Acquire);
        }
        has_one
    }

    /// Takes a permit; the thread sleeps until there is one.
    pub fn wait(&self, patience: Option<&Timespec>) {
        while !self.take() {
            self.sleepers.fetch_add(1, Relaxed);
            fence(SeqCst);
            let slept = futex::wait(&self.count, futex::Flags::empty(), 0, patience);
            self.sleepers.fetch_sub(1, Relaxed);
            assert!(slept != Err(Errno::TIMEDOUT), "a wake-up was lost");
        }
    }

    /// Adds a permit and wakes who sleeps on the word. Returns whether that took a system call.
    pub fn post(&self) -> bool {
        self.count.fetch_add(1, Release);
        fence(SeqCst);
        let is_awaited = self.sleepers.load(Relaxed) != 0;
        if is_awaited {
            futex::wake(&self.count, futex::Flags::empty(), i32::MAX as u32).expect("a live word");
        }
        is_awaited
    }
}

/// A word with a cache line of its own.
#[repr(C, align(128))]
pub struct Line(pub AtomicU32);

/// How posts reach the waiters.
#[derive(Clone, Copy, PartialEq)]
#[repr(u32)]
pub enum By {
    /// A wake of the word, if it has sleepers.
    Futex,
    /// A message, if one is wanted.
    Message,
}

/// What the peer is to do next.
#[derive(Clone, Copy)]
pub enum Job {
    /// Works a little, posts `burst` random words, waits for the answers to all of them, and so on
    /// for `span`.
    Run {
        by: By,
        waiters: usize,
        burst: usize,
        work: Duration,
        span: Duration,
    },
    /// Posts each word once.
    Release {
        by: By,
        waiters: usize,
    },
    Exit,
}

/// All that is shared. It starts as zeros.
#[repr(C)]
pub struct Shared {
    pub words: [Word; MOST],
    /// Raised while the waiters' process wants a message for the next post.
    pub needs_message: Line,
    /// How many of a burst have not been answered.
    unanswered: Line,
    /// Posted with the last answer to a burst.
    answered: Word,
    start: Word,
    finished: Word,
    kind: AtomicU32,
    by: AtomicU32,
    waiters: AtomicU32,
    burst: AtomicU32,
    /// In microseconds, as the next.
    work: AtomicU32,
    span: AtomicU32,
    posts: AtomicU32,
    calls: AtomicU32,
    trips: AtomicU32,
    /// Nanoseconds that all bursts took together, their work not included.
    took: AtomicU32,
    /// Nanoseconds of processor time that the work took.
    worked: AtomicU32,
    times: [AtomicU32; TIMES],
}

/// What came of [`Job::Run`].
pub struct Ran {
    pub posts: u32,
    /// Posts that needed a system call.
    pub calls: u32,
    /// Seconds that all bursts took, answers included, work not.
    pub took: f64,
    /// Seconds of processor time that the work took, and is not a cost of the posts.
    pub worked: f64,
    /// Seconds of each burst, sorted.
    pub times: Vec<f64>,
}

impl Shared {
    pub fn new() -> &'static Shared {
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let memory = unsafe {
            mmap_anonymous(ptr::null_mut(), size_of::<Shared>(), rights, MapFlags::SHARED)
        };
        // SAFETY: aligned to a page, as long as the type, never unmapped; all of its fields are
        // atomic, and zeros are values of theirs.
        unsafe { &*memory.expect("memory").cast::<Shared>() }
    }

    /// Says, on the waiters' side, that a word's permit was taken.
    pub fn answer(&self) {
        if self.unanswered.0.fetch_sub(1, Relaxed) == 1 {
            self.answered.post();
        }
    }

    /// Has the peer do it, and waits until it is done.
    pub fn order(&self, job: Job) {
        let set = |field: &AtomicU32, value: usize| field.store(value as u32, Relaxed);
        match job {
            Job::Run { by, waiters, burst, work, span } => {
                set(&self.kind, 0);
                set(&self.by, by as usize);
                set(&self.waiters, waiters);
                set(&self.burst, burst);
                set(&self.work, work.as_micros() as usize);
                set(&self.span, span.as_micros() as usize);
            }
            Job::Release { by, waiters } => {
                set(&self.kind, 1);
                set(&self.by, by as usize);
                set(&self.waiters, waiters);
            }
            Job::Exit => set(&self.kind, 2),
        }
        self.start.post();
        self.finished.wait(Some(&Timespec { tv_sec: 30, tv_nsec: 0 }));
    }

    pub fn result(&self) -> Ran {
        let trips = self.trips.load(Relaxed);
        let times = self.times.iter().take(trips as usize);
        let mut times: Vec<f64> = times.map(|nanos| f64::from(nanos.load(Relaxed)) / 1e9).collect();
        times.sort_unstable_by(f64::total_cmp);
        Ran {
            posts: self.posts.load(Relaxed),
            calls: self.calls.load(Relaxed),
            took: f64::from(self.took.load(Relaxed)) / 1e9,
            worked: f64::from(self.worked.load(Relaxed)) / 1e9,
            times,
        }
    }

    fn job(&self) -> Job {
        let number = |field: &AtomicU32| field.load(Relaxed) as usize;
        let micros = |field: &AtomicU32| Duration::from_micros(field.load(Relaxed).into());
        let by = if number(&self.by) == By::Message as usize { By::Message } else { By::Futex };
        let waiters = number(&self.waiters);
        match number(&self.kind) {
            0 => Job::Run {
                by,
                waiters,
                burst: number(&self.burst),
                work: micros(&self.work),
                span: micros(&self.span),
            },
            1 => Job::Release { by, waiters },
            _ => Job::Exit,
        }
    }

    /// Posts a word, and returns whether that took a system call.
    fn post(&self, by: By, word: usize, socket: BorrowedFd) -> bool {
        if by == By::Futex {
            return self.words[word].post();
        }
        self.words[word].count.fetch_add(1, Release);
        fence(SeqCst);
        let needed = &self.needs_message.0;
        // Lowered before it is sent: the receiver raises it again once it has the message.
        let is_needed = needed.load(Relaxed) != 0 && needed.swap(0, Relaxed) != 0;
        if is_needed {
            match send(socket, &[0], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                // Full: there are messages that are not read yet, and any of them will do.
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(errno) => panic!("cannot send: {errno}"),
            }
        }
        is_needed
    }
}

/// The process that posts. It ends with this one.
pub struct Peer {
    pid: Pid,
    shared: &'static Shared,
}

impl Peer {
    /// Forks: to be called while there is no other thread.
    pub fn start(shared: &'static Shared, socket: &OwnedFd) -> Peer {
        // SAFETY: there is no other thread that could hold a lock.
        match unsafe { libc::fork() } {
            0 => {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).expect("set");
                serve(shared, socket);
                std::process::exit(0);
            }
            pid => Peer { pid: Pid::from_raw(pid).expect("fork"), shared },
        }
    }

    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get() as u32
    }

    /// Keeps it on these processors.
    pub fn keep_on(&self, processors: &CpuSet) -> io::Result<()> {
        Ok(sched_setaffinity(Some(self.pid), processors)?)
    }

    pub fn end(self) {
        self.shared.order(Job::Exit);
        waitpid(Some(self.pid), WaitOptions::empty()).expect("a child");
    }
}

fn serve(shared: &Shared, socket: &OwnedFd) {
    let socket = socket.as_fd();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    loop {
        shared.start.wait(None);
        let job = shared.job();
        match job {
            Job::Run { by, waiters, burst, work, span } => {
                let mut order: [usize; MOST] = array::from_fn(|i| i);
                let mut at = waiters;
                let (mut posts, mut calls, mut trips, mut took, mut worked) = (0, 0, 0, 0, 0);
                let begin = Instant::now();
                while begin.elapsed() < span {
                    if at + burst > waiters {
                        random.shuffle(&mut order[..waiters]);
                        at = 0;
                    }
                    worked += busy(work);
                    shared.unanswered.0.store(burst as u32, Relaxed);
                    let posted = Instant::now();
                    for word in &order[at..at + burst] {
                        calls += u32::from(shared.post(by, *word, socket));
                    }
                    shared.answered.wait(Some(&PATIENCE));
                    let nanos = posted.elapsed().as_nanos() as u32;
                    if let Some(time) = shared.times.get(trips as usize) {
                        time.store(nanos, Relaxed);
                    }
                    at += burst;
                    posts += burst as u32;
                    trips += 1;
                    took += nanos;
                }
                shared.posts.store(posts, Relaxed);
                shared.calls.store(calls, Relaxed);
                shared.trips.store(trips, Relaxed);
                shared.took.store(took, Relaxed);
                shared.worked.store(worked, Relaxed);
            }
            Job::Release { by, waiters } => {
                for word in 0..waiters {
                    shared.post(by, word, socket);
                }
            }
            Job::Exit => {}
        }
        shared.finished.post();
        if matches!(job, Job::Exit) {
            return;
        }
    }
}

/// Works for so long, and lets others on this processor run until they sleep. Returns nanoseconds of
/// processor time.
fn busy(work: Duration) -> u32 {
    if work.is_zero() {
        return 0;
    }
    let used = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let (begin, before) = (Instant::now(), used());
    while begin.elapsed() < work {}
    thread::yield_now();
    (used() - before) as u32
}

/// Xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn shuffle(&mut self, of: &mut [usize]) {
        for i in (1..of.len()).rev() {
            of.swap(i, self.below(i + 1));
        }
    }
}
