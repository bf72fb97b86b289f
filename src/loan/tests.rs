//! Accounts, kept loans against a model, and the arithmetic of parts.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, fallocate, fcntl_add_seals};

use super::*;
use crate::Error;
use crate::error::{Misuse, PeerFault};
use crate::segment::{allocate_blocks, empty_memfd};

fn limits(bytes: u64, count: u32) -> LoanLimits {
    LoanLimits { bytes, count }
}

/// Sealed memory of this length.
fn sealed(len: usize) -> Content {
    Loan::from_bytes(&vec![1; len]).unwrap().content().clone()
}

// ---------------------------------------------------------------- accounts

#[test]
fn an_account_stops_at_its_limits_and_has_room_for_what_comes_back() {
    let mut account = Account::new(limits(100, 3));
    assert_eq!(account.standing(1, 101), Standing::TooLarge);
    assert_eq!(account.standing(1, u64::MAX), Standing::TooLarge);
    assert_eq!(account.standing(1, 100), Standing::Fits);
    account.enter(1, 100);
    assert_eq!(account.standing(1, 100), Standing::Known);
    assert_eq!(account.standing(2, 1), Standing::Full);
    account.enter(3, 0);
    account.enter(4, 0);
    assert_eq!(account.standing(5, 0), Standing::Full, "by count");
    account.strike(1).unwrap();
    assert_eq!(account.standing(2, 100), Standing::Fits);
    assert_eq!(account.strike(1), Err(PeerFault::ReturnedUnlent(1)), "twice");
    assert_eq!(account.strike(77), Err(PeerFault::ReturnedUnlent(77)));
    // With the widest limits, nothing overflows.
    let mut account = Account::new(limits(u64::MAX, u32::MAX));
    account.enter(1, u64::MAX);
    assert_eq!(account.standing(2, 1), Standing::Full);
    assert_eq!(account.standing(2, 0), Standing::Fits);
    assert_eq!(Account::new(limits(1, 0)).standing(1, 0), Standing::TooLarge);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

    #[test]
    fn an_account_is_a_sum(
        most in (0..200u64, 0..6u32),
        steps in prop::collection::vec((0..12u64, 0..100u64, any::<bool>()), 0..100),
    ) {
        let mut account = Account::new(limits(most.0, most.1));
        let mut model = std::collections::BTreeMap::new();
        for (id, bytes, returns) in steps {
            if returns {
                prop_assert_eq!(account.strike(id).is_ok(), model.remove(&id).is_some());
                continue;
            }
            let sum: u64 = model.values().sum();
            let expected = if model.contains_key(&id) {
                Standing::Known
            } else if bytes > most.0 || most.1 == 0 {
                Standing::TooLarge
            } else if sum + bytes <= most.0 && model.len() < most.1 as usize {
                Standing::Fits
            } else {
                Standing::Full
            };
            prop_assert_eq!(account.standing(id, bytes), expected);
            if expected == Standing::Fits {
                account.enter(id, bytes);
                model.insert(id, bytes);
            }
        }
    }
}

// ---------------------------------------------------------------- kept loans

#[test]
fn those_unused_for_longest_go_first_and_pinned_ones_stay() {
    let kept = KeptLoans::new(limits(1 << 20, 4));
    let [first, ..] = [1, 2, 3, 4].map(|id| {
        let content = sealed(4096);
        assert!(kept.keep(id, Ok(content.clone())).is_empty());
        content
    });
    kept.find(2).unwrap().unwrap();
    // The first is held by a user, the second was used last.
    assert_eq!(kept.make_room(4096), [3]);
    drop(first);
    assert_eq!(kept.make_room(4097), [1, 4], "what was freed does not do, and no loan has come");
    assert!(kept.find(3).unwrap().is_none());
    assert!(kept.find(2).unwrap().is_some());
}

#[test]
fn one_wish_for_room_is_granted_once_until_a_loan_comes() {
    let kept = KeptLoans::new(limits(1 << 20, 100));
    for id in 0..16 {
        kept.keep(id, Ok(sealed(100)));
    }
    assert_eq!(kept.make_room(150), [0, 1], "so many, and an eighth of all");
    assert_eq!(kept.make_room(150), [0; 0], "several answers say the same");
    kept.keep(16, Ok(sealed(100)));
    assert_eq!(kept.make_room(1), [2, 3]);
    kept.keep(17, Ok(sealed(100)));
    assert_eq!(kept.make_room(u64::MAX).len(), 14);
    assert_eq!(kept.make_room(u64::MAX), [0; 0]);
}

