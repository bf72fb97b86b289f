//! Properties over inputs at random: transfers against a plain model.
//!
//! `PROPTEST_CASES` in the environment says how many cases each property tries.

use std::collections::VecDeque;
use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::OnceLock;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use shmferry::channel::{InProcess, RequestQueue, Requester};
use shmferry::error::{Awaited, Misuse};
use shmferry::protocol::{
    METADATA_LIMIT, Offered, Receiver, Receiving, Reply, Sender, Sending, ShmTransfer, Starting,
};
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error, Refusal, Size};

fn config(cases: u32) -> ProptestConfig {
    let asked = env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// No step waits: what cannot be done now times out.
fn now() -> Deadline {
    Deadline::after(Duration::ZERO)
}

/// The byte at this position of every transfer, wherever it comes from.
fn byte_at(position: u64) -> u8 {
    (position % 251) as u8
}

fn bytes_at(position: u64, len: usize) -> Vec<u8> {
    (position..position + len as u64).map(byte_at).collect()
}

/// More than any transfer here sends.
const SOURCE_LEN: u64 = 1 << 20;

/// A file with the bytes of every transfer.
fn source() -> &'static File {
    static SOURCE: OnceLock<File> = OnceLock::new();
    SOURCE.get_or_init(|| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes_at(0, SOURCE_LEN as usize)).unwrap();
        file
    })
}

/// What is done next. Numbers are brought into range when it is done.
#[derive(Clone, Debug)]
enum Step {
    /// Leases a segment, and has a sender take the request up.
    Ask,
    /// Leases a segment, and drops the request.
    AskInVain,
    /// The sender's, of one of the transfers.
    Sender(u8, SenderStep),
    /// The receiver's, of one of the transfers.
    Receiver(u8, ReceiverStep),
}

#[derive(Clone, Debug)]
enum SenderStep {
    Accept(Option<u16>, usize),
    Refuse(u16),
    Chunk(u16),
    ChunkFromFile,
    Write(u16),
    Flush,
    Finish,
    Drop,
}

#[derive(Clone, Debug)]
enum ReceiverStep {
    Reply,
    Chunk(u16),
    Read(u16),
    Drop,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sender = prop_oneof![
        6 => (proptest::option::of(any::<u16>()), prop_oneof![Just(0), 0..=METADATA_LIMIT + 1])
            .prop_map(|(size, metadata)| SenderStep::Accept(size, metadata)),
        1 => any::<u16>().prop_map(SenderStep::Refuse),
        6 => any::<u16>().prop_map(SenderStep::Chunk),
        3 => Just(SenderStep::ChunkFromFile),
        6 => any::<u16>().prop_map(SenderStep::Write),
        3 => Just(SenderStep::Flush),
        2 => Just(SenderStep::Finish),
        1 => Just(SenderStep::Drop),
    ];
    let receiver = prop_oneof![
        4 => Just(ReceiverStep::Reply),
        6 => any::<u16>().prop_map(ReceiverStep::Chunk),
        6 => any::<u16>().prop_map(ReceiverStep::Read),
        1 => Just(ReceiverStep::Drop),
    ];
    // The latest transfer mostly, but late senders and receivers of older ones, too.
    let which = || prop_oneof![8 => Just(0u8), 2 => any::<u8>()];
    let step = prop_oneof![
        3 => Just(Step::Ask),
        1 => Just(Step::AskInVain),
        16 => (which(), sender).prop_map(|(which, step)| Step::Sender(which, step)),
        16 => (which(), receiver).prop_map(|(which, step)| Step::Receiver(which, step)),
    ];
    vec(step, 1..80)
}

/// The sender's side as it is.
enum Giving {
    Starting(ShmTransfer<Sender, Starting>),
    Sending(ShmTransfer<Sender, Sending>),
    Gone,
}

/// The receiver's side as it is.
enum Taking {
    Offered(ShmTransfer<Receiver, Offered>),
    Receiving(ShmTransfer<Receiver, Receiving>),
    Gone,
}

/// Where the model says that the sender is.
#[derive(Clone, Debug, PartialEq)]
enum Stand {
    Offered,
    Accepted,
    Finished,
    Refused(Refusal),
    Aborted,
    /// Withdrawn by the receiver.
    Withdrawn,
    /// The request was dropped.
    NeverSent,
}

/// One transfer, real and modelled.
struct Transfer {
    giving: Giving,
    taking: Taking,
    model: Model,
}

