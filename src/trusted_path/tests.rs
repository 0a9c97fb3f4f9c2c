//! The rule as a table; paths over real trees, some of them others'; and an attacker who swaps
//! what is there all the while.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{chown, lchown, symlink, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{geteuid, mkfifo};

use super::policy::{acceptable, ours, replaceable, writable};
use super::*;
use crate::worker::Worker;

/// Somebody else.
const EVE: u32 = 233_001;
/// A group of others.
const STAFF: u32 = 50;

/// A directory of a test's own, removed when dropped.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Tree {
        assert!(geteuid().is_root(), "this test gives files to others: run it as root");
        let path = std::env::temp_dir().join(format!("vmcache-path-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Tree(path)
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// What is read at a path that passes, or why it does not.
fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    TrustedPath::file(path)
        .and_then(|file| file.open()?.read_to_string(&mut text))
        .map(|_| text)
        .map_err(|e| e.to_string())
}

/// It is refused for a component, with a remedy.
fn refuses(path: &Path, component: &Path, words: &str) {
    let why = read(path).unwrap_err();
    let begin = format!("{} ", component.display());
    assert!(why.starts_with(&begin) && why.contains(words), "{}: {why}", path.display());
}

#[test]
fn the_rule_of_one_component() {
    let (root, alice) = (Asker { uid: 0, gid: 0 }, Asker { uid: 1000, gid: 1000 });
    let kind = |k: SFlag, mode: u32| k.bits() | mode;
    let (file, dir) = (|m| kind(SFlag::S_IFREG, m), |m| kind(SFlag::S_IFDIR, m));
    let (link, device) = (|m| kind(SFlag::S_IFLNK, m), |m| kind(SFlag::S_IFCHR, m));
    let (closed, sticky) = (Ok(Standing::Closed), Ok(Standing::Sticky));
    let owner = |uid, mode| Err(Fault::Owner { uid, mode });
    let others = |mode| Err(Fault::Others { mode });
    let group = |gid, mode| Err(Fault::Group { gid, mode });
    let list = |mode| Err(Fault::List { mode });
    for (asker, uid, gid, mode, has_list, result) in [
        (root, 0, 0, file(0o644), false, closed.clone()),
        (root, 0, STAFF, file(0o640), false, closed.clone()),
        (root, 0, 0, dir(0o755), false, closed.clone()),
        // Whose it is.
        (root, 1000, 1000, file(0o600), false, owner(1000, file(0o600))),
        (root, 1000, 1000, dir(0o1777), false, owner(1000, dir(0o1777))),
        (root, 1000, 1000, link(0o777), false, owner(1000, link(0o777))),
        (alice, 1000, 1000, file(0o600), false, closed.clone()),
        (alice, 0, 0, file(0o644), false, closed.clone()),
        (alice, 1001, 1000, file(0o600), false, owner(1001, file(0o600))),
        // Who may write it.
        (root, 0, 0, file(0o646), false, others(file(0o646))),
        (root, 0, 0, file(0o1646), false, others(file(0o1646))),
        (root, 0, 0, dir(0o757), false, others(dir(0o757))),
        (root, 0, 0, file(0o664), false, closed.clone()),
        (root, 0, STAFF, file(0o664), false, group(STAFF, file(0o664))),
        (root, 0, STAFF, dir(0o2775), false, group(STAFF, dir(0o2775))),
        (alice, 1000, 1000, dir(0o775), false, closed.clone()),
        (alice, 1000, STAFF, dir(0o775), false, group(STAFF, dir(0o775))),
        // The group's permissions are a list's mask.
        (root, 0, 0, file(0o664), true, list(file(0o664))),
        (root, 0, 0, file(0o644), true, closed.clone()),
        (alice, 1000, 1000, dir(0o770), true, list(dir(0o770))),
        // Where each touches its own only.
        (root, 0, 0, dir(0o1777), false, sticky.clone()),
        (root, 0, STAFF, dir(0o1775), false, sticky.clone()),
        (root, 0, 0, dir(0o1770), true, sticky.clone()),
        (alice, 0, 0, dir(0o1777), false, sticky),
        // Permissions of links and devices are not about paths.
        (root, 0, 0, link(0o777), false, closed.clone()),
        (root, 0, 0, device(0o666), false, closed),
    ] {
        let component = Component { uid, gid, mode, names: 1, list: has_list };
        assert_eq!(acceptable(asker, &component), result, "{asker:?} {component:?}");
    }
}

#[test]
fn the_rule_of_what_is_written() {
    let root = Asker { uid: 0, gid: 0 };
    let file =
        Component { uid: 0, gid: 0, mode: SFlag::S_IFREG.bits() | 0o644, names: 1, list: false };
    let kind = |k: SFlag| Component { mode: k.bits() | 0o644, ..file };
    assert_eq!((writable(root, &file), replaceable(root, &file)), (Ok(()), Ok(())));
    let twice = Component { names: 2, ..file };
    assert_eq!((writable(root, &twice), replaceable(root, &twice)), (Err(Fault::Names(2)), Ok(())));
    let open = Component { mode: file.mode | 0o002, ..file };
    assert!(writable(root, &open).is_err() && replaceable(root, &open).is_ok());
    let eves = Component { uid: EVE, ..file };
    for judge in [writable, replaceable, ours] {
        assert_eq!(judge(root, &eves), Err(Fault::Owner { uid: EVE, mode: file.mode }));
    }
    for (other, fault) in [
        (SFlag::S_IFLNK, Fault::Link),
        (SFlag::S_IFIFO, Fault::Kind { is: "a FIFO", wanted: "a file" }),
        (SFlag::S_IFDIR, Fault::Kind { is: "a directory", wanted: "a file" }),
        (SFlag::S_IFCHR, Fault::Kind { is: "a character device", wanted: "a file" }),
        (SFlag::S_IFSOCK, Fault::Kind { is: "a socket", wanted: "a file" }),
    ] {
        assert_eq!(writable(root, &kind(other)), Err(fault.clone()));
        assert_eq!(replaceable(root, &kind(other)), Err(fault));
    }
}

#[test]
fn each_component_counts_and_the_error_names_it() {
    let tree = Tree::new("walk");
    let (a, b) = (tree.dir("a"), tree.dir("a/b"));
    let file = tree.file("a/b/f", "root's");
    assert_eq!(read(&file).unwrap(), "root's");
    for component in [&a, &b, &file] {
        let mode = fs::metadata(component).unwrap().mode() & 0o7777;
        chown(component, Some(EVE), None).unwrap();
        let words = format!("is uid {EVE}'s (mode {mode:04o}): whoever owns it decides");
        refuses(&file, component, &words);
        refuses(&file, component, &format!("`chown root {}`", component.display()));
        chown(component, Some(0), None).unwrap();
        chmod(component, mode | 0o002);
        refuses(&file, component, "is writable for everybody");
        chmod(component, mode | 0o020);
        assert_eq!(read(&file).unwrap(), "root's", "root's group is root");
        chown(component, None, Some(STAFF)).unwrap();
        refuses(&file, component, "is writable for group 50");
        chown(component, None, Some(0)).unwrap();
        // user::rw-, user:EVE:rw-, group::r--, mask::rw-, other::r--.
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        let list = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 7, none),
            entry(2, 7, EVE),
            entry(4, 4, none),
            entry(16, 7, none),
            entry(32, 5, none),
        ];
        xattr::set(component, "system.posix_acl_access", &list.concat()).unwrap();
        assert_eq!(fs::metadata(component).unwrap().gid(), 0);
        refuses(&file, component, "has an access control list");
        xattr::remove(component, "system.posix_acl_access").unwrap();
        chmod(component, mode);
    }
    assert_eq!(read(&file).unwrap(), "root's");
}

