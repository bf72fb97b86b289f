//! Files worth fetching: pictures, texts, nothing at all, and one larger than any segment.

use std::fs;
use std::path::{Path, PathBuf};

use image::{ImageFormat, ImageReader, Rgb, RgbImage};

use super::Result;
use super::child::Interrupt;

/// A file, what it is asked for by, and what it holds.
pub struct Sample {
    pub key: String,
    pub path: PathBuf,
    bytes: Vec<u8>,
    is_picture: bool,
}

/// Makes the files in a directory, unless interrupted.
pub fn make(dir: &Path, interrupt: &Interrupt) -> Result<Vec<Sample>> {
    fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let picture = |format| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        mandelbrot(960, 640).write_to(&mut bytes, format).map_err(|error| error.to_string())?;
        Ok::<_, String>(bytes.into_inner())
    };
    let text = include_str!("../../README.md").as_bytes();
    let samples = [
        ("/pictures/mandelbrot.png", picture(ImageFormat::Png)?, true),
        ("/pictures/mandelbrot.jpg", picture(ImageFormat::Jpeg)?, true),
        ("/text/README.md", text.to_vec(), false),
        ("/empty", Vec::new(), false),
        ("/one-byte", vec![b'!'], false),
        ("/large.bin", noise(64 << 20), false),
    ];
    let samples = samples.into_iter().enumerate().map(|(i, (key, bytes, is_picture))| {
        interrupt.check()?;
        let path = dir.join(i.to_string());
        fs::write(&path, &bytes).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Sample { key: key.to_owned(), path, bytes, is_picture })
    });
    samples.collect()
}

impl Sample {
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Compares what was fetched, byte by byte, and decodes it if it is a picture; says what it is.
    pub fn check(&self, fetched: &Path) -> Result<String> {
        let found = fs::read(fetched).map_err(|error| format!("{}: {error}", fetched.display()))?;
        if found != self.bytes {
            let at = found.iter().zip(&self.bytes).take_while(|(a, b)| a == b).count();
            return Err(format!("{}: {} bytes, wrong from byte {at} on", self.key, found.len()));
        }
        if !self.is_picture {
            return Ok("the same bytes".to_owned());
        }
        let reader = ImageReader::new(std::io::Cursor::new(found)).with_guessed_format();
        let picture = reader
            .map_err(|e| e.to_string())?
            .decode()
            .map_err(|e| format!("{}: {e}", self.key))?;
        Ok(format!("the same bytes, a picture of {} x {}", picture.width(), picture.height()))
    }
}

fn mandelbrot(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let (cx, cy) = (
            f64::from(x) / f64::from(width) * 3.5 - 2.5,
            f64::from(y) / f64::from(height) * 2.4 - 1.2,
        );
        let (mut zx, mut zy, mut n) = (0.0, 0.0, 0u8);
        while zx * zx + zy * zy <= 4.0 && n < 255 {
            (zx, zy) = (zx * zx - zy * zy + cx, 2.0 * zx * zy + cy);
            n += 1;
        }
        Rgb([n.wrapping_mul(7), n.wrapping_mul(3), 255 - n])
    })
}

/// Bytes in which any two mixed-up chunks would show.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| word()).collect()
}
