//! Lent memory never changes: every way to alter or shrink it from the server's side is tried,
//! after sealing and before, and what the client holds is compared after each.
//!
//! The server is this test's own executable, run again, of the same user. What is left is a
//! debugger, which the last test shows: see *Trust* in the crate's documentation.

use std::ffi::c_void;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::{env, ptr};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use shmferry::loan::{Lent, Loan};
use shmferry::{Client, Server};
use shmferry_test_support::watchdog::watchdog;

/// The loan's length: several pages, and not a whole number of them.
const LEN: usize = (64 << 10) + 123;
const PAGE: usize = 4096;
const SOCKET: &str = "SHMFERRY_TEST_NEVER_CHANGES";

fn pattern() -> Vec<u8> {
    (0..LEN).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect()
}

type Outcome = Result<(), Errno>;

/// The outcome of a system call that `rustix` does not have.
fn checked(returned: impl TryInto<i64>) -> Outcome {
    match returned.try_into() {
        Ok(-1) => {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap();
            Err(Errno::from_raw_os_error(errno))
        }
        _ => Ok(()),
    }
}

fn of_std<T>(result: std::io::Result<T>) -> Outcome {
    result.map(drop).map_err(|error| Errno::from_raw_os_error(error.raw_os_error().unwrap()))
}

fn map(fd: impl AsFd, prot: ProtFlags, flags: MapFlags) -> Result<*mut c_void, Errno> {
    // SAFETY: the kernel chooses fresh addresses.
    unsafe { rustix::mm::mmap(ptr::null_mut(), LEN, prot, flags, fd, 0) }
}

const READ: ProtFlags = ProtFlags::READ;
const WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

// ---------------------------------------------------------------- what the server tries

/// What an attempt has at hand.
struct Target<'t> {
    loan: &'t Loan,
    client: u32,
    /// Where the client has the loan mapped.
    at: usize,
}

impl Target<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.loan.as_fd()
    }

    fn fd_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd().as_raw_fd())
    }

    /// The client's own descriptor of the loan, by `/proc`.
    fn client_fd_path(&self) -> String {
        let ours = rustix::fs::fstat(self.fd()).unwrap().st_ino;
        let fds = fs::read_dir(format!("/proc/{}/fd", self.client)).unwrap();
        let mut paths = fds.map(|fd| fd.unwrap().path());
        let same = |path: &std::path::PathBuf| {
            rustix::fs::stat(path).is_ok_and(|stat| stat.st_ino == ours)
                && fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memfd:"))
        };
        paths.find(same).unwrap().to_str().unwrap().to_owned()
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64) -> Outcome {
        rustix::fs::fallocate(self.fd(), mode, offset, PAGE as u64)
    }

    /// Writes to a process's memory by a system call of its own.
    fn write_to_process(&self, pid: u32, at: usize) -> Outcome {
        let bytes = [0xee_u8; 16];
        let local =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: at as *mut c_void, iov_len: bytes.len() };
        // SAFETY: it reads the local bytes; the remote ones are for the kernel to refuse.
        checked(unsafe { libc::process_vm_writev(pid as i32, &local, 1, &remote, 1, 0) } as i64)
    }
}

fn open(path: &str, truncate: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    if truncate {
        options.custom_flags(libc::O_TRUNC);
    }
    options.read(true).write(true).open(path)
}

/// Some other file with bytes.
fn source() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0xee; PAGE]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// One way to alter the loan: its name, the attempt, and what comes of it. `None` succeeds without
/// an effect on the loan, as the comment says.
type Way = (&'static str, fn(&Target<'_>) -> Outcome, &'static [Option<Errno>]);

const PERM: &[Option<Errno>] = &[Some(Errno::PERM)];
/// A shared mapping for reading is refused by some kernels, and cannot become writable in others.
const PERM_OR_ACCESS: &[Option<Errno>] = &[Some(Errno::PERM), Some(Errno::ACCESS)];
const UNKNOWN: &[Option<Errno>] = &[Some(Errno::OPNOTSUPP), Some(Errno::PERM)];
const FAULT: &[Option<Errno>] = &[Some(Errno::FAULT)];
const HARMLESS: &[Option<Errno>] = &[None];