#[test]
fn links_are_followed_where_nobody_else_can_change_them() {
    let tree = Tree::new("links");
    let (ours, eves) = (tree.dir("ours"), tree.dir("eves"));
    let good = tree.file("ours/f", "good");
    tree.file("eves/f", "evil");
    chown(&eves, Some(EVE), None).unwrap();
    chown(eves.join("f"), Some(EVE), None).unwrap();
    symlink(&good, ours.join("absolute")).unwrap();
    symlink("f", ours.join("relative")).unwrap();
    symlink("../ours/./f", ours.join("up")).unwrap();
    symlink(&ours, tree.0.join("dir")).unwrap();
    symlink("dir/up", tree.0.join("both")).unwrap();
    for name in ["ours/absolute", "ours/relative", "ours/up", "dir/f", "dir/../ours/f", "both"] {
        let found = TrustedPath::file(&tree.0.join(name)).unwrap();
        assert_eq!(found.path(), fs::canonicalize(&good).unwrap(), "{name}");
        assert_eq!(read(&tree.0.join(name)).unwrap(), "good", "{name}");
    }
    // Where it leads counts, wherever it stands.
    symlink(&eves, ours.join("away")).unwrap();
    refuses(&ours.join("away/f"), &eves, "is uid");
    symlink("../eves/f", ours.join("there")).unwrap();
    refuses(&ours.join("there"), &eves, "is uid");
    // Back from there, too: what was on the way decides.
    refuses(&tree.0.join("eves/../ours/f"), &eves, "is uid");
    // Whose the link is.
    let link = tree.0.join("theirs");
    symlink(&good, &link).unwrap();
    lchown(&link, Some(EVE), None).unwrap();
    refuses(&link, &link, &format!("`chown -h root {}`", link.display()));
    // In circles, and too many.
    symlink("b", tree.0.join("a")).unwrap();
    symlink("a", tree.0.join("b")).unwrap();
    assert!(read(&tree.0.join("a")).unwrap_err().contains("symbolic links"), "a loop");
    for n in 0..=MAX_LINKS {
        let to = if n == 0 { "ours/f".into() } else { format!("l{}", n - 1) };
        symlink(to, tree.0.join(format!("l{n}"))).unwrap();
    }
    let read_through = |n: u32| read(&tree.0.join(format!("l{n}")));
    assert_eq!(read_through(MAX_LINKS - 1).unwrap(), "good");
    assert!(read_through(MAX_LINKS).unwrap_err().contains("symbolic links"));
    let deep = tree.0.join(["d"; MAX_DEPTH + 1].join("/"));
    fs::create_dir_all(&deep).unwrap();
    let e = TrustedPath::directory(&deep).unwrap_err().to_string();
    assert!(e.contains("more than 128 components"), "{e}");
}

