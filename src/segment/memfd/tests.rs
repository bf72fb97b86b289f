//! Which descriptors can be mapped, and which are refused.

use super::super::LAYOUT_VERSION;
use super::*;
use rustix::fs::ftruncate;

const ID: SegmentId = SegmentId { pool: PoolId(7), index: 3 };

fn geometry() -> Geometry {
    Geometry::new(2, 5000).unwrap()
}

fn create() -> Result<(Segment<ReadSlots>, Memfd)> {
    <Memfd as super::super::sealed::Backing>::create(&(), ID, geometry())
}

fn refusal(fd: impl AsFd, id: SegmentId, geometry: Geometry) -> LayoutMismatch {
    match attach(fd, id, geometry) {
        Err(Error::Layout(unusable)) => unusable.0,
        other => panic!("{other:?}"),
    }
}

fn memfd(len: u64, allocated: bool, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    if allocated {
        fallocate(&fd, FallocateFlags::empty(), 0, len).unwrap();
    }
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[test]
fn an_honest_segment_is_attached() {
    let (owned, memory) = create().unwrap();
    let attached = attach(&memory, ID, geometry()).unwrap();
    attached.writable().write_slot(1, 4990, b"0123456789");
    let mut seen = [0; 10];
    owned.readable().read_slot(1, 4990, &mut seen);
    assert_eq!(&seen, b"0123456789");
}

#[test]
fn only_the_segment_that_was_announced() {
    let (owned, memory) = create().unwrap();
    assert_eq!(owned.header().turn.phase_of(0), Some(crate::segment::Phase::Idle));
    assert_eq!(owned.header().turn.phase_of(1), None, "no such generation");
    let other = SegmentId { index: 4, ..ID };
    assert_eq!(
        refusal(&memory, other, geometry()),
        LayoutMismatch::Identity { found: ID, expected: other }
    );
    // The same length, divided differently.
    let recut = Geometry::new(2, 5001).unwrap();
    let found = LayoutMismatch::Geometry { slot_count: 2, slot_len: 5000 };
    assert_eq!(refusal(&memory, ID, recut), found);
    let longer = Geometry::new(3, 5000).unwrap();
    let sizes = LayoutMismatch::Size { found: 20_480, expected: 28_672 };
    assert_eq!(refusal(&memory, ID, longer), sizes);
}

#[test]
fn no_descriptor_that_could_kill_us() {
    let len = geometry().mapped_len() as u64;
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    assert_eq!(refusal(&file, ID, geometry()), LayoutMismatch::Unsealed);
    let growing = memfd(len, true, SealFlags::GROW | SealFlags::SEAL);
    assert_eq!(refusal(&growing, ID, geometry()), LayoutMismatch::Unsealed);
    let short = memfd(len - 1, true, SEALS);
    let sizes = LayoutMismatch::Size { found: len - 1, expected: len };
    assert_eq!(refusal(&short, ID, geometry()), sizes);
    let hollow = memfd(len, false, SEALS);
    assert_eq!(
        refusal(&hollow, ID, geometry()),
        LayoutMismatch::Sparse { present: 0, expected: len }
    );
    let blank = memfd(len, true, SEALS);
    assert_eq!(refusal(&blank, ID, geometry()), LayoutMismatch::NotASegment);
}

#[test]
fn a_segment_of_another_layout_is_refused_and_both_versions_named() {
    let (_owned, memory) = create().unwrap();
    let theirs = LAYOUT_VERSION + 1;
    rustix::io::pwrite(&memory, &theirs.to_ne_bytes(), 8).unwrap();
    let versions = LayoutMismatch::Version { theirs, ours: LAYOUT_VERSION };
    assert_eq!(refusal(&memory, ID, geometry()), versions);
}

#[test]
fn memory_in_huge_pages_which_can_run_out_is_refused() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(fd) = memfd_create("test", flags) else {
        return eprintln!("not tested: this kernel has no huge pages");
    };
    fcntl_add_seals(&fd, SEALS).unwrap();
    assert_eq!(refusal(&fd, ID, geometry()), LayoutMismatch::NotMemory);
}

#[test]
fn nothing_is_mapped_that_could_shrink() {
    let len = geometry().mapped_len() as u64;
    let refused = |fd: OwnedFd| Mapping::sealed(fd, geometry(), true).err();
    assert_eq!(refused(memfd(len, true, SealFlags::GROW)), Some(Errno::INVAL));
    assert_eq!(refused(memfd(len - 1, true, SEALS)), Some(Errno::INVAL));
    assert_eq!(refused(memfd(len, true, SEALS)), None);
}

