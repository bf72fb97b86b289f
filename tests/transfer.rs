//! Transfers over every shape of segment and size, and over both backings; pools; what the API refuses.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use shmferry::channel::{InProcess, RequestQueue, Requester, Seqpacket};
use shmferry::error::{Awaited, Misuse};
use shmferry::protocol::{
    METADATA_LIMIT, Receiver, Receiving, Reply, Sender, ShmTransfer, Starting,
};
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::{Deadline, Error, Fault, Size};

/// Every test, over either backing.
macro_rules! over_both {
    ($($test:ident,)*) => {
        mod memfd {
            $(#[test] fn $test() { super::$test::<super::Memfd>() })*
        }
        #[cfg(feature = "posix-mq")]
        mod named {
            $(#[test] fn $test() { super::$test::<shmferry::channel::Named>() })*
        }
    };
}
over_both! {
    every_size_through_every_geometry,
    writes_of_any_length_fill_slots,
    a_range_of_a_file,
    bytes_written_before_a_file_go_out_first,
    a_file_too_short_counts_from_what_went_out_before,
    one_byte_too_many_is_refused_before_anything_goes_out,
    metadata_has_a_limit,
    a_chunk_can_be_written_on_its_own,
    bytes_written_before_a_range_count,
    a_wait_lasts_as_long_as_its_deadline,
    bytes_are_read_where_they_are,
    the_files_own_position_neither_matters_nor_moves,
    a_range_past_four_gigabytes_is_read_where_it_is,
    a_file_that_shrinks_is_an_error_on_both_sides,
    a_source_longer_than_announced_is_an_error_on_both_sides,
    finishing_short_is_an_error_on_both_sides,
    chunks_are_copied_in_parts_or_passed_over,
    bytes_go_to_sockets_pipes_and_files,
    a_sink_that_takes_nothing_costs_its_deadline_and_cancels,
    a_copy_goes_on_where_its_sink_gave_up,
    a_receiver_that_stalls_costs_the_sender_its_deadline,
    a_timeout_can_be_tried_again,
    leases_come_in_order_of_arrival,
    impossible_pools_are_refused_with_the_numbers_that_work,
    a_pool_beyond_the_memory_says_how_much_was_asked_for,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn pool<B: Backing>(segments: u32, segment_len: u64, slots: u32) -> SegmentPool<B> {
    SegmentPool::builder()
        .segments(segments)
        .segment_len(segment_len)
        .slots(slots)
        .create()
        .unwrap()
}

/// Bytes that differ from slot to slot and from one length to another.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes()[0]).collect()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Runs one transfer: `send` on a thread of its own, `receive` here.
fn ferry<B: Backing, T: Send + 'static, R>(
    pool: &SegmentPool<B>,
    send: impl FnOnce(ShmTransfer<Sender, Starting>) -> T + Send + 'static,
    receive: impl FnOnce(ShmTransfer<Receiver, Receiving>) -> R,
) -> (T, R) {
    let queue = InProcess::bounded(1);
    let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    let sender = thread::spawn(move || send(queue.recv(soon()).unwrap()));
    let Reply::Found(body) = transfer.reply(soon()).unwrap() else { panic!("refused") };
    let received = receive(body);
    (sender.join().unwrap(), received)
}

fn read_all(mut body: ShmTransfer<Receiver, Receiving>) -> Vec<u8> {
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).unwrap();
    bytes
}

fn every_size_through_every_geometry<B: Backing>() {
    for slots in [1, 2, 3, 8] {
        for slot_len in [1u64, 7, 4096, 5000] {
            let segment = slot_len * u64::from(slots);
            let pool = pool::<B>(1, segment, slots);
            let sizes = [
                0,
                1,
                slot_len - 1,
                slot_len,
                slot_len + 1,
                segment - 1,
                segment,
                segment + 1,
                10 * segment + 3,
            ];
            for size in sizes {
                let bytes = pattern(size as usize);
                let file = file_of(&bytes);
                let (sent, received) = ferry(
                    &pool,
                    move |t| t.accept(size).unwrap().send_file(&file).unwrap(),
                    read_all,
                );
                assert_eq!(sent, size);
                assert!(received == bytes, "{size} bytes through {slots} slots of {slot_len}");

                let file = file_of(&bytes);
                let (sent, received) = ferry(
                    &pool,
                    move |t| t.accept(Size::Unknown).unwrap().send_file(&file).unwrap(),
                    read_all,
                );
                assert_eq!(sent, size);
                assert!(
                    received == bytes,
                    "a stream of {size} through {slots} slots of {slot_len}"
                );
            }
        }
    }
}

fn writes_of_any_length_fill_slots<B: Backing>() {
    let pool = pool::<B>(1, 14, 2);
    for step in 1..=16 {
        let bytes = pattern(50);
        let sent = bytes.clone();
        let write = move |transfer: ShmTransfer<Sender, Starting>| {
            let mut sending = transfer.accept(50).unwrap();
            sent.chunks(step).for_each(|part| sending.write_all(part).unwrap());
            sending.finish().unwrap()
        };
        let (sent, received) = ferry(&pool, write, |mut body| {
            let (mut lens, mut received) = (Vec::new(), Vec::new());
            while let Some(mut chunk) = body.next_chunk(soon()).unwrap() {
                lens.push(chunk.len());
                let from = received.len();
                received.resize(from + chunk.len(), 0);
                assert_eq!(chunk.copy_to(&mut received[from..]), 7.min(50 - from));
            }
            assert_eq!(lens, [7, 7, 7, 7, 7, 7, 7, 1], "{step} at a time");
            received
        });
        assert_eq!(sent, 50);
        assert!(received == bytes, "{step} at a time");
    }
}

fn bytes_written_before_a_range_count<B: Backing>() {
    let pool = pool::<B>(1, 4096, 2);
    let (sent, received) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(110).unwrap();
            sending.write_all(&[1; 10]).unwrap();
            sending.send_file_range(file_of(&[2; 200]), 0..100).unwrap()
        },
        read_all,
    );
    assert_eq!(sent, 110);
    assert!(received == [vec![1; 10], vec![2; 100]].concat());
}

