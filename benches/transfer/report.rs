//! The figures: medians by method and size, ratios to the two anchors, as a table, a document and a plot.

use std::fmt::Write;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Command;

use super::{BUFFER, FILES, ROUNDS};

/// What a method took: seconds a fetch, of each file, by round; and every fetch of the smallest.
pub struct Result {
    pub name: &'static str,
    pub rounds: [Vec<f64>; FILES.len()],
    pub smallest: Vec<f64>,
}

/// The methods that all others are held against.
pub const ANCHORS: [&str; 2] = ["local pread", "Unix socket, sendfile"];

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
            let pairs = anchor.rounds[file].iter().zip(&result.rounds[file]);
            let ratios: Vec<f64> = pairs.map(|(anchor, ours)| anchor / ours).collect();
            format!("{:.2}", spread(&ratios).1)
        });
    }
    text.push_str("\n### One fetch of 1 KiB (µs)\n\n| method | p50 | p99 |\n| --- | --- | --- |\n");
    for result in results {
        let mut times = result.smallest.clone();
        times.sort_unstable_by(f64::total_cmp);
        let at = |part: usize| micros(times[times.len() * part / 100]);
        let _ = writeln!(text, "| {} | {} | {} |", result.name, at(50), at(99));
    }
    text
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
    let document = format!(
        "# Benchmarks\n\n\
        For users who compare speeds.\n\n\
        Written by `{command}`, from one run; whatever came out worse stays in.\n\n\
        | | |\n| --- | --- |\n\
        | processor | {}, {processors} seen |\n| kernel | {} |\n| compiler | {} |\n| load at the end | {} |\n\
        | rounds | {ROUNDS}, methods interleaved; per round {} fetches |\n\
        | buffers | {} KiB for every method that has one; shmferry: one segment of 2 MiB; pipe: 1 MiB; iceoryx2: eight slices; shmem-ipc: 2 MiB |\n\n\
        The server is another process, with the files in its page cache. Each method's bytes are compared, all\n\
        of them, before the timing; timed, the client touches one byte of each cache line. One transfer at a\n\
        time. `local pread` is one process reading the file by itself: the limit for whoever copies.\n\
        `descriptor` passes the file's own descriptor: no limit holds for those who may have it.\n\
        Bytes are read where they are, in the slot; `copied out` copies them to private memory first.\n\
        What was tried on the way, and left: [design](design.md#speed). Many at once: [concurrency](concurrency.md); \
        requests alone: [control](control.md); system calls: [calls](calls.md); whole programs: [programs](programs.md).\n\n\
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

fn rows(text: &mut String, results: &[Result], cell: impl Fn(&Result, usize) -> String) {
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
    chart(&marks.collect::<Vec<_>>(), 1..=5, "MiB/s", results, line)
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
