//! The crowd of clients: each on a thread of its own, all held back at quiet moments.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::chance::Dice;
use super::client::{Ending, Plan, private_address};
use super::files::Files;
use super::gate::Gate;
use super::record::{Group, Record};

const CLIENTS: u64 = 10;

/// The longest pause of a client between two requests, in milliseconds: some load, and not all there is.
const THINKING: u64 = 30;

/// What the clients share with those who run the programs.
pub struct Stage {
    pub seed: u64,
    pub timeout: Duration,
    pub files: Files,
    pub record: Record,
    port: AtomicU16,
    whole: AtomicU64,
    pub gate: Gate,
}

impl Stage {
    pub fn new(seed: u64, timeout: Duration, files: Files) -> Stage {
        Stage {
            seed,
            timeout,
            files,
            record: Record::new(),
            port: AtomicU16::new(0),
            whole: AtomicU64::new(0),
            gate: Gate::default(),
        }
    }

    /// Where the proxy listens, or did last.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(private_address()), self.port.load(SeqCst))
    }

    pub fn listens_at(&self, port: u16) {
        self.port.store(port, SeqCst);
    }

    /// Whole transfers so far.
    pub fn whole(&self) -> u64 {
        self.whole.load(SeqCst)
    }
}

/// Has clients come until the run is over.
pub fn gather(stage: &Arc<Stage>) -> Vec<JoinHandle<()>> {
    (0..CLIENTS)
        .map(|client| {
            let stage = Arc::clone(stage);
            thread::spawn(move || {
                let mut number = 0;
                while !stage.record.is_over() {
                    let mut dice = Dice::of(stage.seed, CLIENT + client, number);
                    let plan = Plan::draw(&mut dice, &stage.files, stage.timeout);
                    stage.gate.inside(|| carry_out(&stage, &plan));
                    thread::sleep(Duration::from_millis(dice.roll(THINKING)));
                    number += 1;
                }
            })
        })
        .collect()
}

/// Whose dice they are.
const CLIENT: u64 = 1000;

/// Does it, notes how it ended, and whether that may be.
pub fn carry_out(stage: &Stage, plan: &Plan) {
    let start = Instant::now();
    let ending = plan.carry_out(stage.address(), &stage.files);
    let told = |what: &str| {
        format!(
            "{}: {what}, {:.2} s after it began",
            plan.name(&stage.files),
            start.elapsed().as_secs_f64()
        )
    };
    let name = match &ending {
        Ending::Whole => {
            stage.whole.fetch_add(1, SeqCst);
            "whole"
        }
        Ending::Short => "short",
        Ending::Error => "error",
        Ending::Miss => "miss",
        Ending::Invalid => "invalid",
        Ending::Nothing => "nothing",
        Ending::Refused => "refused",
        Ending::Left => "left",
        Ending::Hang(place) => {
            stage.record.failed("hang", &told(place));
            "hang"
        }
        Ending::Wrong(what) => {
            stage.record.failed("wrong bytes", &told(what));
            "wrong"
        }
    };
    stage.record.count(Group::Transfers, name);
    // Without a fault that could excuse it, everything ends as it should.
    let excused = matches!(ending, Ending::Hang(_) | Ending::Wrong(_))
        || plan.ends_well(&ending, &stage.files);
    if !excused && stage.record.was_calm_since(start) {
        stage.record.failed("failed in calm", &told(name));
    }
}