/// Sleepers look up once a second, and sleep on.
fn a_wait_lasts_as_long_as_its_deadline<B: Backing>() {
    let pool = pool::<B>(1, 4096, 2);
    let ((), body) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(2).unwrap();
            sending.next_slot(soon()).unwrap().send(b"1").unwrap();
            // Not for a state: a sender that takes its time.
            thread::sleep(Duration::from_millis(1300));
            sending.next_slot(soon()).unwrap().send(b"2").unwrap();
        },
        |body| {
            assert!(body.metadata::<Vec<u8>>().unwrap().is_empty(), "none was attached");
            read_all(body)
        },
    );
    assert_eq!(body, b"12");
}

fn bytes_are_read_where_they_are<B: Backing>() {
    let pool = pool::<B>(1, 4096, 2);
    let bytes = pattern(10_000);
    let expected = bytes.clone();
    let ((), seen) = ferry(
        &pool,
        move |t| t.accept(10_000).unwrap().write_all(&bytes).unwrap(),
        |mut body| {
            let mut seen = Vec::new();
            while let Some(mut chunk) = body.next_chunk(soon()).unwrap() {
                let mut first = [0; 3];
                let copied = chunk.copy_to(&mut first);
                seen.extend(&first[..copied]);
                assert_eq!(chunk.bytes().len(), chunk.len());
                seen.extend(chunk.bytes().iter().map(shmferry::segment::SharedByte::read));
            }
            seen
        },
    );
    assert!(seen == expected);
}

fn a_range_of_a_file<B: Backing>() {
    let pool = pool::<B>(1, 4096, 2);
    let bytes = pattern(20_000);
    for size in [Size::Known(9_000), Size::Unknown] {
        let file = file_of(&bytes);
        let (sent, received) = ferry(
            &pool,
            move |t| t.accept(size).unwrap().send_file_range(&file, 5_000..14_000).unwrap(),
            read_all,
        );
        assert_eq!(sent, 9_000);
        assert!(received == bytes[5_000..14_000]);
    }
    let (file, empty) = (file_of(&bytes), file_of(b""));
    let queue = InProcess::bounded(1);
    for (size, file, expected) in [
        (Size::Known(5), &file, "a range of 10 bytes where 5 are still to come"),
        (Size::Unknown, &empty, "10 bytes were announced, but the source holds 0"),
    ] {
        let (request, _transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        queue.send(request, soon()).unwrap();
        let sending = queue.recv(soon()).unwrap().accept(size).unwrap();
        assert_eq!(sending.send_file_range(file, 0..10).unwrap_err().to_string(), expected);
    }
}

fn bytes_written_before_a_file_go_out_first<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let (sent, received) = ferry(
        &pool,
        |t| {
            let file = file_of(b"and the file, but not all of it");
            let mut sending = t.accept(18).unwrap();
            sending.write_all(b"first ").unwrap();
            sending.send_file(&file).unwrap()
        },
        read_all,
    );
    assert_eq!((sent, &received[..]), (18, &b"first and the file"[..]));
}

