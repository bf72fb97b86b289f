//! One pool with its requester: asks the cache for known files, checks every byte, and accounts for
//! every request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use shmferry::channel::{Named, PosixMq, Requester, Seqpacket};
use shmferry::error::Awaited;
use shmferry::loan::Lent;
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::{Address, Deadline, Error, Refusal, Result, Size};

use super::chance::Dice;
use super::files::{FileId, Files};

/// Segments of each pool: one in use, and one that may be in the hands of a late cache.
pub const SEGMENTS: u32 = 2;

/// The bytes of a segment: larger files take several chunks.
const SEGMENT_LEN: u64 = 16 << 10;

/// How long a request may take that waits for a successor of the cache.
pub const LONG: Duration = Duration::from_secs(12);

/// How long any other may take.
const SHORT: Duration = Duration::from_secs(3);

/// How a request ended. There is no other way.
pub enum Outcome {
    /// With all bytes, each as it should be.
    Answered,
    /// The file is not there, as is right.
    Refused,
    /// With this error.
    Failed { cause: String, is_timeout: bool, has_no_reply: bool },
    /// With what may not be.
    Wrong(String),
}

/// A request that has ended.
pub struct Asked {
    pub outcome: Outcome,
    pub took: Duration,
    /// Until its deadline.
    pub timeout: Duration,
}

/// A request that ends so long after its deadline is late.
const SLACK: Duration = Duration::from_secs(1);

impl Asked {
    pub fn is_late(&self) -> bool {
        self.took > self.timeout + SLACK
    }
}

/// Asks again and again.
pub struct Asker {
    address: Address,
    seed: u64,
    number: u64,
    /// Requests so far, the one under way included.
    begun: Arc<AtomicU64>,
    way: Option<Box<dyn Way>>,
    /// Lent bytes that are held across restarts and deaths of the cache, and what they were.
    held: Option<(Lent, Vec<u8>)>,
}

impl Asker {
    /// Counts in `begun` what it asks, before it does.
    pub fn new(address: Address, seed: u64, number: u64, begun: Arc<AtomicU64>) -> Asker {
        Asker { address, seed, number, begun, way: None, held: None }
    }

    /// Asks for one file, and says for how long to think then. Nothing is asked where the system
    /// has not got the memory for a pool.
    pub fn ask(&mut self, files: &Files, rushes: bool) -> (Option<Asked>, Duration) {
        let asked = self.begun.load(SeqCst);
        let mut dice = Dice::of(self.seed, ASKER + self.number, asked);
        if dice.roll(LIFETIME) == 0 {
            self.way = None; // another process, as it were
        }
        let pause = self.pause(asked, rushes, &mut dice);
        let timeout = dice.pick(&[SHORT, SHORT, LONG]);
        let wanted = match dice.roll(20) {
            0 => None,
            1 => Some(files.middling(&mut dice)),
            _ => Some(files.small(&mut dice)),
        };
        let way = match self.way.take().map_or_else(|| open(&self.address, self.number), Ok) {
            Ok(way) => self.way.insert(way),
            Err(_) => return (None, LACKING),
        };
        self.begun.fetch_add(1, SeqCst);
        let start = Instant::now();
        let key = match wanted {
            Some(file) => files.key(file),
            None => format!("/absent/{}", dice.roll(1000)),
        };
        let outcome = match way.ask(&key, Deadline::after(timeout)) {
            Ok(answer) => self.hold(&answer).unwrap_or_else(|| answer.judge(files, wanted, start)),
            Err(error) => Outcome::Failed {
                is_timeout: matches!(error, Error::Timeout(_)),
                has_no_reply: matches!(error, Error::Timeout(Awaited::Reply)),
                cause: error.to_string(),
            },
        };
        (Some(Asked { outcome, took: start.elapsed(), timeout }), pause)
    }

    /// Holds what was lent, in place of what was held before; wrong if that has changed.
    fn hold(&mut self, answer: &Answer) -> Option<Outcome> {
        let Answer::File(_, bytes, Some(lent)) = answer else { return None };
        let before = self.held.replace((lent.clone(), bytes.clone()));
        let is_changed = before.is_some_and(|(lent, bytes)| lent[..] != bytes[..]);
        is_changed.then(|| Outcome::Wrong("lent bytes that changed while they were held".into()))
    }

    /// Some ask without a pause for a while; most think each time, unless all are in a rush.
    fn pause(&self, asked: u64, rushes: bool, dice: &mut Dice) -> Duration {
        let is_eager = self.number.is_multiple_of(6) && !asked.is_multiple_of(50);
        match dice.roll(400) {
            thought if rushes => Duration::from_micros(thought),
            _ if is_eager => Duration::ZERO,
            thought => Duration::from_millis(100 + thought),
        }
    }
}

/// Whose dice they are.
const ASKER: u64 = 1_000_000;

/// What each keeps of what is lent to it, in bytes and loans: little, so that much is returned.
const KEPT: (u64, u32) = (128 << 10, 4);

/// Requests that a pool lives for, on average.
const LIFETIME: u64 = 300;

/// How long to wait for memory.
const LACKING: Duration = Duration::from_millis(100);

/// A pool and its queue, whatever the segments are made of.
trait Way: Send {
    fn ask(&self, key: &str, deadline: Deadline) -> Result<Answer>;
}

