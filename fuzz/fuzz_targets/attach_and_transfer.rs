//! An honest side of a transfer, while the fuzzer writes to the memory before it is attached and between
//! its steps: no panic, no byte beyond what was announced, no segment lost.
//!
//! Nothing here waits: every deadline has passed.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use shmferry::fuzzing::{offered, starting};
use shmferry::error::Misuse;
use shmferry::protocol::{Receiver, Receiving, Reply, Sender, Sending, ShmTransfer};
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::{Deadline, Error, Fault, Refusal, Size};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut script = Script(bytes);
    match script.byte() % 2 {
        0 => receive(&mut script),
        _ => send(&mut script),
    }
});

/// The fuzzer's bytes, read from the front; zeros at the end.
struct Script<'b>(&'b [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// More often than not, until the script is over.
    fn goes_on(&mut self) -> bool {
        !self.is_over() && !self.byte().is_multiple_of(8)
    }

    /// Writes to a word of the header: one that matters, or any.
    fn spoil(&mut self, memory: impl AsFd) {
        const TURN: u64 = 128;
        const WORDS: [u64; 14] =
            [256, 260, 264, 272, 276, 1408, 1412, 1536, 1540, 1664, 1672, 1792, 1796, 1800];
        let (at, bytes) = match self.byte() {
            // A turn that makes sense.
            which @ 0..64 => {
                let word = u64::from(which % 4) << 8 | u64::from(self.byte() % 10);
                (TURN, word.to_ne_bytes().to_vec())
            }
            // A small number, or the poison with it, in a word that matters.
            which @ 64..160 => {
                let value = self.byte();
                let value = u32::from(value & 0x7f) | u32::from(value & 0x80) << 24;
                (WORDS[usize::from(which) % WORDS.len()], value.to_ne_bytes().to_vec())
            }
            which @ 160..224 => {
                (WORDS[usize::from(which) % WORDS.len()], (self.number() as u32).to_ne_bytes().to_vec())
            }
            which => {
                let at = (usize::from(which) << 8 | usize::from(self.byte())) % 4088;
                (at as u64, self.number().to_ne_bytes().to_vec())
            }
        };
        rustix::io::pwrite(memory, &bytes, at).expect("memory that is sealed against resizing only");
    }
}

fn now() -> Deadline {
    Deadline::after(Duration::ZERO)
}

/// The error is a peer's, or time's, or says that the transfer is over.
fn expected(error: &Error) {
    let over = matches!(error, Error::Misuse(Misuse::TransferOver));
    assert!(over || matches!(error.fault(), Fault::Peer | Fault::Time), "{error:?}");
}

fn cause(error: std::io::Error) -> Error {
    *error.into_inner().expect("an error of ours").downcast().expect("an error of ours")
}

fn receive(script: &mut Script<'_>) {
    let (slots, slot_len) = (u32::from(script.byte() % 4) + 1, u64::from(script.byte()) + 1);
    let pool = SegmentPool::<Memfd>::builder().segments(1).slots(slots);
    let pool = pool.segment_len(slot_len * u64::from(slots)).create().expect("a small pool");
    for _ in 0..3 {
        if pool.stats().idle == 0 {
            // Replaced in the end, but that takes its time.
            assert_eq!(pool.stats().quarantined, 1, "the segment is lost");
            return;
        }
        let (transfer, memory) = offered(&pool).expect("idle, and not spoilt");
        while script.goes_on() {
            script.spoil(&memory);
        }
        match transfer.reply(now()) {
            Ok(Reply::Found(mut body)) => {
                body.set_timeout(Duration::ZERO);
                take(script, &mut body, memory, slot_len);
            }
            Ok(Reply::Refused(_) | Reply::Lent(_)) => {}
            Err(error) => expected(&error),
        }
    }
}

