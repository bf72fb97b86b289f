//! Loans, between the front doors of two sides, over a socket.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use shmferry::loan::{Lent, Loan};
use shmferry::{Client, Error, Refusal, Server, Serving, Size};
use tempfile::TempDir;

/// Bytes in which each position can be told from its neighbours.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

fn serve(
    builder: shmferry::ServerBuilder,
    loans: Vec<Loan>,
) -> (TempDir, String, Serving, Arc<AtomicUsize>) {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", dir.path().join("s").display());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let serving = builder
        .bind(address.as_str())
        .unwrap()
        .serve(4, move |request| {
            count.fetch_add(1, Relaxed);
            let number: Option<usize> =
                std::str::from_utf8(request.key()).ok().and_then(|key| key.parse().ok());
            match number.and_then(|number| loans.get(number)) {
                Some(loan) => request.lend_with(loan, &String::from("of a loan")),
                None => request.refuse(Refusal::NotFound),
            }
        })
        .unwrap();
    (dir, address, serving, asked)
}

#[test]
fn lent_memory_is_the_same_bytes_again_and_outlives_both_sides() {
    for len in [0, 1, 4095, 4096, 4097, 1 << 20, (3 << 20) + 5] {
        let bytes = pattern(len, 1);
        let loan = Loan::from_bytes(&bytes).unwrap();
        let (_dir, address, serving, _) = serve(Server::builder(), vec![loan]);
        let client = Client::builder().segments(1).connect(address.as_str()).unwrap();
        let mut held: Vec<Lent> = Vec::new();
        for _ in 0..3 {
            let body = client.get("0").unwrap();
            assert!(body.is_lent());
            assert_eq!(client.stats().idle, 1, "the segment is back before the body is read");
            assert_eq!(body.size(), Size::Known(len as u64));
            assert_eq!(body.metadata::<String>().unwrap(), "of a loan");
            held.push(body.into_bytes().unwrap());
        }
        if len > 0 {
            assert_eq!(held[0].as_ptr(), held[2].as_ptr(), "one mapping");
        }
        drop(client);
        serving.stop();
        serving.wait();
        drop(serving);
        for lent in held {
            let bytes = bytes.clone();
            thread::spawn(move || assert!(lent[..] == bytes[..])).join().unwrap();
        }
    }
}

#[test]
fn a_body_reads_the_same_however_it_came() {
    let bytes = pattern(700_001, 2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    let file = || std::fs::File::open(&path).unwrap();
    let loans = [
        Loan::from_bytes(&bytes).unwrap(),
        Loan::from_reader(&bytes[..]).unwrap(),
        Loan::from_file(&file()).unwrap(),
        Loan::file(file()).unwrap(),
    ];
    let parts = loans.iter().map(|loan| loan.slice(1000..=300_000).unwrap());
    let loans: Vec<Loan> = loans.iter().cloned().chain(parts).collect();
    let count = loans.len();
    let (_dir, address, _serving, _) = serve(Server::builder(), loans);
    let lending = Client::builder().segments(2).connect(address.as_str()).unwrap();
    let streaming =
        Client::builder().segments(2).keep_loans(0, 0).connect(address.as_str()).unwrap();
    for number in 0..count {
        let expected = if number < 4 { &bytes[..] } else { &bytes[1000..=300_000] };
        for (client, is_lent) in [(&lending, true), (&streaming, false)] {
            let get = || client.get(number.to_string()).unwrap();
            assert_eq!(get().is_lent(), is_lent);
            assert!(get().read_all().unwrap() == expected);
            assert!(get().into_bytes().unwrap()[..] == *expected);
            // Read in part, then otherwise.
            let mut body = get();
            let mut first = [0; 1001];
            body.read_exact(&mut first).unwrap();
            assert!(first[..] == expected[..1001]);
            let mut rest = Vec::new();
            while let Some(mut chunk) = body.next_chunk(shmferry::Deadline::NEVER).unwrap() {
                let start = rest.len();
                assert_eq!(chunk.bytes().len(), chunk.len());
                let byte = chunk.bytes()[0].read();
                rest.resize(start + chunk.len(), 0);
                assert_eq!(chunk.copy_to(&mut rest[start..]), rest.len() - start);
                assert!(chunk.is_empty());
                assert_eq!(rest[start], byte);
            }
            assert!(rest == expected[1001..]);
            // To sinks of every kind.
            let out = tempfile::tempfile().unwrap();
            assert_eq!(get().copy_to(&out).unwrap(), expected.len() as u64);
            assert_eq!(out.metadata().unwrap().len(), expected.len() as u64);
            for nonblocking in [false, true] {
                let (ours, mut theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(nonblocking).unwrap();
                let reader = thread::spawn(move || {
                    let mut all = Vec::new();
                    theirs.read_to_end(&mut all).map(|_| all)
                });
                assert_eq!(get().copy_to(&ours).unwrap(), expected.len() as u64);
                drop(ours);
                assert!(reader.join().unwrap().unwrap() == expected);
            }
            let (mut reader, writer) = std::io::pipe().unwrap();
            let reading = thread::spawn(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).map(|_| all)
            });
            assert_eq!(get().copy_to(&writer).unwrap(), expected.len() as u64);
            drop(writer);
            assert!(reading.join().unwrap().unwrap() == expected);
        }
    }
}

