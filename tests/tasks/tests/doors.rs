//! Tasks and threads, over sockets and within a process: the same bytes, the same errors.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shmferry::channel::InProcess;
use shmferry::tokio::{Client, Server};
use shmferry::{Error, Refusal, Size};
use shmferry_tasks::{Spot, asked, key, noise, on_threads, serve_tasks};
use shmferry_test_support::watchdog::watchdog;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

const SIZES: [usize; 9] = [0, 1, 1000, 4096, 262_144, 262_145, 2 << 20, (2 << 20) + 1, 9_000_000];

async fn all_sizes_arrive(client: &Client) {
    for (seed, len) in SIZES.into_iter().enumerate() {
        let body = client.get(key(seed, len)).await.unwrap();
        assert_eq!(body.size(), Size::Known(len as u64));
        assert!(body.read_all().await.unwrap() == noise(seed, len), "{len}");

        let mut body = client.get(key(seed, len)).await.unwrap();
        let mut read = Vec::new();
        body.read_to_end(&mut read).await.unwrap();
        assert!(read == noise(seed, len), "{len}, by AsyncRead");

        let bytes = client.get(key(seed, len)).await.unwrap().into_bytes().await.unwrap();
        assert!(bytes == noise(seed, len), "{len}, as Bytes");
    }
    let refused = client.get("none").await;
    assert!(matches!(refused, Err(Error::Refused(Refusal::NotFound))), "{refused:?}");
}

#[test]
fn tasks_ask_threads() {
    let _watchdog = watchdog();
    let spot = Spot::new();
    let _serving = spot.serve_threads();
    on_threads(2, async {
        let client = Client::connect(spot.address.as_path()).unwrap();
        all_sizes_arrive(&client).await;
    });
}

#[test]
fn tasks_ask_tasks() {
    let _watchdog = watchdog();
    for threads in [1, 2] {
        on_threads(threads, async {
            let spot = Spot::new();
            let serving = spot.serve_tasks();
            let client = Client::connect(spot.address.as_path()).unwrap();
            all_sizes_arrive(&client).await;
            serving.stop();
            serving.wait().await;
        });
    }
}

#[test]
fn threads_ask_tasks() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let _serving = spot.serve_tasks();
        let address = spot.address.clone();
        tokio::task::spawn_blocking(move || {
            let client = shmferry::Client::connect(address.as_path()).unwrap();
            for (seed, len) in SIZES.into_iter().enumerate() {
                let body = client.get(key(seed, len)).unwrap();
                assert!(body.read_all().unwrap() == noise(seed, len), "{len}");
            }
        })
        .await
        .unwrap();
    });
}

#[test]
fn tasks_ask_tasks_within_a_process() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let queue = InProcess::bounded(4);
        let serving = serve_tasks(Server::in_process(queue.clone()));
        let client = shmferry::Client::builder().in_process_tokio(&queue).unwrap();
        all_sizes_arrive(&client).await;
        serving.stop();
        serving.wait().await;
        assert!(client.get(key(1, 1)).await.is_err());
    });
}

#[test]
fn a_slow_reader_holds_its_sender_back_and_nobody_else() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let _serving = spot.serve_tasks();
        let client = Client::connect(spot.address.as_path()).unwrap();
        let mut slow = client.get(key(1, 5_000_000)).await.unwrap();
        let mut read = vec![0; 1000];
        slow.read_exact(&mut read).await.unwrap();
        for seed in 0..100 {
            let bytes = client.get(key(seed, 100_000)).await.unwrap().read_all().await.unwrap();
            assert!(bytes == noise(seed, 100_000));
        }
        slow.read_to_end(&mut read).await.unwrap();
        assert!(read == noise(1, 5_000_000));
    });
}

#[test]
fn files_are_sent_whole_and_in_part() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (dir, bytes) = (tempfile::tempdir().unwrap(), noise(7, 3_000_000));
        let path = dir.path().join("file");
        std::fs::write(&path, &bytes).unwrap();
        let server = Server::bind(spot.address.as_path()).unwrap();
        let _serving = server
            .serve(move |request| {
                let path = path.clone();
                async move {
                    let file = std::fs::File::open(path).unwrap();
                    match request.key() {
                        b"whole" => request.send_file(&file).await,
                        b"unknown" => {
                            request.accept(Size::Unknown)?.send_file(&file).await.map(drop)
                        }
                        b"too long" => request.accept(4_000_000)?.send_file(&file).await.map(drop),
                        b"behind" => {
                            let mut outgoing = request.accept(Size::Unknown)?;
                            outgoing.send(b"head").await?;
                            outgoing.send_file(&file).await.map(drop)
                        }
                        _ => {
                            let outgoing = request.accept(1_000_000)?;
                            outgoing.send_file_range(&file, 5..1_000_005).await.map(drop)
                        }
                    }
                }
            })
            .unwrap();
        let client = Client::connect(spot.address.as_path()).unwrap();
        let all = async |key: &str| client.get(key).await.unwrap().read_all().await;
        assert!(all("whole").await.unwrap() == bytes);
        assert!(all("unknown").await.unwrap() == bytes);
        assert!(all("part").await.unwrap() == bytes[5..1_000_005]);
        assert!(all("behind").await.unwrap() == [b"head", &bytes[..]].concat());
        assert!(matches!(all("too long").await, Err(Error::Aborted)));
    });
}

