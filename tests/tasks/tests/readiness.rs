//! What is ready is told, also while a client is at its limit of requests under way.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::event::epoll;
use shmferry::Deadline;
use shmferry::channel::{Requester, Seqpacket, SeqpacketQueue, SeqpacketRequester};
use shmferry::protocol::{Receiver, Sender, ShmTransfer, Starting};
use shmferry::segment::{Memfd, SegmentPool};
use shmferry::tokio::Server;
use shmferry_tasks::{Driven, Spot, asked, key, noise, on_threads};
use shmferry_test_support::wait_until;
use shmferry_test_support::watchdog::watchdog;
use tokio::sync::{Semaphore, mpsc};

/// Requests that a client with one segment may have under way at a server.
const LIMIT: usize = 10;

const SOON: Duration = Duration::from_secs(20);

type Asked = ShmTransfer<Receiver, shmferry::protocol::Offered>;

struct Asker {
    pool: SegmentPool<Memfd>,
    requester: SeqpacketRequester,
}

impl Asker {
    fn new(spot: &Spot) -> Asker {
        let pool = SegmentPool::<Memfd>::builder().segments(1).segment_len(4096).slots(1);
        let pool = pool.create().unwrap();
        let requester = Seqpacket::new(&spot.address).requester(&pool).unwrap();
        Asker { pool, requester }
    }

    fn ask(&self, key: &str) -> Asked {
        let lease = self.pool.lease(Deadline::after(SOON)).unwrap();
        let (request, transfer) = lease.request(key).unwrap();
        self.requester.send(request, Deadline::after(SOON)).unwrap();
        transfer
    }
}

fn taken(queue: &SeqpacketQueue) -> Option<ShmTransfer<Sender, Starting>> {
    match queue.try_recv() {
        Poll::Ready(taken) => Some(taken.unwrap()),
        Poll::Pending => None,
    }
}

#[test]
fn a_queue_that_is_pending_has_looked_at_everything() {
    let _watchdog = watchdog();
    let spot = Spot::new();
    let queue = Seqpacket::new(&spot.address).bind().unwrap();
    // Told of changes only, as tokio is.
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let changes = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&epoll, &queue, epoll::EventData::new_u64(0), changes).unwrap();
    let is_told = || {
        let mut events = [MaybeUninit::uninit()];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        !epoll::wait(&epoll, &mut events, Some(&now)).unwrap().0.is_empty()
    };
    let next = || {
        let mut request = None;
        wait_until("a request", || {
            request = is_told().then(|| taken(&queue)).flatten();
            request = request.take().or_else(|| taken(&queue));
            request.is_some()
        });
        request.unwrap()
    };

    let first = Asker::new(&spot);
    // Each is taken, and then withdrawn: its segment serves the next.
    let mut held: Vec<_> = (0..LIMIT)
        .map(|_| {
            let asked = first.ask("held");
            let request = next();
            drop(asked);
            request
        })
        .collect();
    let waiting = first.ask("at the limit");
    while is_told() || taken(&queue).is_some() {}
    assert!(taken(&queue).is_none(), "it takes no more than its limit from a client");

    // There is room again, and another client comes, before the queue looks.
    drop(held.pop());
    let second = Asker::new(&spot);
    let other = second.ask("other");
    let mut keys = Vec::new();
    wait_until("both are taken, whenever the queue says that there is something", || {
        if is_told() {
            while let Some(request) = taken(&queue) {
                keys.push(request.key().to_vec());
                held.push(request);
            }
        }
        keys.len() == 2
    });
    keys.sort();
    assert_eq!(keys, [&b"at the limit"[..], b"other"]);
    drop((waiting, other));
}

#[test]
fn a_client_at_its_limit_is_still_heard() {
    const LARGE: usize = 100_000;
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (tell, mut is_taken) = mpsc::unbounded_channel();
        let release = Arc::new(Semaphore::new(0));
        let server = Server::bind(spot.address.as_path()).unwrap();
        let server = server.timeout(Duration::from_secs(3600)).on_error(|_| {});
        let _serving = {
            let release = Arc::clone(&release);
            server.serve(move |request| {
                tell.send(()).unwrap();
                let release = Arc::clone(&release);
                async move {
                    if request.key() == b"held" {
                        let _permit = release.acquire().await;
                    }
                    let bytes = asked(request.key()).unwrap_or_default();
                    request.send_bytes(&bytes).await
                }
            })
        };
        let builder = shmferry::Client::builder().segments(1).segment_len(8192).slots(2);
        let client = builder.connect_tokio(spot.address.as_path()).unwrap();
        for _ in 1..LIMIT {
            let mut get = Driven::new(client.get("held"));
            assert!(get.polled(1).await.is_none());
            is_taken.recv().await.unwrap();
        }
        // As many as may be under way, of which the last takes many steps.
        let body = client.get(key(1, LARGE)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await; // so that its handler sleeps
        assert!(body.read_all().await.unwrap() == noise(1, LARGE));
        release.add_permits(LIMIT);
        let body = client.get(key(2, LARGE)).await.unwrap();
        assert!(body.read_all().await.unwrap() == noise(2, LARGE));
    });
}
