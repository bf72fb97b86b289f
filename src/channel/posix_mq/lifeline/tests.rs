//! Lifelines: held, followed, inherited, and distinguished from other files at their names.

use super::*;
use crate::peer::on_hang_up;
use std::sync::{Arc, mpsc};

#[test]
fn a_lifeline_tells_its_followers_of_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("life");
    assert!(Lifeline::follow(&path).unwrap().is_none());
    let held = Lifeline::hold(path.clone()).unwrap();
    let followed = Arc::new(Lifeline::follow(&path).unwrap().unwrap());
    assert!(is_held(&*followed));
    assert!(has_open(std::process::id(), &*followed) && !has_open(1, &*followed));
    assert!(Lifeline::inherit(&path).unwrap().is_none() && path.exists(), "it lives");
    let (told, end) = mpsc::channel();
    let _watch = on_hang_up(Arc::clone(&followed), move || told.send(()).unwrap()).unwrap();
    assert!(end.try_recv().is_err());
    drop(held);
    end.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(!is_held(&*followed));
    assert!(!path.exists());
}

#[test]
fn a_lifeline_is_told_from_another_by_its_file_and_not_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("life");
    let held = Lifeline::hold(path.clone()).unwrap();
    let followed = Lifeline::follow(&path).unwrap().unwrap();
    assert!(stands_at(&path, &followed));
    std::fs::remove_file(&path).unwrap();
    let _other = Lifeline::hold(path.clone()).unwrap();
    assert!(!stands_at(&path, &followed), "another has its name");
    // A child has files open, but not this one.
    let mut child = std::process::Command::new("cat");
    let mut child = child.stdin(std::process::Stdio::piped()).spawn().unwrap();
    assert!(!has_open(child.id(), &followed));
    assert!(has_open(std::process::id(), &followed));
    drop(child.stdin.take());
    child.wait().unwrap();
    drop(held);
}

#[test]
fn what_a_dead_owner_left_is_inherited_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("life");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert!(Lifeline::follow(&path).unwrap().is_none(), "no process holds it");
    let inherited = Lifeline::inherit(&path).unwrap().unwrap();
    assert!(Lifeline::inherit(&path).unwrap().is_none());
    assert!(Lifeline::follow(&path).unwrap().is_none(), "an heir is no owner");
    drop(inherited);
    assert!(!path.exists());
}

#[test]
fn only_a_fifo_is_a_lifeline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("life");
    std::fs::write(&path, "a file").unwrap();
    let us = rustix::process::geteuid().as_raw();
    let told = |result: Result<()>| match result {
        Err(Error::NameTaken { path: named, kind, uid }) => (named == path).then_some((kind, uid)),
        other => panic!("{other:?}"),
    };
    let a_file = Some(("a regular file", us));
    assert_eq!(told(Lifeline::follow(&path).map(drop)), a_file);
    assert_eq!(told(Lifeline::inherit(&path).map(drop)), a_file);
    assert_eq!(told(Lifeline::hold(path.clone()).map(drop)), a_file);
    assert!(path.exists());
}
