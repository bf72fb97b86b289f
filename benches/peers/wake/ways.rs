//! The ways in which a task can wait for a permit in shared memory.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, fence};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, Probe, opcode};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::thread::futex::{self, ClockId, Wait, WaitFlags, WaitPtr, WaitvFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::shared::Shared;

/// Wakes tasks when their words are posted.
pub trait Way: Send + Sync {
    /// Has the task woken once, when the word has a permit. Returns whether it has one already, and
    /// the task is not to be woken.
    fn register(&self, word: usize, waker: &Waker) -> bool;

    /// Whether a task waits for it.
    fn is_registered(&self, word: usize) -> bool;
}

/// Waits for a permit and takes it.
pub async fn wait(way: &dyn Way, shared: &Shared, word: usize) {
    poll_fn(|context| {
        let word_there = &shared.words[word];
        if word_there.take() || (way.register(word, context.waker()) && word_there.take()) {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

/// The wakers of tasks that wait, by word.
type Wakers = Vec<Mutex<Option<Waker>>>;

fn no_wakers(count: usize) -> Wakers {
    (0..count).map(|_| Mutex::default()).collect()
}

fn wake(slot: &Mutex<Option<Waker>>) {
    let waker = slot.lock().expect("no panic").take();
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Within a runtime.
fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor names the same file, open, for as long as it is there.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

// ---------------------------------------------------------------- connection

/// The poster sends a message if one is wanted; a task reads it and looks at all words.
pub struct Connection {
    shared: &'static Shared,
    socket: OwnedFd,
    /// An epoll descriptor, as if there were several sockets.
    ready: AsyncFd<OwnedFd>,
    wakers: Wakers,
}

impl Connection {
    /// Within a runtime.
    pub fn start(shared: &'static Shared, socket: &OwnedFd, words: usize) -> io::Result<Arc<Self>> {
        let socket = socket.try_clone()?;
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&ready, &socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let ready = readable(ready)?;
        let this = Arc::new(Connection { shared, socket, ready, wakers: no_wakers(words) });
        this.drain()?;
        this.scan();
        let driver = Arc::clone(&this);
        tokio::spawn(async move { driver.drive().await.expect("the connection lives") });
        Ok(this)
    }

    async fn drive(&self) -> io::Result<()> {
        loop {
            let mut guard = self.ready.readable().await?;
            self.drain()?;
            guard.clear_ready();
            self.scan();
        }
    }

    /// Reads all messages of all sockets that have some.
    fn drain(&self) -> io::Result<()> {
        let mut events = [const {
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }
        }; 8];
        let count = epoll::wait(self.ready.get_ref(), &mut events[..], Some(&NOW))?;
        for _ in 0..count {
            loop {
                match recv(&self.socket, &mut [0; 8], RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(_) => {}
                    Err(Errno::AGAIN) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    /// From here on a post sends a message; what was posted before is seen.
    fn scan(&self) {
        self.shared.needs_message.0.store(1, Relaxed);
        fence(SeqCst);
        for (word, slot) in self.shared.words.iter().zip(&self.wakers) {
            if word.count.load(Relaxed) != 0 {
                wake(slot);
            }
        }
    }
}

const NOW: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 0 };

impl Way for Connection {
    fn register(&self, word: usize, waker: &Waker) -> bool {
        let slot = &self.wakers[word];
        *slot.lock().expect("no panic") = Some(waker.clone());
        // Either the poster's or the scanner's fence comes later, and it sees the waker; or this one
        // does, and sees the permit.
        fence(SeqCst);
        let has_permit = self.shared.words[word].count.load(Relaxed) != 0;
        if has_permit {
            *slot.lock().expect("no panic") = None;
        }
        has_permit
    }

    fn is_registered(&self, word: usize) -> bool {
        self.wakers[word].lock().expect("no panic").is_some()
    }
}

// ---------------------------------------------------------------- futex_waitv

/// Threads that sleep on many words each, and wake tasks.
pub struct Waitv {
    shared: &'static Shared,
    groups: Vec<Arc<Group>>,
    threads: Vec<JoinHandle<()>>,
}

/// The kernel takes 128 words in a call; one of them is `control`.
const WORDS: usize = 127;

/// What one thread sleeps on.
#[derive(Default)]
struct Group {
    /// Changed whenever `awaited` has a word more.
    control: AtomicU32,
    /// Whether the thread sleeps, or is about to.
    is_asleep: AtomicBool,
    is_over: AtomicBool,
    awaited: Mutex<Vec<(usize, Waker)>>,
}

impl Waitv {
    /// Whether the kernel has the call.
    pub fn is_there() -> bool {
        futex::waitv(&[], WaitvFlags::empty(), None, ClockId::Monotonic) != Err(Errno::NOSYS)
    }

    pub fn start(shared: &'static Shared, words: usize) -> Arc<Self> {
        let groups: Vec<Arc<Group>> = (0..words.div_ceil(WORDS)).map(|_| Arc::default()).collect();
        let serve = |group: &Arc<Group>| {
            let group = Arc::clone(group);
            thread::spawn(move || group.serve(shared))
        };
        let threads = groups.iter().map(serve).collect();
        Arc::new(Waitv { shared, groups, threads })
    }
}

impl Group {
    /// Has the thread look at `awaited` once more.
    fn change(&self) {
        self.control.fetch_add(1, Release);
        fence(SeqCst);
        if self.is_asleep.load(Relaxed) {
            futex::wake(&self.control, futex::Flags::PRIVATE, 1).expect("a live word");
        }
    }

    fn serve(&self, shared: &Shared) {
        let mut ready = Vec::new();
        loop {
            let seen = self.control.load(Acquire);
            if self.is_over.load(Relaxed) {
                return;
            }
            let mut sleep_on = vec![entry(&self.control, seen, WaitFlags::PRIVATE)];
            self.awaited.lock().expect("no panic").retain(|(word, waker)| {
                let word = &shared.words[*word];
                let has_permit = word.count.load(Relaxed) != 0;
                if has_permit {
                    word.sleepers.fetch_sub(1, Relaxed);
                    ready.push(waker.clone());
                } else {
                    sleep_on.push(entry(&word.count, 0, WaitFlags::empty()));
                }
                !has_permit
            });
            ready.drain(..).for_each(Waker::wake);
            self.is_asleep.store(true, Relaxed);
            fence(SeqCst);
            match futex::waitv(&sleep_on, WaitvFlags::empty(), None, ClockId::Monotonic) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => panic!("futex_waitv: {errno}"),
            }
            self.is_asleep.store(false, Relaxed);
        }
    }
}

fn entry(word: &AtomicU32, expected: u32, flags: WaitFlags) -> Wait {
    let mut entry = Wait::new();
    entry.val = expected.into();
    entry.uaddr = WaitPtr::new(word.as_ptr().cast());
    entry.flags = WaitFlags::SIZE_U32 | flags;
    entry
}

impl Way for Waitv {
    fn register(&self, word: usize, waker: &Waker) -> bool {
        self.shared.words[word].sleepers.fetch_add(1, Relaxed);
        let group = &self.groups[word % self.groups.len()];
        group.awaited.lock().expect("no panic").push((word, waker.clone()));
        group.change();
        false
    }

    fn is_registered(&self, word: usize) -> bool {
        self.shared.words[word].sleepers.load(Relaxed) != 0
    }
}

impl Drop for Waitv {
    fn drop(&mut self) {
        for group in &self.groups {
            group.is_over.store(true, Relaxed);
            group.change();
        }
        self.threads.drain(..).for_each(|thread| thread.join().expect("no panic"));
    }
}

// ---------------------------------------------------------------- io_uring

/// A request to the kernel for each word that is awaited; a task reads the completions.
pub struct Ring {
    shared: &'static Shared,
    ring: Mutex<IoUring>,
    ready: AsyncFd<OwnedFd>,
    wakers: Wakers,
}

/// As in the kernel's header: a word of 32 bits, shared between processes.
const FUTEX2_SIZE_U32: u32 = 2;
const FUTEX_BITSET_MATCH_ANY: u64 = u32::MAX as u64;

impl Ring {
    /// Whether the kernel has it, and lets this process use it.
    pub fn is_there() -> bool {
        let mut probe = Probe::new();
        let asked = IoUring::new(1).and_then(|ring| ring.submitter().register_probe(&mut probe));
        asked.is_ok() && probe.is_supported(opcode::FutexWait::CODE)
    }

    /// Within a runtime.
    pub fn start(shared: &'static Shared, words: usize) -> io::Result<Arc<Self>> {
        let ring = IoUring::new(words.max(8) as u32)?;
        // SAFETY: the ring is open.
        let ready = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }.try_clone_to_owned()?;
        let ready = readable(ready)?;
        let wakers = no_wakers(words);
        let this = Arc::new(Ring { shared, ring: Mutex::new(ring), ready, wakers });
        let driver = Arc::clone(&this);
        tokio::spawn(async move { driver.drive().await.expect("the ring lives") });
        Ok(this)
    }

    async fn drive(&self) -> io::Result<()> {
        loop {
            let mut guard = self.ready.readable().await?;
            let completed: Vec<_> = self.ring.lock().expect("no panic").completion().collect();
            guard.clear_ready();
            for entry in completed {
                // Or the word had changed already.
                let is_fine = [0, -libc::EAGAIN].contains(&entry.result());
                assert!(is_fine, "a futex request: {}", entry.result());
                let word = entry.user_data() as usize;
                self.shared.words[word].sleepers.fetch_sub(1, Relaxed);
                wake(&self.wakers[word]);
            }
        }
    }
}

impl Way for Ring {
    fn register(&self, word: usize, waker: &Waker) -> bool {
        *self.wakers[word].lock().expect("no panic") = Some(waker.clone());
        let there = &self.shared.words[word];
        there.sleepers.fetch_add(1, Relaxed);
        fence(SeqCst);
        let futex = there.count.as_ptr();
        let request = opcode::FutexWait::new(futex, 0, FUTEX_BITSET_MATCH_ANY, FUTEX2_SIZE_U32);
        let request = request.build().user_data(word as u64);
        let mut ring = self.ring.lock().expect("no panic");
        // SAFETY: the word is never unmapped.
        unsafe { ring.submission().push(&request) }.expect("one entry for each word");
        ring.submit().expect("submitted");
        false
    }

    fn is_registered(&self, word: usize) -> bool {
        self.shared.words[word].sleepers.load(Relaxed) != 0
    }
}
