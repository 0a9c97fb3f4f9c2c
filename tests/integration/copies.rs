//! `cp` by docker cp's rules, in both directions; tar streams; what does not fit, and what
//! an error says of the guest.
//!
//! One script makes the same tree here and in the guest, the same table of copies goes both
//! ways, and the same tree must be there afterwards.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use crate::daemon::{assert_nothing_left, feed, text, Daemon, Dir, Options};
use crate::require_qemu;

/// Sources below `src`, and what is there already below `t`.
const PREPARE: &str = "set -e; umask 022
mkdir -p src/d/sub t; cd src; printf file > f; printf in > d/in; printf x > d/sub/x
ln -s f l; ln -s d ld
cd ../t; mkdir dir1 dir2 dir3 dir4 dir5 dir6 dir7 dir8 dir9 dir10 dir11
for n in 1 2 3 4 5; do printf old > old$n; done
mkdir dir9/f; printf old > dir10/d; ln -s dir11 to-dir; ln -s old5 to-old; ln -s later dangling";

/// What is below `t`, one line for each, in the guest and here.
const LIST: &str = "cd t; find . | sort | while read -r p; do
if [ -L $p ]; then echo \"$p -> $(readlink $p)\"
elif [ -f $p ]; then echo \"$p = $(cat $p)\"; else echo $p/; fi; done";

/// Options, source, target, and what an error says.
const TABLE: [(&[&str], &str, &str, Option<&str>); 27] = [
    (&[], "f", "new1", None),
    (&[], "f", "dir1", None),
    (&[], "f", "dir2/", None),
    (&[], "f", "old1", None),
    (&[], "f", "old2/", Some("os error 20")),
    (&[], "f", "none/", Some("no such directory")),
    (&[], "f", "none/.", Some("no such directory")),
    (&[], "f", "no/new", Some("os error 2")),
    (&[], "f", "old2/new", Some("os error 20")),
    (&[], "f", "to-dir", None),
    (&[], "f", "to-old", None),
    (&[], "f", "dangling", None),
    (&[], "f/", "new", Some("os error 20")),
    (&[], "nothing", "new", Some("os error 2")),
    (&[], "d", "new2", None),
    (&[], "d/", "new3/", None),
    (&[], "d", "dir3", None),
    (&[], "d", "old3", Some("cannot be copied onto")),
    (&[], "d/.", "dir4", None),
    (&[], "d/.", "new4", None),
    (&[], "d/.", "old4", Some("cannot be copied onto")),
    // A link keeps its own name, followed or not.
    (&[], "l", "dir5", None),
    (&["-L"], "l", "dir6", None),
    (&["--follow-link"], "l", "new7", None),
    (&[], "ld", "dir7", None),
    (&[], "ld/", "dir8", None),
    (&[], "d", "dir10", Some("no directory")),
];

/// What is there after all of the table.
const AFTER: &str = "./
./dangling -> later
./dir1/
./dir1/f = file
./dir10/
./dir10/d = old
./dir11/
./dir11/f = file
./dir2/
./dir2/f = file
./dir3/
./dir3/d/
./dir3/d/in = in
./dir3/d/sub/
./dir3/d/sub/x = x
./dir4/
./dir4/in = in
./dir4/sub/
./dir4/sub/x = x
./dir5/
./dir5/l -> f
./dir6/
./dir6/l = file
./dir7/
./dir7/ld -> d
./dir8/
./dir8/ld/
./dir8/ld/in = in
./dir8/ld/sub/
./dir8/ld/sub/x = x
./dir9/
./dir9/f/
./later = file
./new1 = file
./new2/
./new2/in = in
./new2/sub/
./new2/sub/x = x
./new3/
./new3/in = in
./new3/sub/
./new3/sub/x = x
./new4/
./new4/in = in
./new4/sub/
./new4/sub/x = x
./new7 = file
./old1 = file
./old2 = old
./old3 = old
./old4 = old
./old5 = file
./to-dir -> dir11
./to-old -> old5
";

/// A claimed VM, with the tree below /root/c, and a directory here with the same.
struct Pair<'a> {
    daemon: &'a Daemon,
    id: String,
    here: std::path::PathBuf,
}