#[test]
fn a_sticky_directory_passes_with_entries_of_ones_own() {
    let tree = Tree::new("sticky");
    let shared = tree.dir("tmp");
    chmod(&shared, 0o1777);
    let file = tree.file("tmp/f", "mine");
    assert_eq!(read(&file).unwrap(), "mine");
    assert!(Destination::of(&file).is_ok());
    chown(&file, Some(EVE), None).unwrap();
    refuses(&file, &file, "is uid");
    let link = shared.join("l");
    symlink("/etc/passwd", &link).unwrap();
    assert!(read(&link).is_ok());
    lchown(&link, Some(EVE), None).unwrap();
    refuses(&link, &link, "is uid");
    let sub = tree.dir("tmp/sub");
    chown(&sub, Some(EVE), None).unwrap();
    refuses(&sub.join("f"), &sub, "is uid");
    // As a place of one's own it is none.
    let e = TrustedPath::directory(&shared).unwrap_err().to_string();
    assert!(e.contains("is writable for others (mode 1777)"), "{e}");
    assert!(e.contains("name one below it"), "{e}");
    assert!(TrustedPath::of(&shared, Kind::SharedDirectory).is_ok());
    // What is not there yet, whoever makes it.
    for missing in ["later", "later/below"] {
        let e = check_provided(&shared.join(missing), Kind::Any).unwrap_err().to_string();
        let words = format!("{} is not there", shared.join("later").display());
        assert!(e.starts_with(&words), "{e}");
        assert!(check_existing(&shared.join(missing), Kind::Directory).is_ok());
        assert!(check_provided(&tree.0.join(missing), Kind::Any).is_ok());
    }
    assert!(check_provided(&link, Kind::Any).is_err());
    // Sticky is for directories, and another user's stickiness is that user's.
    chown(&shared, Some(EVE), None).unwrap();
    refuses(&link, &shared, "is uid");
}

#[test]
fn what_is_not_wanted_is_refused_unopened() {
    let tree = Tree::new("kinds");
    let file = tree.file("f", "text");
    let fifo = tree.0.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(tree.0.join("s")).unwrap();
    let refused = |name: &str, kind, words: &str| {
        let e = TrustedPath::of(&tree.0.join(name), kind).unwrap_err().to_string();
        assert!(e.contains(words), "{name} as {kind:?}: {e}");
    };
    refused("fifo", Kind::File, "is a FIFO, and a file is needed");
    refused("fifo", Kind::Program, "is a FIFO");
    refused("fifo", Kind::Source, "is a FIFO");
    refused("fifo", Kind::Directory, "is a FIFO, and a directory is needed");
    refused("fifo", Kind::Any, "is a FIFO");
    refused("s", Kind::File, "is a socket");
    refused(".", Kind::File, "is a directory, and a file is needed");
    refused("f", Kind::Program, "is a file that nobody may execute");
    refused("f", Kind::Directory, "and a directory is needed");
    refused("f/..", Kind::Directory, "Not a directory");
    refused("f/x", Kind::File, "Not a directory");
    refused("nothing", Kind::File, "No such file");
    assert!(TrustedPath::of(&tree.0.join("s"), Kind::Socket).is_ok());
    assert!(TrustedPath::of(Path::new("/dev/null"), Kind::Source).is_ok());
    assert!(TrustedPath::of(Path::new("/dev/null"), Kind::File).is_err());
    assert!(check_existing(&tree.0.join("nothing/below"), Kind::Directory).is_ok());
    assert!(check_existing(&file.join("below"), Kind::Directory).is_err());
    // A log's socket may be its server's, where only root can have put it.
    chown(tree.0.join("s"), Some(EVE), None).unwrap();
    assert!(TrustedPath::of(&tree.0.join("s"), Kind::Socket).is_ok());
    chmod(&tree.0, 0o1777);
    refused("s", Kind::Socket, "is uid");
    drop(socket);
}

