//! Lends files that are asked for again, from sealed copies that it makes and keeps under a budget.

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, Metadata as FileMetadata};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use rustix::fs::{FsWord, fstatfs};
use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::process::Own;
use crate::protocol::{Metadata, Size};
use crate::segment::available_memory;
use crate::server::Incoming;
use crate::sync::lock;

use super::Loan;

/// The shortest file that is lent: a shorter one costs less through the segment.
const SHORTEST: u64 = 4096;
/// Memory comes in pages.
const PAGE: u64 = 4096;
/// What one copy may take of the budget, as the cache needs it: 31 of 32 parts.
const SHARE_OF_ONE: f64 = 31.0 / 32.0;
/// The most copies: each takes a descriptor and a mapping, of which a process has 65,530.
const MOST_COPIES: u64 = 16_384;
/// The most open files that are kept to be lent as files.
const MOST_FILES: u64 = 256;
/// The most copies that wait to be made. Each holds a descriptor.
const MOST_WAITING: usize = 64;
/// How many of the last requests are remembered, about.
const REMEMBERED: usize = 1 << 14;

/// Answers with files, and hands the same file out again without a copy.
///
/// The first answer from a file goes through the segment. When it is asked for again, a thread
/// copies it into sealed memory, while answers still go through the segment; from then on they are
/// [lent](crate::loan). The copies are kept under a budget; the ones that are used least go first.
/// Clients that take no loans get everything through the segment, and cause no copies. Cheap to
/// clone: the clones share all of it. Feature `loan-store`.
///
/// ```
/// use shmferry::loan::LoanStore;
/// use shmferry::{channel::InProcess, files::Directory, Client, Refusal, Server};
///
/// # let dir = tempfile::tempdir()?;
/// # std::fs::write(dir.path().join("a.jpg"), [7; 10_000])?;
/// let files = Directory::open(dir.path())?;
/// let store = LoanStore::new(64 << 20);
/// let queue = InProcess::bounded(8); // or an address, for another process
/// let _serving = Server::with(queue.clone()).serve(2, {
///     let store = store.clone();
///     move |request| match files.file(request.key())? {
///         Some(file) => store.send_file(request, &file),
///         None => request.refuse(Refusal::NotFound),
///     }
/// })?;
/// let client = Client::builder().segments(2).in_process(&queue)?;
/// assert_eq!(client.get("/a.jpg")?.read_all()?.len(), 10_000);
/// assert_eq!(store.stats().streamed, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # A file that changes
/// Every request looks at the opened file: device, inode, length, modification and change time, to
/// the nanosecond. A copy is lent only if all of them are those of the moment it was made, so that
/// a file that is written to, replaced, cut short or deleted is served as it is now, from the next
/// request on. Answers that were lent before are snapshots.
///
/// Times of files advance in ticks of some milliseconds, and two changes in one tick look like one.
/// So a file is not copied before it has been left alone for 50 ms, and longer the larger it is (a
/// second for 100 MB), because a system call that writes for long sets the time only when it
/// begins. Where files have times in whole seconds, it is two seconds.
///
/// What no time tells is not seen: a program that writes through a shared memory map that it has
/// had for long (times are set when it first writes to a page, and when that is written back), one
/// whose single call writes more slowly than 100 MB/s, a clock that is set back to the very
/// nanosecond.
///
/// # What is not copied
/// Files shorter than 4 KiB, or longer than nearly all of the budget; what is not a regular file,
/// or has no blocks on a disk (procfs); files of FUSE and network file systems, whose times are
/// another machine's. No more copies are kept than a quarter of the descriptors that the process
/// may have when the store is made, or 16,384. When a copy cannot be made, for lack of memory or
/// descriptors, say, answers go through the segment.
///
/// # Memory
/// The budget bounds the copies that are kept. The one that is being made comes on top, and so do
/// copies that clients still hold after they were evicted: see
/// [`lend_at_most`](crate::ServerBuilder::lend_at_most).
///
/// # Fork
/// In a child of `fork`, a store that it has inherited lends nothing, and keeps its memory.
#[derive(Clone)]
pub struct LoanStore {
    /// A child of `fork` leaks it: its thread is not there, and its locks may be held for ever.
    kept: Own<Arc<Kept>>,
    lend_files: bool,
}