impl<'a> Pair<'a> {
    fn new(daemon: &'a Daemon, user: u32) -> Pair<'a> {
        use std::os::unix::fs::chown;
        let here = daemon.dir.0.join("c");
        fs::create_dir(&here).unwrap();
        chown(&here, Some(user), Some(user)).unwrap();
        let pair = Pair { daemon, id: daemon.ok(&["get"]).trim().to_string(), here };
        pair.sh("mkdir /root/c");
        pair.sh(&format!("cd /root/c; {PREPARE}"));
        pair.shell(PREPARE, user);
        pair
    }

    fn sh(&self, script: &str) -> String {
        self.daemon.ok(&["exec", &self.id, "--", "sh", "-c", script])
    }

    /// The same here, as that user.
    fn shell(&self, script: &str, user: u32) -> String {
        use std::os::unix::process::CommandExt;
        let mut sh = Command::new("sh");
        sh.arg("-c").arg(script).current_dir(&self.here).env("LC_ALL", "C").uid(user).gid(user);
        let out = sh.output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout)
    }

    fn there(&self, path: &str) -> String {
        format!("{}:/root/c/{path}", self.id)
    }

    fn cp(&self, options: &[&str], from: &str, to: &str) -> Output {
        self.daemon.output(&[&["cp"], options, &[from, to]].concat())
    }

    /// The table one way. `out`: out of the guest.
    fn table(&self, out: bool) {
        for (options, source, target, error) in TABLE {
            let here = |path: String| self.here.join(path).to_str().unwrap().to_string();
            let (source, target) = (format!("src/{source}"), format!("t/{target}"));
            let (from, to) = match out {
                true => (self.there(&source), here(target)),
                false => (here(source), self.there(&target)),
            };
            let done = self.cp(options, &from, &to);
            let (code, err) = (done.status.code(), text(&done.stderr));
            match error {
                None => assert_eq!((code, err.as_str()), (Some(0), ""), "{from} {to}"),
                Some(why) => {
                    assert!(code == Some(1) && err.contains(why), "{from} {to}: {code:?} {err}");
                    assert_eq!(err.lines().count(), 1, "{err}");
                }
            }
        }
    }
}

#[test]
fn copies_follow_docker_cps_rules_in_both_directions() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let pair = Pair::new(&d, 0);
    d.ok(&["resize", "0"]);
    pair.table(false);
    assert_eq!(pair.sh(&format!("cd /root/c; LC_ALL=C; {LIST}")), AFTER);
    pair.table(true);
    assert_eq!(pair.shell(LIST, 0), AFTER);
    // A file in a directory's place.
    for (from, to) in [
        (pair.there("src/f"), pair.here.join("t/dir9").to_str().unwrap().to_string()),
        (pair.here.join("src/f").to_str().unwrap().to_string(), pair.there("t/dir9")),
    ] {
        let out = pair.cp(&[], &from, &to);
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(1) && err.contains("directory"), "{err}");
    }
    // From the root, with or without a slash, and by letters.
    d.ok(&[
        "cp",
        &format!("{}:root/c/src/../src/f", pair.id),
        &format!("{}/rel", d.dir.0.display()),
    ]);
    assert_eq!(fs::read_to_string(d.dir.0.join("rel")).unwrap(), "file");
    for (from, to) in [("a", "b"), ("x:/a", "y:/b"), ("-", "-")] {
        assert_eq!(pair.cp(&[], from, to).status.code(), Some(2), "{from} {to}");
    }
    streams(&pair);
    errors(&pair);
    d.ok(&["stop", &pair.id]);
    assert_nothing_left(&d.quit().0);
}

