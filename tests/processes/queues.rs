//! What only a POSIX message queue and named segments can suffer: foreign messages, foreign queues,
//! limits, a full file system, names that the dead have left.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::OnceLock;

use nix::mqueue::{MQ_OFlag, MqAttr, MqdT, mq_close, mq_getattr, mq_open, mq_send, mq_unlink};
use nix::sys::stat::Mode as Permissions;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mknodat, open};
use shmferry::channel::SendError;
use shmferry::error::Misuse;
use shmferry_test_support::{SHARED_MEMORY, names_in, queue_exists, wait_until};

use super::*;

const NOBODY: u32 = 65_534;

/// The roles that only tests in here need.
pub(super) fn play(role: &str, address: &str) {
    match role {
        "bind and halt" => {
            let _queue = Mq::bind(address).unwrap();
            say("ready");
            linger()
        }
        "make two pools and exit" => {
            let _pools = [pool::<Mq>(2, 1), pool::<Mq>(40, 1)];
            say("holding");
            is_nudged();
            std::process::exit(0) // with all of them alive
        }
        "bind beyond the limit" => {
            let capacity = msg_max() + 1;
            match Mq::at(address).capacity(capacity).bind() {
                Ok(_) => say("bound"),
                Err(error) => say(&format!("error: {error}")),
            }
        }
        "fill the shared memory" => fill_the_shared_memory(),
        "take two and tell of their ends" => take_two_and_tell(address),
        other => panic!("unknown role {other:?}"),
    }
}

fn place() -> Place {
    Place::over(Transport::Mq)
}

fn msg_max() -> u32 {
    fs::read_to_string("/proc/sys/fs/mqueue/msg_max").unwrap().trim().parse().unwrap()
}

/// The kernel's queue, opened past the library.
struct Raw(Option<MqdT>);

impl Raw {
    fn open(name: &str) -> Raw {
        let flags = MQ_OFlag::O_RDWR | MQ_OFlag::O_NONBLOCK;
        Raw(Some(mq_open(name, flags, Permissions::empty(), None).unwrap()))
    }

    fn create(name: &str) -> Raw {
        let flags = MQ_OFlag::O_RDWR | MQ_OFlag::O_CREAT | MQ_OFlag::O_EXCL;
        let mode = Permissions::S_IRUSR | Permissions::S_IWUSR;
        Raw(Some(mq_open(name, flags, mode, Some(&MqAttr::new(0, 2, 64, 0))).unwrap()))
    }

    fn get(&self) -> &MqdT {
        self.0.as_ref().unwrap()
    }

    fn send(&self, message: &[u8]) {
        // It is full at times; others take from it.
        wait_until("there was room in the queue", || mq_send(self.get(), message, 0).is_ok());
    }

    fn waiting(&self) -> i64 {
        mq_getattr(self.get()).unwrap().curmsgs()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        mq_close(self.0.take().unwrap()).unwrap();
    }
}