/// What a [`LoanStore`] has done so far, and what it keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoanStats {
    /// Answers that were lent.
    pub lent: u64,
    /// Answers that went through the segment, to the end.
    pub streamed: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Copies that were made.
    pub filled: u64,
    /// Copies that are kept now.
    pub kept: u64,
    /// Their bytes.
    pub kept_bytes: u64,
}

impl LoanStore {
    /// A store that keeps copies of so many bytes in all; of zero, it lends nothing.
    pub fn new(budget: u64) -> LoanStore {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most_copies = (descriptors / 4).clamp(2, MOST_COPIES);
        let weight = Weight { least: budget.div_ceil(most_copies) };
        let kept = Kept {
            budget,
            weight,
            copies: cache(budget, weight),
            files: cache((descriptors / 8).clamp(1, MOST_FILES), Each),
            seen: Seen::new(),
            filling: Mutex::default(),
            tally: Tally::default(),
        };
        LoanStore { kept: Own::new(Arc::new(kept)), lend_files: false }
    }

    /// Whether to lend the files themselves where there is no copy; off by default.
    ///
    /// That costs neither memory nor a copy, and gives clients a read-only descriptor of the file:
    /// see [`Loan::file`], also for what cannot be lent so. Up to 256 files are held open for that,
    /// or an eighth of the descriptors that the process may have. The space of a deleted one is
    /// free once others have displaced it here, and clients have let go of it.
    pub fn lend_files(mut self, lend_files: bool) -> LoanStore {
        self.lend_files = lend_files;
        self
    }

    /// Answers with a whole file, as [`Incoming::send_file`] does: lent, if it is kept.
    ///
    /// # Errors
    /// Those of [`Incoming::send_file`] and [`Incoming::lend`].
    pub fn send_file(&self, request: Incoming, file: &File) -> Result<()> {
        self.send_file_with(request, file, &())
    }

    /// As [`send_file`](Self::send_file), with metadata.
    ///
    /// # Errors
    /// Also [`Error::Misuse`] for metadata that does not fit.
    pub fn send_file_with(
        &self,
        request: Incoming,
        file: &File,
        metadata: &impl Metadata,
    ) -> Result<()> {
        let found = file.metadata().map_err(Error::Source)?;
        if let Some(loan) = self.loan_for(&request, file, &found) {
            return self.lend(request, &loan, metadata);
        }
        let size = if is_plain(&found) { Ok(found.len().into()) } else { Size::of_file(file) };
        let outgoing = request.accept_with(size.map_err(Error::Source)?, metadata)?;
        self.kept.tally.count(false, outgoing.send_file(file)?);
        Ok(())
    }

    /// As [`send_file_with`](Self::send_file_with), for the bytes of the file in `range`: lent as a
    /// part of its copy. A part counts as a request for the file, which is copied whole.
    ///
    /// # Errors
    /// Also [`Error::SizeMismatch`] when the file ends before the range does.
    pub fn send_file_range_with(
        &self,
        request: Incoming,
        file: &File,
        range: Range<u64>,
        metadata: &impl Metadata,
    ) -> Result<()> {
        let found = file.metadata().map_err(Error::Source)?;
        let loan = self.loan_for(&request, file, &found);
        if let Some(part) = loan.and_then(|loan| loan.slice(range.clone()).ok()) {
            return self.lend(request, &part, metadata);
        }
        let len = range.end.saturating_sub(range.start);
        let outgoing = request.accept_with(len, metadata)?.into_transfer();
        self.kept.tally.count(false, outgoing.send_file_range(file, range)?);
        Ok(())
    }

