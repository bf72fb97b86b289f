//! Clients that leave while their handlers go on. A program of its own: it counts all that the process has.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use shmferry::tokio::Server;
use shmferry::{Error, Refusal, Size};
use shmferry_tasks::{Spot, on_threads, until};
use shmferry_test_support::watchdog::watchdog;
use tokio::sync::Semaphore;

const CLIENTS: usize = 60;

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Segments and rings that are mapped.
fn mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

#[test]
fn clients_whose_handlers_go_on_leave_nothing_behind() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (gate, ended) = (Arc::new(Semaphore::new(0)), Arc::<AtomicUsize>::default());
        let (entry, count) = (Arc::clone(&gate), Arc::clone(&ended));
        let server = Server::bind(spot.address.as_path()).unwrap();
        let server = server.on_error(|error| panic!("{error}"));
        let serving = server.serve(move |request| {
            let (gate, ended) = (Arc::clone(&entry), Arc::clone(&count));
            async move {
                match request.key() {
                    b"bytes" => request.send_bytes(b"all").await?,
                    b"refused" => request.refuse(Refusal::NotFound)?,
                    _ => {
                        let mut outgoing = request.accept(Size::Unknown)?;
                        outgoing.send(b"all").await?;
                        outgoing.finish().await?;
                    }
                }
                gate.acquire().await.unwrap().forget();
                ended.fetch_add(1, SeqCst);
                Ok::<(), Error>(())
            }
        });
        let serving = serving.unwrap();
        let before = (descriptors(), mappings());
        for client in 0..CLIENTS {
            let builder = shmferry::Client::builder().segments(1);
            let leaver = builder.connect_tokio(spot.address.as_path()).unwrap();
            match ["bytes", "refused", "stream"][client % 3] {
                "refused" => {
                    let reply = leaver.get("refused").await;
                    assert!(matches!(reply, Err(Error::Refused(Refusal::NotFound))), "{reply:?}");
                }
                key => {
                    let body = leaver.get(key).await.unwrap();
                    assert_eq!(body.read_all().await.unwrap(), b"all");
                }
            }
        }
        // A few for what is just being closed.
        until("nothing of them is left", || descriptors() < before.0 + 6).await;
        until("no memory of them is left", || mappings() <= before.1 + 2).await;
        assert_eq!(ended.load(SeqCst), 0, "their handlers go on");
        gate.add_permits(CLIENTS);
        until("all handlers are over", || ended.load(SeqCst) == CLIENTS).await;
        serving.stop();
        serving.wait().await;
    });
}
