//! Archives by the programs that people have, unpacked as GNU tar unpacks them, entry by
//! entry: kind, mode, owner, time to the nanosecond, content, holes, links, devices,
//! extended attributes. No VM: it is the guest's own code, on this host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use vmcache::tree::{compressed, measure, pack, unpack, Sockets};

use crate::daemon::Dir;

mod odd;

/// Each name with all that there is of it.
type Listed = BTreeMap<Vec<u8>, String>;

/// What the tests make and compare with: `tests/run` installs what is missing.
fn program(name: &str) -> Command {
    let found = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
    assert!(found.status.success(), "{name} is not installed, which tests/run does");
    Command::new(name)
}

fn sh(dir: &Path, script: &str) {
    let out = Command::new("bash").args(["-ec", script]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A tree with all that tars know.
fn source(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir(&tree).unwrap();
    sh(
        &tree,
        r#"
        mkdir -p sub/deep sticky closed; chmod 1777 sticky
        echo hello > sub/file; chmod 4755 sub/file; chown 1000:1001 sub/file
        echo big > owner; chown 3000000:4000000 owner
        ln sub/file twin; ln sub/file sub/deep/third
        ln -s sub/file link; ln link hardlink-to-link; ln -s /etc/passwd absolute; ln -s nowhere dangling
        touch empty; touch -d @0 epoch; touch -d @1234567890.123456789 parts; touch -h -d @99.5 link
        head -c 100000 /dev/urandom > data; chmod 0000 data
        long=$(printf 'n%.0s' $(seq 180)); echo l > $long; mkdir -p $long.d/$long; echo d > $long.d/$long/$long
        ln -s $long.d/$long/$long long-link
        printf 'x' > $'bytes-\xff\xfe'; echo n > $'new\nline'; echo s > 'a space'
        mknod char c 1 3; mknod block b 7 99; mkfifo pipe
        truncate -s 3M sparse; echo middle | dd of=sparse bs=1 seek=1500000 conv=notrunc status=none
        truncate -s 1M hole
        dd if=/dev/zero of=many bs=4096 count=1 status=none; for i in $(seq 1 2 99); do echo $i | dd of=many bs=1 seek=$((i*65536)) conv=notrunc status=none; done
        chmod 0555 closed; touch -d @1111111111.5 closed sub sticky; touch -d @1000000000 sub/deep
        "#,
    );
    let set =
        |name: &str, key: &str, value: &[u8]| xattr::set(tree.join(name), key, value).unwrap();
    set("sub/file", "user.colour", b"red");
    set("sub", "user.dir", b"d\0binary\xff");
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("data", "security.capability", &capability);
    tree
}

/// All that there is of a name; `times` where the format has them.
fn describe(root: &Path, path: &Path, xattrs: bool, nanoseconds: bool) -> String {
    let meta = fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    let content = if kind.is_file() {
        let mut text = Vec::new();
        File::open(path).unwrap().read_to_end(&mut text).unwrap();
        format!(
            "{} bytes {:x}",
            text.len(),
            text.iter().fold(7u64, |h, b| { (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3) })
        )
    } else if kind.is_symlink() {
        format!("-> {:?}", fs::read_link(path).unwrap())
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("{:x}", meta.rdev())
    } else {
        String::new()
    };
    let mut names = Vec::new();
    if xattrs {
        for name in xattr::list(path).unwrap() {
            let value = xattr::get(path, &name).unwrap();
            names.push(format!("{name:?}={value:?}"));
        }
        names.sort();
    }
    let time = match (path == root, nanoseconds) {
        (true, _) => String::new(),
        (false, true) => format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()),
        (false, false) => meta.mtime().to_string(),
    };
    let links = if kind.is_dir() { 0 } else { meta.nlink() };
    format!(
        "{:o} {}:{} links {links} at {time} {content} {names:?}",
        meta.mode(),
        meta.uid(),
        meta.gid()
    )
}

fn listed(root: &Path, xattrs: bool, nanoseconds: bool) -> Listed {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    let mut twins: BTreeMap<u64, PathBuf> = BTreeMap::new();
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut text = describe(root, &path, xattrs, nanoseconds);
        if !meta.is_dir() && meta.nlink() > 1 {
            let first = twins.entry(meta.ino()).or_insert_with(|| path.clone());
            text.push_str(&format!(" inode of {:?}", first.strip_prefix(root).unwrap()));
        }
        all.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), text);
        if meta.is_dir() {
            let mut inner: Vec<_> =
                fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            inner.sort();
            todo.extend(inner.into_iter().rev());
        }
    }
    all
}