#[test]
fn what_is_written_bit_by_bit_arrives() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let server = Server::bind(spot.address.as_path()).unwrap();
        let _serving = server
            .serve(|request| async move {
                let bytes = asked(request.key()).unwrap();
                let mut outgoing = request.accept(Size::Unknown)?;
                for piece in bytes.chunks(777) {
                    outgoing.write_all(piece).await?;
                    if piece[0] % 5 == 0 {
                        outgoing.flush().await?;
                    }
                }
                outgoing.shutdown().await
            })
            .unwrap();
        let client = Client::connect(spot.address.as_path()).unwrap();
        for (seed, len) in SIZES.into_iter().enumerate() {
            let body = client.get(key(seed, len)).await.unwrap();
            assert!(body.read_all().await.unwrap() == noise(seed, len), "{len}");
        }
    });
}

#[test]
fn a_message_queue_is_refused() {
    let refused = Client::connect("mq:/shmferry-tasks").unwrap_err();
    assert!(refused.to_string().contains("unix:PATH"), "{refused}");
    assert!(Server::bind("mq:/shmferry-tasks").is_err());
}

#[test]
fn an_absent_server_is_waited_for_as_long_as_was_said() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let builder = shmferry::Client::builder().connect_timeout(Duration::from_millis(50));
        let client = builder.connect_tokio(spot.address.as_path()).unwrap();
        let absent = client.get("key").await;
        assert!(matches!(absent, Err(Error::Timeout(_))), "{absent:?}");
        let client = Client::connect(spot.address.as_path()).unwrap();
        let asked = tokio::spawn(async move { client.get(key(1, 5)).await?.read_all().await });
        let _serving = spot.serve_tasks();
        assert_eq!(asked.await.unwrap().unwrap(), noise(1, 5));
    });
}

#[test]
fn an_answer_that_the_handler_hands_to_a_task_of_its_own_is_sent() {
    let _watchdog = watchdog();
    on_threads(1, async {
        let spot = Spot::new();
        let server = Server::bind(spot.address.as_path()).unwrap();
        let _serving = server
            .serve(|request| async move {
                let bytes = asked(request.key()).unwrap();
                let mut outgoing = request.accept(Size::Unknown)?;
                tokio::spawn(async move {
                    outgoing.send(&bytes).await.unwrap();
                    outgoing.finish().await.unwrap();
                });
                Ok::<(), Error>(())
            })
            .unwrap();
        let client = Client::connect(spot.address.as_path()).unwrap();
        let bytes = client.get(key(3, 3_000_000)).await.unwrap().read_all().await.unwrap();
        assert!(bytes == noise(3, 3_000_000));
    });
}

#[test]
fn a_stopped_server_waits_for_answers_that_were_handed_to_other_tasks() {
    let _watchdog = watchdog();
    on_threads(2, async {
        let spot = Spot::new();
        let (taken, is_taken) = oneshot::channel();
        let (taken, is_sent) = (Mutex::new(Some(taken)), Arc::new(AtomicBool::new(false)));
        let sent = Arc::clone(&is_sent);
        let server = Server::bind(spot.address.as_path()).unwrap();
        let serving = server.serve(move |request| {
            let (taken, sent) = (taken.lock().unwrap().take().unwrap(), Arc::clone(&sent));
            async move {
                let bytes = asked(request.key()).unwrap();
                tokio::spawn(async move {
                    taken.send(()).unwrap();
                    request.send_bytes(&bytes).await.unwrap();
                    sent.store(true, SeqCst);
                });
                Ok::<(), Error>(())
            }
        });
        let serving = serving.unwrap();
        let builder = shmferry::Client::builder().segments(1).segment_len(16 << 10).slots(4);
        let client = builder.connect_tokio(spot.address.as_path()).unwrap();
        let reading = tokio::spawn(async move {
            let mut body = client.get(key(3, 3_000_000)).await.unwrap();
            let (mut bytes, mut buffer) = (Vec::new(), vec![0; 5000]);
            loop {
                match body.read(&mut buffer).await.unwrap() {
                    0 => return bytes,
                    len => bytes.extend_from_slice(&buffer[..len]),
                }
            }
        });
        is_taken.await.unwrap();
        serving.stop();
        serving.wait().await;
        assert!(is_sent.load(SeqCst), "it waited");
        assert!(reading.await.unwrap() == noise(3, 3_000_000));
    });
}
