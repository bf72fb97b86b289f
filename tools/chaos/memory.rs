//! A `/dev/shm` of this run's own, small enough to be filled.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use super::{Result, told};

const SHM: &str = "/dev/shm";

/// Says to the successor of [`move_in`] that it has moved.
const MARK: &str = "SHMFERRY_CHAOS_MEMORY";

/// Enough for both programs.
const SIZE: &str = "size=96m,mode=1777";

/// Goes on as the same process with a `/dev/shm` of its own, if that is possible; whether it has one.
pub fn move_in() -> bool {
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let mount = format!("mount -t tmpfs -o {SIZE} tmpfs {SHM}");
    let tried = Command::new("unshare").args(["-m", "sh", "-c", &mount]).output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        return false;
    }
    let Ok(this) = std::env::current_exe() else { return false };
    let script = format!("{mount} && exec \"$@\"");
    let error = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .exec();
    eprintln!("chaos: unshare: {error}");
    false
}

/// Fills it, but for so many bytes, until dropped.
pub struct Filler(());

const FILLER: &str = "/dev/shm/filler";

impl Filler {
    pub fn leaving(bytes: u64) -> Result<Filler> {
        let filler = Filler(());
        let file = File::create(FILLER).map_err(told("filling"))?;
        loop {
            let found = statvfs(SHM).map_err(told("filling"))?;
            let len = (found.f_bavail * found.f_frsize).saturating_sub(bytes);
            if len == 0 {
                return Ok(filler);
            }
            match fallocate(&file, FallocateFlags::empty(), 0, len) {
                Err(Errno::NOSPC) => {} // a program was quicker: less is left by now
                filled => return filled.map(|()| filler).map_err(told("filling")),
            }
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // If it is not there, nothing was filled.
        let _ = fs::remove_file(FILLER);
    }
}

/// Names of ours in shared memory, those of these processes if it is not ours alone.
pub fn names(is_private: bool, pids: &[u32], queue: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(SHM)).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_ours = |name: &String| {
        is_private
            || name.contains(queue)
            || pids.iter().any(|pid| name.starts_with(&format!("shmferry-{pid}-")))
    };
    names.filter(is_ours).collect()
}
