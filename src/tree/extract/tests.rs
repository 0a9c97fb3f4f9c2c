//! Hostile streams, made by hand, and what of them is on disk afterwards.

use super::*;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{symlink, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A directory of a test's own; the target is one in it, so that what leaves it is found.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        Place::below(&std::env::temp_dir(), name)
    }

    fn below(dir: &Path, name: &str) -> Place {
        let path = dir.join(format!("vmcache-extract-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("target")).unwrap();
        fs::write(path.join("witness"), "unchanged").unwrap();
        Place(path)
    }

    fn target(&self) -> PathBuf {
        self.0.join("target")
    }

    fn extract(&self, stream: &[u8]) -> Result<Extracted, Error> {
        self.extract_as(stream, &Policy::of("t"))
    }

    fn extract_as(&self, mut stream: &[u8], policy: &Policy) -> Result<Extracted, Error> {
        extract(&mut stream, &self.target(), policy, &Stop::default())
    }

    /// The error, which must be one; nothing may be outside of the target.
    fn refused(&self, stream: &[u8]) -> String {
        let text = self.extract(stream).unwrap_err().to_string();
        self.outside_is_as_it_was();
        text
    }

    fn outside_is_as_it_was(&self) {
        let mut names: Vec<_> =
            fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["target", "witness"]);
        assert_eq!(fs::read_to_string(self.0.join("witness")).unwrap(), "unchanged");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.target().join(name)).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An entry's header, changed as `change` does.
fn header(name: &[u8], kind: u8, size: u64, change: impl FnOnce(&mut [u8; 512])) -> Vec<u8> {
    let mut block = [0u8; 512];
    block[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0001750");
    block[116..123].copy_from_slice(b"0001750");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar  \0");
    change(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.to_vec()
}

fn with_data(mut header: Vec<u8>, data: &[u8]) -> Vec<u8> {
    header.extend_from_slice(data);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn file(name: &[u8], data: &[u8]) -> Vec<u8> {
    with_data(header(name, b'0', data.len() as u64, |_| {}), data)
}

fn mode(name: &[u8], kind: u8, mode: &[u8; 7]) -> Vec<u8> {
    header(name, kind, 0, |b| b[100..107].copy_from_slice(mode))
}

fn directory(name: &[u8]) -> Vec<u8> {
    mode(name, b'5', b"0000755")
}

fn link(name: &[u8], kind: u8, to: &[u8]) -> Vec<u8> {
    header(name, kind, 0, |b| b[157..157 + to.len()].copy_from_slice(to))
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = 3 + key.len() + value.len();
        let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        text.extend_from_slice(format!("{length} {key}=").as_bytes());
        text.extend_from_slice(value);
        text.push(b'\n');
    }
    with_data(header(b"pax", b'x', text.len() as u64, |_| {}), &text)
}

fn stream(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut out = entries.concat();
    out.extend([0; 1024]);
    out
}

#[test]
fn a_plain_tree_comes_as_the_callers_own() {
    let place = Place::new("plain");
    let entries = [
        mode(b"t", b'5', b"0000750"),
        with_data(
            header(b"t/suid", b'0', 5, |b| b[100..107].copy_from_slice(b"0006777")),
            b"hello",
        ),
        mode(b"t/shut", b'5', b"0001000"),
        file(b"t/shut/in", b"in"),
        link(b"t/link", b'2', b"/etc/passwd"),
        link(b"t/twin", b'1', b"t/suid"),
        link(b"t/link-2", b'1', b"t/link"),
        pax(&[("SCHILY.xattr.user.a", b"b"), ("path", b"t/x/deep")]),
        file(b"ignored", b"deep"),
    ];
    let came = place.extract(&stream(&entries)).unwrap();
    // The directory of the last one nobody named.
    assert_eq!((came.entries, came.bytes), (9, 11));
    let t = place.target().join("t");
    let meta = fs::metadata(t.join("suid")).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o777);
    assert_eq!((meta.uid(), meta.gid()), {
        let own = fs::metadata(place.0.join("witness")).unwrap();
        (own.uid(), own.gid())
    });
    // As the header and the directory's entry say, though files were made in it since.
    let changed = |name: &str| fs::symlink_metadata(place.target().join(name)).unwrap().mtime();
    assert_eq!(["t", "t/suid", "t/shut", "t/link"].map(changed), [0; 4]);
    assert_eq!(fs::metadata(&t).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::metadata(t.join("shut")).unwrap().mode() & 0o7777, 0);
    assert_eq!(fs::read_link(t.join("link")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(t.join("link-2")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(meta.ino(), fs::metadata(t.join("twin")).unwrap().ino());
    assert!(xattr::list(t.join("x/deep")).map_or(0, Iterator::count) == 0);
    fs::set_permissions(t.join("shut"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(place.read("t/shut/in"), "in");
}

#[test]
fn names_that_lead_out_are_refused() {
    let long = [&b"t/"[..], &[b'n'; 256]].concat();
    let deep = "t/".repeat(300).into_bytes();
    let gnu = |name: &[u8]| {
        let text = with_data(header(b"L", b'L', name.len() as u64, |_| {}), name);
        [text, file(b"t", b"x")].concat()
    };
    for (n, (entry, why)) in [
        (file(b"../evil", b"x"), "leaves the target"),
        (file(b"t/../../evil", b"x"), "leaves the target"),
        (file(b"t/..", b"x"), "leaves the target"),
        (file(b"/t", b"x"), "leaves the target"),
        (file(b"", b"x"), "no name"),
        (file(b"./", b"x"), "no name"),
        (file(b"witness", b"x"), "asked for \"t\" alone"),
        (file(b"other/t", b"x"), "asked for \"t\" alone"),
        (file(b"tt", b"x"), "asked for \"t\" alone"),
        ([pax(&[("path", b"t/a\0b")]), file(b"t", b"x")].concat(), "no name"),
        ([pax(&[("path", b"../evil")]), file(b"t", b"x")].concat(), "leaves the target"),
        ([pax(&[("path", &long)]), file(b"t", b"x")].concat(), "256 bytes"),
        (gnu(&long), "256 bytes"),
        (gnu(&deep), "more than 256 directories"),
        (gnu(b"../../evil"), "leaves the target"),
        ([pax(&[("linkpath", b"a\0b")]), link(b"t", b'2', b"x")].concat(), "no name"),
        (link(b"t", b'2', b""), "write t: "),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(&format!("names-{n}"));
        let e = place.refused(&stream(&[entry]));
        assert!(e.contains(why), "{n}: {e}");
        assert_eq!(fs::read_dir(place.target()).unwrap().count(), 0, "{n}: {e}");
    }
}

/// What leads out by a link that the stream made, or somebody else on this host.
#[test]
fn links_in_the_middle_are_never_followed() {
    for (n, last) in [
        file(b"t/l/witness", b"x"),
        directory(b"t/l/evil"),
        link(b"t/l/evil", b'2', b"x"),
        link(b"t/l/evil", b'1', b"t/own"),
        file(b"t/l/a/b", b"x"),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(&format!("middle-{n}"));
        let out = place.0.to_string_lossy().into_owned();
        let own = file(b"t/own", b"own");
        let bytes = [directory(b"t"), own, link(b"t/l", b'2', out.as_bytes()), last.clone()];
        let e = place.refused(&stream(&bytes));
        assert!(e.contains("\"l\" in its name is a link"), "{n}: {e}");
        // The same link, planted; and the one name itself a link.
        let place = Place::new(&format!("planted-{n}"));
        fs::create_dir(place.target().join("t")).unwrap();
        symlink(&place.0, place.target().join("t/l")).unwrap();
        let bytes = stream(&[file(b"t/own", b"own"), last.clone()]);
        assert!(place.refused(&bytes).contains("\"l\" in its name is a link"));
        let place = Place::new(&format!("top-{n}"));
        symlink(&place.0, place.target().join("t")).unwrap();
        let e = place.refused(&stream(&[last]));
        assert!(e.contains("is a link"), "{n}: {e}");
    }
}

#[test]
fn what_is_there_is_replaced_and_never_written_through() {
    let place = Place::new("replace");
    let t = place.target().join("t");
    fs::create_dir(&t).unwrap();
    symlink(place.0.join("witness"), t.join("link")).unwrap();
    fs::hard_link(place.0.join("witness"), t.join("hard")).unwrap();
    nix::unistd::mkfifo(&t.join("fifo"), Mode::S_IRWXU).unwrap();
    symlink(&place.0, t.join("dir")).unwrap();
    fs::create_dir(t.join("kept")).unwrap();
    fs::set_permissions(t.join("kept"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::write(t.join("kept/mine"), "mine").unwrap();
    let bytes = stream(&[
        directory(b"t"),
        file(b"t/link", b"1"),
        file(b"t/hard", b"2"),
        file(b"t/fifo", b"3"),
        directory(b"t/kept"),
        file(b"t/kept/new", b"5"),
        // File, link, file again: the last one counts.
        file(b"t/again", b"6"),
        link(b"t/again", b'2', place.0.join("witness").to_str().unwrap().as_bytes()),
        file(b"t/again", b"7"),
    ]);
    place.extract(&bytes).unwrap();
    place.outside_is_as_it_was();
    for (name, text) in [
        ("link", "1"),
        ("hard", "2"),
        ("fifo", "3"),
        ("kept/new", "5"),
        ("kept/mine", "mine"),
        ("again", "7"),
    ] {
        assert!(fs::symlink_metadata(t.join(name)).unwrap().is_file(), "{name}");
        assert_eq!(place.read(&format!("t/{name}")), text);
    }
    // No directory takes the place of what is somebody's: a link, or a file.
    for name in [b"t/dir".as_slice(), b"t/again"] {
        let e = place.refused(&stream(&[directory(b"t"), directory(name)]));
        assert!(e.contains("and no directory"), "{e}");
    }
    assert!(fs::symlink_metadata(t.join("dir")).unwrap().is_symlink());
    place.outside_is_as_it_was();
    // What is somebody's directory keeps its mode, and no file takes its place.
    assert_eq!(fs::metadata(t.join("kept")).unwrap().mode() & 0o777, 0o711);
    for entry in [file(b"t/kept", b"x"), link(b"t/kept", b'2', b"x"), link(b"t/kept", b'1', b"t")] {
        let e = place.refused(&stream(&[entry]));
        assert!(e.contains("only a directory") || e.contains("not among"), "{e}");
        assert_eq!(place.read("t/kept/mine"), "mine");
    }
}

#[test]
fn hard_links_lead_to_what_was_copied_and_nowhere_else() {
    let place = Place::new("hard");
    let t = place.target().join("t");
    fs::create_dir(&t).unwrap();
    fs::write(t.join("old"), "old").unwrap();
    symlink(&place.0, t.join("planted")).unwrap();
    for to in [
        &b"/etc/passwd"[..],
        b"../witness",
        b"t/../../witness",
        b"witness",
        b"t/nothing",
        // Below the target, but not of this copy.
        b"t/old",
        b"t/planted/witness",
        b"t",
        b"",
    ] {
        let e = place.refused(&stream(&[directory(b"t"), link(b"t/new", b'1', to)]));
        assert!(e.contains("a hard link to"), "{e}");
        assert!(!t.join("new").exists());
    }
    // Devices are not made, so there is nothing to link to.
    let device = header(b"t/null", b'3', 0, |_| {});
    let e = place.refused(&stream(&[device, link(b"t/new", b'1', b"t/null")]));
    assert!(e.starts_with("t/null: it is a character device"), "{e}");
    // To itself, and twice.
    let bytes = stream(&[
        file(b"t/a", b"a"),
        link(b"t/a", b'1', b"t/a"),
        link(b"t/b", b'1', b"t/a"),
        link(b"t/b", b'1', b"t/a"),
        // What had its name is another file's now.
        file(b"t/a", b"new"),
        link(b"t/c", b'1', b"t/b"),
    ]);
    place.extract(&bytes).unwrap();
    assert_eq!((place.read("t/a"), place.read("t/b"), place.read("t/c")), {
        ("new".into(), "a".into(), "a".into())
    });
    place.outside_is_as_it_was();
}

#[test]
fn devices_and_fifos_are_errors_by_name_and_what_came_before_stays() {
    for (kind, name) in [(b'3', "character device"), (b'4', "block device"), (b'6', "FIFO")] {
        let place = Place::new(&format!("device-{kind}"));
        let bytes = stream(&[
            file(b"t/before", b"1"),
            header(b"t/special", kind, 0, |_| {}),
            file(b"t/after", b"2"),
        ]);
        let e = place.refused(&bytes);
        assert!(e.starts_with(&format!("t/special: it is a {name}")), "{e}");
        assert_eq!(place.read("t/before"), "1");
        assert_eq!(fs::read_dir(place.target().join("t")).unwrap().count(), 1);
    }
}

#[test]
fn an_archive_of_a_trusted_guest_has_all() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("not root: no other owners, no devices");
    }
    let place = Place::new("archive");
    let policy = Policy { archive: true, ..Policy::of("t") };
    let bytes = stream(&[
        header(b"t", b'5', 0, |b| b[100..107].copy_from_slice(b"0002750")),
        pax(&[("mtime", b"1000000000.5"), ("SCHILY.xattr.user.colour", b"r\ned")]),
        with_data(header(b"t/suid", b'0', 1, |b| b[100..107].copy_from_slice(b"0004755")), b"x"),
        header(b"t/null", b'3', 0, |b| {
            b[100..107].copy_from_slice(b"0000666");
            b[329..336].copy_from_slice(b"0000001");
            b[337..344].copy_from_slice(b"0000003");
        }),
        header(b"t/fifo", b'6', 0, |_| {}),
        link(b"t/link", b'2', b"x"),
    ]);
    let came = place.extract_as(&bytes, &policy).unwrap();
    let t = place.target().join("t");
    let meta = fs::metadata(t.join("suid")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o4755, 1000, 1000));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 500_000_000));
    let directory = fs::metadata(&t).unwrap();
    assert_eq!((directory.mode() & 0o7777, directory.mtime(), directory.uid()), (0o2750, 0, 1000));
    let null = fs::symlink_metadata(t.join("null")).unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == 0x103);
    assert_eq!((null.mode() & 0o7777, null.uid()), (0o666, 1000));
    assert!(fs::symlink_metadata(t.join("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(fs::symlink_metadata(t.join("link")).unwrap().uid(), 1000);
    // Either the attribute is there, or it is told that it is not.
    match came.lost {
        None => {
            assert_eq!(xattr::get(t.join("suid"), "user.colour").unwrap().unwrap(), b"r\ned");
        }
        Some((path, name, n)) => {
            assert_eq!((path.as_path(), name.as_str(), n), {
                (Path::new("t/suid"), "user.colour", 1)
            });
        }
    }
    // But still nothing outside, nor another name.
    let out = stream(&[link(b"t/l", b'2', place.0.to_str().unwrap().as_bytes()), {
        header(b"t/l/null", b'3', 0, |_| {})
    }]);
    assert!(place.extract_as(&out, &policy).is_err());
    assert!(place.extract_as(&stream(&[file(b"evil", b"x")]), &policy).is_err());
    place.outside_is_as_it_was();
}

/// For who tests without the rights that this needs; CI has them.
#[allow(clippy::disallowed_macros)] // A test's word, and loud.
fn skipped(what: &str) {
    assert!(std::env::var_os("VMCACHE_REQUIRE_QEMU").is_none(), "{what}");
    eprintln!("SKIPPED: {what}");
}

#[test]
fn too_much_is_refused_before_it_is_written() {
    let place = Place::new("much");
    let policy = Policy { bytes: 1000, entries: 4, ..Policy::of("t") };
    let fits = stream(&[directory(b"t"), file(b"t/a", &[1; 600]), file(b"t/b", &[2; 400])]);
    place.extract_as(&fits, &policy).unwrap();
    let over = stream(&[file(b"t/a", &[1; 600]), file(b"t/c", &[2; 401])]);
    let e = place.extract_as(&over, &policy).unwrap_err().to_string();
    assert!(e.starts_with("t/c: with it, the files would have over 1000 bytes"), "{e}");
    assert!(!place.target().join("t/c").exists());
    // A file without an end, of which not a byte is read.
    let endless = header(b"t/c", b'0', 0, |b| b[124..136].copy_from_slice(b"777777777777"));
    struct Endless(u64);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            buffer.fill(b'x');
            self.0 += buffer.len() as u64;
            Ok(buffer.len())
        }
    }
    let mut rest = Endless(0);
    let mut stream_of = (&endless[..]).chain(&mut rest);
    let usual = Policy::of("t");
    let e = extract(&mut stream_of, &place.target(), &usual, &Stop::default()).unwrap_err();
    assert!(e.to_string().contains("over 16.0 GiB"), "{e}");
    assert_eq!(rest.0, 0);
    // Many entries, and directories that nobody named.
    let many: Vec<_> = (0..5).map(|n| file(format!("t/{n}").as_bytes(), b"")).collect();
    let e = place.extract_as(&stream(&many), &policy).unwrap_err().to_string();
    assert!(e.starts_with("t/4: it is one of over 4"), "{e}");
    let e = place.extract_as(&stream(&[file(b"t/d/2/3/4/5", b"")]), &policy).unwrap_err();
    assert!(e.to_string().contains("over 4"), "{e}");
    // What follows the end, without one; names without one.
    let end = [0; 512];
    let mut stream_of = (&end[..]).chain(Endless(0));
    let e = extract(&mut stream_of, &place.target(), &usual, &Stop::default()).unwrap_err();
    assert!(e.to_string().contains("follow its end"), "{e}");
    for kind in [b'L', b'K', b'x', b'g'] {
        let head = header(b"n", kind, 1 << 30, |_| {});
        let mut stream_of = (&head[..]).chain(Endless(0));
        let e = extract(&mut stream_of, &place.target(), &usual, &Stop::default()).unwrap_err();
        assert!(e.to_string().contains("over 1048576 bytes"), "{e}");
    }
    let headers = header(b"n", b'g', 0, |_| {}).repeat(3000);
    assert!(place.refused(&headers).contains("over 1048576 bytes"));
}

#[test]
fn a_million_entries_are_bounded_in_number_and_memory() {
    /// Directories without an end.
    struct Entries(u64, Vec<u8>);
    impl Read for Entries {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.1.is_empty() {
                self.0 += 1;
                self.1 = link(format!("t/{}", self.0 % 50).as_bytes(), b'2', b"x");
            }
            let n = buffer.len().min(self.1.len());
            buffer[..n].copy_from_slice(&self.1[..n]);
            self.1.drain(..n);
            Ok(n)
        }
    }
    // In memory: a disk takes a minute for as many.
    let place = Place::below(Path::new("/dev/shm"), "million");
    let policy = Policy { entries: 100_000, ..Policy::of("t") };
    let mut entries = Entries(0, Vec::new());
    let e = extract(&mut entries, &place.target(), &policy, &Stop::default()).unwrap_err();
    assert!(e.to_string().contains("one of over 100000"), "{e}");
    assert_eq!(fs::read_dir(place.target().join("t")).unwrap().count(), 50);
}

/// A file system of a test's own, of which a twentieth stays free.
#[test]
fn the_last_twentieth_of_a_file_system_stays_free() {
    use nix::mount::{mount, umount2, MntFlags, MsFlags};
    if !nix::unistd::geteuid().is_root() {
        return skipped("not root: no file system of its own");
    }
    let place = Place::new("full");
    let target = place.target();
    let tmpfs = |options: &str| {
        let flags = MsFlags::empty();
        mount(Some("tmpfs"), &target, Some("tmpfs"), flags, Some(options))
    };
    if tmpfs("size=4m,nr_inodes=100").is_err() {
        // In a container without the right to mount; CI's has it.
        return skipped("no right to mount a file system");
    }
    let free = || {
        let all = nix::sys::statvfs::statvfs(&target).unwrap();
        (all.blocks_available() * 20 >= all.blocks(), all.files_available() * 20 >= all.files())
    };
    let bytes = stream(&[file(b"t/a", &vec![1; 2 << 20]), file(b"t/b", &vec![2; 3 << 20])]);
    let e = place.extract(&bytes).unwrap_err().to_string();
    assert!(e.starts_with("t/b: with it, less than 5 % of the bytes"), "{e}");
    assert!(free().0 && !target.join("t/b").exists());
    // Others fill it while a file is copied: what was written of it goes again.
    struct Filling<'a>(&'a [u8], &'a Path);
    impl Read for Filling<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.len() < 1 << 20 {
                let _ = fs::write(self.1.join("filler"), vec![3; 1 << 20]);
            }
            self.0.read(buffer)
        }
    }
    let bytes = stream(&[file(b"t/c", &vec![1; 1 << 20])]);
    let mut filling = Filling(&bytes, &target);
    let e = extract(&mut filling, &target, &Policy::of("t"), &Stop::default()).unwrap_err();
    assert!(e.to_string().contains("less than 5 % of the bytes"), "{e}");
    assert!(!target.join("t/c").exists());
    fs::remove_file(target.join("filler")).unwrap();
    let many: Vec<_> = (0..200).map(|n| file(format!("t/{n}").as_bytes(), b"")).collect();
    let e = place.extract(&stream(&many)).unwrap_err().to_string();
    assert!(e.contains("less than 5 % of the inodes"), "{e}");
    assert!(free().1);
    umount2(&target, MntFlags::MNT_DETACH).unwrap();
}

fn sparse_pax(version: &str, data: &[u8]) -> Vec<u8> {
    let size = &b"10000000"[..];
    match version {
        "0.0" => [
            pax(&[
                ("GNU.sparse.size", size),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.offset", b"0"),
                ("GNU.sparse.numbytes", b"512"),
                ("GNU.sparse.offset", b"9000000"),
                ("GNU.sparse.numbytes", b"10"),
            ]),
            file(b"t/s", data),
        ]
        .concat(),
        "0.1" => [
            pax(&[
                ("GNU.sparse.size", size),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.name", b"t/s"),
                ("GNU.sparse.map", b"0,512,9000000,10"),
            ]),
            file(b"t/GNUSparseFile.1/s", data),
        ]
        .concat(),
        _ => {
            let mut list = b"2\n0\n512\n9000000\n10\n".to_vec();
            list.resize(512, 0);
            let records = [
                ("GNU.sparse.major", &b"1"[..]),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"t/s"),
                ("GNU.sparse.realsize", size),
            ];
            [pax(&records), file(b"t/GNUSparseFile.1/s", &[list, data.to_vec()].concat())].concat()
        }
    }
}