#[test]
fn directories_are_made_where_they_stay_ones_own() {
    let tree = Tree::new("made");
    let made =
        TrustedPath::make_directory(&tree.0.join("a/b/../c"), 0o700, Kind::Directory).unwrap();
    assert_eq!(made.path(), fs::canonicalize(&tree.0).unwrap().join("a/c"));
    assert_eq!(fs::metadata(made.path()).unwrap().mode() & 0o7777, 0o700);
    assert!(tree.0.join("a/b").is_dir());
    let again = TrustedPath::make_directory(&tree.0.join("a/c"), 0o711, Kind::Directory).unwrap();
    assert_eq!(again.path(), made.path());
    chown(tree.0.join("a"), Some(EVE), None).unwrap();
    assert!(TrustedPath::make_directory(&tree.0.join("a/new"), 0o700, Kind::Directory).is_err());
    assert!(!tree.0.join("a/new").exists());
    // Where root's own link leads, and not where another's does.
    symlink(tree.0.join("elsewhere"), tree.0.join("link")).unwrap();
    let made = TrustedPath::make_directory(&tree.0.join("link"), 0o700, Kind::Directory).unwrap();
    assert_eq!(made.path(), fs::canonicalize(tree.0.join("elsewhere")).unwrap());
    symlink(tree.0.join("further"), tree.0.join("theirs")).unwrap();
    lchown(tree.0.join("theirs"), Some(EVE), None).unwrap();
    assert!(TrustedPath::make_directory(&tree.0.join("theirs"), 0o700, Kind::Directory).is_err());
    assert!(!tree.0.join("further").exists());
}

#[test]
fn what_is_written_is_written_there_and_nowhere_else() {
    let tree = Tree::new("written");
    let kept = tree.file("kept", "root's");
    let place = |name: &str| Destination::of(&tree.0.join(name)).unwrap();
    let witness = || assert_eq!(fs::read_to_string(&kept).unwrap(), "root's");
    let refused = |e: std::io::Error, words: &str| {
        assert!(e.to_string().contains(words), "{e}");
        witness();
    };
    place("new").replace(b"one").unwrap();
    assert_eq!(fs::read_to_string(tree.0.join("new")).unwrap(), "one");
    place("new").replace(b"two").unwrap();
    drop(place("new").draft().unwrap());
    assert_eq!(fs::read_to_string(tree.0.join("new")).unwrap(), "two");
    let lock = place("lock").open_or_create(0o600).unwrap();
    assert_eq!(lock.metadata().unwrap().mode() & 0o7777, 0o600);
    let again = place("lock").open_or_create(0o600).unwrap();
    assert_eq!(lock.metadata().unwrap().ino(), again.metadata().unwrap().ino());

    symlink(&kept, tree.0.join("link")).unwrap();
    refused(place("link").replace(b"x").unwrap_err(), "is a symbolic link");
    refused(place("link").open_or_create(0o600).unwrap_err(), "is a symbolic link");
    refused(place("link").check_no_link().unwrap_err(), "is a symbolic link");
    symlink(tree.0.join("made"), tree.0.join("dangling")).unwrap();
    refused(place("dangling").open_or_create(0o600).unwrap_err(), "is a symbolic link");
    refused(place("dangling").replace(b"x").unwrap_err(), "is a symbolic link");
    assert!(!tree.0.join("made").exists());
    fs::hard_link(&kept, tree.0.join("twin")).unwrap();
    refused(place("twin").open_or_create(0o600).unwrap_err(), "a file with 2 names");
    place("twin").replace(b"x").unwrap();
    witness();
    mkfifo(&tree.0.join("fifo"), Mode::S_IRWXU).unwrap();
    refused(place("fifo").open_or_create(0o600).unwrap_err(), "is a FIFO");
    refused(place("fifo").replace(b"x").unwrap_err(), "is a FIFO");
    let eves = tree.file("eves", "eve's");
    chown(&eves, Some(EVE), None).unwrap();
    refused(place("eves").open_or_create(0o600).unwrap_err(), "is uid");
    refused(place("eves").replace(b"x").unwrap_err(), "is uid");
    refused(place("eves").check_owner().unwrap_err(), "is uid");
    assert_eq!(fs::read_to_string(&eves).unwrap(), "eve's");
    // A new file, whatever is there, and not through it.
    place("link").create(0o644).unwrap();
    witness();
    assert!(!tree.0.join("link").is_symlink());
    let names: Vec<_> = fs::read_dir(&tree.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().ends_with(".new")), "{names:?}");
    for none in ["", "/", "/tmp/.."] {
        assert!(Destination::of(Path::new(none)).is_err(), "{none:?}");
    }
}