fn a_file_too_short_counts_from_what_went_out_before<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let (sent, _) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(18).unwrap();
            sending.write_all(b"first ").unwrap();
            sending.send_file(file_of(b"and"))
        },
        |mut body| assert!(body.read_to_end(&mut Vec::new()).is_err()),
    );
    assert!(matches!(sent, Err(Error::SizeMismatch { announced: 18, found: 9 })), "{sent:?}");
}

fn one_byte_too_many_is_refused_before_anything_goes_out<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let (sent, received) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(10).unwrap();
            sending.write_all(b"12345").unwrap();
            sending.flush().unwrap();
            sending.write_all(b"678").unwrap();
            sending.write_all(b"90+")
        },
        |mut body| {
            let mut bytes = Vec::new();
            body.read_to_end(&mut bytes).map(|_| ()).unwrap_err();
            bytes
        },
    );
    let error = sent.unwrap_err();
    let error = error.get_ref().and_then(|error| error.downcast_ref());
    assert!(matches!(error, Some(Error::SizeMismatch { announced: 10, found: 11 })), "{error:?}");
    assert_eq!(received, b"12345", "what was flushed, and no more");
}

fn metadata_has_a_limit<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let ((), received) = ferry(
        &pool,
        |t| {
            let sending = t.accept_with(0, &pattern(METADATA_LIMIT)).unwrap();
            assert_eq!(sending.finish().unwrap(), 0);
        },
        |body| body.metadata::<Vec<u8>>().unwrap(),
    );
    assert!(received == pattern(METADATA_LIMIT));
    let ((), ()) = ferry(
        &pool,
        |t| assert_eq!(t.accept(0).unwrap().finish().unwrap(), 0),
        |body| body.metadata::<()>().unwrap(),
    );
    let queue = InProcess::bounded(1);
    let (request, _transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
    queue.send(request, soon()).unwrap();
    let error =
        queue.recv(soon()).unwrap().accept_with(0, &pattern(METADATA_LIMIT + 1)).unwrap_err();
    assert!(
        matches!(error, Error::Misuse(Misuse::MetadataTooLong { len: 1025, limit: 1024 })),
        "{error}"
    );
}

fn a_chunk_can_be_written_on_its_own<B: Backing>() {
    let pool = pool::<B>(1, 8, 2);
    let mut target = tempfile::tempfile().unwrap();
    let (_, ()) = ferry(
        &pool,
        |t| t.accept(8).unwrap().send_file(file_of(b"abcdefgh")).unwrap(),
        |mut body| {
            drop(body.next_chunk(soon()).unwrap()); // the first four, unread
            let mut chunk = body.next_chunk(soon()).unwrap().unwrap();
            assert_eq!(chunk.copy_to(&mut [0]), 1);
            chunk.write_to(&target).unwrap();
            assert!(chunk.is_empty());
        },
    );
    target.seek(SeekFrom::Start(0)).unwrap();
    let mut written = String::new();
    target.read_to_string(&mut written).unwrap();
    assert_eq!(written, "fgh");
}

fn the_files_own_position_neither_matters_nor_moves<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let mut file = file_of(&pattern(100));
    file.seek(SeekFrom::Start(42)).unwrap();
    let same = file.try_clone().unwrap();
    let (_, received) =
        ferry(&pool, move |t| t.accept(100).unwrap().send_file(&same).unwrap(), read_all);
    assert!(received == pattern(100));
    assert_eq!(file.stream_position().unwrap(), 42);
}

/// Where pointers have 32 bits, offsets in files have 64 all the same.
fn a_range_past_four_gigabytes_is_read_where_it_is<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let at = (5 << 30) + 7;
    let mut file = tempfile::tempfile().unwrap(); // all but its end is a hole
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&pattern(100)).unwrap();
    let (_, received) = ferry(
        &pool,
        move |t| t.accept(100).unwrap().send_file_range(&file, at..at + 100).unwrap(),
        read_all,
    );
    assert!(received == pattern(100));
}

