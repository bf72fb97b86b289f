//! The cache as a server of tasks: `simplecached`, as far as chaos needs it, with a task for each
//! request instead of a thread.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use shmferry::files::Directory;
use shmferry::loan::Loan;
use shmferry::tokio::{Incoming, Server};
use shmferry::{Address, Refusal};

use super::{Result, told};

/// What `simplecached` takes, too.
#[derive(clap::Args)]
pub struct Options {
    #[arg(short = 'c')]
    directory: PathBuf,
    #[arg(short = 't')]
    threads: usize,
    #[arg(long)]
    listen: Address,
    #[arg(long)]
    timeout: f64,
}

/// Every so many answers are lent.
const LENDS: u64 = 3;

/// Serves until it is told to end.
pub fn run(options: Options) -> ExitCode {
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chaos tasks: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: Options) -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(told("signals"))?;
    let files = Arc::new(Directory::open(&options.directory).map_err(told("the files"))?);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(options.threads.min(2)).max_blocking_threads(options.threads);
    let runtime = builder.enable_all().build().map_err(told("a runtime"))?;
    runtime.block_on(async {
        let server = Server::bind(options.listen.clone());
        let server = server.map_err(told(&format!("cannot listen on {}", options.listen)))?;
        let number = Arc::new(AtomicU64::new(0));
        let server = server.timeout(Duration::from_secs_f64(options.timeout));
        let serving = server.on_error(|error| eprintln!("{error}")).serve(move |request| {
            let (files, number) = (Arc::clone(&files), number.fetch_add(1, Relaxed));
            async move { answer(&files, request, number).await }
        });
        let serving = serving.map_err(told("serving"))?;
        eprintln!("listening on {}: tasks", options.listen);
        let stop = serving.clone();
        thread::spawn(move || {
            if signals.forever().next().is_some() {
                stop.stop();
            }
        });
        serving.wait().await;
        Ok(())
    })
}

async fn answer(files: &Directory, request: Incoming, number: u64) -> shmferry::Result<()> {
    let file: File = match files.file(request.key()) {
        Ok(Some(file)) => file,
        Ok(None) => return request.refuse(Refusal::NotFound),
        Err(error) => {
            eprintln!("a file cannot be opened: {error}");
            return request.refuse(Refusal::Failed);
        }
    };
    if number.is_multiple_of(LENDS) {
        // As it is now. Without memory for a copy, it is sent.
        if let Ok(loan) = Loan::from_file(&file) {
            return request.lend(&loan).await;
        }
    }
    request.send_file(&file).await
}
