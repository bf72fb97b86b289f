//! The figures: medians by method and size, ratios to the two anchors, as a table, a document and a plot.

use std::fmt::Write;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Command;

use super::{BUFFER, FILES, HANDED_OVER};

/// What a method took, in seconds.
pub struct Result {
    pub name: &'static str,
    /// A fetch of each file, by round.
    pub rounds: [Vec<f64>; FILES.len()],
    /// The server's processor time for it, by round.
    pub processor: [Vec<f64>; FILES.len()],
    /// Handing each file over, untouched, by round; empty for ways that copy.
    pub handed_over: [Vec<f64>; FILES.len()],
    /// Every fetch of the smallest file.
    pub smallest: Vec<f64>,
}

/// The methods that all others are held against.
pub const ANCHORS: [&str; 2] = [LOCAL, "Unix socket, sendfile"];
pub const LOCAL: &str = "local pread";
/// The method without a request, which others can come close to.
pub const KEPT_AND_MAPPED: &str = "descriptor, kept and mapped";
pub const STREAMED: &str = "shmferry, streamed";
pub const LENT_SEALED: &str = "shmferry, lent, sealed";
pub const LENT_AS_A_FILE: &str = "shmferry, lent, as a file";

/// All figures, in Markdown.
pub fn table(results: &[Result]) -> String {
    let mut text =
        String::from("\n### Median time of a fetch (µs), and its spread over the rounds\n");
    rows(&mut text, results, |result, file| {
        let (least, middle, most) = spread(&result.rounds[file]);
        format!("{} ({}–{})", micros(middle), micros(least), micros(most))
    });
    for anchor in ANCHORS {
        let Some(anchor) = results.iter().find(|result| result.name == anchor) else { continue };
        let _ = writeln!(
            text,
            "\n### Speed as a multiple of {}, median of the ratios by round",
            anchor.name
        );
        rows(&mut text, results, |result, file| {
            format!("{:.2}", ratio(&anchor.rounds[file], &result.rounds[file]))
        });
    }
    text.push_str("\n### One fetch of 1 KiB (µs)\n\n| method | p50 | p99 |\n| --- | --- | --- |\n");
    for result in results {
        let mut times = result.smallest.clone();
        times.sort_unstable_by(f64::total_cmp);
        let at = |part: usize| micros(times[times.len() * part / 100]);
        let _ = writeln!(text, "| {} | {} | {} |", result.name, at(50), at(99));
    }
    text.push_str("\n### Processor time of the server for a fetch (µs), median of the rounds\n");
    rows(&mut text, results, |result, file| micros(median(&result.processor[file])));
    loans(&mut text, results);
    text
}