/// The same of an ordinary user's server, by that user.
#[test]
fn copies_of_an_ordinary_user_follow_the_same_rules() {
    const SOMEBODY: u32 = 4243;
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    let dir = Dir::new();
    let program = dir.0.join("vmcache");
    fs::copy(env!("CARGO_BIN_EXE_vmcache"), &program).unwrap();
    for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
        let copy = dir.0.join(name);
        fs::copy(&image, &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
        *image = copy.to_str().unwrap().to_string();
    }
    options.server = Some((SOMEBODY, program));
    std::os::unix::fs::chown(&dir.0, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    let d = Daemon::launch(&options, dir);
    d.wait_ready(1);
    let pair = Pair::new(&d, SOMEBODY);
    d.ok(&["resize", "0"]);
    pair.table(true);
    assert_eq!(pair.shell(LIST, SOMEBODY), AFTER);
    pair.table(false);
    assert_eq!(pair.sh(&format!("cd /root/c; LC_ALL=C; {LIST}")), AFTER);
    // What is root's alone is an error that says so.
    let out = pair.cp(&[], &pair.there("src/f"), "/usr/here");
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("os error 13"), "{err}");
    d.ok(&["stop", &pair.id]);
    assert_nothing_left(&d.quit().0);
}

fn streams(pair: &Pair<'_>) {
    let d = pair.daemon;
    pair.sh("cd /root/c/src/d; chmod 4755 in; ln in twin; mkfifo ../fifo; truncate -s 3M holes");
    let fine = d.dir.0.join("fine");
    fs::write(&fine, "").unwrap();
    let time = UNIX_EPOCH - Duration::from_millis(86_400_250);
    fs::File::options().write(true).open(&fine).unwrap().set_modified(time).unwrap();
    d.ok(&["cp", fine.to_str().unwrap(), &pair.there("src/d")]);
    pair.sh("cd /root/c/src/d; touch -d '2001-02-03 04:05:06' sub .");
    let out = pair.cp(&[], &pair.there("src/d"), "-");
    assert!(out.status.success(), "{}", text(&out.stderr));
    let into = d.dir.0.join("tar");
    fs::create_dir(&into).unwrap();
    let tar = |args: &[&str], input: &[u8]| {
        let mut tar = Command::new("tar");
        tar.args(args).current_dir(&into);
        let out = feed(tar, input);
        assert!(out.status.success(), "{}", text(&out.stderr));
        out.stdout
    };
    let listed = text(&tar(&["tv"], &out.stdout));
    assert!(listed.contains("-rwxr-xr-x") && !listed.contains("rws"), "{listed}");
    tar(&["x"], &out.stdout);
    assert_eq!(fs::read_to_string(into.join("d/sub/x")).unwrap(), "x");
    assert_eq!(fs::read_to_string(into.join("d/twin")).unwrap(), "in");
    assert_eq!(fs::metadata(into.join("d/holes")).unwrap().len(), 3 << 20);
    // Times to their parts of seconds, and before 1970: on a stream and as files.
    let files = d.dir.0.join("timed");
    assert!(pair.cp(&[], &pair.there("src/d"), files.to_str().unwrap()).status.success());
    for dir in [into.join("d"), files] {
        let changed = |name: &str| fs::metadata(dir.join(name)).unwrap().modified().unwrap();
        assert_eq!(changed("fine"), time, "{dir:?}");
        for name in ["sub", ""] {
            assert_eq!(
                changed(name),
                UNIX_EPOCH + Duration::from_secs(981_173_106),
                "{dir:?}/{name}"
            );
        }
    }
    let contents = pair.cp(&[], &pair.there("src/d/."), "-").stdout;
    assert_eq!(text(&tar(&["t"], &contents)), "fine\nholes\nin\nsub\nsub/x\ntwin\n");

    // And back, as GNU tar writes it, through a pipe that has nothing for a while.
    let packed = tar(&["c", "d"], b"");
    let copied = feed(d.command(&["cp", "-", &pair.there("t/dir9")]), &packed);
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    assert_eq!(
        pair.sh("cat /root/c/t/dir9/d/sub/x; stat -c %s /root/c/t/dir9/d/holes"),
        "x3145728\n"
    );
    let zipped = feed(Command::new("gzip"), &packed).stdout;
    let copied = feed(d.command(&["cp", "-", &pair.there("t/dir9")]), &zipped);
    assert!(copied.status.success(), "compressed: {}", text(&copied.stderr));
    // Files of the kernel's, which have no size.
    let version = pair.cp(&[], &format!("{}:/proc/version", pair.id), into.to_str().unwrap());
    assert!(version.status.success(), "{}", text(&version.stderr));
    let version = fs::read_to_string(into.join("version")).unwrap();
    assert!(version.starts_with("Linux version ") && version == pair.sh("cat /proc/version"));
    for (to, why) in [("t/old1", "os error 20"), ("t/nowhere", "os error 2")] {
        let out = feed(d.command(&["cp", "-", &pair.there(to)]), b"");
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(1) && err.contains(why), "{to}: {err}");
    }
    let noise = feed(d.command(&["cp", "-", &pair.there("t/dir9")]), &[b'n'; 5000]);
    assert_eq!(noise.status.code(), Some(1), "{}", text(&noise.stderr));
    // What harms who unpacks it does not pass, and a stream that is not all there says so.
    for (path, why) in [("src/fifo", "it is a FIFO"), ("src/none", "os error 2")] {
        let out = pair.cp(&[], &pair.there(path), "-");
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(1) && err.contains(why), "{path}: {err}");
    }
    fs::write(into.join("big"), vec![b'b'; 200_000]).unwrap();
    // One that is cut leaves no half file.
    let cut =
        feed(d.command(&["cp", "-", &pair.there("t/dir9")]), &tar(&["c", "big"], b"")[..90_000]);
    assert_eq!(cut.status.code(), Some(1), "{}", text(&cut.stderr));
    let none = "ls /root/c/t/dir9/big 2>&1 | grep -c 'No such file'";
    assert_eq!(pair.sh(none), "1\n");
    // Nor does one whose compression is: found on this host, in the middle of a file.
    let mut random = fs::File::open("/dev/urandom").unwrap().take(3_000_000);
    std::io::copy(&mut random, &mut fs::File::create(into.join("big")).unwrap()).unwrap();
    let mut zipped = tar(&["cz", "big"], b"");
    zipped.truncate(2_500_000);
    let cut = feed(d.command(&["cp", "-", &pair.there("t/dir9")]), &zipped);
    let err = text(&cut.stderr);
    assert!(cut.status.code() == Some(1) && err.contains("gzip does not decompress"), "{err}");
    assert_eq!(pair.sh(none), "1\n");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let out = d.command(&["cp", &pair.there("src/d"), "-"]).stdout(full).output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("os error 28"), "{err}");
    let limited = pair.cp(&["--max-size", "1M"], &pair.there("src/d"), "-");
    assert!(text(&limited.stderr).contains("--max-size"), "{}", text(&limited.stderr));
}