/// In a root without /proc there is only the name: it must still be what was checked.
#[test]
fn without_proc_a_file_is_opened_by_its_name_if_it_is_the_same() {
    let tree = Tree::new("proc");
    let file = tree.file("f", "text");
    let checked = TrustedPath::file(&file).unwrap();
    let open = || {
        let above = checked.above.as_ref().unwrap().as_fd();
        reopened_by_name(checked.as_fd(), (above, OsStr::new("f")), OFlag::O_RDONLY)
    };
    let mut text = String::new();
    open().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
    fs::remove_file(&file).unwrap();
    assert_eq!(open().unwrap_err().kind(), io::ErrorKind::NotFound);
    mkfifo(&file, Mode::S_IRWXU).unwrap();
    assert_eq!(open().unwrap_err().raw_os_error(), Some(Errno::ESTALE as i32));
    fs::remove_file(&file).unwrap();
    symlink("/etc/passwd", &file).unwrap();
    assert!(open().is_err());
}

/// Swaps a name between three things, as fast as it can, until it is told to stop; how often.
fn swapping(tree: &Path, least: u32, stop: &Arc<AtomicBool>) -> Worker<u32> {
    let (tree, stop) = (tree.to_path_buf(), Arc::clone(stop));
    Worker::spawn("vmc-swaps", move || {
        let mut n = 0;
        while n < least || !stop.load(Ordering::Relaxed) {
            for other in ["ours", "eves", "link"] {
                let _ = fs::rename(tree.join(other), tree.join("x"));
                let _ = fs::rename(tree.join("x"), tree.join(other));
                n += 1;
            }
        }
        n
    })
    .unwrap()
}

/// The attack that the check is about: now root's directory, now another's, now a link to
/// that. Whatever is opened is root's.
#[test]
fn nothing_of_an_attackers_is_opened_while_names_are_swapped() {
    let tree = Tree::new("swapped");
    for (name, text) in [("ours", "good"), ("eves", "evil")] {
        tree.dir(name);
        tree.file(&format!("{name}/f"), text);
    }
    for path in ["eves", "eves/f"] {
        chown(tree.0.join(path), Some(EVE), None).unwrap();
    }
    fs::rename(tree.0.join("eves"), tree.0.join("kept-eves")).unwrap();
    symlink("kept-eves", tree.0.join("eves")).unwrap();
    symlink("kept-eves", tree.0.join("link")).unwrap();
    // What root's own link leads to now, and what another's does.
    lchown(tree.0.join("link"), Some(EVE), None).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swaps = swapping(&tree.0, 2000, &stop);
    let (opened, refused) = (AtomicU32::new(0), AtomicU32::new(0));
    while opened.load(Ordering::Relaxed) < 200 || refused.load(Ordering::Relaxed) < 200 {
        match read(&tree.0.join("x/f")) {
            Ok(text) => {
                assert_eq!(text, "good");
                opened.fetch_add(1, Ordering::Relaxed);
            }
            Err(why) if why.contains("is uid") => {
                refused.fetch_add(1, Ordering::Relaxed);
            }
            Err(why) => assert!(why.contains("No such file"), "{why}"),
        }
        // Nor is anything written into what is another's.
        let written = Destination::of(&tree.0.join("x/w")).and_then(|w| w.replace(b"w"));
        drop(written);
        assert!(!tree.0.join("kept-eves/w").exists());
    }
    stop.store(true, Ordering::Relaxed);
    assert!(swaps.join(Duration::from_secs(60)).unwrap() >= 2000);
}