#[test]
fn a_loan_introduced_twice_or_beyond_the_limits_is_an_error_where_it_is_named() {
    let kept = KeptLoans::new(limits(10_000, 2));
    kept.keep(1, Ok(sealed(10)));
    kept.keep(1, Ok(sealed(20)));
    assert_eq!(kept.find(1).err(), Some(PeerFault::RepeatedLoan(1)));
    assert_eq!(kept.find(1).err(), Some(PeerFault::RepeatedLoan(1)), "it stays so");
    let held = [2, 3].map(|id| {
        let content = sealed(10);
        kept.keep(id, Ok(content.clone()));
        content
    });
    for id in 4..1000 {
        kept.keep(id, Ok(sealed(10)));
        assert_eq!(kept.find(id).err(), Some(PeerFault::LentTooMuch(id)));
    }
    drop(held);
    // Beyond the bytes.
    assert_eq!(kept.keep(1000, Ok(sealed(10_001))).len(), 3);
    assert_eq!(kept.find(1000).err(), Some(PeerFault::LentTooMuch(1000)));
    assert_eq!(kept.keep(1001, Ok(sealed(10_000))).len(), 0);
    assert!(kept.find(1001).unwrap().is_some());
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A loan of this length comes.
    Keep(usize),
    /// The loan that came as this number is asked for; the user holds it.
    Find(usize, bool),
    /// The user lets go of all.
    LetGo,
    MakeRoom(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..40usize).prop_map(Step::Keep),
        4 => (0..30usize, any::<bool>()).prop_map(|(id, holds)| Step::Find(id, holds)),
        1 => Just(Step::LetGo),
        3 => (0..60u64).prop_map(Step::MakeRoom),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 200 }))]

    #[test]
    fn kept_loans_are_a_list_in_order_of_use(
        bytes in 0..120u64,
        count in 0..6u32,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        /// In order of use: number, length (0 for one that is an error), whether it is an error.
        #[derive(Debug, Default)]
        struct Model(Vec<(u64, u64, bool)>, BTreeSet<u64>, Option<u64>);
        impl Model {
            fn sum(&self) -> u64 {
                self.0.iter().map(|kept| kept.1).sum()
            }
            fn evict(&mut self, bytes: u64, count: usize, spared: Option<u64>) -> Vec<u64> {
                let mut gone = Vec::new();
                let mut at = 0;
                while at < self.0.len() && (self.sum() > bytes || self.0.len() > count) {
                    let (id, ..) = self.0[at];
                    if self.1.contains(&id) || Some(id) == spared {
                        at += 1;
                    } else {
                        self.0.remove(at);
                        gone.push(id);
                    }
                }
                gone
            }
        }
        let kept = KeptLoans::new(limits(bytes, count));
        let mut model = Model::default();
        let mut held: Vec<Content> = Vec::new();
        let mut next = 0u64;
        for step in steps {
            match step {
                Step::Keep(len) => {
                    let id = next;
                    next += 1;
                    model.0.push((id, len as u64, false));
                    model.2 = None;
                    let gone = model.evict(bytes, count as usize, Some(id));
                    if model.sum() > bytes || model.0.len() > count as usize {
                        *model.0.last_mut().unwrap() = (id, 0, true);
                    }
                    prop_assert_eq!(kept.keep(id, Ok(sealed(len))), gone);
                }
                Step::Find(id, holds) => {
                    let id = id as u64;
                    let at = model.0.iter().position(|kept| kept.0 == id);
                    let found = kept.find(id);
                    match at {
                        None => prop_assert!(matches!(found, Ok(None))),
                        Some(at) => {
                            let entry = model.0.remove(at);
                            model.0.push(entry);
                            prop_assert_eq!(found.is_err(), entry.2);
                            if let (Ok(Some(content)), true) = (found, holds) {
                                prop_assert_eq!(content.len(), entry.1);
                                held.push(content);
                                model.1.insert(id);
                            }
                        }
                    }
                }
                Step::LetGo => {
                    held.clear();
                    model.1.clear();
                }
                Step::MakeRoom(wanted) => {
                    let mut gone = Vec::new();
                    if model.2.is_none_or(|freed| freed < wanted) {
                        let before = model.sum();
                        let most = before - wanted.max(before / 8).min(before);
                        let loans = model.0.len() - model.0.len().div_ceil(8);
                        gone = model.evict(most, loans, None);
                        if !gone.is_empty() {
                            model.2 = Some(model.2.unwrap_or(0) + before - model.sum());
                        }
                    }
                    prop_assert_eq!(kept.make_room(wanted), gone);
                }
            }
            prop_assert!(model.0.len() <= count as usize + 1);
            prop_assert!(model.sum() <= bytes);
        }
    }
}