fn take(
    script: &mut Script<'_>,
    body: &mut ShmTransfer<Receiver, Receiving>,
    memory: impl AsFd,
    slot_len: u64,
) {
    let announced = body.size();
    let metadata: Vec<u8> = body.metadata().expect("any bytes");
    assert!(metadata.len() <= shmferry::protocol::METADATA_LIMIT);
    let (mut received, mut failed) = (0, false);
    let whole = |received| announced.known().is_none_or(|announced| announced == received);
    while !script.is_over() {
        let mut buffer = [0; 300];
        match script.byte() % 8 {
            0 => match body.next_chunk(now()) {
                Ok(Some(mut chunk)) => {
                    let len = chunk.len() as u64;
                    assert!(len > 0 && len <= slot_len && !failed);
                    let some = usize::from(script.byte());
                    assert_eq!(chunk.copy_to(&mut buffer[..some]), some.min(len as usize));
                    received += len;
                }
                Ok(None) => assert!(whole(received) && !failed),
                Err(error) => {
                    expected(&error);
                    failed |= !matches!(error, Error::Timeout(_));
                }
            },
            1 => match body.read(&mut buffer) {
                Ok(0) => assert!(whole(received) && !failed),
                Ok(read) => {
                    assert!(read as u64 <= slot_len && !failed);
                    received += read as u64;
                }
                Err(error) => {
                    let error = cause(error);
                    expected(&error);
                    failed |= !matches!(error, Error::Timeout(_));
                }
            },
            _ => script.spoil(&memory),
        }
        assert_eq!(body.size(), announced);
        assert!(announced.known().is_none_or(|announced| received <= announced));
    }
}

fn send(script: &mut Script<'_>) {
    let (slots, slot_len) = (u32::from(script.byte() % 4) + 1, u32::from(script.byte()) + 1);
    let generation = u64::from(script.byte() % 4);
    let begun = starting(slots, slot_len, generation, |memory| {
        // As an honest receiver has it, and then as the script wants it.
        rustix::io::pwrite(memory, &(generation << 8 | 1).to_ne_bytes(), 128).expect("memory");
        rustix::io::pwrite(memory, &slots.to_ne_bytes(), 1536).expect("memory");
        while script.goes_on() {
            script.spoil(memory);
        }
    });
    let (transfer, memory) = match begun {
        Ok(begun) => begun,
        Err(Error::Layout(_)) => return,
        Err(error) => panic!("{error:?}"),
    };
    let choice = script.byte();
    if choice.is_multiple_of(8) {
        return transfer.refuse(Refusal::other(choice.into())).unwrap_or_else(|error| expected(&error));
    }
    let size =
        if choice.is_multiple_of(2) { Size::Unknown } else { Size::Known(u64::from(script.byte()) * 4) };
    match transfer.accept_with(size, &vec![7u8; usize::from(choice)]) {
        Ok(mut sending) => {
            sending.set_timeout(Duration::ZERO);
            give(script, sending, memory);
        }
        Err(error) => expected(&error),
    }
}

fn give(script: &mut Script<'_>, mut sending: ShmTransfer<Sender, Sending>, memory: impl AsFd) {
    // What we do wrong ourselves, by the script's will.
    let ours = |error: &Error| {
        matches!(error, Error::SizeMismatch { .. } | Error::Misuse(Misuse::ChunkTooLong { .. }))
    };
    let check = |error: Error| {
        assert!(
            ours(&error) || {
                expected(&error);
                true
            }
        )
    };
    while !script.is_over() {
        match script.byte() % 8 {
            0 => {
                let bytes = vec![1; usize::from(script.byte())];
                let _ = sending.next_slot(now()).and_then(|slot| slot.send(&bytes)).map_err(check);
            }
            1 => {
                let bytes = vec![2; usize::from(script.byte())];
                let _ = sending.write(&bytes).map_err(|error| check(cause(error)));
            }
            2 => {
                let _ = sending.flush().map_err(|error| check(cause(error)));
            }
            _ => script.spoil(&memory),
        }
        assert!(sending.size().known().is_none_or(|size| sending.sent() <= size));
    }
    let _ = sending.finish().map_err(check);
}