const WAYS: &[Way] = &[
    ("write", |t| rustix::io::write(t.fd(), b"x").map(drop), PERM),
    ("pwrite", |t| rustix::io::pwrite(t.fd(), b"x", 0).map(drop), PERM),
    ("pwrite at the end", |t| rustix::io::pwrite(t.fd(), b"x", LEN as u64).map(drop), PERM),
    ("mmap, shared and writable", |t| map(t.fd(), WRITE, MapFlags::SHARED).map(drop), PERM),
    (
        "mprotect of a shared mapping for reading",
        |t| {
            let at = map(t.fd(), READ, MapFlags::SHARED)?;
            // SAFETY: the mapping is ours, and no reference into it exists.
            unsafe { rustix::mm::mprotect(at, LEN, MprotectFlags::READ | MprotectFlags::WRITE) }
        },
        PERM_OR_ACCESS,
    ),
    // Writes to a copy of the page.
    (
        "a private mapping, written to",
        |t| {
            let at = map(t.fd(), WRITE, MapFlags::PRIVATE)?;
            // SAFETY: the mapping is ours, long enough, and writable.
            unsafe { ptr::write_bytes(at.cast::<u8>(), 0xee, LEN) };
            Ok(())
        },
        HARMLESS,
    ),
    ("ftruncate, shorter", |t| rustix::fs::ftruncate(t.fd(), PAGE as u64), PERM),
    ("ftruncate, to nothing", |t| rustix::fs::ftruncate(t.fd(), 0), PERM),
    ("ftruncate, longer", |t| rustix::fs::ftruncate(t.fd(), 2 * LEN as u64), PERM),
    ("fallocate, longer", |t| t.fallocate(FallocateFlags::empty(), LEN as u64), PERM),
    ("fallocate beyond the end", |t| t.fallocate(FallocateFlags::KEEP_SIZE, 1 << 20), PERM),
    (
        "a hole punched",
        |t| t.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0),
        PERM,
    ),
    ("a range collapsed", |t| t.fallocate(FallocateFlags::COLLAPSE_RANGE, 0), UNKNOWN),
    ("a range inserted", |t| t.fallocate(FallocateFlags::INSERT_RANGE, 0), UNKNOWN),
    ("a range zeroed", |t| t.fallocate(FallocateFlags::ZERO_RANGE, 0), UNKNOWN),
    (
        "MADV_REMOVE of a private mapping",
        |t| remove(map(t.fd(), WRITE, MapFlags::PRIVATE)?),
        &[Some(Errno::ACCESS), Some(Errno::INVAL)],
    ),
    (
        "MADV_REMOVE of a shared mapping",
        |t| remove(map(t.fd(), READ, MapFlags::SHARED)?),
        &[Some(Errno::ACCESS), Some(Errno::PERM), Some(Errno::INVAL)],
    ),
    // Drops the pages from this process's mapping only.
    (
        "MADV_DONTNEED",
        |t| {
            let at = map(t.fd(), READ, MapFlags::PRIVATE)?;
            // SAFETY: the mapping is ours, and no reference into it exists.
            unsafe { rustix::mm::madvise(at, LEN, rustix::mm::Advice::LinuxDontNeed) }
        },
        HARMLESS,
    ),
    (
        "process_vm_writev to its own mapping",
        |t| {
            let at = map(t.fd(), READ, MapFlags::PRIVATE)?;
            t.write_to_process(std::process::id(), at as usize)
        },
        FAULT,
    ),
    ("process_vm_writev to the client's mapping", |t| t.write_to_process(t.client, t.at), FAULT),
    (
        "its descriptor opened again by /proc, and written to",
        |t| of_std(open(&t.fd_path(), false).unwrap().write_all(b"x")),
        PERM,
    ),
    (
        "its descriptor opened again by /proc, and mapped",
        |t| map(open(&t.fd_path(), false).unwrap(), WRITE, MapFlags::SHARED).map(drop),
        PERM,
    ),
    ("opened again with O_TRUNC", |t| of_std(open(&t.fd_path(), true)), PERM),
    (
        "the client's descriptor opened by /proc, and written to",
        |t| of_std(open(&t.client_fd_path(), false).unwrap().write_all(b"x")),
        PERM,
    ),
    ("the client's opened with O_TRUNC", |t| of_std(open(&t.client_fd_path(), true)), PERM),
    // Writes to a copy of the page, as a debugger that sets a breakpoint.
    (
        "/proc/self/mem at a private mapping",
        |t| {
            let at = map(t.fd(), READ, MapFlags::PRIVATE)?;
            of_std(open("/proc/self/mem", false).unwrap().write_all_at(b"x", at as u64))
        },
        HARMLESS,
    ),
    (
        "/proc/self/mem at a shared mapping",
        |t| {
            let at = map(t.fd(), READ, MapFlags::SHARED)?;
            of_std(open("/proc/self/mem", false).unwrap().write_all_at(b"x", at as u64))
        },
        &[Some(Errno::IO), Some(Errno::FAULT), Some(Errno::PERM)],
    ),
    ("further seals", |t| rustix::fs::fcntl_add_seals(t.fd(), SealFlags::FUTURE_WRITE), PERM),
    (
        "copy_file_range",
        |t| {
            let (mut from, mut to) = (0, 0);
            let file = source();
            rustix::fs::copy_file_range(&file, Some(&mut from), t.fd(), Some(&mut to), PAGE)
                .map(drop)
        },
        // Between file systems some kernels do not even try.
        &[Some(Errno::PERM), Some(Errno::XDEV)],
    ),
    (
        "copy_file_range within memory",
        |t| {
            let (mut from, mut to) = (0, 0);
            let memory = memfd();
            rustix::io::pwrite(&memory, &[0xee; PAGE], 0)?;
            rustix::fs::copy_file_range(&memory, Some(&mut from), t.fd(), Some(&mut to), PAGE)
                .map(drop)
        },
        PERM,
    ),
    ("sendfile", |t| rustix::fs::sendfile(t.fd(), source(), None, PAGE).map(drop), PERM),
    (
        "splice",
        |t| {
            let (out, mut into) = std::io::pipe().unwrap();
            into.write_all(b"bytes").unwrap();
            let mut to = 0;
            let flags = rustix::pipe::SpliceFlags::empty();
            rustix::pipe::splice(&out, None, t.fd(), Some(&mut to), 5, flags).map(drop)
        },
        PERM,
    ),
    // The pipe has the page itself, for reading; what is written comes into pages of its own.
    (
        "pages of it in a pipe, which is written to",
        |t| {
            let at = map(t.fd(), READ, MapFlags::PRIVATE)?;
            let (mut out, mut into) = std::io::pipe().unwrap();
            vmsplice(&into, at)?;
            into.write_all(&[0xee; 100]).unwrap();
            let mut read = [0; PAGE + 100];
            out.read_exact(&mut read).unwrap();
            assert!(read[..PAGE] == pattern()[..PAGE] && read[PAGE..] == [0xee; 100]);
            Ok(())
        },
        HARMLESS,
    ),
    (
        "read from a file straight into its mapping",
        |t| {
            let at = map(t.fd(), READ, MapFlags::PRIVATE)?;
            let file = source();
            // SAFETY: the mapping is ours; the kernel is to refuse to write there.
            checked(unsafe { libc::pread(file.as_raw_fd(), at, PAGE, 0) } as i64)
        },
        FAULT,
    ),
    (
        "a buffer of io_uring",
        |t| pin(map(t.fd(), READ, MapFlags::PRIVATE)?).map(drop),
        // Or the system has no io_uring for us.
        &[Some(Errno::FAULT), Some(Errno::NOSYS), Some(Errno::PERM), None],
    ),
    ("userfaultfd", userfault, &[Some(Errno::PERM), Some(Errno::INVAL), Some(Errno::NOSYS)]),
];