// ---------------------------------------------------------------- parts

/// A sparse file: nothing but its length, and a few bytes at some offsets.
fn sparse(len: u64, marks: &[(u64, &[u8])]) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let file = File::create(&path).unwrap();
    for (at, bytes) in marks {
        file.write_all_at(bytes, *at).unwrap();
    }
    file.set_len(len).unwrap();
    File::open(&path).unwrap()
}

#[test]
fn a_slice_is_within_its_loan_or_an_error() {
    let loan = Loan::from_bytes(&[7; 100]).unwrap();
    let part = |range: Range<u64>| loan.slice(range).map(|part| (part.start(), part.len()));
    assert_eq!(part(0..100).unwrap(), (0, 100));
    assert_eq!(part(100..100).unwrap(), (100, 0));
    assert_eq!(part(7..8).unwrap(), (7, 1));
    let reversed = Range { start: 5, end: 4 };
    for range in [0..101, 101..101, reversed, u64::MAX..u64::MAX, 0..u64::MAX] {
        let error = part(range.clone()).unwrap_err();
        assert!(matches!(error, Error::Misuse(Misuse::LoanRange { .. })), "{range:?}: {error}");
    }
    assert!(loan.slice(0..=u64::MAX).is_err());
    assert!(loan.slice((Bound::Excluded(u64::MAX), Bound::Unbounded)).is_err());
    let of = |loan: Loan| (loan.start(), loan.len());
    assert_eq!(of(loan.slice(..).unwrap()), (0, 100));
    assert_eq!(of(loan.slice((Bound::Excluded(9), Bound::Included(19))).unwrap()), (10, 10));
    // A part of a part; it is the same loan.
    let inner = loan.slice(10..90).unwrap().slice(5..=9).unwrap();
    assert_eq!((inner.start(), inner.len(), inner.id()), (15, 5, loan.id()));
    assert!(loan.slice(10..20).unwrap().slice(0..11).is_err());
    assert!(Loan::from_bytes(&[]).unwrap().slice(..).unwrap().is_empty());
}