struct Model {
    slots: usize,
    slot_len: usize,
    stand: Stand,
    size: Size,
    metadata: Vec<u8>,
    sent: u64,
    /// Bytes in the slot that the sender holds.
    pending: usize,
    holds_slot: bool,
    free: usize,
    /// Chunks handed over that the receiver has not closed: their lengths, and whether they are the last.
    chunks: VecDeque<(usize, bool)>,
    /// Bytes of the chunk in front that were read, if it is open.
    open: Option<usize>,
    /// Where the receiver is in the bytes.
    received: u64,
    end: bool,
    failed: bool,
    cancelled: bool,
}

impl Model {
    fn new(slots: usize, slot_len: usize) -> Model {
        Model {
            slots,
            slot_len,
            stand: Stand::Offered,
            size: Size::Unknown,
            metadata: Vec::new(),
            sent: 0,
            pending: 0,
            holds_slot: false,
            free: slots,
            chunks: VecDeque::new(),
            open: None,
            received: 0,
            end: false,
            failed: false,
            cancelled: false,
        }
    }

    fn room(&self) -> u64 {
        self.size.known().map_or(u64::MAX, |size| size - self.sent)
    }

    fn is_off(&self) -> bool {
        self.stand != Stand::Offered && self.stand != Stand::Accepted
    }

    /// The sender is about to need a slot.
    fn take_slot(&mut self) -> Result<(), Expected> {
        if self.stand != Stand::Accepted {
            return Err(Expected::Over);
        }
        if !self.holds_slot {
            if self.cancelled {
                return Err(Expected::Cancelled);
            }
            if self.free == 0 {
                return Err(Expected::Timeout(Awaited::FreeSlot));
            }
            self.free -= 1;
            self.holds_slot = true;
        }
        Ok(())
    }

    fn publish(&mut self, len: usize, last: bool) {
        assert!(self.holds_slot && self.chunks.len() < self.slots);
        self.holds_slot = false;
        self.pending = 0;
        self.sent += len as u64;
        let last = last || self.size == Size::Known(self.sent);
        self.chunks.push_back((len, last));
        if last {
            self.stand = Stand::Finished;
        }
    }

    /// What is pending goes out before a slot is asked for.
    fn next_slot(&mut self) -> Result<(), Expected> {
        if self.pending > 0 {
            if self.stand != Stand::Accepted {
                return Err(Expected::Over);
            }
            self.publish(self.pending, false);
        }
        self.take_slot()
    }

    /// The sender is dropped.
    fn drop_sender(&mut self) {
        if matches!(self.stand, Stand::Offered | Stand::Accepted) {
            self.stand = Stand::Aborted;
        }
    }

    /// The receiver is dropped.
    fn drop_receiver(&mut self) {
        match self.stand {
            Stand::Offered => self.stand = Stand::Withdrawn,
            Stand::Accepted => self.cancelled = true,
            _ => {}
        }
    }

    /// The receiver needs a chunk; `false` at the end.
    fn open(&mut self) -> Result<bool, Expected> {
        while self.open.is_none() {
            if self.end {
                return Ok(false);
            }
            if self.failed {
                return Err(Expected::Over);
            }
            match self.chunks.front() {
                Some((0, true)) => self.end = true,
                Some(_) => self.open = Some(0),
                None if self.stand == Stand::Aborted => {
                    self.failed = true;
                    return Err(Expected::Aborted);
                }
                None => return Err(Expected::Timeout(Awaited::FilledSlot)),
            }
        }
        Ok(true)
    }

    fn unread(&self) -> usize {
        self.open.map_or(0, |read| self.chunks[0].0 - read)
    }

    fn read(&mut self, len: usize) -> usize {
        let len = len.min(self.unread());
        if let Some(read) = &mut self.open {
            *read += len;
        }
        self.received += len as u64;
        len
    }

    fn close(&mut self) {
        self.received += self.unread() as u64;
        self.open = None;
        let (_, last) = self.chunks.pop_front().unwrap();
        if last { self.end = true } else { self.free += 1 }
    }
}

/// How a step is to fail.
#[derive(Debug)]
enum Expected {
    Timeout(Awaited),
    Cancelled,
    Aborted,
    Over,
    SizeMismatch,
    ChunkTooLong,
}

impl Expected {
    #[track_caller]
    fn check(&self, error: &Error) {
        let same = match (self, error) {
            (Expected::Timeout(awaited), Error::Timeout(found)) => awaited == found,
            (Expected::Cancelled, Error::Cancelled) | (Expected::Aborted, Error::Aborted) => true,
            (Expected::Over, Error::Misuse(Misuse::TransferOver)) => true,
            (Expected::SizeMismatch, Error::SizeMismatch { .. }) => true,
            (Expected::ChunkTooLong, Error::Misuse(Misuse::ChunkTooLong { .. })) => true,
            _ => false,
        };
        assert!(same, "{self:?}, but: {error:?}");
    }