fn remove(at: *mut c_void) -> Outcome {
    // SAFETY: the mapping is ours, and no reference into it exists.
    unsafe { rustix::mm::madvise(at, LEN, rustix::mm::Advice::LinuxRemove) }
}

/// Puts the first page of a mapping into a pipe, without a copy.
fn vmsplice(pipe: impl AsFd, at: *mut c_void) -> Outcome {
    let part = libc::iovec { iov_base: at, iov_len: PAGE };
    // SAFETY: the mapping is readable, and at least as long.
    checked(unsafe { libc::vmsplice(pipe.as_fd().as_raw_fd(), &part, 1, 0) } as i64)
}

/// Pins the first page of a mapping, for writing: a registered buffer of an io_uring.
fn pin(at: *mut c_void) -> Result<OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    const REGISTER_BUFFERS: u32 = 0;
    let mut params = [0_u64; 15];
    // SAFETY: the kernel writes 120 bytes of parameters there.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    checked(fd)?;
    // SAFETY: it is new, and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let part = libc::iovec { iov_base: at, iov_len: PAGE };
    // SAFETY: the vector lives as long as the call.
    checked(unsafe {
        libc::syscall(libc::SYS_io_uring_register, fd.as_raw_fd(), REGISTER_BUFFERS, &part, 1)
    })?;
    Ok(fd)
}