#[test]
fn no_number_is_given_twice() {
    let loans: Vec<Loan> = std::thread::scope(|scope| {
        let make = || (0..50).map(|_| Loan::from_bytes(b"x").unwrap()).collect::<Vec<_>>();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let numbers: BTreeSet<u64> = loans.iter().map(Loan::id).collect();
    assert_eq!(numbers.len(), loans.len());
    assert!(!numbers.contains(&0), "zero is no loan in an announcement");
}

/// What an announcement can claim of a loan.
fn body(content: &Content, start: u64, len: u64) -> Result<LentBody, PeerFault> {
    LentBody::new(content.clone(), (start, len), Box::default())
}

#[test]
fn an_announcement_beyond_the_loan_is_a_fault_whatever_the_numbers() {
    let memory = sealed(4096);
    let file = Loan::file(sparse(4096, &[])).unwrap().content().clone();
    const TOP: u64 = 1 << 63;
    for content in [memory, file] {
        for (start, len) in [(0, 0), (0, 1), (0, 4096), (4095, 1), (4096, 0)] {
            assert_eq!(body(&content, start, len).unwrap().size(), len);
        }
        for (start, len) in [
            (0, 4097),
            (4096, 1),
            (4097, 0),
            (1, 4096),
            (1 << 31, 0),
            (0, 1 << 31),
            (TOP, 0),
            (TOP, TOP),
            (1, u64::MAX),
            (u64::MAX, 1),
            (u64::MAX, 0),
            (u64::MAX, u64::MAX),
        ] {
            let fault = body(&content, start, len).err();
            assert_eq!(fault, Some(PeerFault::BeyondLoan { start, len, whole: 4096 }));
        }
    }
}

#[test]
fn a_lent_file_beyond_4_gib_is_read_where_it_should_be() {
    const GIB: u64 = 1 << 30;
    let len = 6 * GIB;
    let file = sparse(len, &[(1 << 31, b"two"), (5 * GIB, b"five"), (len - 3, b"end")]);
    let loan = Loan::file(file).unwrap();
    for (at, expected) in [(1u64 << 31, "two"), (5 * GIB, "five"), (len - 3, "end")] {
        let part = loan.slice(at..at + expected.len() as u64).unwrap();
        let mut read = String::new();
        let mut whole = body(part.content(), part.start(), part.len()).unwrap();
        whole.read_to_string(&mut read).unwrap();
        assert_eq!(read, expected);
        // By the kernel, and into memory.
        let out = tempfile::tempfile().unwrap();
        let mut whole = body(part.content(), part.start(), part.len()).unwrap();
        assert_eq!(whole.copy_to(&out).unwrap(), expected.len() as u64);
        let mut copied = vec![0; expected.len()];
        out.read_exact_at(&mut copied, 0).unwrap();
        assert_eq!(copied, expected.as_bytes());
        let gathered = body(part.content(), part.start(), part.len()).unwrap().into_bytes();
        assert_eq!(&gathered.unwrap()[..], expected.as_bytes());
    }
    // From before 4 GiB to after it, with the counts on the way.
    let mut body = body(loan.content(), 0, len).unwrap();
    body.advance((5 * GIB) as usize - 2);
    let mut some = [9; 6];
    body.read_exact(&mut some).unwrap();
    assert_eq!(&some, b"\0\0five");
    assert_eq!(body.left(), GIB - 4);
    body.advance((GIB - 4 - 3) as usize);
    assert_eq!(&body.into_bytes().unwrap()[..], b"end");
}

#[test]
fn a_file_that_claims_more_than_any_file_can_have_is_an_error() {
    let file = |len| Content::of_peer(sparse(10, &[]).into(), FILE, len).map_err(|(_, why)| why);
    for (start, len) in [(0, 1 << 63), (1 << 63, 10), (u64::MAX - 10, 10), (0, u64::MAX)] {
        let content = file(u64::MAX).unwrap();
        let mut all = Vec::new();
        let error = body(&content, start, len).unwrap().read_to_end(&mut all).unwrap_err();
        assert!(all.len() <= 10, "{error}");
        let error = body(&content, start, len).unwrap().copy_to(tempfile::tempfile().unwrap());
        assert!(error.is_err());
        let mut ahead = body(&content, start, len).unwrap();
        if start < 10 {
            ahead.read_ahead().unwrap();
            ahead.advance(ahead.seen().len());
        }
        assert!(ahead.read_ahead().is_err());
    }
    assert_eq!(body(&file(10).unwrap(), 0, 10).unwrap().size(), 10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 100 }))]

    /// However a body is read, it is the bytes of its part, each once.
    #[test]
    fn a_body_is_its_part(
        len in 0..600_000usize,
        part in (0.0..1.0f64, 0.0..1.0f64),
        steps in prop::collection::vec((0..3u8, 0..300_000usize), 0..12),
        is_file in any::<bool>(),
    ) {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect();
        let start = (len as f64 * part.0) as usize;
        let count = ((len - start) as f64 * part.1) as usize;
        let expected = &bytes[start..start + count];
        let content = if is_file {
            Loan::file(sparse(len as u64, &[(0, &bytes)])).unwrap().content().clone()
        } else {
            Loan::from_bytes(&bytes).unwrap().content().clone()
        };
        let mut body = body(&content, start as u64, count as u64).unwrap();
        let mut read = Vec::new();
        for (how, most) in steps {
            match how {
                0 => {
                    let mut buffer = vec![0; most];
                    let some = body.read(&mut buffer).unwrap();
                    prop_assert!(some > 0 || most == 0 || read.len() == count);
                    read.extend(&buffer[..some]);
                }
                1 => {
                    body.read_ahead().unwrap();
                    let mut buffer = vec![0; most];
                    let some = body.consume(&mut buffer);
                    read.extend(&buffer[..some]);
                }
                _ => {
                    body.read_ahead().unwrap();
                    let seen = body.seen().len();
                    let out = tempfile::tempfile().unwrap();
                    body.write_seen(&out).unwrap();
                    let mut buffer = vec![0; seen];
                    out.read_exact_at(&mut buffer, 0).unwrap();
                    read.extend(buffer);
                }
            }
            prop_assert_eq!(body.left() as usize, count - read.len());
        }
        read.extend(&body.into_bytes().unwrap()[..]);
        prop_assert!(read == expected);
    }
}

