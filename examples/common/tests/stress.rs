//! A lot of everything at once through the real programs: whole files, misses, malformed requests,
//! clients that leave and clients that dawdle. Alone in its file, so that nothing else runs beside
//! it.

use std::sync::Mutex;
use std::thread;

use shmferry_test_support::{
    Answer, Dice, LARGE, Place, Program, Transport, noise, ok, over_both, wait_until,
};

over_both! {
    a_hundred_thousand_requests_at_random_cost_no_byte_no_descriptor_and_no_thread,
}

/// One request of some kind or other.
fn at_random(proxy: &Program, files: &[Vec<u8>], dice: &mut Dice) {
    let small = dice.roll(files.len() - 4);
    match dice.roll(100) {
        0..50 => proxy.get(&format!("/{small}")).assert_whole(&files[small]),
        50..60 => {
            let large = files.len() - 4 + dice.roll(4);
            proxy.get(&format!("/{large}")).assert_whole(&files[large]);
        }
        60..75 => assert_eq!(proxy.get("/absent"), Answer::NotFound),
        75..90 => {
            let malformed =
                ["PULLFILE GET /1\r\n\r\n", "GETFILE GET 1\r\n\r\n", "GETFILE GET /1 2\r\n\r\n"];
            assert_eq!(Answer::parse(&proxy.ask(malformed[dice.roll(3)])), Answer::Invalid);
        }
        90..95 => {
            let mut client = proxy.connect();
            client.request(&format!("/{}", files.len() - 1));
            client.read_exactly(1 + dice.roll(1000));
            if dice.roll(2) == 0 { client.reset() } else { drop(client) }
        }
        _ => {
            let mut client = proxy.connect();
            for byte in format!("GETFILE GET /{small}\r\n\r\n").into_bytes() {
                client.send([byte]);
            }
            client.answer().assert_whole(&files[small]);
        }
    }
}

fn a_hundred_thousand_requests_at_random_cost_no_byte_no_descriptor_and_no_thread(over: Transport) {
    const CLIENTS: usize = 10;
    const REQUESTS: usize = 10_000;
    const WORKERS: usize = 4;
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let place = Place::over(over);
    let files: Vec<Vec<u8>> = (0..30)
        .map(|i| noise(i, i * 97))
        .chain([65_536, 65_537, 300_000, 500_001].into_iter().map(|len| noise(len, len)))
        .collect();
    for (i, file) in files.iter().enumerate() {
        place.write(&format!("files/{i}"), file);
    }
    let large = noise(1000, LARGE);
    place.write("files/large", &large);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files", "-t", "4"]).listening();
    let proxy =
        place.webproxy(["-n", "2", "-t", "4", "-z", "16384", "--timeout", "600"]).listening();
    // Whatever is made at first is there: over mq, the cache maps a segment when it is first used.
    proxy.assert_pool_is_whole(2, "/large", &large);
    let descriptors = || (proxy.descriptors(), cache.descriptors());
    let threads = || (proxy.threads_named("proxy"), cache.threads_named("shmferry-worker"));
    wait_until("they were idle", || proxy.is_asleep() && cache.is_asleep());
    let before = descriptors();
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (proxy, files) = (&proxy, &files);
            scope.spawn(move || {
                let mut dice = Dice::new(client);
                (0..REQUESTS).for_each(|_| at_random(proxy, files, &mut dice));
            });
        }
    });
    wait_until("their descriptors were as before", || descriptors() == before);
    // As many as there are workers stay, for what comes next.
    wait_until("the surplus threads had gone", || threads().0 <= WORKERS && threads().1 <= WORKERS);
    assert_eq!(proxy.get("/1"), ok(&files[1]));
    assert_eq!((proxy.segments(), cache.segments()), (2, 2));
    let [proxy, cache] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("errors"), cache.count("errors")), (0, 0));
    assert_eq!(proxy.count("requests"), (CLIENTS * REQUESTS + 3) as u64);
    assert_eq!(
        proxy.count("requests"),
        ["hits", "misses", "invalid"].map(|name| proxy.count(name)).iter().sum()
    );
}