    #[track_caller]
    fn check_io(&self, error: io::Error) {
        self.check(
            error.get_ref().and_then(|source| source.downcast_ref()).expect("a source of ours"),
        );
    }
}

/// What came of a step, where both agree that it worked.
#[track_caller]
fn agree<T>(real: Result<T, Error>, model: Result<(), Expected>) -> Option<T> {
    match (real, model) {
        (Ok(value), Ok(())) => Some(value),
        (Err(error), Err(expected)) => {
            expected.check(&error);
            None
        }
        (Ok(_), Err(expected)) => panic!("it worked, but: {expected:?}"),
        (Err(error), Ok(())) => panic!("it should have worked: {error:?}"),
    }
}

impl Transfer {
    fn send(&mut self, step: &SenderStep) {
        let model = &mut self.model;
        match (std::mem::replace(&mut self.giving, Giving::Gone), step) {
            (Giving::Starting(real), SenderStep::Accept(size, metadata)) => {
                let size = size.map_or(Size::Unknown, |size| {
                    Size::Known(u64::from(size) % (3 * (model.slots * model.slot_len) as u64))
                });
                let metadata = bytes_at(0, *metadata);
                let accepted = real.accept_with(size, &metadata);
                if metadata.len() > METADATA_LIMIT {
                    assert!(matches!(accepted, Err(Error::Misuse(Misuse::MetadataTooLong { .. }))));
                    model.drop_sender();
                } else if model.stand == Stand::Withdrawn {
                    assert!(matches!(accepted, Err(Error::Stale)));
                } else {
                    let mut real = accepted.unwrap();
                    real.set_timeout(Duration::ZERO);
                    (model.stand, model.size, model.metadata) = (Stand::Accepted, size, metadata);
                    self.giving = Giving::Sending(real);
                }
            }
            (Giving::Starting(real), SenderStep::Refuse(code)) => {
                let why =
                    [Refusal::NotFound, Refusal::Failed, Refusal::Invalid, Refusal::other(*code)]
                        [*code as usize % 4]
                        .clone();
                let refused = real.refuse(why.clone());
                if model.stand == Stand::Withdrawn {
                    assert!(matches!(refused, Err(Error::Stale)));
                } else {
                    refused.unwrap();
                    model.stand = Stand::Refused(why);
                }
            }
            (giving @ (Giving::Starting(_) | Giving::Sending(_)), SenderStep::Drop) => {
                drop(giving);
                model.drop_sender();
            }
            (Giving::Sending(mut real), step) => {
                self.giving = match step {
                    SenderStep::Finish => {
                        let total = model.sent + model.pending as u64;
                        let expected = if model.size.known().is_some_and(|size| size != total) {
                            Err(Expected::SizeMismatch)
                        } else if model.stand == Stand::Finished {
                            Ok(())
                        } else {
                            model.take_slot().map(|()| model.publish(model.pending, true))
                        };
                        if let Some(sent) = agree(real.finish(), expected) {
                            assert_eq!(sent, total);
                        }
                        model.drop_sender();
                        Giving::Gone
                    }
                    step => {
                        go_on_sending(&mut real, model, step);
                        assert_eq!((real.sent(), real.size()), (model.sent, model.size));
                        Giving::Sending(real)
                    }
                }
            }
            // Not a step of this state.
            (giving, _) => self.giving = giving,
        }
    }

    fn receive(&mut self, step: &ReceiverStep) {
        let model = &mut self.model;
        match (std::mem::replace(&mut self.taking, Taking::Gone), step) {
            (Taking::Offered(real), ReceiverStep::Reply) => {
                let reply = real.reply(now());
                match (reply, model.stand.clone()) {
                    (Ok(Reply::Refused(why)), Stand::Refused(expected)) => {
                        assert_eq!(why, expected)
                    }
                    (Ok(Reply::Found(mut real)), _) if !model.chunks.is_empty() => {
                        assert_eq!(real.size(), model.size);
                        assert_eq!(real.metadata::<Vec<u8>>().unwrap(), model.metadata);
                        real.set_timeout(Duration::ZERO);
                        self.taking = Taking::Receiving(real);
                        return;
                    }
                    (Err(Error::Timeout(Awaited::Reply)), Stand::Offered | Stand::Accepted) => {
                        assert!(model.chunks.is_empty());
                    }
                    (Err(Error::Aborted), Stand::Aborted) => assert!(model.chunks.is_empty()),
                    (Err(Error::Misuse(Misuse::NeverSent)), Stand::NeverSent) => {}
                    (reply, stand) => panic!("{stand:?}, but {reply:?}"),
                }
                model.drop_receiver();
            }
            (taking @ (Taking::Offered(_) | Taking::Receiving(_)), ReceiverStep::Drop) => {
                drop(taking);
                model.drop_receiver();
            }
            (Taking::Receiving(mut real), step) => {
                match step {
                    ReceiverStep::Chunk(len) => take_chunk(&mut real, model, *len as usize),
                    ReceiverStep::Read(len) => read_some(&mut real, model, *len as usize),
                    ReceiverStep::Reply | ReceiverStep::Drop => {}
                }
                self.taking = Taking::Receiving(real);
            }
            (taking, _) => self.taking = taking,
        }
    }
}

