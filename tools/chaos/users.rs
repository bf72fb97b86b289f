//! What users do that is no fault: read slowly, connect and say nothing, half-close, come all at
//! once. Everyone must be served meanwhile as at any time.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::chance::Dice;
use super::client::Plan;
use super::crowd::{Stage, carry_out};
use super::record::Group;
use super::theatre::Theatre;

/// What they do.
pub enum Users {
    /// Several read slowly, without a pause, for longer than the programs' time-out.
    SlowReaders { rates: Vec<u32>, span: Duration },
    /// Many connect at once and say nothing, or not all; they leave after so long.
    Silent { count: u64, stay: Duration },
    /// All pools ask with hardly a pause.
    Rush(Duration),
}

/// Clients that ask, and half-close, while others are silent.
const HALF_CLOSED: u64 = 6;

impl Users {
    /// As the dice have it, one kind after the other.
    pub fn draw(dice: &mut Dice, turn: u64, timeout: Duration) -> Users {
        match turn % 3 {
            0 => {
                let count = 2 + dice.roll(3);
                let rates = (0..count).map(|_| 80_000 + dice.roll(80_001) as u32).collect();
                Users::SlowReaders { rates, span: timeout * 2 + Duration::from_millis(500) }
            }
            1 => Users::Rush(Duration::from_millis(5000 + dice.roll(3000))),
            _ => {
                let stay = match dice.roll(3) {
                    0 => timeout + Duration::from_millis(500), // until they are cut
                    _ => Duration::from_millis(200 + dice.roll(1500)),
                };
                Users::Silent { count: 100 + dice.roll(301), stay }
            }
        }
    }

    /// What it is counted as.
    pub fn kind(&self) -> &'static str {
        match self {
            Users::SlowReaders { .. } => "slow steady readers",
            Users::Silent { .. } => "a burst of silent connections",
            Users::Rush(_) => "a rush of all pools",
        }
    }

    /// All there is to know of it.
    pub fn told(&self) -> String {
        match self {
            Users::SlowReaders { rates, span } => {
                format!("{}: {rates:?} bytes a second, for {span:?}", self.kind())
            }
            Users::Silent { count, stay } => format!("{}: {count}, for {stay:?}", self.kind()),
            Users::Rush(span) => format!("{}: {span:?}", self.kind()),
        }
    }

    /// Has them come, and go.
    pub fn act(&self, theatre: &mut Theatre, dice: &mut Dice) {
        let stage = &*Arc::clone(&theatre.stage);
        match self {
            Users::SlowReaders { rates, span } => thread::scope(|scope| {
                for rate in rates {
                    let plan =
                        Plan::Steady { file: stage.files.largest(), rate: *rate, span: *span };
                    scope.spawn(move || carry_out(stage, &plan));
                }
            }),
            Users::Silent { count, stay } => {
                let silent: Vec<_> =
                    (0..*count).filter_map(|_| Silent::connect(stage, dice)).collect();
                stage.record.add(Group::Transfers, "silent", silent.len() as u64);
                let files: Vec<_> = (0..HALF_CLOSED).map(|_| stage.files.small(dice)).collect();
                thread::scope(|scope| {
                    for file in files {
                        scope.spawn(move || carry_out(stage, &Plan::HalfClosed(file)));
                    }
                    thread::sleep(*stay);
                });
                drop(silent);
            }
            Users::Rush(span) => {
                theatre.rush(true);
                thread::sleep(*span);
                theatre.rush(false);
            }
        }
    }
}

/// A connection that asks for nothing. Some leave by a reset.
pub struct Silent {
    _stream: TcpStream,
}

impl Silent {
    /// As the dice have it: says nothing, or a part of a request, or that it will say no more.
    pub fn connect(stage: &Stage, dice: &mut Dice) -> Option<Silent> {
        let (says, len, resets) = (dice.roll(10), dice.roll(16) as usize, dice.roll(2) == 0);
        let mut stream = TcpStream::connect(stage.address()).ok()?;
        // Each of these fails only where the server has hung up: it may.
        let _ = match says {
            0..6 => Ok(()),
            6..9 => stream.write_all(&b"GETFILE GET /f1\r\n\r\n"[..len]),
            _ => stream.shutdown(Shutdown::Write),
        };
        if resets {
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
        Some(Silent { _stream: stream })
    }
}
