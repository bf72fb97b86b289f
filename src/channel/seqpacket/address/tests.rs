//! The address: private directories, and the change of servers.

use super::*;

impl Address {
    fn path(&self) -> &Path {
        &self.path
    }
}

#[test]
fn a_private_directory_is_this_users_and_nobody_elses_to_write_to() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path| match check_private(path) {
        Ok(()) => false,
        Err(Error::Misuse(Misuse::UnsafeDirectory(named))) => named == path,
        Err(error) => panic!("{error}"),
    };
    assert!(!refused(&dir.path().join("not there")), "it will be made");
    for (mode, is_refused) in
        [(0o700, false), (0o755, false), (0o775, true), (0o777, true), (0o1777, true)]
    {
        fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        assert_eq!(refused(dir.path()), is_refused, "{mode:o}");
    }
    fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    assert!(refused(&file) && refused(&link));
    if getuid().is_root() {
        std::os::unix::fs::chown(dir.path(), Some(65_534), None).unwrap();
        assert!(refused(dir.path()), "another user's");
    }
    assert!(matches!(check_private(&file.join("below a file")), Err(Error::Os { .. })));
}

#[test]
fn what_was_made_is_removed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("made");
    let (address, _listener) = Address::listen(&made.join("queue.sock")).unwrap();
    assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(address.path()).unwrap().mode() & 0o777, 0o600);
    drop(address);
    assert!(!made.exists());
    let failed = Address::listen(&made.join("deeper/queue.sock")).map(drop).unwrap_err();
    assert!(failed.to_string().contains("making the socket's directory"), "{failed}");

    let (address, _listener) = Address::listen(&dir.path().join("queue.sock")).unwrap();
    drop(address);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_a_killed_server_made_goes_with_its_successor() {
    let dir = tempfile::tempdir().unwrap();
    let (made, own) = (dir.path().join("made"), dir.path().join("own"));
    DirBuilder::new().mode(MADE_DIR).create(&made).unwrap(); // and was killed right then
    DirBuilder::new().mode(0o700).create(&own).unwrap();
    for dir in [&made, &own] {
        drop(Address::listen(&dir.join("queue.sock")).unwrap());
    }
    assert!(!made.exists() && own.exists());
}

#[test]
fn a_directory_goes_with_the_last_server_however_they_follow_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made/queue.sock");
    for _ in 0..300 {
        let first = Address::listen(&path).unwrap();
        let successor = std::thread::spawn({
            let path = path.clone();
            move || {
                loop {
                    match Address::listen(&path) {
                        Err(Error::AddressInUse { .. }) => std::hint::spin_loop(),
                        listening => return drop(listening.unwrap()),
                    }
                }
            }
        });
        drop(first);
        successor.join().unwrap();
        assert!(!dir.path().join("made").exists());
    }
}
