//! Files of every size through the real programs, and memory: how little a transfer takes, and what
//! happens when there is not enough.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::thread;

use image::{ImageFormat, Rgb, RgbImage};
use shmferry_test_support::{
    Answer, Client, Dice, LARGE, PLAIN, Place, Program, Transport, noise, ok, over_both,
};

over_both! {
    files_of_every_size_arrive_whole_through_one_slot,
    files_of_every_size_arrive_whole_through_four_slots,
    one_segment_serves_many_workers_and_many_clients,
    two_gigabytes_pass_through_four_megabytes,
    a_pool_beyond_all_memory_says_how_much_it_asked_for,
    a_pool_beyond_the_limit_on_addresses_says_how_much_it_asked_for,
    a_pool_beyond_the_limit_on_descriptors_is_a_failure_to_start,
    a_pool_beyond_the_limit_on_file_sizes_is_a_failure_to_start,
    more_clients_than_descriptors_wait_and_are_served,
}

/// The sizes at which chunks, segments and the end of a file meet, and one of many segments.
fn critical_sizes(segment: usize, slots: usize) -> Vec<usize> {
    let slot = segment / slots;
    vec![
        0,
        1,
        slot - 1,
        slot,
        slot + 1,
        2 * slot,
        segment - 1,
        segment,
        segment + 1,
        2 * segment - 1,
        2 * segment,
        37 * segment + 13,
    ]
}

fn every_size_arrives(over: Transport, slots: usize) {
    let place = Place::over(over);
    // A size of pages, one that leaves the slots uneven, the least.
    for segment in [64 << 10, 10_007, 824] {
        let sizes = critical_sizes(segment, slots);
        let name = |size: usize| format!("/{segment}/{size}");
        for &size in &sizes {
            place.write(&format!("files{}", name(size)), noise(size, size));
        }
        let cache = place.simplecached(["-c", "files"]).listening();
        let (z, slots) = (segment.to_string(), slots.to_string());
        let proxy = place.webproxy(["-z", &z, "--slots", &slots, "-n", "2"]).listening();
        for _ in 0..3 {
            for &size in &sizes {
                assert_eq!(proxy.get(&name(size)), ok(noise(size, size)), "{}", name(size));
            }
        }
        let [proxy, cache] = place.wind_up([proxy, cache]);
        assert_eq!(
            (proxy.count("errors"), proxy.count("retired"), cache.count("errors")),
            (0, 0, 0)
        );
        assert_eq!(proxy.count("bytes"), cache.count("bytes"));
    }
}

fn files_of_every_size_arrive_whole_through_one_slot(over: Transport) {
    every_size_arrives(over, 1);
}

fn files_of_every_size_arrive_whole_through_four_slots(over: Transport) {
    every_size_arrives(over, 4);
}

fn one_segment_serves_many_workers_and_many_clients(over: Transport) {
    let segment = 16 << 10;
    for slots in ["1", "4"] {
        let place = Place::over(over);
        let sizes = [0, 1, 4095, 4096, 4097, segment - 1, segment, segment + 1, 300_000, 2_000_003];
        let files: Vec<Vec<u8>> =
            sizes.iter().enumerate().map(|(seed, &size)| noise(seed, size)).collect();
        for (i, file) in files.iter().enumerate() {
            place.write(&format!("files/{i}"), file);
        }
        let cache = place.simplecached(["-c", "files", "-t", "16"]).listening();
        let z = segment.to_string();
        let proxy = place.webproxy(["-n", "1", "-t", "16", "-z", &z, "--slots", slots]).listening();
        thread::scope(|scope| {
            for client in 0..24 {
                let (proxy, files) = (&proxy, &files);
                scope.spawn(move || {
                    let mut dice = Dice::new(client);
                    for _ in 0..20 {
                        let i = dice.roll(files.len());
                        proxy.get(&format!("/{i}")).assert_whole(&files[i]);
                    }
                });
            }
        });
        let [proxy, _] = place.wind_up([proxy, cache]);
        assert_eq!((proxy.count("hits"), proxy.count("retired")), (24 * 20, 0));
    }
}