#[test]
fn a_sink_that_takes_nothing_is_a_timeout_and_the_copy_can_go_on() {
    let bytes = pattern(8 << 20, 3);
    let (_dir, address, _serving, _) =
        serve(Server::builder(), vec![Loan::from_bytes(&bytes).unwrap()]);
    let client = Client::builder().segments(1).connect(address.as_str()).unwrap();
    for nonblocking in [false, true] {
        let mut body = client.get("0").unwrap();
        body.set_timeout(Duration::from_millis(50));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(nonblocking).unwrap();
        let error = body.copy_to(&ours).unwrap_err();
        assert!(matches!(error, Error::Timeout(_)), "{error}");
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).map(|_| all)
        });
        body.set_timeout(Duration::from_secs(30));
        body.copy_to(&ours).unwrap();
        drop(ours);
        assert!(reader.join().unwrap().unwrap() == bytes);
    }
}

#[test]
fn a_sink_that_takes_no_sendfile_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "a name").unwrap();
    let loans = vec![
        Loan::from_bytes(b"a name").unwrap(),
        Loan::file(std::fs::File::open(&path).unwrap()).unwrap(),
    ];
    let (_dir, address, _serving, _) = serve(Server::builder(), loans);
    let client = Client::builder().segments(1).connect(address.as_str()).unwrap();
    for key in ["0", "1"] {
        let sink = std::fs::OpenOptions::new().write(true).open("/proc/thread-self/comm").unwrap();
        let mut body = client.get(key).unwrap();
        assert!(body.is_lent());
        assert_eq!(body.copy_to(&sink).unwrap(), 6);
    }
    assert_eq!(std::fs::read_to_string("/proc/thread-self/comm").unwrap(), "a name\n");
}

#[test]
fn a_lent_file_that_is_cut_short_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, pattern(100_000, 4)).unwrap();
    let loan = Loan::file(std::fs::File::open(&path).unwrap()).unwrap();
    let (_dir, address, _serving, _) = serve(Server::builder(), vec![loan]);
    let client = Client::builder().segments(1).connect(address.as_str()).unwrap();
    let mut body = client.get("0").unwrap();
    assert!(body.is_lent());
    let cut = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    cut.set_len(50_000).unwrap();
    let mut all = Vec::new();
    let error = Error::from(body.read_to_end(&mut all).unwrap_err());
    assert!(matches!(error, Error::SizeMismatch { announced: 100_000, found: 50_000 }), "{error}");
    let error = client.get("0").unwrap().copy_to(tempfile::tempfile().unwrap()).unwrap_err();
    assert!(matches!(error, Error::SizeMismatch { announced: 100_000, found: 50_000 }), "{error}");
}