/// What was wanted of loans, and what was reached; and handing over alone.
fn loans(text: &mut String, results: &[Result]) {
    let find = |name: &str| results.iter().find(|result| result.name == name);
    let (sealed, file, local) = (find(LENT_SEALED), find(LENT_AS_A_FILE), find(LOCAL));
    let streamed = find(STREAMED);
    let from = |least: u64| (0..FILES.len()).filter(move |file| FILES[*file].0 >= least);
    text.push_str(
        "\n## Loans\n\n\
        The same file asked again, its mapping kept. Targets, and what this run reached: medians of the ratios by\n\
        round. Many at once, and on to TCP: [concurrency](concurrency.md#loans).\n\n\
        | what | target | reached |\n| --- | --- | --- |\n",
    );
    let mut row = |what: &str, target: &str, reached: Option<Vec<String>>| {
        let reached = reached.map_or("not measured yet".to_owned(), |cells| cells.join(", "));
        let _ = writeln!(text, "| {what} | {target} | {reached} |");
    };
    let cell = |file: usize, value: f64, is_met: bool| {
        let missed = if is_met { "" } else { " (missed)" };
        format!("{} {value:.2}{missed}", size(FILES[file].0))
    };
    row(
        "request → readable slice, nothing touched, p50, × a streamed fetch of 1 KiB",
        "≤ 1.3 from 4 KiB to 256 MiB",
        sealed.zip(streamed).map(|(sealed, streamed)| {
            let of = |file: usize| {
                let times = ratio(&sealed.handed_over[file], &streamed.handed_over[file]);
                cell(file, times, times <= 1.3)
            };
            from(4 << 10).map(of).collect()
        }),
    );
    row(
        "every cache line touched, × local pread",
        "64 KiB ≥ 0.8, 1 MiB ≥ 3, 16 MiB ≥ 1.4, 256 MiB ≥ 1.5",
        sealed.zip(local).map(|(sealed, local)| {
            let targets = from(64 << 10).zip([0.8, 3.0, 1.4, 1.5]);
            let of = |(file, target): (usize, f64)| {
                let times = ratio(&local.rounds[file], &sealed.rounds[file]);
                cell(file, times, times >= target)
            };
            targets.map(of).collect()
        }),
    );
    let others: Vec<&Result> = results.iter().filter(|result| is_other(result.name)).collect();
    row(
        "sealed, × the fastest other way between processes",
        "> 1 from 16 KiB up",
        sealed.filter(|_| !others.is_empty()).map(|sealed| {
            let of = |file: usize| {
                let least = |round: usize| {
                    others.iter().map(|other| other.rounds[file][round]).fold(f64::MAX, f64::min)
                };
                let best: Vec<f64> = (0..sealed.rounds[file].len()).map(least).collect();
                let times = ratio(&best, &sealed.rounds[file]);
                cell(file, times, times > 1.0)
            };
            from(16 << 10).map(of).collect()
        }),
    );
    row(
        "lent as a file, × pread of a kept descriptor",
        "≥ 0.9 from 64 KiB to 256 MiB",
        file.zip(local).map(|(lent, local)| {
            let of = |file: usize| {
                let times = ratio(&local.rounds[file], &lent.rounds[file]);
                cell(file, times, times >= 0.9)
            };
            from(64 << 10).map(of).collect()
        }),
    );
    row(
        "processor time of the server, lent as a file beside streamed, µs a fetch",
        "that of a request, at every size",
        file.zip(streamed).map(|(lent, streamed)| {
            let of = |file: usize| {
                let spent = [lent, streamed].map(|way| micros(median(&way.processor[file])));
                format!("{} {} beside {}", size(FILES[file].0), spent[0], spent[1])
            };
            from(64 << 10).map(of).collect()
        }),
    );
    let _ = write!(
        text,
        "\n`{KEPT_AND_MAPPED}` has no request, and is the limit: it is none of the other ways. `first request` makes\n\
        a new loan for each fetch: sealing, introduction and mapping included. The server's processor time includes\n\
        that it looks out for the next request for a while before it sleeps.\n\n\
        ### Handing over alone: request to readable bytes, none touched (µs)\n\n\
        Medians over the rounds of the p50 of {HANDED_OVER}; in brackets, × a streamed fetch of 1 KiB beside it.\n",
    );
    let handing: Vec<&Result> =
        results.iter().filter(|result| !result.handed_over[0].is_empty()).collect();
    rows(text, handing.iter().copied(), |result, file| {
        let own = &result.handed_over[file];
        let times = streamed.map(|streamed| ratio(own, &streamed.handed_over[file]));
        let times = times.map_or(String::new(), |times| format!(" ({times:.2})"));
        micros(median(own)) + &times
    });
    let _ = writeln!(text, "\n`{STREAMED}` fetches and reads 1 KiB in each column.");
}

/// Whether it is another way from one process to another: no method of this crate's, and none of
/// those that send no request at all.
fn is_other(name: &str) -> bool {
    !name.starts_with("shmferry") && name != LOCAL && name != KEPT_AND_MAPPED
}

/// Writes `benchmarks.md` and its plots into a directory.
pub fn write(directory: &Path, command: &str, results: &[Result]) -> io::Result<()> {
    let said = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        output.map_or("unknown".to_owned(), |out| {
            String::from_utf8_lossy(&out.stdout).trim().to_owned()
        })
    };
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let rounds = results.first().map_or(0, |result| result.rounds[0].len());
    let document = format!(
        "# Benchmarks\n\n\
        For users who compare speeds.\n\n\
        Written by `{command}`, from one run; whatever came out worse stays in.\n\n\
        | | |\n| --- | --- |\n\
        | processor | {}, {processors} seen |\n| kernel | {} |\n| compiler | {} |\n| load at the end | {} |\n\
        | rounds | {rounds}, methods interleaved; per round {} fetches |\n\
        | buffers | {} KiB for every method that has one; shmferry: one segment of 2 MiB; pipe: 1 MiB; iceoryx2: eight slices; shmem-ipc: 2 MiB |\n\n\
        The server is another process, with the files in its page cache. Each method's bytes are compared, all\n\
        of them, before the timing; timed, the client touches one byte of each cache line. One transfer at a\n\
        time. `local pread` is one process reading the file by itself: the limit for whoever copies.\n\
        `descriptor` passes the file's own descriptor: no limit holds for those who may have it.\n\
        Bytes are read where they are, in the slot; `copied out` copies them to private memory first.\n\
        What was tried on the way, and left: [design](design.md#speed). Many at once: [concurrency](concurrency.md); \
        requests alone: [control](control.md); system calls: [calls](calls.md); whole programs: [programs](programs.md).\n\
        Ways to wake a task from another process, printed only: `cargo bench --manifest-path benches/peers/Cargo.toml --bench wake`.\n\n\
        ![throughput](throughput.svg)\n\n\
        Every fetch of 1 KiB, by its place among all of its method, the fastest first:\n\n\
        ![latency](latency.svg)\n{}",
        cpu.trim_start_matches([' ', '\t', ':']),
        said("uname", "-r"),
        said("rustc", "--version"),
        load.trim(),
        FILES.map(|(len, times)| format!("{times} of {}", size(len))).join(", "),
        BUFFER >> 10,
        table(results),
    );
    fs::write(directory.join("benchmarks.md"), document)?;
    fs::write(directory.join("throughput.svg"), throughput(results))?;
    fs::write(directory.join("latency.svg"), latency(results))
}