#[test]
fn pictures_decode_after_the_trip() {
    let place = Place::new();
    let picture = RgbImage::from_fn(640, 480, |x, y| {
        Rgb([(x * y / 64) as u8, (x ^ y) as u8, (x * x / 128 + y) as u8])
    });
    let encode = |format| {
        let mut encoded = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut encoded, format).unwrap();
        encoded.into_inner()
    };
    let (png, jpeg) = (encode(ImageFormat::Png), encode(ImageFormat::Jpeg));
    let jpeg_pixels = image::load_from_memory(&jpeg).unwrap();
    place.write("files/picture.png", &png);
    place.write("files/picture.jpg", &jpeg);
    place.write("manifest", "/png files/picture.png\n/jpeg files/picture.jpg\n");
    let cache = place.simplecached(["-c", "manifest"]).listening();
    for args in [&["-z", "824"][..], &["-z", "4096", "--slots", "1"], &PLAIN] {
        let proxy = place.webproxy(args).listening();
        let fetch = |key: &str| {
            let Answer::Ok(fetched) = proxy.get(key) else { panic!("{key} was not served") };
            fetched
        };
        let fetched =
            image::load_from_memory_with_format(&fetch("/png"), ImageFormat::Png).unwrap();
        assert_eq!(fetched.to_rgb8(), picture);
        let fetched =
            image::load_from_memory_with_format(&fetch("/jpeg"), ImageFormat::Jpeg).unwrap();
        assert_eq!(fetched, jpeg_pixels);
        proxy.terminate();
    }
    place.wind_up([cache]);
}

/// What a program may take beside its pool: its own code and data, threads, allocator. Measured in
/// a debug build: about 4 MiB.
const BESIDE_THE_POOL: u64 = 24 << 20;

fn two_gigabytes_pass_through_four_megabytes(over: Transport) {
    const LEN: u64 = (2 << 30) + 12_345;
    const POOL: u64 = 8 * (512 << 10);
    let place = Place::over(over);
    // Nothing but zeros, with marks at both ends, around what a 31-bit number counts, and in
    // between.
    let marks: Vec<(u64, Vec<u8>)> = [0, 524_287, (1 << 30) + 77, (1 << 31) - 50, LEN - 100]
        .into_iter()
        .zip((0..).map(|i| noise(i, 100)))
        .collect();
    let file = File::create(place.write("files/sparse", "")).unwrap();
    file.set_len(LEN).unwrap();
    for (at, mark) in &marks {
        file.write_all_at(mark, *at).unwrap();
    }
    let cache = place.simplecached(["-c", "files"]).listening();
    let proxy = place.webproxy(["-n", "8", "-z", "524288"]).listening();

    let mut client = proxy.connect();
    client.request("/sparse");
    let header = format!("GETFILE OK {LEN}\r\n\r\n");
    assert_eq!(client.read_exactly(header.len()), header.as_bytes());
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    let mut expected = vec![0; 1 << 20];
    loop {
        let read = client.0.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        // The marks, as far as they reach into this part.
        let part = received..received + read as u64;
        let mut marked = false;
        for (at, mark) in &marks {
            for (offset, byte) in (*at..).zip(mark) {
                if part.contains(&offset) {
                    expected[(offset - received) as usize] = *byte;
                    marked = true;
                }
            }
        }
        assert!(buffer[..read] == expected[..read], "a wrong byte in {part:?}");
        received += read as u64;
        if marked {
            expected.fill(0);
        }
    }
    assert_eq!(received, LEN);
    let peaks = [&proxy, &cache].map(Program::peak_memory);
    eprintln!("peak memory: proxy {} KiB, cache {} KiB", peaks[0] >> 10, peaks[1] >> 10);
    assert!(peaks.iter().all(|peak| *peak < POOL + BESIDE_THE_POOL), "{peaks:?}");
    let [proxy, cache] = place.wind_up([proxy, cache]);
    assert_eq!((proxy.count("bytes"), cache.count("bytes")), (LEN, LEN));
}

// ---------------------------------------------------------------- too little

fn a_pool_beyond_all_memory_says_how_much_it_asked_for(over: Transport) {
    let place = Place::over(over);
    let exit = place.webproxy(["-n", "60000", "-z", "1073741824"]).finish();
    // The header's page beside each gigabyte.
    let asked = 60_000 * ((1u64 << 30) + 4096);
    exit.assert_failure(&[
        "webproxy: cannot make the pool",
        &format!("{asked} bytes"),
        "available",
    ]);
    place.assert_nothing_left();
}