#[test]
fn accounts_hold_and_what_does_not_fit_is_streamed() {
    let len = 64 << 10;
    let many: Vec<Loan> = (0..40).map(|i| Loan::from_bytes(&pattern(len, i)).unwrap()).collect();
    // The client's limits, and the server's, each the smaller one.
    for (keep, most) in [((8 * len, 100), (1 << 30, 100)), ((1 << 30, 100), (1 << 30, 8))] {
        let builder = Server::builder().lend_at_most(most.0 as u64, most.1);
        let (_dir, address, _serving, asked) = serve(builder, many.clone());
        let client = Client::builder()
            .segments(2)
            .keep_loans(keep.0 as u64, keep.1)
            .connect(address.as_str())
            .unwrap();
        let (mut lent, mut rounds) = (0, 0);
        for round in 0..30 {
            for number in 0..40 {
                let body = client.get(number.to_string()).unwrap();
                lent += usize::from(body.is_lent());
                rounds += 1;
                assert!(body.read_all().unwrap() == pattern(len, number), "{round} {number}");
            }
        }
        assert!(lent > rounds / 20, "{lent} of {rounds}: what is returned makes room for others");
        assert!(lent < rounds, "{lent}");
        // Asked for twice only if it was lent while its return was on the way.
        let again = asked.load(Relaxed) - rounds;
        assert!(again < rounds / 10, "{again} of {rounds}");
        // What stays hot is lent again and again.
        let hot = (0..200).filter(|_| client.get("7").unwrap().is_lent()).count();
        assert!(hot > 100, "{hot} of 200");
    }
}

#[test]
fn pinned_loans_are_kept_and_others_are_streamed() {
    let len = 4096;
    let many: Vec<Loan> = (0..20).map(|i| Loan::from_bytes(&pattern(len, i)).unwrap()).collect();
    let (_dir, address, _serving, _) = serve(Server::builder(), many);
    let client =
        Client::builder().segments(2).keep_loans(1 << 20, 4).connect(address.as_str()).unwrap();
    let held: Vec<Lent> = (0..20)
        .map(|number: u32| client.get(number.to_string()).unwrap().into_bytes().unwrap())
        .collect();
    let lent = held.iter().filter(|bytes| bytes.memory().is_some()).count();
    assert_eq!(lent, 4);
    for (number, bytes) in held.iter().enumerate() {
        assert!(bytes[..] == pattern(len, number as u8));
    }
}

#[test]
#[cfg(feature = "posix-mq")]
fn over_a_message_queue_what_is_lent_is_sent() {
    let bytes = pattern(100_000, 5);
    let loan = Loan::from_bytes(&bytes).unwrap();
    let address = format!("mq:/shmferry-test-loans-{}", std::process::id());
    let _serving =
        Server::bind(address.as_str()).unwrap().serve(2, move |request| request.lend(&loan));
    let client = Client::builder().segments(2).connect(address.as_str()).unwrap();
    let body = client.get("0").unwrap();
    assert!(!body.is_lent());
    let held = body.into_bytes().unwrap();
    assert!(held[..] == bytes && held.memory().is_none());
}

#[test]
fn within_a_process_the_loan_itself_is_lent() {
    let bytes = pattern(100_000, 6);
    let loan = Loan::from_bytes(&bytes).unwrap();
    let queue = shmferry::channel::InProcess::bounded(4);
    let part = loan.slice(10..20).unwrap();
    let _serving = Server::with(queue.clone()).serve(2, move |request| match request.key() {
        b"all" => request.lend(&loan),
        _ => request.lend(&part),
    });
    let client = Client::builder().segments(1).in_process(&queue).unwrap();
    let (all, part) = (client.get("all").unwrap(), client.get("part").unwrap());
    assert_eq!(client.stats().idle, 1, "neither holds a segment");
    let (all, part) = (all.into_bytes().unwrap(), part.into_bytes().unwrap());
    assert!(all[..] == bytes && part[..] == bytes[10..20]);
    assert_eq!(part.as_ptr(), all[10..].as_ptr());
}
