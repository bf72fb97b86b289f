//! A headless Chromium opens the page of a directory: each picture in it is loaded and decoded.
//!
//! With `SCREENSHOT=PATH` it also writes what a user sees.

mod site;

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::process::Command;

use image::{ImageFormat, ImageReader, Rgb, RgbImage};
use shmferry_test_support::watchdog::watchdog;
use site::{Site, has};

/// Names, widths and heights.
const PICTURES: [(&str, u32, u32); 9] = [
    ("aurora.png", 641, 427),
    ("coral.jpg", 642, 428),
    ("dunes.jpeg", 643, 429),
    ("ember.png", 644, 430),
    ("fjord.jpg", 645, 431),
    ("grove with blanks.jpg", 646, 432),
    ("quote\" & <b>.png", 647, 433),
    ("100% #1?.jpg", 648, 434),
    ("Grüße.png", 649, 435),
];

/// Opens the page in a frame, waits for its pictures, and writes down what became of them.
const OPENER: &str = "<!DOCTYPE html><meta charset=utf-8><pre id=seen></pre>
<iframe src='/pictures/' width=1200 height=3000></iframe>
<script>
    const frame = document.querySelector('iframe');
    frame.onload = () => setInterval(() => {
        const pictures = [...frame.contentDocument.images];
        if (pictures.length == 0 || !pictures.every(it => it.complete)) return;
        const seen = pictures.map(it => `${it.naturalWidth}x${it.naturalHeight}`);
        const lazy = pictures.filter(it => it.loading == 'lazy').length;
        document.getElementById('seen').textContent = `seen ${seen.join(' ')} lazy ${lazy}`;
    }, 50);
</script>";

#[test]
fn a_browser_decodes_every_picture_of_a_page() {
    let _watchdog = watchdog();
    if !has("chromium") {
        return;
    }
    let site = Site::new(&[("opener.html", OPENER.as_bytes()), ("pictures/more/x", b"hello")]);
    site.place.write("files/pictures/notes.txt", b"what these are");
    for (kind, (name, width, height)) in PICTURES.into_iter().enumerate() {
        let picture = picture(kind, width, height);
        let format = ImageFormat::from_path(name).unwrap();
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        site.place.write(&format!("files/pictures/{name}"), bytes.into_inner());
    }
    let profile = tempfile::tempdir().unwrap();
    let dump = ["--virtual-time-budget=20000", "--dump-dom"];
    let page =
        String::from_utf8(chromium(profile.path(), &dump, &site.url("/opener.html"))).unwrap();
    let seen = page.split("seen ").nth(1).unwrap_or_else(|| panic!("nothing was seen:\n{page}"));
    let seen = seen.split('<').next().unwrap();
    let (mut sizes, lazy) = match seen.split_once(" lazy ") {
        Some((sizes, lazy)) => (sizes.split(' ').map(str::to_owned).collect::<Vec<_>>(), lazy),
        None => panic!("{seen}"),
    };
    let mut expected: Vec<_> =
        PICTURES.iter().map(|(_, width, height)| format!("{width}x{height}")).collect();
    sizes.sort();
    expected.sort();
    assert_eq!(sizes, expected, "a width of 0 is a picture that was not decoded");
    assert_eq!(lazy, PICTURES.len().to_string());

    // What a user sees: it can be read again, and is not of one colour.
    let asked = std::env::var_os("SCREENSHOT");
    let shot = asked.map_or(profile.path().join("shot.png"), Into::into);
    let flag = format!("--screenshot={}", shot.display());
    let shoot =
        ["--window-size=860,560", "--hide-scrollbars", "--virtual-time-budget=20000", &flag];
    chromium(profile.path(), &shoot, &site.url("/pictures/"));
    let image = ImageReader::new(Cursor::new(fs::read(shot).unwrap()));
    let image = image.with_guessed_format().unwrap().decode().unwrap().to_rgb8();
    let first = *image.get_pixel(0, 0);
    assert!(image.pixels().filter(|pixel| **pixel != first).count() > 10_000);
    site.end();
}

fn chromium(profile: &Path, args: &[&str], url: &str) -> Vec<u8> {
    let fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ];
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "100", "chromium"]).args(fixed);
    command.arg(format!("--user-data-dir={}", profile.display())).args(args).arg(url);
    let output = command.env("HOME", profile).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Rings and waves in a few colours, other ones for each kind.
fn picture(kind: usize, width: u32, height: u32) -> RgbImage {
    let phase = kind as f32 * 0.7;
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32 / width as f32 - 0.5, y as f32 / height as f32 - 0.5);
        let wave = (x * 5.0 + phase).sin() + (y * 6.0 + (x * 4.0 - phase).cos()).sin();
        let level = (wave * 2.5 + phase).floor() / 2.5; // bands
        let shade = |shift: f32| (140.0 + 110.0 * (level * 0.6 + shift).sin()) as u8;
        Rgb([shade(phase), shade(phase * 0.5 + 1.6), shade(phase * 0.8 + 3.1)])
    })
}
