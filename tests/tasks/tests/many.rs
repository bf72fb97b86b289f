//! Many transfers at once need no threads. Alone in its process, whose threads it counts.

use shmferry_tasks::{Spot, back, key, noise, on_threads, threads, until};
use shmferry_test_support::watchdog::watchdog;

#[test]
fn many_transfers_at_once_take_no_threads() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let _serving = spot.serve_tasks();
        let builder = shmferry::Client::builder().segments(256).segment_len(64 << 10).slots(4);
        let client = builder.connect_tokio(spot.address.as_path()).unwrap();
        client.get(key(0, 1)).await.unwrap().read_all().await.unwrap();
        let before = threads();
        let mut all = tokio::task::JoinSet::new();
        for seed in 0..1000 {
            let client = client.clone();
            all.spawn(async move {
                let len = 100_000 + seed * 100;
                let bytes = client.get(key(seed, len)).await.unwrap().read_all().await.unwrap();
                assert!(bytes == noise(seed, len));
            });
        }
        let mut most = 0;
        while let Some(done) = all.join_next().await {
            done.unwrap();
            most = most.max(threads());
        }
        assert!(most <= before, "{most} threads, {before} before");
        until("all segments are back", || back(client.stats()) == 256).await;
    });
}
