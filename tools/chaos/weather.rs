//! What is being done to the programs, and since when: whether a failure is excused.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::record::lock;

/// From the best to the worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Weather {
    /// Nothing.
    Calm,
    /// One program is replaced in order: requests may be late, and none may fail.
    Orderly,
    /// A fault, or its effects may last.
    Trouble,
}

/// Longer ago than anything that is still judged began.
const MEMORY: Duration = Duration::from_secs(300);

/// The weather and its changes.
pub struct Weathers(Mutex<VecDeque<(Instant, Weather)>>);

impl Weathers {
    /// Trouble, until told otherwise.
    pub fn new() -> Weathers {
        Weathers(Mutex::new(VecDeque::from([(Instant::now(), Weather::Trouble)])))
    }

    pub fn set(&self, weather: Weather) {
        let mut changes = lock(&self.0);
        changes.push_back((Instant::now(), weather));
        // The one before is needed: it tells how the time that is remembered began.
        while changes.get(1).is_some_and(|(since, _)| since.elapsed() > MEMORY) {
            changes.pop_front();
        }
    }

    /// The worst from `start` to now.
    pub fn worst_since(&self, start: Instant) -> Weather {
        let changes = lock(&self.0);
        let mut worst = Weather::Calm;
        for (since, weather) in changes.iter().rev() {
            worst = worst.max(*weather);
            if *since <= start {
                break;
            }
        }
        worst
    }
}