/// Compares what we make of an archive with what GNU tar makes of it.
fn compare(dir: &Path, archive: &Path, what: &str) {
    let (ours, theirs) = (dir.join("ours"), dir.join("theirs"));
    for path in [&ours, &theirs] {
        let _ = fs::remove_dir_all(path);
        fs::create_dir(path).unwrap();
    }
    let file = File::open(archive).unwrap();
    let unpacked = unpack(&mut compressed::plain(file).unwrap(), &ours, true)
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(unpacked.lost, None, "{what}");
    let out = program("tar")
        .args(["--numeric-owner", "-p", "--xattrs", "--xattrs-include=*", "-xf"])
        .arg(archive)
        .arg("-C")
        .arg(&theirs)
        .output()
        .unwrap();
    assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
    let (mut theirs, mut ours) = (listed(&theirs, true, true), listed(&ours, true, true));
    // These come back to a directory whose entries they have left: GNU tar 1.34 gives that
    // its time before, and changes it again.
    if what.starts_with("bsdtar") || what == "Go" {
        let directories = theirs.iter_mut().chain(ours.iter_mut()).map(|(_, text)| text);
        for text in directories.filter(|text| text.starts_with('4')) {
            *text = text.split(" at ").next().unwrap().to_string();
        }
    }
    same(&theirs, &ours, what);
    let (needs, _) =
        measure::measure_tar(&mut compressed::plain(File::open(archive).unwrap()).unwrap())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(needs.inodes > 0, "{what}");
}

fn same(wanted: &Listed, found: &Listed, what: &str) {
    for (name, text) in wanted {
        let name = String::from_utf8_lossy(name);
        let ours = found.get(name.as_bytes()).or_else(|| {
            found.iter().find(|(n, _)| String::from_utf8_lossy(n) == name).map(|(_, t)| t)
        });
        assert_eq!(ours, Some(text), "{what}: {name}");
    }
    let more: Vec<_> = found.keys().filter(|n| !wanted.contains_key(*n)).collect();
    assert!(more.is_empty(), "{what}: {more:?}");
}

#[test]
fn tars_of_all_programs_are_unpacked_as_gnu_tar_does() {
    let dir = Dir::on_disk();
    let tree = source(&dir.0);
    let all = "--xattrs --xattrs-include='*' --numeric-owner";
    let python = |format: &str| {
        format!(
            "python3 -c \"import tarfile; t = tarfile.open('TAR', 'w', format=tarfile.{format}, \
             encoding='utf-8', errors='surrogateescape'); t.add('.'); t.close()\""
        )
    };
    let made = [
        ("gnu", "tar --numeric-owner --format=gnu -cf TAR .".into()),
        ("gnu, sparse", "tar --numeric-owner --format=gnu -S -cf TAR .".into()),
        ("pax", format!("tar {all} --format=pax -cf TAR .")),
        ("pax, sparse 0.0", format!("tar {all} --format=pax -S --sparse-version=0.0 -cf TAR .")),
        ("pax, sparse 0.1", format!("tar {all} --format=pax -S --sparse-version=0.1 -cf TAR .")),
        ("pax, sparse 1.0", format!("tar {all} --format=pax -S --sparse-version=1.0 -cf TAR .")),
        ("pax, absolute", format!("tar {all} --format=pax -P --transform=s,^,/, -cf TAR epoch link twin sub")),
        ("a volume's name", "tar --format=gnu -V name -cf TAR sub".into()),
        ("oldgnu", "tar --format=oldgnu -cf TAR .".into()),
        ("ustar", "tar --format=ustar -cf TAR sub sticky epoch link twin char pipe".into()),
        ("v7", "tar --format=v7 -cf TAR sub sticky epoch link twin".into()),
        ("bsdtar, pax", "bsdtar --format=pax -cf TAR .".into()),
        ("bsdtar, its usual", "bsdtar -cf TAR .".into()),
        ("bsdtar, gnutar", "bsdtar --format=gnutar -cf TAR sub sticky epoch link twin".into()),
        ("bsdtar, ustar", "bsdtar --format=ustar -cf TAR sub sticky epoch link twin".into()),
        ("busybox", "busybox tar -cf TAR .".into()),
        ("Python, GNU", python("GNU_FORMAT")),
        ("Python, PAX", python("PAX_FORMAT")),
        ("a file, then a directory of its name", "mkdir ../o; cd ../o; echo f > a; tar -cf TAR a; rm a; mkdir a; echo i > a/in; tar -rf TAR a; rm -r ../o".into()),
        ("a directory, then a file of its name", "mkdir ../o; cd ../o; mkdir a; tar -cf TAR a; rmdir a; echo f > a; tar -rf TAR a; rm -r ../o".into()),
        ("a file, then a link of its name", "mkdir ../o; cd ../o; echo f > a; tar -cf TAR a; ln -sf x a; tar -rf TAR a; rm -r ../o".into()),
        ("a file twice", "mkdir ../o; cd ../o; echo f > a; ln a b; tar -cf TAR a b; echo longer > a; tar -rf TAR a; rm -r ../o".into()),
        ("before 1970", "mkdir ../o; cd ../o; mkdir d; touch -d '1960-01-01 00:00:00.25' a d; tar --format=pax -cf TAR a d; rm -r ../o".into()),
        ("before 1970, gnu", "mkdir ../o; cd ../o; touch -d '1960-01-01' a; tar --format=gnu -cf TAR a; rm -r ../o".into()),
        ("two, one behind the other", "mkdir ../o; cd ../o; echo a > a; tar -cf TAR a; head -c 3000000 /dev/zero >> TAR; rm -r ../o".into()),
    ];
    let archive = dir.0.join("made.tar");
    for (what, script) in &made {
        let _ = fs::remove_file(&archive);
        sh(&tree, &script.replace("TAR", archive.to_str().unwrap()));
        compare(&dir.0, &archive, what);
    }
    // Go's own, as `docker save` and image builders write: made once, by make.go beside it.
    let go = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tar/go.tar");
    compare(&dir.0, &go, "Go");
}

