//! Trees there and back, and streams that want out.

use super::*;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};

use tar::{EntryType, Header};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("vmcache-tree-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn modes_links_and_attributes_survive() {
    let (from, to) = (Dir::new("from"), Dir::new("to"));
    let d = &from.0;
    fs::create_dir(d.join("sub")).unwrap();
    fs::write(d.join("sub/file"), b"hello").unwrap();
    fs::set_permissions(d.join("sub/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(d.join("sub/file"), d.join("twin")).unwrap();
    fs::hard_link(d.join("sub/file"), d.join("third")).unwrap();
    symlink("/etc/passwd", d.join("out")).unwrap();
    let has_xattr = xattr::set(d.join("sub/file"), "user.colour", b"red").is_ok();
    let long = "n".repeat(180);
    fs::write(d.join(&long), vec![7; 100_000]).unwrap();
    fs::set_permissions(d.join("sub"), fs::Permissions::from_mode(0o555)).unwrap();

    let mut stream = Vec::new();
    pack(d, Path::new(""), Sockets::Skip, &mut stream).unwrap();
    let root = nix::unistd::geteuid().is_root();
    unpack(&mut stream.as_slice(), &to.0, root).unwrap();

    let t = &to.0;
    let file = fs::metadata(t.join("sub/file")).unwrap();
    assert_eq!((file.mode() & 0o7777, file.len()), (0o4711, 5));
    let inode = |n: &str| fs::metadata(t.join(n)).unwrap().ino();
    assert!(inode("sub/file") == inode("twin") && inode("twin") == inode("third"));
    assert_eq!(fs::read_link(t.join("out")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::metadata(t.join("sub")).unwrap().mode() & 0o7777, 0o555);
    assert_eq!(fs::metadata(t.join(&long)).unwrap().len(), 100_000);
    if has_xattr {
        assert_eq!(xattr::get(t.join("sub/file"), "user.colour").unwrap().unwrap(), b"red");
    }
}

fn entry(name: &[u8], kind: EntryType, link: Option<&str>) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    if let Some(link) = link {
        header.set_link_name(link).unwrap();
    }
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn names_that_leave_the_target_are_refused() {
    let outside = Dir::new("outside");
    let out = outside.0.display().to_string();
    let streams: Vec<Vec<u8>> = vec![
        entry(b"../evil", EntryType::Regular, None),
        entry(b"a/../../evil", EntryType::Regular, None),
        entry(b"../evil", EntryType::Fifo, None),
        [entry(b"l", EntryType::Symlink, Some(&out)), entry(b"l/evil", EntryType::Regular, None)]
            .concat(),
        [entry(b"l", EntryType::Symlink, Some(&out)), entry(b"l/evil", EntryType::Fifo, None)]
            .concat(),
        [entry(b"l", EntryType::Symlink, Some(&out)), entry(b"l/evil", EntryType::Directory, None)]
            .concat(),
    ];
    for (n, mut stream) in streams.into_iter().enumerate() {
        let to = Dir::new(&format!("target-{n}"));
        stream.extend([0; 1024]);
        assert!(unpack(&mut stream.as_slice(), &to.0, false).is_err(), "stream {n}");
        assert!(!outside.0.join("evil").exists(), "stream {n}");
        assert!(!to.0.parent().unwrap().join("evil").exists(), "stream {n}");
    }
}

/// As tar itself takes them: the target is their `/`, and the links' that they go by.
#[test]
fn names_that_begin_at_the_root_stay_in_the_target() {
    let (outside, to) = (Dir::new("elsewhere"), Dir::new("rooted"));
    let out = outside.0.display().to_string();
    let inner = out.trim_start_matches('/').to_string();
    let mut stream = [
        entry(format!("{out}/evil").as_bytes(), EntryType::Regular, None),
        entry(b"l", EntryType::Symlink, Some(&out)),
        entry(b"l/evil-too", EntryType::Regular, None),
    ]
    .concat();
    stream.extend([0; 1024]);
    unpack(&mut stream.as_slice(), &to.0, false).unwrap();
    assert!(to.0.join(&inner).join("evil").exists() && to.0.join(&inner).join("evil-too").exists());
    assert_eq!(fs::read_dir(&outside.0).unwrap().count(), 0);
}

#[test]
fn names_without_an_end_are_refused() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_mode(0);
    header.set_cksum();
    let mut stream = header.as_bytes().chain(io::repeat(b'n'));
    let to = Dir::new("endless");
    let e = unpack(&mut stream, &to.0, false).unwrap_err().to_string();
    assert!(e.contains("over 1048576 bytes"), "{e}");
}

#[test]
fn a_stream_that_breaks_off_is_an_error() {
    let from = Dir::new("half");
    fs::write(from.0.join("file"), vec![1; 10_000]).unwrap();
    let mut stream = Vec::new();
    pack(&from.0, Path::new(""), Sockets::Skip, &mut stream).unwrap();
    let to = Dir::new("half-to");
    assert!(unpack(&mut &stream[..3000], &to.0, false).is_err());
}

/// A tree whose names change while it is packed: see [`walk`] for what is swapped in; here
/// are the files that are not as long as they say.
#[test]
fn files_that_change_are_told_by_name() {
    let from = Dir::new("changing");
    // One that is cut while it is read, by whoever takes its first bytes.
    let path = from.0.join("short");
    fs::write(&path, vec![1; 300_000]).unwrap();
    struct Cutting<'a>(&'a Path, usize);
    impl io::Write for Cutting<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += bytes.len();
            if self.1 > 10_000 {
                fs::OpenOptions::new().write(true).open(self.0)?.set_len(20_000)?;
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let e = pack(&path, Path::new("short"), Sockets::Skip, &mut Cutting(&path, 0)).unwrap_err();
    let e = e.to_string();
    assert!(e.contains("short: it ended after 20000 of 300000 bytes"), "{e}");
}

#[test]
fn sockets_are_left_out_or_refused_and_fifos_wait_for_nobody() {
    let from = Dir::new("special");
    let _socket = std::os::unix::net::UnixListener::bind(from.0.join("socket")).unwrap();
    nix::unistd::mkfifo(&from.0.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut stream = Vec::new();
    pack(&from.0, Path::new("t"), Sockets::Skip, &mut stream).unwrap();
    let e = pack(&from.0, Path::new("t"), Sockets::Refuse, &mut io::sink()).unwrap_err();
    assert!(e.to_string().contains("socket: it is a socket"), "{e}");
    let to = Dir::new("special-to");
    unpack(&mut stream.as_slice(), &to.0, false).unwrap();
    assert!(to.0.join("t/fifo").exists() && !to.0.join("t/socket").exists());
}

/// Links with several names broke both ways: a tar's hard link to one is not everybody's.
#[test]
fn links_with_several_names_and_files_with_holes_survive() {
    let (from, to) = (Dir::new("holes"), Dir::new("holes-to"));
    symlink("nowhere", from.0.join("link")).unwrap();
    fs::hard_link(from.0.join("link"), from.0.join("link-2")).unwrap();
    let name = "n".repeat(120);
    let file = fs::File::create(from.0.join(&name)).unwrap();
    for at in 0..9u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], at * 1_000_000).unwrap();
    }
    file.set_len(20 << 20).unwrap();
    let mut stream = Vec::new();
    pack(&from.0, Path::new("t"), Sockets::Skip, &mut stream).unwrap();
    assert!(stream.len() < 1 << 20, "{} bytes", stream.len());
    unpack(&mut stream.as_slice(), &to.0, false).unwrap();
    let extracted = Dir::new("holes-out");
    extract(&mut stream.as_slice(), &extracted.0, &Policy::of("t"), &Stop::default()).unwrap();
    let before = fs::read(from.0.join(&name)).unwrap();
    for dir in [&to.0, &extracted.0] {
        let came = fs::read(dir.join("t").join(&name)).unwrap();
        let differs = came.iter().zip(&before).position(|(a, b)| a != b);
        assert_eq!((differs, came.len()), (None, before.len()), "{}", dir.display());
        assert!(fs::metadata(dir.join("t").join(&name)).unwrap().blocks() < 2048);
        assert_eq!(fs::read_link(dir.join("t/link-2")).unwrap(), Path::new("nowhere"));
    }
}