#[test]
fn holes_stay_holes_in_all_forms_and_count_with_their_size() {
    let data = [vec![b'a'; 512], vec![b'b'; 10]].concat();
    let old = with_data(
        header(b"t/s", b'S', 522, |b| {
            b[386..397].copy_from_slice(b"00000000000");
            b[398..409].copy_from_slice(b"00000001000");
            b[410..421].copy_from_slice(format!("{:011o}", 9_000_000).as_bytes());
            b[422..433].copy_from_slice(b"00000000012");
            b[483..494].copy_from_slice(format!("{:011o}", 10_000_000).as_bytes());
        }),
        &data,
    );
    let forms = [old, sparse_pax("0.0", &data), sparse_pax("0.1", &data), sparse_pax("1.0", &data)];
    for (n, form) in forms.iter().enumerate() {
        let place = Place::new(&format!("holes-{n}"));
        let after = file(b"t/after", b"after");
        let came = place.extract(&stream(&[form.clone(), after])).unwrap();
        assert_eq!(came.bytes, 10_000_005, "form {n}");
        let got = fs::read(place.target().join("t/s")).unwrap();
        assert_eq!(got.len(), 10_000_000);
        assert!(
            got[..512].iter().all(|b| *b == b'a') && got[512..9_000_000].iter().all(|b| *b == 0)
        );
        assert_eq!(&got[9_000_000..9_000_011], b"bbbbbbbbbb\0");
        assert!(fs::metadata(place.target().join("t/s")).unwrap().blocks() < 1000, "form {n}");
        assert_eq!(place.read("t/after"), "after");
        // Holes count.
        let policy = Policy { bytes: 9_999_999, ..Policy::of("t") };
        let e =
            place.extract_as(&stream(std::slice::from_ref(form)), &policy).unwrap_err().to_string();
        assert!(e.contains("the files would have over"), "{e}");
    }
}