    /// How it went so far.
    pub fn stats(&self) -> LoanStats {
        let mut stats = LoanStats::default();
        if Own::origin(&self.kept).is_here() {
            let Tally { lent, streamed, bytes, filled } = &self.kept.tally;
            stats.lent = lent.load(Relaxed);
            stats.streamed = streamed.load(Relaxed);
            stats.bytes = bytes.load(Relaxed);
            stats.filled = filled.load(Relaxed);
            for (_, copy) in self.kept.copies.iter() {
                stats.kept += 1;
                stats.kept_bytes += copy.loan.len();
            }
        }
        stats
    }

    fn lend(&self, request: Incoming, loan: &Loan, metadata: &impl Metadata) -> Result<()> {
        let was_lent = request.lend_or_send(loan, metadata)?;
        self.kept.tally.count(was_lent, loan.len());
        Ok(())
    }

    /// What to lend for this file to this client.
    fn loan_for(&self, request: &Incoming, file: &File, found: &FileMetadata) -> Option<Loan> {
        if is_plain(found) && request.takes_loans() { self.find(file, found) } else { None }
    }

    /// What to lend for this file; has it copied if it is asked for again.
    fn find(&self, file: &File, found: &FileMetadata) -> Option<Loan> {
        if found.len() < SHORTEST || !Own::origin(&self.kept).is_here() {
            return None;
        }
        let (id, version) = (FileId::of(found), Version::of(found));
        let kept = &self.kept;
        match kept.copies.get(&id) {
            Some(copy) if copy.version == version => return Some(copy.loan),
            // Never again of use.
            Some(_) => drop(kept.copies.remove_if(&id, |copy| copy.version != version)),
            None => {}
        }
        if kept.has_room_for(version.len) && version.is_settled() && kept.seen.again(id, version) {
            Kept::fill(kept, file, id, version);
        }
        if self.lend_files { kept.lend_file(file, id, version.len) } else { None }
    }
}

impl Default for LoanStore {
    /// A store of 256 MiB, or of an eighth of the memory that the system has available now, if that
    /// is less.
    fn default() -> LoanStore {
        let most = available_memory().map_or(u64::MAX, |available| available / 8);
        LoanStore::new(most.min(256 << 20))
    }
}

impl fmt::Debug for LoanStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoanStore")
            .field("budget", &self.kept.budget)
            .field("lend_files", &self.lend_files)
            .finish_non_exhaustive()
    }
}

/// What the clones of a store share.
struct Kept {
    budget: u64,
    weight: Weight,
    copies: Cache<FileId, Copied, Weight, RandomState>,
    /// Open files, to be lent as they are.
    files: Cache<FileId, Loan, Each, RandomState>,
    seen: Seen,
    filling: Mutex<Filling>,
    tally: Tally,
}

/// A sealed copy of a file.
#[derive(Clone)]
struct Copied {
    version: Version,
    loan: Loan,
}

/// The copies that wait to be made, or are being made.
#[derive(Default)]
struct Filling {
    /// Prevents that one file is copied twice at a time.
    files: HashSet<FileId>,
    /// To the thread that makes them, once there is one. It ends when this is dropped.
    jobs: Option<Sender<Job>>,
}

/// A copy to be made.
struct Job {
    file: File,
    id: FileId,
    version: Version,
}

impl Kept {
    /// Whether the cache takes a copy of so many bytes.
    fn has_room_for(&self, len: u64) -> bool {
        self.weight.of(len) as f64 <= self.budget as f64 * SHARE_OF_ONE
    }

