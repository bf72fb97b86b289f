//! The page of a directory, in HTML: links to what is in it, with thumbnails of pictures.

use std::fmt::Write;

use super::answer::type_of;
use super::path;

/// What a page may load: pictures from here.
pub const POLICY: &str = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'";

const STYLE: &str = "body{font:16px sans-serif;margin:2em}ul{list-style:none;padding:0}\
    li{margin:.4em 0}a{text-decoration:none}span{color:#666;margin-left:.6em}\
    .pictures{display:flex;flex-wrap:wrap;gap:1em}.pictures li{width:180px;overflow-wrap:anywhere}\
    img{display:block;width:180px;height:135px;object-fit:cover;background:#eee}";

/// The page of the directory at `key`, which ends in a slash, from what the cache lists.
pub fn render(key: &[u8], list: &[u8]) -> String {
    let title = escape(&String::from_utf8_lossy(key));
    let (mut names, mut pictures) = (String::new(), String::new());
    if key != b"/" {
        names.push_str("<li><a href=\"../\">../</a></li>\n");
    }
    for line in list.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
        let Some((kind, rest)) = line.split_first() else { continue };
        let blank = rest.iter().position(|byte| *byte == b' ').unwrap_or_default();
        let (len, name) = (String::from_utf8_lossy(&rest[..blank]), &rest[blank + 1..]);
        let shown = escape(&String::from_utf8_lossy(name));
        let link = path::encode(&[key, name].concat());
        let _ = if *kind == b'd' {
            writeln!(names, "<li><a href=\"{link}/\">{shown}/</a></li>")
        } else if type_of(name).starts_with("image/") {
            let image = format!("<img loading=lazy alt=\"\" src=\"{link}\">");
            writeln!(pictures, "<li><a href=\"{link}\">{image}{shown}</a><span>{len}</span></li>")
        } else {
            writeln!(names, "<li><a href=\"{link}\">{shown}</a><span>{len}</span></li>")
        };
    }
    format!(
        "<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<ul>\n{names}</ul>\n\
         <ul class=pictures>\n{pictures}</ul>\n</body></html>\n"
    )
}

fn escape(text: &str) -> String {
    let replaced = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    replaced.replace('"', "&quot;").replace('\'', "&#39;")
}