fn a_pool_beyond_the_limit_on_addresses_says_how_much_it_asked_for(over: Transport) {
    let place = Place::over(over);
    let address = place.cache_address();
    let args = ["--cache", &address, "-p", "0", "-n", "64", "-z", "16777216"]; // a gigabyte
    let exit = Program::spawn(place.command_limited("-v 500000", "webproxy").args(args)).finish();
    let asked = 64 * ((16 << 20) + 4096);
    exit.assert_failure(&["webproxy: cannot make the pool", &format!("{asked} bytes")]);
    place.assert_nothing_left();
}

fn a_pool_beyond_the_limit_on_descriptors_is_a_failure_to_start(over: Transport) {
    let place = Place::over(over);
    let address = place.cache_address();
    let args = ["--cache", &address, "-p", "0", "-n", "64"];
    let exit = Program::spawn(place.command_limited("-n 40", "webproxy").args(args)).finish();
    exit.assert_failure(&["webproxy: cannot make the pool", "Too many open files"]);
    place.assert_nothing_left();
}

fn a_pool_beyond_the_limit_on_file_sizes_is_a_failure_to_start(over: Transport) {
    let place = Place::over(over);
    let address = place.cache_address();
    let args = ["--cache", &address, "-p", "0", "-n", "1", "-z", "1048576"];
    let exit = Program::spawn(place.command_limited("-f 100", "webproxy").args(args)).finish();
    exit.assert_failure(&["webproxy: cannot make the pool", "File too large"]);
    assert!(!exit.stderr.contains("no memory"), "{}", exit.stderr);
    place.assert_nothing_left();
}

/// Over a socket only: over mq, the cache maps what it fills, and not the pool.
#[test]
fn a_cache_without_room_for_a_pool_turns_it_away_and_serves_the_others() {
    let place = Place::new();
    place.write("files/a", "hello");
    let mut limited = place.command_limited("-v 800000", "simplecached");
    let cache = Program::spawn(limited.args(["--listen", &place.cache_address(), "-c", "files"]))
        .listening();
    let modest = place.webproxy(PLAIN).listening();
    for _ in 0..3 {
        let greedy = place.webproxy(["-n", "64", "-z", "16777216"]).listening(); // a gigabyte
        assert_eq!(greedy.get("/a"), Answer::Error);
        cache.wait_for("turned process");
        assert_eq!(modest.get("/a"), ok("hello"));
        greedy.terminate();
    }
    place.wind_up([modest, cache]);
}

fn more_clients_than_descriptors_wait_and_are_served(over: Transport) {
    let place = Place::over(over);
    place.write("files/a", "hello");
    let large = noise(1, LARGE);
    place.write("files/large", &large);
    let cache = place.simplecached(["--loan-budget", "0", "-c", "files"]).listening();
    let mut limited = place.command_limited("-n 40", "webproxy");
    let address = place.cache_address();
    let proxy = limited.args(["-p", "0", "--listen", "127.0.0.1", "-n", "1", "--cache", &address]);
    let proxy = Program::spawn(proxy.args(["--timeout", "600"])).listening();
    assert_eq!(proxy.get("/a"), ok("hello")); // it has its connection to the cache from now on
    let first = proxy.stall("/large");
    let ask = || {
        let mut client = proxy.connect();
        client.request("/a");
        client
    };
    let waiting: Vec<Client> = (0..100).map(|_| ask()).collect();
    proxy.wait_for("cannot accept: Too many open files");
    first.resume().assert_whole(&large);
    for mut client in waiting {
        assert_eq!(client.answer(), ok("hello"));
    }
    assert_eq!(proxy.get("/a"), ok("hello"));
    place.wind_up([proxy, cache]);
}

#[test]
fn an_origins_body_beyond_the_limit_on_file_sizes_is_an_error() {
    let place = Place::new();
    place.write("root/a", "hello");
    // A body of unknown length, larger than what is kept in memory: it goes to a temporary file.
    let origin = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", origin.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in origin.incoming().flatten() {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
            let _ = stream.write_all(&vec![b'x'; 2 << 20]);
        }
    });
    let mut limited = place.command_limited("-f 2048", "webproxy"); // a megabyte
    let proxy = limited.args(["-p", "0", "--listen", "127.0.0.1", "--root", "root", "-s", &url]);
    let proxy = Program::spawn(proxy).listening();
    assert_eq!(proxy.get("/b"), Answer::Error);
    assert_eq!(proxy.get("/a"), ok("hello"));
    place.wind_up([proxy]);
}