fn go_on_sending(real: &mut ShmTransfer<Sender, Sending>, model: &mut Model, step: &SenderStep) {
    match step {
        SenderStep::Chunk(len) => {
            // One in a while too long for the slot.
            let len = *len as usize % (model.slot_len + 2);
            let mut expected = model.next_slot();
            let bytes = bytes_at(model.sent, len);
            if expected.is_ok() {
                if len > model.slot_len {
                    expected = Err(Expected::ChunkTooLong);
                } else if len as u64 > model.room() {
                    expected = Err(Expected::SizeMismatch);
                } else if len > 0 {
                    model.publish(len, false);
                }
            }
            agree(real.next_slot(now()).and_then(|slot| slot.send(&bytes)), expected);
        }
        SenderStep::ChunkFromFile => {
            let expected = model.next_slot();
            let at = model.sent;
            let mut filled = 0;
            if expected.is_ok() {
                filled = (model.slot_len as u64).min(model.room()).min(SOURCE_LEN - at) as usize;
                if filled > 0 {
                    model.publish(filled, false);
                }
            }
            let sent = agree(
                real.next_slot(now()).and_then(|slot| slot.send_from(source(), at)),
                expected,
            );
            assert_eq!(sent.unwrap_or(0), filled);
        }
        SenderStep::Write(len) => {
            let len = *len as usize % (2 * model.slot_len + 2);
            let bytes = bytes_at(model.sent + model.pending as u64, len);
            let written = real.write(&bytes);
            let room = model.room() - model.pending as u64;
            if len == 0 {
                assert_eq!(written.unwrap(), 0);
            } else if len as u64 > room {
                Expected::SizeMismatch.check_io(written.unwrap_err());
                model.drop_sender();
            } else if let Err(expected) = model.take_slot() {
                expected.check_io(written.unwrap_err());
            } else {
                let fits = len.min(model.slot_len - model.pending);
                model.pending += fits;
                if model.pending == model.slot_len || model.pending as u64 == model.room() {
                    model.publish(model.pending, false);
                }
                assert_eq!(written.unwrap(), fits);
            }
        }
        SenderStep::Flush => {
            let flushed = real.flush();
            if model.pending > 0 && model.stand != Stand::Accepted {
                Expected::Over.check_io(flushed.unwrap_err());
            } else {
                flushed.unwrap();
                if model.pending > 0 {
                    model.publish(model.pending, false);
                }
            }
        }
        SenderStep::Accept(..) | SenderStep::Refuse(_) | SenderStep::Finish | SenderStep::Drop => {}
    }
}

fn take_chunk(real: &mut ShmTransfer<Receiver, Receiving>, model: &mut Model, len: usize) {
    let at = model.received;
    let opened = model.open();
    match (real.next_chunk(now()), opened) {
        (Ok(None), Ok(false)) => {}
        (Ok(Some(mut chunk)), Ok(true)) => {
            assert_eq!(chunk.len(), model.unread());
            let mut bytes = vec![0; len % (model.slot_len + 2)];
            let copied = chunk.copy_to(&mut bytes);
            assert_eq!(copied, model.read(bytes.len()));
            assert!(bytes[..copied] == bytes_at(at, copied));
            assert_eq!((chunk.len(), chunk.is_empty()), (model.unread(), model.unread() == 0));
            drop(chunk);
            model.close();
        }
        (Err(error), Err(expected)) => expected.check(&error),
        (real, expected) => panic!("{expected:?}, but {real:?}"),
    }
}