#[test]
fn what_is_not_understood_is_an_error_and_never_wrong_bytes() {
    let unknown = |records: &[(&str, &[u8])]| [pax(records), file(b"t/s", b"x")].concat();
    let mut bad_sum = file(b"t/s", b"x");
    bad_sum[0] = b'u';
    for (n, entries) in [
        unknown(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]),
        unknown(&[("GNU.sparse.realsize", b"9"), ("GNU.sparse.map", b"0,9")]),
        unknown(&[("SCHILY.realsize", b"99")]),
        unknown(&[("size", b"x")]),
        unknown(&[("size", b"18446744073709551615")]),
        unknown(&[("path", b"t/a"), ("mtime", b"x")]),
        bad_sum,
        header(b"t/s", b'M', 0, |_| {}),
        header(b"t/s", b'Z', 0, |_| {}),
        header(b"t/s", b'S', 0, |b| b[257..265].copy_from_slice(b"ustar\x0000")),
        header(b"t/s", b'0', 0, |b| b[124..136].fill(0xff)),
        with_data(header(b"t/s", b'5', 3, |_| {}), b"abc"),
        with_data(header(b"t/s", b'1', 3, |_| {}), b"abc"),
        [pax(&[("path", b"t/a")]), pax(&[("path", b"t/b")]), file(b"t/c", b"x")].concat(),
        {
            let text = b"13 path=evil\n";
            let global = header(b"g", b'g', text.len() as u64, |_| {});
            [with_data(global, text), file(b"t/c", b"x")].concat()
        },
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(&format!("unknown-{n}"));
        let e = place.refused(&stream(&[entries]));
        assert!(e.contains("no tar stream that is understood"), "{n}: {e}");
        assert!(!place.target().join("t").exists(), "{n}: {e}");
    }
}