/// Asks to resolve page faults of a shared mapping of the loan ourselves.
fn userfault(target: &Target<'_>) -> Outcome {
    use std::os::fd::FromRawFd;
    // SAFETY: no memory is concerned.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    checked(fd)?;
    // SAFETY: it is new, and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: UFFDIO_API reads and writes 24 bytes.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), 0xc018_aa3f, api.as_mut_ptr()) })?;
    let at = map(target.fd(), READ, MapFlags::SHARED)?;
    let len = LEN.next_multiple_of(PAGE) as u64;
    let mut range = [at as u64, len, 1, 0]; // missing pages
    // SAFETY: UFFDIO_REGISTER reads and writes 32 bytes.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), 0xc020_aa00, range.as_mut_ptr()) })
}

// ---------------------------------------------------------------- the server's process

/// Not a test of its own: the server, which tries what it is told to.
#[test]
fn the_servers_process() {
    let Ok(socket) = env::var(SOCKET) else { return };
    let loan = Loan::from_bytes(&pattern()).unwrap();
    let lending = loan.clone();
    let serving = Server::bind(format!("unix:{socket}").as_str())
        .unwrap()
        .serve(1, move |request| request.lend(&lending))
        .unwrap();
    println!("says ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<usize> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        let [way, client, at] = words[..] else { panic!("{line}") };
        let target = Target { loan: &loan, client: client as u32, at };
        let outcome = match WAYS.get(way) {
            Some((_, attempt, _)) => attempt(&target),
            None => of_std(
                open(&format!("/proc/{client}/mem"), false)
                    .and_then(|memory| memory.write_all_at(&[0xee; 3], at as u64)),
            ),
        };
        println!("says {}", outcome.err().map_or(0, Errno::raw_os_error));
    }
    drop(serving);
}

/// The server as the client's process has it; killed at the latest when dropped.
struct Lending {
    child: Child,
    stdin: ChildStdin,
    says: BufReader<ChildStdout>,
    address: String,
    _dir: tempfile::TempDir,
}