fn rows<'r>(
    text: &mut String,
    results: impl IntoIterator<Item = &'r Result>,
    cell: impl Fn(&Result, usize) -> String,
) {
    let sizes = FILES.map(|(len, _)| size(len));
    let _ = write!(
        text,
        "\n| method | {} |\n|{}\n",
        sizes.join(" | "),
        " --- |".repeat(1 + FILES.len())
    );
    for result in results {
        let cells: Vec<String> = (0..FILES.len()).map(|file| cell(result, file)).collect();
        let _ = writeln!(text, "| {} | {} |", result.name, cells.join(" | "));
    }
}

/// The median, over the rounds, of one time divided by another.
fn ratio(one: &[f64], by: &[f64]) -> f64 {
    median(&one.iter().zip(by).map(|(one, by)| one / by).collect::<Vec<_>>())
}

pub fn median(of: &[f64]) -> f64 {
    spread(of).1
}

/// The least, the median, the most.
fn spread(of: &[f64]) -> (f64, f64, f64) {
    let mut sorted = of.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    (sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1])
}

fn micros(seconds: f64) -> String {
    match seconds * 1e6 {
        few if few < 10.0 => format!("{few:.2}"),
        some if some < 100.0 => format!("{some:.1}"),
        many => format!("{many:.0}"),
    }
}

fn size(len: u64) -> String {
    match len >> 20 {
        0 => format!("{} KiB", len >> 10),
        mib => format!("{mib} MiB"),
    }
}

/// Throughput by size, a line for each method.
fn throughput(results: &[Result]) -> String {
    let x = |file: usize| file as f64 / (FILES.len() - 1) as f64;
    let marks = FILES.iter().enumerate().map(|(file, &(len, _))| (x(file), size(len)));
    let line = |result: &Result| {
        let speed = |file: usize| {
            FILES[file].0 as f64 / (1u64 << 20) as f64 / spread(&result.rounds[file]).1
        };
        (0..FILES.len()).map(|file| (x(file), speed(file))).collect()
    };
    chart(&marks.collect::<Vec<_>>(), 1..=6, "MiB/s", results, line)
}

/// How long the shortest hundredth of the fetches of 1 KiB took at most, the shortest two hundredths, ...
fn latency(results: &[Result]) -> String {
    let marks: Vec<_> =
        [1, 25, 50, 75, 90, 99].map(|part| (f64::from(part) / 100.0, format!("p{part}"))).into();
    let line = |result: &Result| {
        let mut times = result.smallest.clone();
        times.sort_unstable_by(f64::total_cmp);
        (1..100).map(|part| (part as f64 / 100.0, times[times.len() * part / 100] * 1e6)).collect()
    };
    chart(&marks, -1..=3, "µs", results, line)
}

/// A line for each method: `x` from 0 to 1, with marks, and a logarithmic axis of so many decades.
fn chart(
    marks: &[(f64, String)],
    decades: RangeInclusive<i32>,
    unit: &str,
    results: &[Result],
    line: impl Fn(&Result) -> Vec<(f64, f64)>,
) -> String {
    let [width, height, left, top, legend] = [560.0, 380.0, 80.0, 20.0, 250.0];
    let (least, most) = (f64::from(*decades.start()), f64::from(*decades.end()));
    let x = |part: f64| left + width * part;
    let y = |value: f64| top + height * (most - value.log10().clamp(least, most)) / (most - least);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        left + width + legend,
        top + height + 40.0,
    );
    for decade in decades {
        let value = 10f64.powi(decade);
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{1}\" y2=\"{1}\" stroke=\"#ddd\"/>\
             <text x=\"{2}\" y=\"{3}\" text-anchor=\"end\">{value} {unit}</text>",
            left + width,
            y(value),
            left - 4.0,
            y(value) + 4.0,
        );
    }
    for (part, mark) in marks {
        let (at, below) = (x(*part), top + height + 18.0);
        let _ =
            writeln!(svg, "<text x=\"{at}\" y=\"{below}\" text-anchor=\"middle\">{mark}</text>");
    }
    for (i, result) in results.iter().enumerate() {
        let colour = format!("hsl({}, 70%, 40%)", i * 360 / results.len());
        let dashes =
            if result.name.starts_with("shmferry") { "" } else { " stroke-dasharray=\"4 3\"" };
        let points = line(result);
        let points: Vec<_> = points
            .iter()
            .map(|(part, value)| format!("{:.1},{:.1}", x(*part), y(*value)))
            .collect();
        let (from, to, at) =
            (left + width + 10.0, left + width + 34.0, top + 14.0 * (i as f64 + 1.0));
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dashes}/>\
             <line x1=\"{from}\" x2=\"{to}\" y1=\"{at}\" y2=\"{at}\" stroke=\"{colour}\"{dashes}/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            points.join(" "),
            to + 4.0,
            at + 4.0,
            result.name,
        );
    }
    svg + "</svg>\n"
}