fn errors(pair: &Pair<'_>) {
    let d = pair.daemon;
    let to = |path: &str| format!("{}:{path}", pair.id);
    let file = |name: &str, bytes: usize| {
        let path = d.dir.0.join(name);
        fs::write(&path, vec![b'x'; bytes]).unwrap();
        path.to_str().unwrap().to_string()
    };
    let failed = |out: Output, parts: &[&str]| {
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{err}");
        assert!(parts.iter().all(|part| err.contains(part)), "{parts:?}: {err}");
    };
    // Before anything is sent: more inodes than the guest has in all.
    let many = d.dir.0.join("many");
    fs::create_dir(&many).unwrap();
    for n in 0..70_000 {
        std::os::unix::fs::symlink("x", many.join(n.to_string())).unwrap();
    }
    failed(pair.cp(&[], many.to_str().unwrap(), &to("/tmp")), &["(70001 files)", "inodes"]);
    // All but three MiB of it is full.
    pair.sh("free=$(df -k /tmp | tail -n 1 | awk '{print $4}')
        dd if=/dev/zero of=/tmp/fill bs=1M count=$((free / 1024 - 3)) 2>/dev/null");
    let large = file("large", 5 << 20);
    let parts = ["5.0 MiB (1 files)", " MiB free", "VM of 256 MiB", "`--memory 320`", "--image"];
    failed(pair.cp(&[], &large, &to("/tmp")), &parts);
    assert_eq!(pair.sh("ls /tmp"), "fill\n");
    // One that takes the place of itself fits.
    let most = file("most", 2 << 20);
    for _ in 0..2 {
        d.ok(&["cp", &most, &to("/tmp")]);
    }
    // What nobody could know before: the guest's own error, with its path.
    let mut tar = Command::new("tar");
    tar.arg("c").arg("-C").arg(&d.dir.0).arg("large");
    let packed = feed(tar, b"").stdout;
    let out = feed_all(d.command(&["cp", "-", &to("/tmp")]), &packed);
    failed(out, &["in /tmp", "large", "os error 28", "--memory"]);

    // Who ended the guest's side, which is a program of the guest's own from here on.
    pair.sh("rm /tmp/*; rm /sbin/vmcache-agent
        printf '#!/bin/sh\\nkill -9 $$\\n' > /sbin/vmcache-agent; chmod +x /sbin/vmcache-agent");
    let signal = ["ended by signal 9, which something in the guest sent"];
    failed(pair.cp(&[], &most, &to("/root")), &signal);
    failed(pair.cp(&[], &to("/root/x"), "/dev/shm/vmct-nothing"), &signal);
    pair.sh("printf '#!/bin/sh\\nexit 7\\n' > /sbin/vmcache-agent");
    failed(pair.cp(&[], &most, &to("/root")), &["ended with code 7, and said nothing"]);
    // No word on a user's command: not 126, nor 127.
    for (change, cause) in [("chmod -x", "not executable"), ("rm", "no such file")] {
        pair.sh(&format!("{change} /sbin/vmcache-agent"));
        failed(pair.cp(&[], &most, &to("/root")), &["start the guest's side", cause]);
    }
}

/// As `feed`, of a command that does not read all.
fn feed_all(mut command: Command, input: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

#[test]
fn a_root_that_does_not_fit_is_told_before_it_is_sent_and_links_lead_in_the_root() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let disk = Dir::on_disk();
    let root = disk.0.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
    let root_text = root.to_str().unwrap();
    let run = ["run", "--keep", "--rootfs", root_text, "--", "/bin/busybox", "true"];
    let out = d.output(&run);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let id = text(&out.stderr).lines().last().unwrap().to_string();
    let note = d.dir.0.join("note");
    fs::write(&note, "inside").unwrap();
    d.ok(&["cp", note.to_str().unwrap(), &format!("{id}:/link/note")]);
    let sh = ["exec", &id, "--", "/bin/busybox", "cat", "/etc/note"];
    assert_eq!(d.ok(&sh), "inside", "it is in the workload's root, and not in the guest's");
    let back = d.dir.0.join("back");
    d.ok(&["cp", &format!("{id}:/link/note"), back.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&back).unwrap(), "inside");
    d.ok(&["stop", &id]);

    d.wait_ready(1);
    let big = root.join("big");
    assert!(Command::new("fallocate").args(["-l", "200M"]).arg(&big).status().unwrap().success());
    let out = d.output(&["run", "--rootfs", root_text, "--", "/bin/busybox", "true"]);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(125), "{err}");
    for part in ["do not fit", "VM of 256 MiB", "`--memory ", "--image"] {
        assert!(err.contains(part), "{part}: {err}");
    }
    // All that a container with a root of its own can fill is full, and the VM lives.
    d.wait_ready(1);
    fs::remove_file(&big).unwrap();
    let script = "mkdir -p /tmp; for to in / /dev /dev/shm /tmp; do
            /bin/busybox dd if=/dev/zero of=$to/fill bs=1M 2>&1 | /bin/busybox grep -c 'No space'
        done; echo alive";
    let run = ["run", "--rootfs", root_text, "--", "/bin/busybox", "sh", "-c", script];
    assert_eq!(d.ok(&run), "1\n1\n1\n1\nalive\n");
    assert!(Command::new("fallocate").args(["-l", "200M"]).arg(&big).status().unwrap().success());
    // What it says helps.
    let remedy = err.split("`--memory ").nth(1).and_then(|rest| rest.split('`').next()).unwrap();
    d.wait_ready(1);
    let run = ["run", "--memory", remedy, "--rootfs", root_text, "--"];
    let size = d.ok(&[&run[..], &["/bin/busybox", "stat", "-c", "%s", "/big"]].concat());
    assert_eq!(size.trim(), (200 << 20).to_string());
    assert_nothing_left(&d.quit().0);
}