/// A message of the version that this library speaks.
fn message(pid: u32, pool: u64, index: u32, geometry: (u32, u32), key: &str) -> Vec<u8> {
    let mut bytes = b"shmferry".to_vec();
    bytes.extend(super::VERSION.to_le_bytes());
    bytes.extend(pid.to_le_bytes());
    bytes.extend(pool.to_le_bytes());
    bytes.extend(0u64.to_le_bytes()); // the edition
    bytes.extend(index.to_le_bytes());
    bytes.extend(1u64.to_le_bytes()); // the generation
    bytes.extend(geometry.0.to_le_bytes());
    bytes.extend(geometry.1.to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes
}

type Reports = Arc<Mutex<Vec<(Option<u32>, String)>>>;

/// A server in this process that remembers what it could not use.
fn reporting(address: &str) -> (PosixMqQueue, Reports) {
    let reports = Reports::default();
    let queue = Mq::at(address).on_rejected({
        let reports = Arc::clone(&reports);
        move |peer, error| {
            reports.lock().unwrap().push((peer.and_then(|peer| peer.pid), error.to_string()));
        }
    });
    (queue.bind().unwrap(), reports)
}

/// Runs two workers on a queue meanwhile.
fn while_serving<R>(queue: &PosixMqQueue, run: impl FnOnce() -> R) -> R {
    thread::scope(|scope| {
        let _closing = Closing(queue); // however it ends, the workers do
        for _ in 0..2 {
            scope.spawn(|| {
                answer(queue, |mut sending, len| sending.write_all(&pattern(len)).unwrap());
            });
        }
        run()
    })
}

/// A pool of our own making: a lifeline that is held, and a segment that claims too much.
struct Planted {
    paths: [PathBuf; 2],
    _held: OwnedFd,
}

impl Planted {
    fn new(pool: u64, len: u64) -> Planted {
        let stem = format!("{SHARED_MEMORY}/shmferry-{}-{pool:016x}", std::process::id());
        let paths = [PathBuf::from(&stem), PathBuf::from(format!("{stem}-0"))];
        mknodat(CWD, &paths[0], FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let held = open(&paths[0], OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
        // For this user only, as a pool makes it: another test looks at all of our names.
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let segment = options.open(&paths[1]).unwrap();
        segment.set_len(len).unwrap();
        Planted { paths, _held: held }
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        for path in &self.paths {
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn garbage_in_the_queue_is_reported_and_costs_nobody_else_anything() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let (queue, reports) = reporting(address);
    let us = std::process::id();
    while_serving(&queue, || {
        let pool = pool::<Mq>(2, 2);
        let requester = Mq::requester(address, &pool);
        let honestly =
            || assert!(read_all(ask::<Mq>(&requester, &pool, 9000).unwrap()) == pattern(9000));
        honestly();
        let raw = Raw::open(place.queue());
        let sound = (2, 2048);
        // The header's page and the slots: of the right length, but with holes.
        let (short, sparse) = (Planted::new(0xdead_0001, 100), Planted::new(0xdead_0002, 3 * 4096));
        let mut version_nine = message(us, 1, 0, sound, "10");
        version_nine[8] = 9;
        let garbage: [(&[u8], Option<u32>, &str); 9] = [
            (b"", None, "malformed"),
            (b"GET / HTTP/1.1\r\n\r\n", None, "malformed"),
            (&message(us, 1, 0, sound, "")[..51], None, "malformed"),
            (&vec![b'x'; 4096], None, "malformed"),
            (&version_nine, None, "version"),
            (&message(us, 1, 0, (0, 2048), "10"), Some(us), "slots"),
            (&message(us, 1, 0, (512, u32::MAX), "10"), Some(us), "slots"),
            (&message(us, 0xdead_0001, 0, sound, "10"), Some(us), "100"),
            (&message(us, 0xdead_0002, 0, sound, "10"), Some(us), "0 of its 12288"),
        ];
        for (count, (bytes, pid, part)) in garbage.iter().enumerate() {
            raw.send(bytes);
            wait_until("it was reported", || reports.lock().unwrap().len() > count);
            let (told, why) = reports.lock().unwrap()[count].clone();
            assert!(told == *pid && why.contains(part), "{part:?} is not in {told:?}: {why}");
            honestly();
        }
        // Nobody has these: dropped in silence, as what may be left of the dead.
        raw.send(&message(us, 1, 0, sound, "10"));
        raw.send(&message(1, 1, 0, sound, "10"));
        raw.send(&message(u32::MAX, 1, 0, sound, "10"));
        raw.send(&message(us, 0xdead_0001, 7, sound, "10"));
        for _ in 0..200 {
            raw.send(b"flood");
        }
        honestly();
        wait_until("all were reported", || reports.lock().unwrap().len() == garbage.len() + 200);
        honestly();
        drop((short, sparse));
    });
    assert_eq!(reports.lock().unwrap().len(), 209);
}

#[test]
fn a_flood_of_garbage_holds_no_worker_past_its_deadline() {
    let _watchdog = watchdog();
    let place = place();
    let raw = Arc::new(OnceLock::<Raw>::new());
    let queue = Mq::at(&place.cache_address()).on_rejected({
        let raw = Arc::clone(&raw);
        // Whatever is taken is followed by more: the queue is never empty.
        move |_, _| raw.get().unwrap().send(b"flood")
    });
    let queue = queue.bind().unwrap();
    raw.get_or_init(|| Raw::open(place.queue())).send(b"flood");
    let none = queue.recv(Deadline::after(Duration::from_millis(20))).map(drop);
    assert!(matches!(none, Err(Error::Timeout(Awaited::Request))), "{none:?}");
}

#[test]
fn what_a_dead_pool_has_asked_for_is_dropped_in_silence() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let (queue, reports) = reporting(address);
    let raw = Raw::open(place.queue());
    for dead in 1..4 {
        let receiver = Other::start("ask and halt", &place);
        wait_until("it had asked", || raw.waiting() == dead);
        receiver.kill();
    }
    while_serving(&queue, || {
        let pool = pool::<Mq>(1, 2);
        let requester = Mq::requester(address, &pool);
        assert!(read_all(ask::<Mq>(&requester, &pool, 9000).unwrap()) == pattern(9000));
        assert_eq!(raw.waiting(), 0);
        // The living one only.
        let clients: Vec<_> = queue.clients().iter().map(|peer| peer.pid).collect();
        assert_eq!(clients, [Some(std::process::id())]);
    });
    assert_eq!(*reports.lock().unwrap(), []);
}

/// The names that a process has in shared memory.
fn names_of(pid: u32) -> Vec<String> {
    let mut names = names_in(SHARED_MEMORY.as_ref());
    names.retain(|name| name.starts_with(&format!("shmferry-{pid}-")));
    names
}

#[test]
fn a_pool_that_starts_sweeps_the_dead_and_not_the_living() {
    let _watchdog = watchdog();
    let place = place();
    let queue = Mq::bind(&place.cache_address()).unwrap();
    while_serving(&queue, || {
        let mut living = Other::start("ask whenever told", &place);
        let mut victim = Other::start("ask whenever told", &place);
        for other in [&mut living, &mut victim] {
            other.nudge();
            other.wait_for("served");
        }
        let (names, dead) = (names_of(living.child.id()), victim.child.id());
        assert_eq!((names.len(), names_of(dead).len()), (3, 3), "a lifeline and two segments each");
        victim.kill();
        let mut third = Other::start("ask whenever told", &place);
        third.nudge();
        third.wait_for("served");
        // Perhaps it was somebody else who was just sweeping.
        wait_until("the names of the dead were gone", || names_of(dead).is_empty());
        assert_eq!(names_of(living.child.id()), names);
        for _ in 0..5 {
            for other in [&mut living, &mut third] {
                other.nudge();
                other.wait_for("served");
            }
        }
    });
}

#[test]
fn a_process_that_ends_with_its_pools_takes_their_names_along_and_nobody_elses() {
    let _watchdog = watchdog();
    let place = place();
    let mut other = Other::start("make two pools and exit", &place);
    let pid = other.child.id();
    other.wait_for("holding");
    assert_eq!(names_of(pid).len(), 2 + 2 + 40, "lifelines and segments");
    let ours = pool::<Mq>(2, 1);
    other.nudge();
    assert!(other.child.wait().unwrap().success());
    let left = names_of(pid);
    assert!(left.is_empty(), "left behind: {left:?}");
    let of_ours = |name: &String| name.contains(&ours.id().to_string());
    assert_eq!(names_of(std::process::id()).iter().filter(|name| of_ours(name)).count(), 3);
}

#[test]
fn one_server_at_a_name_and_leftovers_taken_over() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let mut first = Other::start("serve", &place);
    first.wait_for("ready");
    let pool = pool::<Mq>(2, 2);
    let requester = Mq::requester(address, &pool);
    for _ in 0..3 {
        let error = Mq::bind(address).map(drop).unwrap_err();
        let told = format!("{address} is being served by process {}", first.child.id());
        assert_eq!(error.to_string(), told);
        assert!(read_all(ask::<Mq>(&requester, &pool, 9000).unwrap()) == pattern(9000));
    }
    first.kill();
    assert_eq!(place.queue_files().len(), 2, "a killed server cannot clean up");
    assert!(queue_exists(place.queue()));
    let second = Mq::bind(address).unwrap();
    assert_eq!(place.queue_files().len(), 2);
    drop(second);
    assert!(place.is_swept(), "a server that ends leaves nothing");
}

#[test]
fn a_request_in_a_dead_servers_queue_is_told_and_not_served_later() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let mut first = Other::start("bind and halt", &place);
    first.wait_for("ready");
    let pool = pool::<Mq>(2, 2);
    let requester = Mq::requester(address, &pool);
    let raw = Raw::open(place.queue());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ask::<Mq>(&requester, &pool, 10));
        wait_until("it was in the queue", || raw.waiting() == 1);
        first.kill();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Disconnected)));
    });
    let second = Mq::bind(address).unwrap();
    let nothing = second.recv(Deadline::after(Duration::from_millis(20)));
    assert!(matches!(nothing, Err(Error::Timeout(Awaited::Request))));
    while_serving(&second, || {
        assert!(read_all(ask::<Mq>(&requester, &pool, 10).unwrap()) == pattern(10));
    });
    assert_eq!(pool.stats().retired, 0);
}