#[test]
fn half_a_file_is_none() {
    let place = Place::new("half");
    let whole = stream(&[file(b"t/a", b"a"), file(b"t/b", &[7; 5000])]);
    for cut in [1, 600, 1024 + 100, 1024 + 512 + 4000] {
        let e = place.refused(&whole[..cut]);
        assert!(e.contains("ends in the middle"), "{cut}: {e}");
        assert!(!place.target().join("t/b").exists());
    }
    // A signal: the file goes at once, and no other is begun.
    struct Signalled<'a>(&'a [u8], &'a Stop, &'a Path, bool);
    impl Read for Signalled<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if !self.3 && self.2.exists() {
                self.1.ask();
                self.3 = true;
                assert!(!self.2.exists());
            }
            let most = buffer.len().min(1000);
            self.0.read(&mut buffer[..most])
        }
    }
    let stop = Stop::default();
    let path = place.target().join("t/b");
    let mut signalled = Signalled(&whole, &stop, &path, false);
    let e = extract(&mut signalled, &place.target(), &Policy::of("t"), &stop).unwrap_err();
    assert!(matches!(e, Error::Stopped) && !path.exists(), "{e}");
    assert_eq!(place.read("t/a"), "a");
    let e = extract(&mut &whole[..], &place.target(), &Policy::of("t"), &stop).unwrap_err();
    assert!(matches!(e, Error::Stopped), "{e}");
}