    /// Has a file copied, unless too many wait for that already. What fails here is tried again at
    /// the next request but one.
    fn fill(this: &Arc<Kept>, file: &File, id: FileId, version: Version) {
        let mut filling = lock(&this.filling);
        // It may have been made since this request looked.
        let is_kept = || this.copies.peek(&id).is_some_and(|copy| copy.version == version);
        if filling.files.contains(&id) || is_kept() {
            return;
        }
        if filling.jobs.is_none() {
            let (jobs, next) = bounded(MOST_WAITING);
            let kept = Arc::downgrade(this);
            let named = thread::Builder::new().name("shmferry-loans".to_owned());
            if named.spawn(move || make_copies(&next, &kept)).is_err() {
                return;
            }
            filling.jobs = Some(jobs);
        }
        let Some(jobs) = filling.jobs.as_ref().filter(|jobs| !jobs.is_full()) else { return };
        let Some(file) = duplicate(file) else { return };
        match jobs.try_send(Job { file, id, version }) {
            Ok(()) => _ = filling.files.insert(id),
            Err(TrySendError::Full(_)) => {}
            // The thread has panicked. The next request starts another.
            Err(TrySendError::Disconnected(_)) => *filling = Filling::default(),
        }
    }

    /// Makes a copy and keeps it, if the file is still the same afterwards.
    fn make(&self, job: &Job) {
        if let Some(loan) = job.copy() {
            self.tally.filled.fetch_add(1, Relaxed);
            self.copies.insert(job.id, Copied { version: job.version, loan });
        }
        // Last: whoever finds it gone from here finds the copy.
        lock(&self.filling).files.remove(&job.id);
    }

    /// The file itself as a loan; one loan as long as its length stays, since its descriptor shows
    /// the file as it is now.
    fn lend_file(&self, file: &File, id: FileId, len: u64) -> Option<Loan> {
        if let Some(loan) = self.files.get(&id).filter(|loan| loan.len() == len) {
            return Some(loan);
        }
        let loan = Loan::file(duplicate(file)?).ok()?;
        if loan.len() != len {
            return None; // it changes just now
        }
        self.files.insert(id, loan.clone());
        Some(loan)
    }
}

/// What the thread does until the store is gone.
fn make_copies(jobs: &Receiver<Job>, kept: &Weak<Kept>) {
    for job in jobs {
        let Some(kept) = kept.upgrade() else { return };
        kept.make(&job);
    }
}

impl Job {
    /// `None` if the file is not as it was asked for, changes meanwhile, or cannot be copied.
    fn copy(&self) -> Option<Loan> {
        let is_same = || {
            let found = self.file.metadata().ok();
            found.is_some_and(|found| Version::of(&found) == self.version)
        };
        let can_be_trusted = |magic| !FOREIGN.contains(&magic);
        if !is_same() || !can_be_trusted(fstatfs(&self.file).ok()?.f_type) {
            return None;
        }
        let loan = Loan::from_file(&self.file).ok()?;
        let is_good = loan.len() == self.version.len && !is_among_the_last(&loan) && is_same();
        is_good.then_some(loan)
    }
}

/// Others, those of procfs among them, can be longer than they say.
fn is_plain(found: &FileMetadata) -> bool {
    found.is_file() && found.blocks() > 0
}

/// Another descriptor of the file, unless few are left.
fn duplicate(file: &File) -> Option<File> {
    file.try_clone().ok().filter(|file| !is_among_the_last(file))
}

/// Whether a new descriptor is of the last quarter that the process may have. The system gives the
/// lowest free number, so that this tells how many are in use. The last are left to those who open
/// files to answer from, and to clients.
fn is_among_the_last(new: impl AsFd) -> bool {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    u64::try_from(new.as_fd().as_raw_fd()).is_ok_and(|number| number >= most - most / 4)
}

/// File systems of another process or machine, by the numbers of `linux/magic.h`: their times are
/// not this machine's, and can be kept from it for seconds.
const FOREIGN: [FsWord; 8] = [
    0x6573_5546, // FUSE
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x5346_414f, // AFS
    0x7375_7245, // Coda
];

/// Which file. It has one copy at most, so that a changed file's old one goes at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(found: &FileMetadata) -> FileId {
        FileId { device: found.dev(), inode: found.ino() }
    }
}

/// What differs once a file has changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Version {
    len: u64,
    modified: FileTime,
    changed: FileTime,
}