impl<B: Backing, Q: Requester<B>> Way for (SegmentPool<B>, Q) {
    fn ask(&self, key: &str, deadline: Deadline) -> Result<Answer> {
        let (pool, queue) = self;
        let lease = pool.lease(deadline)?;
        Answer::read(queue.ask(lease, key.as_bytes(), deadline)?, deadline)
    }
}

/// A client of tasks, with a runtime on this one thread: nobody attends to its connection while it
/// thinks.
struct TaskWay {
    client: shmferry::tokio::Client,
    runtime: tokio::runtime::Runtime,
    /// Decides about what is dropped.
    asked: AtomicU64,
}

/// Every so many requests, another one is dropped before it.
const DROPS: u64 = 4;

impl TaskWay {
    fn open(address: &Address) -> Result<TaskWay> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().map_err(Error::Io)?;
        let entered = runtime.enter();
        let client = shmferry::Client::builder()
            .segments(SEGMENTS)
            .segment_len(SEGMENT_LEN)
            .slots(2)
            .keep_loans(KEPT.0, KEPT.1)
            .timeout(LONG)
            .connect_tokio(address.clone())?;
        drop(entered);
        Ok(TaskWay { client, runtime, asked: AtomicU64::new(0) })
    }

    async fn read(&self, key: &str) -> Result<Answer> {
        let body = match self.client.get(key).await {
            Ok(body) => body,
            Err(Error::Refused(why)) => return Ok(Answer::Refused(why)),
            Err(error) => return Err(error),
        };
        let size = body.size();
        Ok(Answer::File(size, body.read_all().await?, None))
    }
}

impl Way for TaskWay {
    fn ask(&self, key: &str, deadline: Deadline) -> Result<Answer> {
        let asked = self.asked.fetch_add(1, SeqCst);
        self.runtime.block_on(async {
            if asked.is_multiple_of(DROPS) {
                // At whatever point it is by then.
                let moment = Duration::from_micros(asked * 37 % 2000);
                let _ = tokio::time::timeout(moment, self.read(key)).await;
            }
            let left = deadline.remaining().unwrap_or(LONG);
            let late = |_| Err(Error::Timeout(Awaited::Reply));
            tokio::time::timeout(left, self.read(key)).await.unwrap_or_else(late)
        })
    }
}

/// Every second asks by tasks, where that can be.
fn open(address: &Address, number: u64) -> Result<Box<dyn Way>> {
    Ok(match address {
        Address::Unix(_) if number.is_multiple_of(2) => Box::new(TaskWay::open(address)?),
        Address::Unix(path) => {
            let pool = pool::<Memfd>()?;
            let queue = Seqpacket::new(path).keep_loans(KEPT.0, KEPT.1).requester(&pool)?;
            Box::new((pool, queue))
        }
        Address::Mq(name) => {
            let pool = pool::<Named>()?;
            let queue = PosixMq::new(name)?.requester(&pool);
            Box::new((pool, queue))
        }
        other => unreachable!("no pool is asked for {other}"),
    })
}

fn pool<B: Backing>() -> Result<SegmentPool<B>> {
    SegmentPool::builder().segments(SEGMENTS).segment_len(SEGMENT_LEN).slots(2).create()
}

/// What the cache has sent.
enum Answer {
    Refused(Refusal),
    File(Size, Vec<u8>, Option<Lent>),
}

impl Answer {
    fn read(reply: Reply, deadline: Deadline) -> Result<Answer> {
        let mut body = match reply {
            Reply::Refused(why) => return Ok(Answer::Refused(why)),
            Reply::Found(body) => body,
            Reply::Lent(body) => {
                let bytes = body.into_bytes()?;
                let size = Size::Known(bytes.len() as u64);
                return Ok(Answer::File(size, bytes.to_vec(), Some(bytes)));
            }
        };
        let mut bytes = Vec::new();
        while let Some(mut chunk) = body.next_chunk(deadline)? {
            let at = bytes.len();
            bytes.resize(at + chunk.len(), 0);
            chunk.copy_to(&mut bytes[at..]);
        }
        Ok(Answer::File(body.size(), bytes, None))
    }

    fn judge(self, files: &Files, wanted: Option<FileId>, start: Instant) -> Outcome {
        match (self, wanted) {
            (Answer::Refused(Refusal::NotFound), None) => Outcome::Refused,
            // What with, its own log tells.
            (Answer::Refused(Refusal::Failed), _) => {
                let cause = "the cache says that it failed".to_owned();
                Outcome::Failed { cause, is_timeout: false, has_no_reply: false }
            }
            // The last answer before the deadline, for which no successor came in time.
            (Answer::Refused(Refusal::Leaving), _) => {
                let cause = "the cache ends, and no successor came in time".to_owned();
                Outcome::Failed { cause, is_timeout: true, has_no_reply: false }
            }
            (Answer::Refused(why), _) => Outcome::Wrong(format!("refused: {why:?}")),
            (Answer::File(..), None) => Outcome::Wrong("a file that is not there".to_owned()),
            (Answer::File(size, bytes, _), Some(file)) => {
                let candidates = files.candidates(file, bytes.len() as u64, start);
                let is_right = candidates.iter().any(|candidate| candidate.has(0, &bytes));
                if is_right && size == Size::Known(bytes.len() as u64) {
                    Outcome::Answered
                } else {
                    Outcome::Wrong(format!(
                        "{} bytes of {size:?} for {}",
                        bytes.len(),
                        files.key(file)
                    ))
                }
            }
        }
    }
}
