//! The `raw_sync` parker: sleeps are as long as their deadlines, and no wake is missed.

use super::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

/// A word and its parker, laid out as in a semaphore.
#[derive(Default)]
struct Bed {
    word: AtomicU32,
    parker: Parker,
}

fn made() -> Arc<Bed> {
    let bed = Arc::new(Bed::default());
    bed.parker.initialise();
    bed
}

/// `raw_sync` itself fails at once in half of these positions within the clock's second.
#[test]
fn half_a_second_lasts_half_a_second() {
    const HALF: Duration = Duration::from_millis(500);
    let sleepers: Vec<_> = (0..20)
        .map(|_| {
            thread::sleep(Duration::from_millis(50));
            thread::spawn(|| {
                let (bed, start) = (made(), Instant::now());
                bed.parker.park(&bed.word, 0, Deadline::after(HALF)).unwrap();
                start.elapsed()
            })
        })
        .collect();
    for sleeper in sleepers {
        let slept = sleeper.join().unwrap();
        assert!(slept >= HALF, "{slept:?}");
    }
}

#[test]
fn no_wake_is_missed() {
    const ROUNDS: u32 = 2_000;
    let (there, back) = (made(), made());
    let start = Instant::now();
    let other = thread::spawn({
        let (there, back) = (Arc::clone(&there), Arc::clone(&back));
        move || {
            for round in 0..ROUNDS {
                there.parker.park(&there.word, round, Deadline::NEVER).unwrap();
                back.word.fetch_add(1, Release);
                back.parker.unpark_all(&back.word);
            }
        }
    });
    for round in 0..ROUNDS {
        there.word.fetch_add(1, Release);
        there.parker.unpark_all(&there.word);
        back.parker.park(&back.word, round, Deadline::NEVER).unwrap();
    }
    other.join().unwrap();
    // Each missed wake costs a second.
    assert!(start.elapsed().as_secs() < u64::from(ROUNDS) / 10);
}