#[test]
#[should_panic(expected = "past the slot")]
fn no_access_past_a_slot() {
    let (owned, _memory) = create().unwrap();
    owned.readable().read_slot(0, 4999, &mut [0; 2]);
}

#[test]
fn the_receiver_cannot_write_to_slots() {
    let (owned, _memory) = create().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // The header is writable, the slots behind it are not (rule L4).
    let header = owned.header() as *const _ as usize;
    for (start, end, rights) in [(0, 4096, "rw-s"), (4096, 20_480, "r--s")] {
        let line = format!("{:x}-{:x} {rights} ", header + start, header + end);
        assert!(maps.contains(&line), "{line}\n{maps}");
    }
}

#[test]
fn words_are_as_many_as_fit_and_shared() {
    let (ours, fd) = create_words("words", 4096).unwrap();
    let theirs = attach_words(&fd, 4096).unwrap();
    assert_eq!((ours.len(), theirs.len()), (512, 512));
    ours[511].store(7, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(theirs[511].load(std::sync::atomic::Ordering::Relaxed), 7);
}

use proptest::collection::vec;
use proptest::prelude::*;

/// `PROPTEST_CASES` in the environment overrides the number of cases.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        ..Default::default()
    }
}

/// A header: a valid one with a few words overwritten, or any bytes.
fn any_header() -> impl Strategy<Value = Vec<u8>> {
    let honest = {
        let (owned, memory) = create().unwrap();
        let mut bytes = vec![0; 4096];
        rustix::io::pread(&memory, &mut bytes, 0).unwrap();
        drop(owned);
        bytes
    };
    let word = prop_oneof![any::<u32>(), 0u32..9, Just(u32::MAX), Just(1 << 31)];
    // The geometry mostly, then the words that both sides use.
    let place =
        prop_oneof![4 => 0usize..11, 4 => 32usize..80, 2 => 352usize..430, 1 => 0usize..1024];
    let edited = vec((place, word), 0..4).prop_map(move |edits| {
        let mut bytes = honest.clone();
        for (place, word) in edits {
            bytes[place * 4..][..4].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    });
    prop_oneof![6 => edited, 1 => vec(any::<u8>(), 4096)]
}

proptest! {
    #![proptest_config(config(20_000))]

    #[test]
    fn any_header_is_attached_as_announced_or_refused(
        header in any_header(),
        index in 2u32..5,
        (slots, slot_len) in prop_oneof![Just((2, 5000)), (0u32..4, 4990u32..5010), any::<(u32, u32)>()],
    ) {
        let fd = memfd(geometry().mapped_len() as u64, true, SealFlags::empty());
        rustix::io::pwrite(&fd, &header, 0).unwrap();
        fcntl_add_seals(&fd, SEALS).unwrap();
        let id = SegmentId { index, ..ID };
        let Ok(claimed) = Geometry::new(slots, slot_len) else {
            prop_assert!(slots == 0 || slots > Geometry::MAX_SLOTS
                || slot_len == 0 || slot_len > Geometry::MAX_SLOT_LEN);
            return Ok(());
        };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let named = [word(8), word(12), word(16), word(20), word(32)]
            == [LAYOUT_VERSION, 4096, slots, slot_len, index];
        let honest = &header[..8] == b"shmferry" && named && header[24..32] == ID.pool.0.to_ne_bytes();
        let fits = claimed.mapped_len() == geometry().mapped_len();
        match attach(&fd, id, claimed) {
            Ok(segment) => {
                prop_assert!(honest && fits);
                // The words that both sides use can be read safely, whatever they contain.
                let shared = segment.header();
                if let Ok((generation, phase)) = shared.turn.load() {
                    prop_assert_eq!(shared.turn.phase_of(generation), Some(phase));
                    prop_assert_eq!(shared.turn.phase_of(generation + 1), None);
                }
                prop_assert!(shared.filled.try_wait().is_ok() == (word(1408) & !(1 << 31) != 0));
                let chunk = shared.chunks[0].load();
                let chunks = if cfg!(feature = "raw-sync") { 2048 } else { 1792 };
                prop_assert_eq!(chunk.last, word(chunks) >> 31 == 1);
                // Except waking by `raw_sync`, which trusts the contents of its event.
                if cfg!(not(feature = "raw-sync")) {
                    shared.free.poison();
                    prop_assert!(shared.free.is_poisoned());
                }
            }
            Err(Error::Layout(_)) => prop_assert!(!honest || !fits),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
