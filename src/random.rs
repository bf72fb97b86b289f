//! Random numbers from the system, for names that nobody else is to hit on.

use std::io;

pub(crate) fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // So few bytes come all at once.
    #[cfg(target_os = "linux")]
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
    })?;
    #[cfg(not(target_os = "linux"))]
    getrandom::fill(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