fn read_some(real: &mut ShmTransfer<Receiver, Receiving>, model: &mut Model, len: usize) {
    let mut bytes = vec![0; len % (2 * model.slot_len + 2)];
    let read = real.read(&mut bytes);
    if bytes.is_empty() {
        assert_eq!(read.unwrap(), 0);
        return;
    }
    let at = model.received;
    match model.open() {
        Ok(false) => assert_eq!(read.unwrap(), 0),
        Ok(true) => {
            let read = read.unwrap();
            assert_eq!(read, model.read(bytes.len()));
            assert!(bytes[..read] == bytes_at(at, read));
            if model.unread() == 0 {
                model.close();
            }
        }
        Err(expected) => expected.check_io(read.unwrap_err()),
    }
}

/// Pool and queue, and what the model says about the pool.
struct World {
    pool: SegmentPool<Memfd>,
    queue: InProcess,
    transfers: Vec<Transfer>,
    idle: usize,
    /// Transfers whose segment was given back with their sender on it.
    quarantined: VecDeque<usize>,
    retired: u64,
}

impl World {
    fn new(segments: u32, slots: u32, slot_len: u32) -> World {
        let pool = SegmentPool::builder().segments(segments).slots(slots);
        let pool = pool.segment_len(u64::from(slots) * u64::from(slot_len)).create().unwrap();
        let (queue, transfers, quarantined) = (InProcess::bounded(1), Vec::new(), VecDeque::new());
        World { pool, queue, transfers, idle: segments as usize, quarantined, retired: 0 }
    }

    fn ask(&mut self, sent: bool) {
        let leased = self.pool.lease(now());
        if self.idle > 0 {
            self.idle -= 1;
        } else if let Some(oldest) = self.quarantined.pop_front() {
            self.retired += u64::from(!self.transfers[oldest].model.is_off());
        } else {
            assert!(matches!(leased, Err(Error::Timeout(Awaited::Lease))), "{leased:?}");
            return;
        }
        // Each lease looks after one that lingers, too.
        if let Some(oldest) = self.quarantined.pop_front() {
            if self.transfers[oldest].model.is_off() {
                self.idle += 1
            } else {
                self.quarantined.push_back(oldest)
            }
        }
        let (request, offered) = leased.unwrap().request("key").unwrap();
        let geometry = self.pool.geometry();
        let mut model = Model::new(geometry.slot_count() as usize, geometry.slot_len() as usize);
        let giving = if sent {
            self.queue.send(request, now()).unwrap();
            Giving::Starting(self.queue.recv(now()).unwrap())
        } else {
            model.stand = Stand::NeverSent;
            Giving::Gone
        };
        self.transfers.push(Transfer { giving, taking: Taking::Offered(offered), model });
    }

    fn take(&mut self, step: &Step) {
        // Counted from the latest.
        let chosen = |which: &u8, transfers: &[Transfer]| {
            (!transfers.is_empty()).then(|| transfers.len() - 1 - *which as usize % transfers.len())
        };
        match step {
            Step::Ask => self.ask(true),
            Step::AskInVain => self.ask(false),
            Step::Sender(which, step) => {
                if let Some(chosen) = chosen(which, &self.transfers) {
                    self.transfers[chosen].send(step);
                }
            }
            Step::Receiver(which, step) => {
                let Some(chosen) = chosen(which, &self.transfers) else { return };
                let transfer = &mut self.transfers[chosen];
                let had = !matches!(transfer.taking, Taking::Gone);
                transfer.receive(step);
                if had && matches!(transfer.taking, Taking::Gone) {
                    if transfer.model.is_off() {
                        self.idle += 1
                    } else {
                        self.quarantined.push_back(chosen)
                    }
                }
            }
        }
        let stats = self.pool.stats();
        let real = (stats.idle, stats.quarantined, stats.retired);
        assert_eq!(real, (self.idle, self.quarantined.len(), self.retired));
    }

    /// Everything is dropped, and nothing is lost.
    fn wind_up(self) {
        let World { pool, transfers, retired, .. } = self;
        drop(transfers);
        let segments = pool.stats().segments;
        let leases: Vec<_> = (0..segments).map(|_| pool.lease(now()).unwrap()).collect();
        assert!(pool.lease(now()).is_err());
        assert_eq!(pool.stats().retired, retired, "every sender had left");
        drop(leases);
        assert_eq!(pool.stats().idle, segments);
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn any_steps_of_both_sides_do_what_the_model_does(
        segments in 1u32..=2,
        slots in 1u32..=8,
        slot_len in prop_oneof![1u32..=8, 1u32..=8192],
        steps in steps(),
    ) {
        let mut world = World::new(segments, slots, slot_len);
        steps.iter().for_each(|step| world.take(step));
        world.wind_up();
    }
}