#[test]
fn a_queue_that_nobody_of_ours_made_is_left_alone() {
    let _watchdog = watchdog();
    let place = place();
    let foreign = Raw::create(place.queue());
    foreign.send(b"precious");
    for _ in 0..2 {
        let error = Mq::bind(&place.cache_address()).map(drop).unwrap_err();
        assert!(matches!(error, Error::Os { .. }), "{error}");
        assert!(error.to_string().contains("that no shmferry server made"), "{error}");
        assert_eq!(place.queue_files().len(), 0);
        assert_eq!(foreign.waiting(), 1);
        assert!(queue_exists(place.queue()));
    }
    mq_unlink(place.queue()).unwrap();
    drop(Mq::bind(&place.cache_address()).unwrap());
}

#[test]
fn a_capacity_beyond_the_systems_is_refused_with_the_numbers_that_work() {
    let _watchdog = watchdog();
    let place = place();
    // Root may exceed the limit.
    let uid = rustix::process::getuid().is_root().then_some(NOBODY);
    let mut other = Other::start_as("bind beyond the limit", &place.cache_address(), uid);
    let (said, most) = (other.wait_for(""), msg_max());
    if said == "bound" {
        eprintln!("not run: this user may exceed the limit");
        return;
    }
    let told =
        format!("the queue's capacity in requests is {}; it must be from 1 to {most}", most + 1);
    assert_eq!(said, format!("error: {told}"));
    let mut names = names_in(SHARED_MEMORY.as_ref());
    names.retain(|name| name.contains(&place.queue()[1..]));
    assert_eq!(names, [""; 0]);
    let error = Mq::at(&place.cache_address()).capacity(0).bind().map(drop).unwrap_err();
    assert!(
        matches!(error, Error::Misuse(Misuse::OutOfRange { given: 0, least: 1, .. })),
        "{error}"
    );
}