#[test]
fn what_we_pack_is_what_was_there() {
    let dir = Dir::on_disk();
    let tree = source(&dir.0);
    fs::create_dir(dir.0.join("o")).unwrap();
    sh(&tree, "touch -d '1960-01-01 00:00:00.25' old; touch -d @1111111111.5 .");
    let mut stream = Vec::new();
    let packed = pack(&tree, Path::new(""), Sockets::Refuse, &mut stream).unwrap();
    assert!(packed.complaint().is_none());
    let ours = dir.0.join("ours");
    unpack(&mut stream.as_slice(), &ours, true).unwrap();
    same(&listed(&tree, true, true), &listed(&ours, true, true), "ours");
    let blocks = |name: &str| fs::metadata(ours.join(name)).unwrap().blocks();
    assert!(blocks("hole") == 0 && blocks("sparse") < 100, "holes stay holes");
    // And as others read it.
    let theirs = dir.0.join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(dir.0.join("ours.tar"), &stream).unwrap();
    sh(&theirs, "tar --numeric-owner -p --xattrs --xattrs-include='*' -xf ../ours.tar");
    same(&listed(&tree, true, true), &listed(&theirs, true, true), "ours, by GNU tar");
    // What the kernel has no size for.
    for path in
        ["/proc/version", "/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"]
    {
        let (path, mut stream) = (Path::new(path), Vec::new());
        let name = path.file_name().unwrap();
        pack(path, Path::new(name), Sockets::Refuse, &mut stream).unwrap();
        unpack(&mut stream.as_slice(), &ours, true).unwrap();
        let read = fs::read(ours.join(name)).unwrap();
        assert!(!read.is_empty(), "{path:?}");
        if path.ends_with("version") {
            assert_eq!(read, fs::read(path).unwrap());
        }
    }
}

#[test]
fn compressed_archives_are_told_by_their_bytes() {
    let dir = Dir::on_disk();
    sh(&dir.0, "mkdir t; echo hello > t/a; head -c 3000000 /dev/urandom > t/b; tar -cf plain.tar -C t .; tar -cf 2.tar t/a");
    let archive = dir.0.join("odd-name");
    for (what, script) in [
        ("gzip", "gzip -c plain.tar > odd-name"),
        ("gzip, two members", "(head -c 1000000 plain.tar | gzip -c; tail -c +1000001 plain.tar | gzip -c) > odd-name"),
        ("xz", "xz -c plain.tar > odd-name"),
        ("xz, -9 and threads", "xz -9 -T2 -c plain.tar > odd-name"),
        ("xz, two streams", "(head -c 1000000 plain.tar | xz -c; tail -c +1000001 plain.tar | xz -c) > odd-name"),
        ("zstd", "zstd -q -c plain.tar > odd-name"),
        ("zstd, long and slow", "zstd -q --ultra -20 --long=27 -c plain.tar > odd-name"),
        ("zstd, from a pipe", "cat plain.tar | zstd -q -c > odd-name"),
        ("zstd, two frames", "(head -c 1000000 plain.tar | zstd -q -c; tail -c +1000001 plain.tar | zstd -q -c) > odd-name"),
        ("plain", "cp plain.tar odd-name"),
    ] {
        sh(&dir.0, script);
        compare(&dir.0, &archive, what);
        // Cut off, and with something behind it.
        let whole = fs::read(&archive).unwrap();
        if what != "plain" {
            for broken in [whole[..whole.len() - 20].to_vec(), [&whole[..], b"garbage!"].concat()] {
                let ours = dir.0.join("broken");
                let e = compressed::plain(broken.as_slice())
                    .map_err(|e| e.to_string())
                    .and_then(|mut s| unpack(&mut s, &ours, true).map_err(|e| e.to_string()));
                assert!(e.is_err(), "{what}: {} bytes", broken.len());
            }
        }
    }
    sh(&dir.0, "bzip2 -c plain.tar > odd-name || python3 -c \"import bz2; open('odd-name', 'wb').write(bz2.compress(open('plain.tar', 'rb').read()))\"");
    let e = compressed::plain(File::open(&archive).unwrap()).err().unwrap().to_string();
    assert!(e.contains("bzip2") && e.contains("bunzip2"), "{e}");
}
