//! Quiet moments: what the programs hold stays as it was, however long they live.

use std::thread;
use std::time::{Duration, Instant};

use super::Result;
use super::pools;
use super::program::Holdings;
use super::record::Group;
use super::theatre::{POOL_LEN, ROLES, Role, SEGMENTS, Theatre};

/// Whole transfers that a program has behind it when it is warm.
const WARM: u64 = 150;

/// How long what is on its way out may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Threads that either crew keeps, and those that close and watch.
const THREADS: usize = 12;

/// How soon to look again.
const GLANCE: Duration = Duration::from_millis(10);

/// Holds the clients back, and compares what each program holds with what it held when it was young.
pub fn take(theatre: &mut Theatre) -> Result<()> {
    let stage = theatre.stage.clone();
    if !theatre.hold_back() {
        stage.record.failed("hang", "clients do not come to an end");
    }
    for role in ROLES {
        let whole = stage.whole();
        let actor = theatre.actor(role)?;
        let since = actor.since;
        if whole - actor.whole_before < WARM {
            continue;
        }
        // Then all have a connection to it.
        if !theatre.pools.as_ref().is_some_and(|pools| pools.all_answered_since(since)) {
            continue;
        }
        let actor = theatre.actor(role)?;
        match actor.baseline.clone() {
            None => {
                let holdings = settled(theatre, role)?;
                theatre.actor(role)?.baseline = holdings;
            }
            Some(baseline) => compare(theatre, role, &baseline)?,
        }
    }
    let end = Instant::now() + TIMEOUT;
    while theatre.names().len() > theatre.names_needed() {
        if Instant::now() > end {
            let names = theatre.names();
            stage
                .record
                .failed("leak", &format!("{} names in shared memory: {names:?}", names.len()));
            break;
        }
        thread::sleep(GLANCE);
    }
    stage.record.count(Group::Checks, "quiet moments");
    theatre.let_in();
    Ok(())
}

/// What a program holds when that has not changed for a while.
fn settled(theatre: &mut Theatre, role: Role) -> Result<Option<Holdings>> {
    let end = Instant::now() + TIMEOUT;
    let (mut last, mut same) = (None, 0);
    while Instant::now() < end && same < 10 {
        let now = theatre.program(role)?.holdings();
        let count = now.as_ref().map(|now| (now.descriptors, now.threads, now.mappings));
        same = if Some(count) == last { same + 1 } else { 0 };
        last = Some(count);
        thread::sleep(GLANCE);
    }
    Ok(theatre.program(role)?.holdings())
}

fn compare(theatre: &mut Theatre, role: Role, baseline: &Holdings) -> Result<()> {
    let end = Instant::now() + TIMEOUT;
    loop {
        let Some(now) = theatre.program(role)?.holdings() else { return Ok(()) };
        let Some(excess) = excess(&now, baseline) else { break };
        if Instant::now() > end {
            theatre
                .stage
                .record
                .failed("leak", &format!("{role:?} holds more {excess}: {baseline}; then {now}"));
            theatre.actor(role)?.baseline = Some(now); // told once
            break;
        }
        thread::sleep(GLANCE);
    }
    theatre.stage.record.count(Group::Checks, "comparisons of holdings");
    Ok(())
}

/// What there is too much of.
fn excess(now: &Holdings, baseline: &Holdings) -> Option<&'static str> {
    // A thread has a stack and a guard, and may have an arena of the allocator with its reserve.
    let more_threads = THREADS.saturating_sub(baseline.threads);
    let others = |holdings: &Holdings| holdings.descriptors - holdings.segments;
    // A cache learns of segments one by one, by and by; of more than there are in the pool, never.
    if others(now) > others(baseline) + 3 {
        Some("descriptors")
    } else if now.segments > baseline.segments.max(SEGMENTS + pools::SEGMENTS + 4) {
        Some("segments")
    } else if now.threads > baseline.threads.max(THREADS) {
        Some("threads")
    } else if now.mappings
        > baseline.mappings + 4 * more_threads + 2 * (SEGMENTS + pools::SEGMENTS) + 32
    {
        Some("mappings")
    } else if now.resident > baseline.resident + POOL_LEN + (16 << 20) {
        Some("memory")
    } else {
        None
    }
}