#[test]
fn a_full_queue_hands_the_request_back_and_has_room_when_one_is_taken() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let queue = Mq::bind(address).unwrap();
    let pool = pool::<Mq>(11, 1);
    let requester = Mq::requester(address, &pool);
    let mut asked: Vec<_> =
        (0..11).map(|i| pool.lease(soon()).unwrap().request(i.to_string()).unwrap()).collect();
    let (surplus, _transfer) = asked.pop().unwrap();
    let _transfers: Vec<_> = asked
        .into_iter()
        .map(|(request, transfer)| {
            requester.send(request, soon()).unwrap();
            transfer
        })
        .collect();
    let shortly = || Deadline::after(Duration::from_millis(20));
    let SendError { request, error } = requester.send(surplus, shortly()).unwrap_err();
    assert!(matches!(error, Error::Timeout(Awaited::QueueRoom)), "{error}");
    assert_eq!(request.key(), b"10");
    thread::scope(|scope| {
        let sending = scope.spawn(|| requester.send(request, soon()));
        assert_eq!(queue.recv(soon()).unwrap().key(), b"0");
        sending.join().unwrap().unwrap();
    });
    for i in 1..11 {
        assert_eq!(queue.recv(soon()).unwrap().key(), i.to_string().as_bytes());
    }
}