/// Another user of this host who may write to the target, and is quick: a directory becomes
/// a link that leads out, again and again, while files are written to it.
#[test]
fn a_directory_that_is_swapped_for_a_link_leads_nowhere() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let place = Place::below(Path::new("/dev/shm"), "swapped");
    fs::create_dir(place.0.join("target/elsewhere")).unwrap();
    let outside = Place::below(Path::new("/dev/shm"), "outside");
    let t = place.target().join("t");
    let done = AtomicBool::new(false);
    let swapping = || {
        let (dir, away) = (t.join("d"), place.target().join("elsewhere/d"));
        while !done.load(Ordering::SeqCst) {
            let _ = fs::rename(&dir, &away);
            let _ = symlink(&outside.0, &dir);
            let _ = fs::remove_file(&dir);
            let _ = fs::rename(&away, &dir);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(swapping);
        for round in 0..200 {
            let mut entries = vec![directory(b"t"), directory(b"t/d")];
            for n in 0..20 {
                entries.push(file(format!("t/d/{n}").as_bytes(), b"x"));
                entries.push(link(format!("t/d/l{n}").as_bytes(), b'1', b"t/d/0"));
                // So that the directory is found anew.
                entries.push(file(format!("t/{round}").as_bytes(), b"x"));
            }
            let _ = place.extract(&stream(&entries));
        }
        done.store(true, Ordering::SeqCst);
    });
    outside.outside_is_as_it_was();
    assert_eq!(fs::read_dir(outside.target()).unwrap().count(), 0);
}

#[test]
fn names_of_any_bytes_are_on_disk_as_they_came() {
    let place = Place::new("bytes");
    let names = ["t/\x1b[2J\n\t\x7f", "t/\u{202e}txt.exe", "t/ leading and trailing "];
    let mut entries: Vec<_> = names.iter().map(|n| file(n.as_bytes(), b"x")).collect();
    entries.push(file(b"t/\xff\xfe", b"x"));
    entries.push(file(&[&b"t/"[..], &[b'n'; 97]].concat(), b"x"));
    place.extract(&stream(&entries)).unwrap();
    let found: BTreeMap<_, _> = fs::read_dir(place.target().join("t"))
        .unwrap()
        .map(|e| (e.unwrap().file_name().as_bytes().to_vec(), ()))
        .collect();
    for name in names {
        assert!(found.contains_key(&name.as_bytes()[2..]), "{name:?}");
    }
    assert!(found.contains_key(&b"\xff\xfe"[..]) && found.len() == 5);
}
