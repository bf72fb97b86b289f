//! Chance that a seed repeats: every decision has dice of its own.

/// SplitMix64.
pub struct Dice(u64);

impl Dice {
    /// The dice of one decision: they depend on nothing else that was decided.
    pub fn of(seed: u64, who: u64, number: u64) -> Dice {
        Dice(mix(mix(mix(seed) ^ who) ^ number))
    }

    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0) % sides
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize]
    }
}

pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scatters a number over all 64 bits.
pub fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