#[test]
fn a_full_queue_of_a_server_that_dies_lets_its_senders_go() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let mut first = Other::start("bind and halt", &place);
    first.wait_for("ready");
    let pool = pool::<Mq>(12, 1);
    let requester = Mq::requester(address, &pool);
    let raw = Raw::open(place.queue());
    thread::scope(|scope| {
        let asking: Vec<_> =
            (0..12).map(|_| scope.spawn(|| ask::<Mq>(&requester, &pool, 10))).collect();
        wait_until("the queue was full", || raw.waiting() == 10);
        first.kill();
        // Those who waited for room find the next server, the others are told.
        let second = Mq::bind(address).unwrap();
        let told = while_serving(&second, || {
            let outcomes = asking.into_iter().map(|asking| asking.join().unwrap());
            outcomes.filter(|outcome| matches!(outcome, Err(Error::Disconnected))).count()
        });
        assert_eq!(told, 10);
    });
}

/// In a file system of its own, of a megabyte.
fn fill_the_shared_memory() {
    let try_to = |segments: u32| {
        let made = SegmentPool::<Named>::builder()
            .segments(segments)
            .segment_len(128 << 10)
            .slots(1)
            .create();
        match made.map(drop) {
            Ok(()) => say("made"),
            Err(error) => say(&format!("error: {error}")),
        }
        say(&format!("left: {:?}", names_in(SHARED_MEMORY.as_ref())));
    };
    try_to(4);
    try_to(40);
    fs::write(format!("{SHARED_MEMORY}/large"), vec![1; 700 << 10]).unwrap();
    try_to(4);
    fs::remove_file(format!("{SHARED_MEMORY}/large")).unwrap();
    try_to(4);
    say("done");
}

#[test]
fn a_full_file_system_is_an_error_with_the_amounts_and_nothing_left() {
    let _watchdog = watchdog();
    let mount = "mount -t tmpfs -o size=1m none /dev/shm";
    let alone = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script, "sh"]);
        command
    };
    if !alone(mount).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        eprintln!("not run: no file system can be mounted here");
        return;
    }
    let mut command = alone(&format!("{mount} && exec \"$@\""));
    command.arg(env::current_exe().unwrap()).args(THE_OTHER);
    let mut other = Other::spawn("fill the shared memory", "mq:/unused", &mut command);
    let asked = |segments: u64| {
        format!("no memory for a pool of {} bytes", segments * ((128 << 10) + 4096))
    };
    other.wait_for("made");
    assert_eq!(other.wait_for("left"), "left: []");
    for (segments, left) in [(40, "left: []"), (4, "left: [\"large\"]")] {
        let error = other.wait_for("error");
        eprintln!("{error}");
        assert!(error.contains(&asked(segments)) && error.contains("available"), "{error}");
        assert_eq!(other.wait_for("left"), left);
    }
    other.wait_for("made");
    assert_eq!(other.wait_for("left"), "left: []");
    other.wait_for("done");
}

#[test]
fn queues_and_names_are_for_this_user_only() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let _queue = Mq::bind(address).unwrap();
    let _pool = pool::<Mq>(3, 1);
    let raw = Raw::open(place.queue());
    assert_eq!(fstat(raw.get()).unwrap().st_mode & 0o777, 0o600);
    let files = place.queue_files();
    assert_eq!(files.len(), 2);
    for file in files {
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
    }
    // Those of other tests, too, which may be gone by now.
    let names = names_of(std::process::id());
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        if let Ok(found) = fs::metadata(Path::new(SHARED_MEMORY).join(&name)) {
            let us = rustix::process::geteuid().as_raw();
            assert_eq!((found.mode() & 0o777, found.uid()), (0o600, us), "{name}");
        }
    }
}