/// Nanoseconds since 1970.
type FileTime = i128;

/// Longer than a tick of the clock that files' times are taken from: 1 to 10 ms.
const TICKS: FileTime = 50_000_000;
const SECOND: FileTime = 1_000_000_000;
/// How long one system call may write at a byte. It sets the file's time only when it begins.
const WRITING_A_BYTE: FileTime = 10;

impl Version {
    fn of(found: &FileMetadata) -> Version {
        let time = |seconds: i64, nanoseconds: i64| {
            FileTime::from(seconds) * SECOND + FileTime::from(nanoseconds)
        };
        Version {
            len: found.len(),
            modified: time(found.mtime(), found.mtime_nsec()),
            changed: time(found.ctime(), found.ctime_nsec()),
        }
    }

    /// Whether any change from now on gives the file other times: none of them is so recent that
    /// the clock they are taken from, or a file system that counts seconds, could show it still.
    fn is_settled(&self) -> bool {
        let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else {
            return false;
        };
        let now = now.as_nanos() as FileTime;
        let is_coarse = self.modified % SECOND == 0 && self.changed % SECOND == 0;
        let step = if is_coarse { 2 * SECOND } else { 0 };
        let margin = TICKS + step + FileTime::from(self.len) * WRITING_A_BYTE;
        // A modification time far ahead, which any program can set, is not what a change gives.
        let is_past = |time| now - time > margin;
        is_past(self.changed) && (is_past(self.modified) || self.modified - now > margin)
    }
}

/// Remembers what was asked for lately: bounded, without a lock. Forgets one when another comes to
/// the same place.
struct Seen {
    places: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Seen {
    fn new() -> Seen {
        let places = (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect();
        Seen { places, hasher: RandomState::new() }
    }

    /// Whether it is remembered, and forgets it then; else remembers it. So a file that was evicted
    /// has to be asked for twice again.
    fn again(&self, id: FileId, version: Version) -> bool {
        let hash = self.hasher.hash_one((id, version)) | 1;
        let place = &self.places[(hash >> 32) as usize % REMEMBERED];
        let is_remembered = place.load(Relaxed) == hash;
        place.store(if is_remembered { 0 } else { hash }, Relaxed);
        is_remembered
    }
}

/// How it went so far.
#[derive(Default)]
struct Tally {
    lent: AtomicU64,
    streamed: AtomicU64,
    bytes: AtomicU64,
    filled: AtomicU64,
}

impl Tally {
    fn count(&self, was_lent: bool, bytes: u64) {
        let answers = if was_lent { &self.lent } else { &self.streamed };
        answers.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

/// What a copy takes of the budget: its pages, and so much that there are not too many.
#[derive(Clone, Copy)]
struct Weight {
    least: u64,
}

impl Weight {
    fn of(self, len: u64) -> u64 {
        len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX).max(self.least)
    }
}

impl Weighter<FileId, Copied> for Weight {
    fn weight(&self, _: &FileId, copy: &Copied) -> u64 {
        self.of(copy.loan.len())
    }
}

/// Each counts for one.
#[derive(Clone)]
struct Each;

impl<V> Weighter<FileId, V> for Each {
    fn weight(&self, _: &FileId, _: &V) -> u64 {
        1
    }
}

/// A cache with one shard, so that a single file can take nearly all of it.
fn cache<V, W>(capacity: u64, weight: W) -> Cache<FileId, V, W, RandomState>
where
    V: Clone,
    W: Weighter<FileId, V> + Clone,
{
    let options = OptionsBuilder::new()
        .shards(1)
        .estimated_items_capacity(64) // it grows
        .weight_capacity(capacity)
        .hot_allocation(SHARE_OF_ONE)
        .build();
    let options = options.unwrap_or_else(|_| unreachable!("all that it requires is given"));
    Cache::with_options(options, weight, RandomState::new(), DefaultLifecycle::default())
}