impl Lending {
    fn start() -> Lending {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s").display().to_string();
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "the_servers_process", "--nocapture", "--test-threads=1"]);
        command.env(SOCKET, &socket).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let address = format!("unix:{socket}");
        let mut lending =
            Lending { child, stdin, says: BufReader::new(stdout), address, _dir: dir };
        assert_eq!(lending.hear(), "ready");
        lending
    }

    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.says.read_line(&mut line).unwrap(), 0, "the server has ended");
            if let Some((_, said)) = line.split_once("says ") {
                return said.trim().to_owned();
            }
        }
    }

    /// Has the server try one way, against memory of this process.
    fn attempt(&mut self, way: usize, at: *const u8) -> Option<Errno> {
        writeln!(self.stdin, "{way} {} {}", std::process::id(), at as usize).unwrap();
        match self.hear().parse().unwrap() {
            0 => None,
            errno => Some(Errno::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Lending {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lent_by(lending: &Lending) -> (Client, Lent) {
    let client = Client::builder().segments(1).connect(lending.address.as_str()).unwrap();
    let body = client.get("key").unwrap();
    assert!(body.is_lent());
    let lent = body.into_bytes().unwrap();
    (client, lent)
}

#[test]
fn every_way_to_alter_lent_memory_is_refused_or_has_no_effect() {
    let _watchdog = watchdog();
    let mut lending = Lending::start();
    let (_client, lent) = lent_by(&lending);
    let expected = pattern();
    let whole = |name: &str| {
        assert!(lent[..] == expected[..], "{name}: the bytes have changed");
        // A mapping made anew shows the same, and so does the descriptor.
        let (fd, range) = lent.memory().unwrap();
        let mut read = vec![0; LEN];
        assert_eq!(rustix::io::pread(fd, &mut read, 0), Ok(LEN));
        assert!(read == expected && range == (0..LEN), "{name}: the memory has changed");
        assert_eq!(rustix::fs::fstat(fd).unwrap().st_size, LEN as i64, "{name}");
    };
    whole("at first");
    for (number, (name, _, outcomes)) in WAYS.iter().enumerate() {
        let outcome = lending.attempt(number, lent.as_ptr());
        println!("{name}: {outcome:?}");
        assert!(outcomes.contains(&outcome), "{name}: {outcome:?} and not {outcomes:?}");
        whole(name);
    }
    // The server's end is none of the memory.
    drop(lending);
    whole("the server is dead");
}

#[test]
fn only_a_debugger_of_the_same_user_changes_what_a_client_has() {
    let _watchdog = watchdog();
    let mut lending = Lending::start();
    let (client, lent) = lent_by(&lending);
    // This is what ptrace's POKEDATA does, too. It can write to any other memory of the client as
    // well, whatever the client does: see *Trust*.
    let outcome = lending.attempt(usize::MAX, lent.as_ptr());
    if outcome.is_some() {
        println!("skipped: this system lets no process write to another's memory: {outcome:?}");
        return;
    }
    // Read by the kernel: no assumption that the bytes behind `lent` are constant is relied on.
    let memory = File::open("/proc/self/mem").unwrap();
    let mut now = [0; 4];
    memory.read_exact_at(&mut now, lent.as_ptr() as u64).unwrap();
    assert_eq!(now, [0xee, 0xee, 0xee, pattern()[3]], "the debugger has its way");
    // But that is this process's copy of the page: the loan, and all who map it, are as before.
    let (fd, _) = lent.memory().unwrap();
    let mut read = vec![0; LEN];
    assert_eq!(rustix::io::pread(fd, &mut read, 0), Ok(LEN));
    assert!(read == pattern());
    drop((client, lent));
    let (_client, again) = lent_by(&lending);
    assert!(again[..] == pattern()[..]);
}

// ---------------------------------------------------------------- before sealing

const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

fn memfd() -> OwnedFd {
    let memory =
        rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&memory, &pattern(), 0).unwrap();
    memory
}

#[test]
fn memory_that_someone_can_still_write_to_cannot_be_sealed() {
    let _watchdog = watchdog();
    let seal = |memory: &OwnedFd| rustix::fs::fcntl_add_seals(memory, SEALS);
    let unmap = |at| {
        // SAFETY: the mapping is ours, and no reference into it exists.
        unsafe { rustix::mm::munmap(at, LEN) }.unwrap();
    };
    let reseal = |memory: &OwnedFd| {
        let limit = shmferry::Deadline::after(std::time::Duration::from_secs(60));
        while seal(memory).is_err() {
            assert!(!limit.has_passed(), "it is never let go of");
            std::thread::yield_now();
        }
        assert_eq!(rustix::io::pwrite(memory, b"x", 0), Err(Errno::PERM));
    };

    // A writable mapping, and one that could become writable.
    for prot in [WRITE, READ] {
        let memory = memfd();
        let at = map(&memory, prot, MapFlags::SHARED).unwrap();
        assert_eq!(seal(&memory), Err(Errno::BUSY), "{prot:?}");
        assert_eq!(rustix::fs::fcntl_get_seals(&memory), Ok(SealFlags::empty()), "none of them");
        unmap(at);
        reseal(&memory);
    }

    // A writable mapping of another process: a child of `fork` keeps it.
    let memory = memfd();
    let at = map(&memory, WRITE, MapFlags::SHARED).unwrap();
    let (out, mut into) = std::io::pipe().unwrap();
    // SAFETY: the child does nothing but system calls.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut byte = 0_u8;
        // SAFETY: as above; the parent's end tells it to end.
        unsafe {
            libc::close(into.as_raw_fd());
            libc::read(out.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    unmap(at);
    assert_eq!(seal(&memory), Err(Errno::BUSY), "a child has it");
    into.write_all(b"x").unwrap();
    // SAFETY: it is our child, which no one else waits for.
    assert_eq!(unsafe { libc::waitpid(child, ptr::null_mut(), 0) }, child);
    reseal(&memory);

    // Pages in a pipe: the kernel waits a little for them, and then refuses.
    let memory = memfd();
    let at = map(&memory, WRITE, MapFlags::SHARED).unwrap();
    let (out, into) = std::io::pipe().unwrap();
    vmsplice(&into, at).unwrap();
    unmap(at);
    assert_eq!(seal(&memory), Err(Errno::BUSY), "a pipe has a page");
    drop((out, into));
    reseal(&memory);

    // Pages pinned for an input that may still come.
    let memory = memfd();
    let at = map(&memory, WRITE, MapFlags::SHARED).unwrap();
    match pin(at) {
        Ok(ring) => {
            unmap(at);
            assert_eq!(seal(&memory), Err(Errno::BUSY), "an io_uring has a page");
            drop(ring);
            reseal(&memory);
        }
        Err(errno) => println!("skipped: no io_uring for us: {errno}"),
    }
}