// ---------------------------------------------------------------- what a user holds

#[test]
fn lent_bytes_go_anywhere_and_stay_as_they_are() {
    fn goes_anywhere<T: Send + Sync + 'static>() {}
    goes_anywhere::<Lent>();
    goes_anywhere::<Loan>();
    goes_anywhere::<LentBody>();
    let loan = Loan::from_bytes(b"hello there").unwrap();
    let lent = body(loan.content(), 6, 5).unwrap().into_bytes().unwrap();
    drop(loan);
    assert_eq!(&lent[..], b"there");
    assert_eq!(lent.memory().unwrap().1, 6..11);
    let part = lent.slice(1..3);
    assert_eq!((&part[..], part.memory().unwrap().1), (&b"he"[..], 7..9));
    drop(lent);
    assert_eq!(&part.slice(0..1)[..], b"h");
    assert!(part.slice(2..2).is_empty());
    for range in [0..3, 3..3, Range { start: 2, end: 1 }, usize::MAX..usize::MAX] {
        let sliced = std::panic::catch_unwind(|| part.slice(range.clone()));
        assert!(sliced.is_err(), "{range:?} is not within");
    }
    let gathered = Lent::from(b"gathered".to_vec());
    assert!(gathered.memory().is_none());
    assert_eq!(&gathered.slice(0..4).slice(1..4)[..], b"ath");
}

#[test]
fn what_was_lent_is_lent_on_without_a_copy() {
    let loan = Loan::from_bytes(b"0123456789").unwrap();
    let lent = body(loan.content(), 2, 6).unwrap().into_bytes().unwrap();
    let relayed = Loan::from_lent(&lent).unwrap();
    assert_ne!(relayed.id(), loan.id(), "numbers are each server's own");
    assert_eq!((relayed.start(), relayed.len()), (2, 6));
    assert!(relayed.slice(0..7).is_err());
    let part = relayed.slice(1..3).unwrap();
    let again = body(part.content(), part.start(), part.len()).unwrap().into_bytes().unwrap();
    assert_eq!(&again[..], b"34");
    assert_eq!(again.as_ptr(), lent[1..].as_ptr(), "one mapping");
    assert!(Loan::from_lent(&Lent::from(vec![1])).is_none());
    // An empty part, at the very end.
    let end = lent.slice(6..6);
    assert!(Loan::from_lent(&end).unwrap().is_empty());
}

#[cfg(feature = "bytes")]
#[test]
fn lent_bytes_become_bytes_without_a_copy() {
    let loan = Loan::from_bytes(b"0123456789").unwrap();
    let lent = body(loan.content(), 2, 6).unwrap().into_bytes().unwrap();
    let at = lent.as_ptr();
    let bytes = bytes::Bytes::from(lent);
    drop(loan);
    assert_eq!((bytes.as_ptr(), &bytes[..]), (at, &b"234567"[..]));
    let part = bytes.slice(1..2);
    drop(bytes);
    assert_eq!(&part[..], b"3");
}

// ---------------------------------------------------------------- making loans