fn a_file_that_shrinks_is_an_error_on_both_sides<B: Backing>() {
    let pool = pool::<B>(1, 4096, 4);
    let file = file_of(&pattern(50_000));
    let shrinking = file.try_clone().unwrap();
    let (sent, received) = ferry(
        &pool,
        move |t| t.accept(50_000).unwrap().send_file(&file),
        move |mut body| {
            let mut bytes = vec![0; 1000];
            body.read_exact(&mut bytes).unwrap();
            shrinking.set_len(20_000).unwrap();
            body.read_to_end(&mut bytes).map(|_| bytes)
        },
    );
    let error = sent.unwrap_err();
    assert!(matches!(error, Error::SizeMismatch { announced: 50_000, found: 20_000 }), "{error}");
    assert_eq!(error.fault(), Fault::Outside);
    let error = received.unwrap_err();
    assert!(matches!(error.get_ref().unwrap().downcast_ref(), Some(Error::Aborted)), "{error}");
}

fn a_source_longer_than_announced_is_an_error_on_both_sides<B: Backing>() {
    let pool = pool::<B>(1, 4096, 4);
    let (sent, received) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(10).unwrap();
            sending.next_slot(soon()).unwrap().send(b"12345").unwrap();
            let error = sending.next_slot(soon()).unwrap().send(b"678901").unwrap_err();
            assert!(matches!(error, Error::SizeMismatch { announced: 10, found: 11 }), "{error}");
            sending.write_all(b"678901")
        },
        |mut body| body.read_to_end(&mut Vec::new()),
    );
    assert!(
        sent.unwrap_err().to_string().contains("10 bytes were announced, but the source holds 11")
    );
    assert!(received.is_err());
}

fn finishing_short_is_an_error_on_both_sides<B: Backing>() {
    let pool = pool::<B>(1, 4096, 4);
    let (sent, received) = ferry(
        &pool,
        |t| {
            let mut sending = t.accept(10).unwrap();
            sending.write_all(b"12345").unwrap();
            sending.flush().unwrap();
            sending.finish()
        },
        |mut body| body.read_to_end(&mut Vec::new()),
    );
    assert!(matches!(sent, Err(Error::SizeMismatch { announced: 10, found: 5 })), "{sent:?}");
    assert!(received.is_err());
}

fn chunks_are_copied_in_parts_or_passed_over<B: Backing>() {
    let pool = pool::<B>(1, 40, 4);
    let (_, ()) = ferry(
        &pool,
        |t| t.accept(30).unwrap().send_file(file_of(b"aaaaaaaaaabbbbbbbbbbcccccccccc")).unwrap(),
        |mut body| {
            let mut chunk = body.next_chunk(soon()).unwrap().unwrap();
            let mut part = [0; 4];
            assert_eq!((chunk.len(), chunk.copy_to(&mut part), &part), (10, 4, b"aaaa"));
            assert_eq!((chunk.len(), chunk.copy_to(&mut [0; 100]), chunk.is_empty()), (6, 6, true));
            assert_eq!(chunk.copy_to(&mut part), 0);
            drop(chunk);
            drop(body.next_chunk(soon()).unwrap()); // all the b's, unread
            let mut two = [0; 2];
            body.read_exact(&mut two).unwrap();
            // What `read` left of a chunk is the next chunk.
            assert_eq!((&two, body.next_chunk(soon()).unwrap().unwrap().len()), (b"cc", 8));
            assert!(body.next_chunk(soon()).unwrap().is_none());
            assert!(body.next_chunk(soon()).unwrap().is_none());
        },
    );
}

fn bytes_go_to_sockets_pipes_and_files<B: Backing>() {
    let pool = pool::<B>(1, 64 << 10, 4);
    let bytes = pattern(300_000);
    let file = file_of(&bytes);
    let mut target = tempfile::tempfile().unwrap();
    let (_, copied) = ferry(
        &pool,
        {
            let file = file.try_clone().unwrap();
            move |t| t.accept(300_000).unwrap().send_file(&file).unwrap()
        },
        |mut body| body.copy_to(&target).unwrap(),
    );
    assert_eq!(copied, 300_000);
    target.seek(SeekFrom::Start(0)).unwrap();
    let mut written = Vec::new();
    target.read_to_end(&mut written).unwrap();
    assert!(written == bytes);

    let (sink, mut source) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        source.read_to_end(&mut all).map(|_| all)
    });
    ferry(
        &pool,
        move |t| t.accept(300_000).unwrap().send_file(&file).unwrap(),
        move |mut body| body.copy_to(&sink).unwrap(),
    );
    assert!(reader.join().unwrap().unwrap() == bytes);
}

