//! Lock files: taken, refused, and left by a killed server.

use super::*;

#[test]
fn its_holder_is_named_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let (mut held, found) = LockFile::take(&path, "here").unwrap();
    assert_eq!(found, "", "there was no predecessor");
    held.sign().unwrap();
    match LockFile::take(&path, "here") {
        Err(Error::AddressInUse { address, pid }) => {
            assert_eq!((&*address, pid), ("here", std::process::id()));
        }
        other => panic!("{:?}", other.map(|(_, found)| found)),
    }
    drop(held);
    assert!(!path.exists());
}

#[test]
fn only_a_regular_file_of_this_user_is_a_lock_and_nothing_else_is_waited_for() {
    use rustix::fs::{CWD, mknodat};
    use std::os::unix::fs::{lchown, symlink};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let us = rustix::process::geteuid();
    let refused = |kind: &'static str, owner: u32| {
        lchown(&path, Some(owner), None).unwrap();
        match LockFile::take(&path, "here").map(|(_, found)| found) {
            Err(Error::NameTaken { path: named, kind: told, uid }) => {
                assert_eq!((named, told, uid), (path.clone(), kind, owner));
            }
            other => panic!("{kind} of {owner}: {other:?}"),
        }
        assert_eq!(holder(&path), None);
    };
    // Root can try both.
    let users = if us.is_root() { vec![65_534, us.as_raw()] } else { vec![us.as_raw()] };
    for &user in &users {
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        refused("a FIFO", user);
        fs::remove_file(&path).unwrap();
        symlink(dir.path().join("elsewhere"), &path).unwrap();
        refused("a symbolic link", user);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("a directory", user);
        fs::remove_dir(&path).unwrap();
    }
    if us.is_root() {
        fs::write(&path, "1\n").unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        refused("a regular file", users[0]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n", "left as it was");
    }
}

#[test]
fn what_a_killed_server_left_stays_until_somebody_signs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    fs::write(&path, "7\na note that is longer than what will be there\n").unwrap();
    let (unsigned, found) = LockFile::take(&path, "here").unwrap();
    assert_eq!(pid_in(&found), Some(7));
    drop(unsigned);
    let (mut held, again) = LockFile::take(&path, "here").unwrap();
    assert_eq!(again, found);
    held.sign().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    drop(held);
    assert!(!path.exists());
}
