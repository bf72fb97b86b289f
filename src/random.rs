//! Random numbers from the system, for names that must not collide or be guessed.

use std::io;

pub(crate) fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // Up to 256 bytes are never returned in part.
    #[cfg(target_os = "linux")]
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
    })?;
    #[cfg(not(target_os = "linux"))]
    getrandom::fill(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