fn a_sink_that_takes_nothing_costs_its_deadline_and_cancels<B: Backing>() {
    let pool = pool::<B>(1, 64 << 10, 4);
    let (sink, source) = UnixStream::pair().unwrap();
    let (sent, copied) = ferry(
        &pool,
        |t| t.accept(64 << 20).unwrap().send_file(File::open("/dev/zero").unwrap()),
        |mut body| {
            body.set_timeout(Duration::from_millis(50));
            body.copy_to(&sink)
        },
    );
    let error = copied.unwrap_err();
    assert!(matches!(error, Error::Timeout(Awaited::Sink)), "{error}");
    assert_eq!(error.fault(), Fault::Outside);
    assert!(matches!(sent, Err(Error::Cancelled)), "{sent:?}");

    drop(source);
    let (sent, copied) = ferry(
        &pool,
        |t| t.accept(64 << 20).unwrap().send_file(File::open("/dev/zero").unwrap()),
        |mut body| body.copy_to(&sink),
    );
    assert!(matches!(copied, Err(Error::Sink(_))), "{copied:?}");
    assert!(matches!(sent, Err(Error::Cancelled)), "{sent:?}");
}

fn a_copy_goes_on_where_its_sink_gave_up<B: Backing>() {
    let bytes = pattern(1 << 20);
    for through_a_pipe in [false, true] {
        let pool = pool::<B>(1, 64 << 10, 4);
        let (sink, source): (OwnedFd, OwnedFd) = if through_a_pipe {
            let (reader, writer) = std::io::pipe().unwrap();
            (writer.into(), reader.into())
        } else {
            let (sink, source) = UnixStream::pair().unwrap();
            (sink.into(), source.into())
        };
        let file = file_of(&bytes);
        let (_, received) = ferry(
            &pool,
            move |t| t.accept(1 << 20).unwrap().send_file(&file).unwrap(),
            |mut body| {
                body.set_timeout(Duration::from_millis(20));
                assert!(matches!(body.copy_to(&sink), Err(Error::Timeout(Awaited::Sink))));
                let reader = thread::spawn(move || {
                    let mut all = Vec::new();
                    File::from(source).read_to_end(&mut all).map(|_| all)
                });
                body.set_timeout(Duration::from_secs(30));
                body.copy_to(&sink).unwrap();
                drop(sink);
                reader.join().unwrap().unwrap()
            },
        );
        assert!(received == bytes, "through a pipe: {through_a_pipe}");
    }
}

fn a_receiver_that_stalls_costs_the_sender_its_deadline<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let (told, timed_out) = mpsc::channel();
    let (sent, received) = ferry(
        &pool,
        move |t| {
            let mut sending = t.accept(1000).unwrap();
            sending.set_timeout(Duration::from_millis(20));
            let error = sending.write_all(&[1; 1000]).unwrap_err();
            told.send(()).unwrap();
            error
        },
        |mut body| {
            timed_out.recv().unwrap();
            body.read_to_end(&mut Vec::new()).unwrap_err()
        },
    );
    assert_eq!(sent.kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(received.kind(), std::io::ErrorKind::ConnectionAborted);
}

fn a_timeout_can_be_tried_again<B: Backing>() {
    let pool = pool::<B>(1, 64, 2);
    let meet = Arc::new(Barrier::new(2));
    let (_, ()) = ferry(
        &pool,
        {
            let meet = Arc::clone(&meet);
            move |t| {
                let mut sending = t.accept(2).unwrap();
                sending.next_slot(soon()).unwrap().send(b"1").unwrap();
                meet.wait();
                sending.next_slot(soon()).unwrap().send(b"2").unwrap();
            }
        },
        |mut body| {
            assert_eq!(body.next_chunk(soon()).unwrap().unwrap().len(), 1);
            let early = body.next_chunk(Deadline::after(Duration::from_millis(5))).map(drop);
            assert!(matches!(early, Err(Error::Timeout(Awaited::FilledSlot))));
            meet.wait();
            assert_eq!(body.next_chunk(soon()).unwrap().unwrap().len(), 1);
        },
    );
}

fn leases_come_in_order_of_arrival<B: Backing>() {
    let pool = pool::<B>(1, 64, 1);
    let first = pool.lease(soon()).unwrap();
    let next = Arc::new(AtomicUsize::new(0));
    // The same test runs over the other backing meanwhile.
    let backing = std::any::type_name::<B>().rsplit("::").next().unwrap();
    let name = |i| format!("{backing}-{i}");
    let (arrived, arrivals) = mpsc::channel();
    let waiters: Vec<_> = (0..6)
        .map(|i| {
            let (pool, next, arrived) = (pool.clone(), Arc::clone(&next), arrived.clone());
            let waiter = thread::Builder::new().name(name(i));
            let waiter = waiter
                .spawn(move || {
                    arrived.send(()).unwrap();
                    let _lease = pool.lease(soon()).unwrap();
                    assert_eq!(next.fetch_add(1, Ordering::SeqCst), i);
                })
                .unwrap();
            arrivals.recv().unwrap();
            wait_asleep(&name(i));
            waiter
        })
        .collect();
    drop(first);
    waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
}

