//! `getfile PATH…`: stores files under their own names, whole or not at all.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, IsTerminal, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use indicatif::{ProgressBar, ProgressStyle};
use rustix::{
    fs::{Access, AtFlags, CWD, accessat},
    io::Errno,
};
use signal_hook::{iterator::Signals, low_level::emulate_default_handler};
use tempfile::{NamedTempFile, TempPath};

use crate::{Client, Connection, Failure, complain, protocol::check_path, signals_that_end};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    connection: Connection,
    /// Store the file here, - for standard output [default: the path's last component]
    #[arg(short, long, value_name = "FILE|-")]
    output: Option<PathBuf>,
    /// What to ask for; starts with /
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
}

/// Downloads every path, and reports the ones that fail. True if none did.
pub fn run(options: &Options) -> Result<bool, String> {
    let paths = &options.paths;
    if options.output.is_some() && paths.len() > 1 {
        return Err(format!("-o goes with one PATH, but {} are given", paths.len()));
    }
    remove_unfinished_on_signals().map_err(|error| format!("cannot catch signals: {error}"))?;
    let client = Client::resolve(&options.connection)?;
    let mut buffer = vec![0; 128 << 10];
    let mut taken = HashSet::new();
    let mut all_arrived = true;
    for path in paths {
        let outcome = Target::choose(path.as_bytes(), options.output.as_deref(), &mut taken)
            .and_then(|target| {
                download(&client, path.as_bytes(), &target, &mut buffer)
                    .map_err(|failure| failure.to_string())
            });
        if let Err(why) = outcome {
            complain(&format!("{}: {why}", path.display()));
            all_arrived = false;
        }
    }
    Ok(all_arrived)
}

fn download(
    client: &Client,
    path: &[u8],
    target: &Target,
    buffer: &mut [u8],
) -> Result<(), Failure> {
    let failed = |error| Failure::io(format!("write {target}"), error);
    let body = client.request(path, buffer)?;
    let mut output = Output::create(target).map_err(failed)?;
    let progress = progress_bar(body.len, target);
    let copied = body.copy_to(|bytes| {
        progress.inc(bytes.len() as u64);
        output.file.write_all(bytes).map_err(failed)
    });
    match copied {
        Ok(_) => progress.finish(),
        Err(_) => progress.finish_and_clear(),
    }
    copied?;
    output.finish().map_err(failed)
}

fn progress_bar(len: u64, target: &Target) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style).with_message(target.to_string())
}

/// Where a file goes.
enum Target {
    StandardOutput,
    File(PathBuf),
}

impl Target {
    /// Takes what the user chose, or else the last component of `path` unless that is `taken`.
    fn choose(
        path: &[u8],
        chosen: Option<&Path>,
        taken: &mut HashSet<PathBuf>,
    ) -> Result<Self, String> {
        check_path(path).map_err(|why| why.to_string())?;
        match chosen {
            Some(name) if name == "-" => Ok(Self::StandardOutput),
            Some(name) => Ok(Self::File(name.to_owned())),
            None if path.ends_with(b"/") => Err("ends without a file name; use -o".to_owned()),
            None => {
                let name = Path::new(OsStr::from_bytes(path)).file_name();
                let name = PathBuf::from(name.ok_or("ends without a file name; use -o")?);
                if !taken.insert(name.clone()) {
                    return Err(format!("an earlier path is stored as {}", name.display()));
                }
                Ok(Self::File(name))
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StandardOutput => f.write_str("standard output"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// A file being written. Until it is finished it has a temporary name beside its target;
/// dropping it removes it, and so does a signal.
struct Output {
    file: Box<dyn Write>,
    /// None for what is written as it is: standard output, a pipe, a device.
    rename_to: Option<PathBuf>,
}

/// The temporary name in use, if any. Locked while it is made, renamed or removed, so that a
/// signal finds it either there and known, or not there.
static TEMPORARY: Mutex<Option<TempPath>> = Mutex::new(None);

impl Output {
    fn create(target: &Target) -> io::Result<Self> {
        let Target::File(path) = target else {
            return Ok(Self { file: Box::new(io::stdout()), rename_to: None });
        };
        let path = behind_links(path)?;
        let existing = match fs::metadata(&path) {
            Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(found) if !found.is_file() => {
                let file = OpenOptions::new().write(true).open(path)?;
                return Ok(Self { file: Box::new(file), rename_to: None });
            }
            Ok(found) => {
                // One that may not be written is meant to stay, though a rename would replace it.
                accessat(CWD, &path, Access::WRITE_OK, AtFlags::EACCESS)?;
                Some(found)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut temporary = lock_temporary();
        // What replaces a file is nobody else's to read before it has that file's mode.
        let mode = if existing.is_some() { 0o600 } else { 0o666 };
        let (file, name) = temporary_in(beside.unwrap_or(Path::new(".")), mode)?.into_parts();
        *temporary = Some(name);
        drop(temporary);
        let output = Self { file: Box::new(file.try_clone()?), rename_to: Some(path) };
        if let Some(existing) = existing {
            take_after(&file, &existing)?;
        }
        Ok(output)
    }

    fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        let mut temporary = lock_temporary(); // held for as long as it takes to rename
        match (&self.rename_to, temporary.take()) {
            // Its error says what failed; whoever asked is told of the target.
            (Some(target), Some(name)) => name.persist(target).map_err(|error| error.error),
            _ => Ok(()),
        }
    }
}

/// Where a path leads through symbolic links: they stay, and what they point to is replaced, or
/// made where it is not there.
fn behind_links(path: &Path) -> io::Result<PathBuf> {
    /// As many as the kernel follows.
    const MOST: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..MOST {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            // No link (EINVAL), or nothing there.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}

/// Makes a temporary file. An error does not name it: it is the target that cannot be written.
fn temporary_in(directory: &Path, mode: u32) -> io::Result<NamedTempFile<File>> {
    let mut reason = None;
    let made = tempfile::Builder::new().prefix(".getfile-").make_in(directory, |path| {
        // Less the umask, as for any new file.
        let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
        reason = made.as_ref().err().and_then(io::Error::raw_os_error);
        made
    });
    made.map_err(|error| reason.map_or(error, io::Error::from_raw_os_error))
}

/// Gives a file the mode of the one that it will replace, and its owner and group where that is
/// permitted. Set-user-ID and set-group-ID bits are left out: they would vouch for other contents.
fn take_after(file: &File, existing: &fs::Metadata) -> io::Result<()> {
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    for (owner, group) in [(None, Some(existing.gid())), (Some(existing.uid()), None)] {
        match fchown(file, owner, group) {
            Err(error) if !denied(&error) => return Err(error),
            _ => {} // done, or not ours to give away
        }
    }
    let mut mode = existing.mode() & 0o777;
    if file.metadata()?.gid() != existing.gid() {
        // Another group gets no more than everyone.
        mode = (mode & 0o707) | (mode & 0o007) << 3;
    }
    file.set_permissions(Permissions::from_mode(mode))
}

impl Drop for Output {
    fn drop(&mut self) {
        lock_temporary().take();
    }
}

fn lock_temporary() -> MutexGuard<'static, Option<TempPath>> {
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove_unfinished_on_signals() -> io::Result<()> {
    let mut signals = Signals::new(signals_that_end()?)?;
    thread::Builder::new().spawn(move || {
        for signal in signals.forever() {
            let mut temporary = lock_temporary(); // and keep it: no other may be made any more
            temporary.take();
            let _ = emulate_default_handler(signal); // ends the process
        }
    })?;
    Ok(())
}