#[test]
fn a_reader_of_any_length_becomes_a_loan_and_one_that_fails_an_error() {
    struct Fails(usize);
    impl Read for Fails {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            match self.0 {
                0 => Err(std::io::ErrorKind::ConnectionReset.into()),
                left => {
                    let some = left.min(into.len());
                    self.0 -= some;
                    Ok(some)
                }
            }
        }
    }
    for len in [0, 1, 4096, 300_000] {
        let loan = Loan::from_reader(std::io::repeat(9).take(len)).unwrap();
        assert_eq!(loan.len(), len);
        let bytes = body(loan.content(), 0, len).unwrap().into_bytes().unwrap();
        assert!(bytes.iter().all(|byte| *byte == 9));
        let error = Loan::from_reader(Fails(len as usize)).unwrap_err();
        assert!(matches!(error, Error::Source(_)), "{error}");
    }
}

#[test]
fn a_loan_from_a_file_ignores_its_position_and_a_hole_is_zeros() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"begin").unwrap();
    file.set_len(1 << 20).unwrap();
    let loan = Loan::from_file(&file).unwrap();
    let lent = body(loan.content(), 0, 1 << 20).unwrap().into_bytes().unwrap();
    assert_eq!(&lent[..6], b"begin\0");
    assert!(lent[6..].iter().all(|byte| *byte == 0));
    let error = Loan::file(file).unwrap_err();
    assert!(matches!(error, Error::Misuse(Misuse::NotLendable(_))), "it can write: {error}");
}

#[test]
fn memory_that_is_hollow_is_refused_though_its_blocks_are_many() {
    let len = 64 << 10;
    let of_peer = |memory| Content::of_peer(memory, SEALED, len).map_err(|(_, why)| why);
    // Blocks beyond the end count as well.
    let memory = empty_memfd("hollow").unwrap();
    rustix::fs::ftruncate(&memory, len).unwrap();
    fallocate(&memory, FallocateFlags::KEEP_SIZE, len, len).unwrap();
    assert!(rustix::fs::fstat(&memory).unwrap().st_blocks as u64 * 512 >= len);
    fcntl_add_seals(&memory, memory::SEALS).unwrap();
    assert!(matches!(of_peer(memory), Err(Error::Peer(_))));
    // A hole in the middle, made up for beyond the end.
    let memory = empty_memfd("hollow").unwrap();
    rustix::io::pwrite(&memory, &vec![1; len as usize], 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&memory, punch, 8192, 4096).unwrap();
    fallocate(&memory, FallocateFlags::KEEP_SIZE, len, 4096).unwrap();
    fcntl_add_seals(&memory, memory::SEALS).unwrap();
    assert!(matches!(of_peer(memory), Err(Error::Peer(_))));
    // Whole memory is taken.
    let memory = empty_memfd("whole").unwrap();
    allocate_blocks(&memory, len).unwrap();
    rustix::io::pwrite(&memory, &vec![1; len as usize], 0).unwrap();
    fcntl_add_seals(&memory, memory::SEALS).unwrap();
    assert!(of_peer(memory).is_ok());
}

#[test]
fn which_sockets_lead_to_another_machine() {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;

    use super::body::is_on_this_machine;

    assert!(is_on_this_machine(UnixStream::pair().unwrap().0.as_fd()));
    for ip in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        // A machine without IPv6 has no such listener.
        let Ok(listener) = TcpListener::bind(SocketAddr::new(ip, 0)) else { continue };
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(is_on_this_machine(stream.as_fd()));
        assert!(!is_on_this_machine(listener.as_fd()), "it has no other end");
    }
    // Nothing is sent: an address for documents, behind some route.
    let far = UdpSocket::bind("0.0.0.0:0").unwrap();
    if far.connect("192.0.2.1:9").is_ok() {
        assert!(!is_on_this_machine(far.as_fd()));
    }
    assert!(!is_on_this_machine(tempfile::tempfile().unwrap().as_fd()));
}

#[test]
fn long_memory_begins_at_a_huge_page() {
    // Another test's thread can take the place that was free: not each time.
    let aligned = (0..20).any(|_| {
        let loan = Loan::from_bytes(&vec![7; (4 << 20) + 1]).unwrap();
        let Content::Sealed(sealed) = loan.content() else { panic!("a file") };
        sealed.bytes().as_ptr().addr() % (2 << 20) == 0
    });
    assert!(aligned);
}