/// Waits until the thread of this name sleeps in the kernel.
fn wait_asleep(name: &str) {
    let limit = soon();
    loop {
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task = task.unwrap().path();
            let comm = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            if comm.trim() == name
                && stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"))
            {
                return;
            }
        }
        assert!(!limit.has_passed(), "{name} never went to sleep");
        thread::yield_now();
    }
}

fn impossible_pools_are_refused_with_the_numbers_that_work<B: Backing>() {
    let refused = |segments, len, slots| {
        let error =
            SegmentPool::<B>::builder().segments(segments).segment_len(len).slots(slots).create();
        error.map(drop).unwrap_err().to_string()
    };
    assert_eq!(refused(0, 4096, 1), "the number of segments is 0; it must be from 1 to 65536");
    assert_eq!(refused(1, 4096, 0), "the number of slots is 0; it must be from 1 to 512");
    assert_eq!(refused(1, 4096, 513), "the number of slots is 513; it must be from 1 to 512");
    assert_eq!(
        refused(1, 3, 4),
        "the segment's length in bytes is 3; it must be from 4 to 4294967296"
    );
    let too_long = refused(1, 1 << 40, 1);
    assert_eq!(
        too_long,
        "the segment's length in bytes is 1099511627776; it must be from 1 to 1073741824"
    );
}

fn a_pool_beyond_the_memory_says_how_much_was_asked_for<B: Backing>() {
    let error = SegmentPool::<B>::builder().segments(65_536).segment_len(1 << 30).slots(1).create();
    let error = error.map(drop).unwrap_err();
    assert_eq!(error.fault(), Fault::System);
    assert!(
        error.to_string().starts_with("no memory for a pool of 70369012613120 bytes: only "),
        "{error}"
    );
}

#[test]
fn a_pool_is_what_its_builder_says_unless_told_otherwise() {
    let pool = SegmentPool::<Memfd>::builder().create().unwrap();
    let geometry = pool.geometry();
    assert_eq!(pool.stats().segments, 8);
    assert_eq!((geometry.slot_count(), geometry.slot_len()), (8, 256 << 10));
}

#[test]
fn a_request_goes_only_where_its_pool_is_known() {
    let dir = tempfile::tempdir().unwrap();
    turns_a_stranger_away(|ours| Seqpacket::new(dir.path().join("s")).requester(ours).unwrap());
    #[cfg(feature = "posix-mq")]
    turns_a_stranger_away(|ours| {
        shmferry::channel::PosixMq::new("/shmferry-test-nowhere").unwrap().requester(ours)
    });
}

fn turns_a_stranger_away<B: Backing, R: Requester<B>>(
    requester: impl FnOnce(&SegmentPool<B>) -> R,
) {
    let (ours, other) = (pool(1, 64, 1), pool(1, 64, 1));
    let (request, _transfer) = other.lease(soon()).unwrap().request("a").unwrap();
    let failed = requester(&ours).send(request, soon()).unwrap_err();
    assert!(matches!(failed.error, Error::Misuse(Misuse::ForeignPool)));
}

#[test]
fn a_request_sent_while_its_queue_closes_is_aborted_or_handed_back() {
    let pool = pool::<Memfd>(1, 64, 1);
    for _ in 0..10_000 {
        let queue = InProcess::bounded(1);
        let (request, transfer) = pool.lease(soon()).unwrap().request("key").unwrap();
        let start = Barrier::new(2);
        let sent = thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                queue.close();
            });
            start.wait();
            // What comes back is dropped here, which ends its transfer's wait.
            queue.send(request, soon()).map_err(Error::from)
        });
        // The queue lives on, so that nothing but its end can answer.
        let reply = transfer.reply(soon()).map(drop);
        match sent {
            Ok(()) => assert!(matches!(reply, Err(Error::Aborted)), "{reply:?}"),
            Err(error) => {
                assert!(matches!(error, Error::Closed), "{error}");
                assert!(matches!(reply, Err(Error::Misuse(Misuse::NeverSent))), "{reply:?}");
            }
        }
    }
}