/// What stands there belongs to another user, where the test can arrange for that.
#[test]
fn what_others_put_at_a_servers_names_is_told_by_whose_it_is_and_keeps_nobody_waiting() {
    let _watchdog = watchdog();
    let place = place();
    let address = &place.cache_address();
    let us = rustix::process::geteuid();
    let squatter = if us.is_root() { NOBODY } else { us.as_raw() };
    let stem = format!("{SHARED_MEMORY}/shmferry-queue-{}-{}", us.as_raw(), &place.queue()[1..]);
    let [lock, lifeline] = ["lock", "life"].map(|kind| PathBuf::from(format!("{stem}.{kind}")));
    let taken = |result: Result<(), Error>, at: &Path, told: &str| match result.unwrap_err() {
        Error::NameTaken { path, kind, uid } => {
            assert_eq!((&*path, kind, uid), (at, told, squatter));
        }
        error => panic!("{error}"),
    };
    let pool = pool::<Mq>(1, 1);
    for at in [&lock, &lifeline] {
        let mut kinds = vec!["a FIFO"];
        if squatter != us.as_raw() || at == &lifeline {
            kinds.push("a regular file"); // a lock file of our own is no squatter's
        }
        if squatter == us.as_raw() && at == &lifeline {
            kinds.remove(0); // nor is a lifeline
        }
        for kind in kinds {
            if kind == "a FIFO" {
                mknodat(CWD, at, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
            } else {
                fs::write(at, "1\n").unwrap();
            }
            fs::set_permissions(at, fs::Permissions::from_mode(0o666)).unwrap();
            std::os::unix::fs::chown(at, Some(squatter), None).unwrap();
            taken(Mq::bind(address).map(drop), at, kind);
            if at == &lifeline {
                taken(Mq::connect(address, &pool, soon()).map(drop), at, kind);
            }
            fs::remove_file(at).unwrap();
        }
    }
    // And with none of them, it works.
    drop(Mq::bind(address).unwrap());
}

/// A message to the queue of another user would tell that user what is asked for.
#[test]
fn nothing_is_sent_to_the_queue_of_another_user() {
    let _watchdog = watchdog();
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can make a queue of another user");
        return;
    }
    let place = place();
    let address = &place.cache_address();
    let queue = Mq::bind(address).unwrap();
    let raw = Raw::open(place.queue());
    rustix::fs::fchown(raw.get(), Some(rustix::fs::Uid::from_raw(NOBODY)), None).unwrap();
    let pool = pool::<Mq>(1, 1);
    match Mq::connect(address, &pool, soon()).map(drop) {
        Err(Error::NameTaken { kind, uid, .. }) => {
            assert_eq!((kind, uid), ("a message queue", NOBODY))
        }
        other => panic!("{other:?}"),
    }
    drop(queue);
}

fn take_two_and_tell(address: &str) {
    let queue = Mq::bind(address).unwrap();
    say("ready");
    thread::scope(|scope| {
        for _ in 0..2 {
            let transfer = queue.recv(soon()).unwrap();
            let client = transfer.peer().and_then(|peer| peer.pid).unwrap();
            let mut sending = transfer.accept(Size::Unknown).unwrap();
            scope.spawn(move || {
                let error = loop {
                    match sending.next_slot(Deadline::NEVER).and_then(|slot| slot.send(b"x")) {
                        Ok(()) => {}
                        Err(error) => break error,
                    }
                };
                assert!(matches!(error, Error::Disconnected), "{error}");
                say(&format!("told of {client}"));
            });
        }
    });
    linger()
}

/// The sweep after a death reads a directory, which may be large, or on a busy machine: here,
/// reading it takes half a minute.
#[test]
fn a_sweep_keeps_no_death_from_being_told() {
    let _watchdog = watchdog();
    let place = place();
    let mut server = Other::start("take two and tell of their ends", &place);
    server.wait_for("ready");
    let mut clients = [0, 1].map(|_| Other::start("ask and halt", &place));
    clients.iter_mut().for_each(|client| drop(client.wait_for("holding")));

    let log = place.path("reads");
    let pid = server.child.id();
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-e",
        "trace=getdents64",
        "-e",
        "inject=getdents64:delay_enter=15000000",
    ]);
    strace.arg("-o").arg(&log).args(["-p", &pid.to_string()]).stderr(Stdio::null());
    let Ok(mut strace) = strace.spawn() else {
        eprintln!("not run: there is no strace here");
        return;
    };
    let mut ended = false;
    wait_until("strace was attached", || {
        ended = strace.try_wait().unwrap().is_some();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let mut states =
            threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap());
        ended || states.all(|status| !status.contains("TracerPid:\t0"))
    });
    if ended {
        eprintln!("not run: strace may not trace here");
        return;
    }
    for client in clients {
        let client_pid = client.child.id();
        client.kill();
        server.wait_for(&format!("told of {client_pid}"));
    }
    let reads = fs::read_to_string(&log).unwrap();
    assert!(
        !reads.contains(") = "),
        "the directory was read before both deaths were told: {reads}"
    );
    strace.kill().unwrap();
    strace.wait().unwrap();
    server.kill();
}
