//! A guest that means harm to its host: by the files that are copied out of it, by the
//! texts that are shown of it, and by answering nothing.
//!
//! The guest's root may do what it likes in its guest, so these replace the agent's own
//! `pack` there by a program that says whatever tar stream it is given.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::daemon::{assert_nothing_left, text, wait_child, wait_for, Daemon, Options};
use crate::require_qemu;

/// A name that clears a screen, turns the text around, and forges a line.
const EVIL: &str = "\x1b[2J\u{202e}evil\n\u{9b}31m";

/// Environment of a client whose walls are down.
fn without(command: &mut Command, wall: &str) -> Output {
    command.env(vmcache::walls::VARIABLE, wall).output().unwrap()
}

/// A VM of a daemon's, and a directory for what comes out of it.
struct Guest<'a> {
    daemon: &'a Daemon,
    id: String,
    out: PathBuf,
}

impl Guest<'_> {
    fn claim<'a>(daemon: &'a Daemon, name: &str) -> Guest<'a> {
        let out = daemon.dir.0.join(name);
        fs::create_dir(&out).unwrap();
        Guest { daemon, id: daemon.ok(&["get"]).trim().to_string(), out }
    }

    fn sh(&self, script: &str) -> String {
        self.daemon.ok(&["exec", &self.id, "--", "sh", "-c", script])
    }

    fn cp(&self, path: &str, options: &[&str]) -> Command {
        let from = format!("{}:{path}", self.id);
        let mut args = vec!["cp", &from, self.out.to_str().unwrap()];
        args.extend_from_slice(options);
        self.daemon.command(&args)
    }

    /// An error of exit code 1 that has `why`, in one line.
    fn refused(&self, path: &str, options: &[&str], why: &str) {
        let out = self.cp(path, options).output().unwrap();
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{path}: {err}");
        assert!(err.contains(why) && err.trim_end().lines().count() == 1, "{path}: {err:?}");
        assert_harmless(&out);
    }

    fn copied(&self, path: &str, options: &[&str]) {
        let out = self.cp(path, options).output().unwrap();
        assert!(out.status.success(), "{path}: {}", text(&out.stderr));
    }

    fn meta(&self, name: &str) -> Option<fs::Metadata> {
        fs::symlink_metadata(self.out.join(name)).ok()
    }

    fn clear(&self) {
        fs::remove_dir_all(&self.out).unwrap();
        fs::create_dir(&self.out).unwrap();
    }
}

/// Nothing that commands a terminal or turns text around.
fn assert_harmless(out: &Output) {
    for bytes in [&out.stdout, &out.stderr] {
        let seen = String::from_utf8(bytes.clone()).unwrap();
        let bad =
            |c: &char| (c.is_control() && *c != '\n') || ('\u{202a}'..='\u{202e}').contains(c);
        assert!(!seen.chars().any(|c| bad(&c)), "{seen:?}");
    }
}

/// An entry of a tar stream.
fn entry(name: &str, kind: u8, mode: u32, link: &str, data: &[u8]) -> Vec<u8> {
    let mut block = [0u8; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    block[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..265].copy_from_slice(b"ustar  \0");
    // Of devices: /dev/null's.
    block[329..336].copy_from_slice(b"0000001");
    block[337..344].copy_from_slice(b"0000003");
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut out = block.to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// What gives a file that it comes before all rights of root's: cap_sys_admin=ep, as a PAX
/// record.
fn capability() -> Vec<u8> {
    let mut value = 0x0200_0001u32.to_le_bytes().to_vec();
    value.extend([0x00, 0x00, 0x20, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let rest = [&b" SCHILY.xattr.security.capability="[..], &value, b"\n"].concat();
    let length = rest.len() + 2;
    let record = [length.to_string().as_bytes(), &rest].concat();
    assert_eq!(record.len(), length);
    entry("pax", b'x', 0o644, "", &record)
}

/// The streams that the replaced agent says, by the name that is asked for.
fn streams(outside: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let file = |name: &str| entry(name, b'0', 0o644, "", b"evil");
    let out = outside.to_str().unwrap();
    vec![
        ("suid", entry("suid", b'0', 0o6755, "", b"#!/bin/sh\n")),
        ("capable", [capability(), entry("capable", b'0', 0o755, "", b"x")].concat()),
        ("device", [file("device/before"), entry("device/null", b'3', 0o666, "", b"")].concat()),
        ("block", entry("block", b'4', 0o666, "", b"")),
        ("fifo", entry("fifo", b'6', 0o666, "", b"")),
        ("other", [file("other"), file("authorized_keys")].concat()),
        ("up", file("up/../../escaped")),
        ("absolute", file(&format!("{out}/escaped"))),
        ("middle", [entry("middle/l", b'2', 0o777, out, b""), file("middle/l/escaped")].concat()),
        ("hard", entry("hard", b'1', 0o644, "/etc/passwd", b"")),
        ("hard-link", {
            let link = entry("hard-link/l", b'2', 0o777, "/etc/passwd", b"");
            [link, entry("hard-link/h", b'1', 0o644, "hard-link/l", b"")].concat()
        }),
        ("large", entry("large", b'0', 0o644, "", &vec![b'x'; 200_000])),
        (
            "named",
            [
                file(&format!("named/{EVIL}")),
                entry(&format!("named/{EVIL}-device"), b'3', 0o644, "", b""),
            ]
            .concat(),
        ),
    ]
}

/// From here on, the guest's side of a copy is its root's program.
fn replace_agent(guest: &Guest<'_>) {
    let prepared = guest.daemon.dir.0.join("streams");
    fs::create_dir(&prepared).unwrap();
    for (name, bytes) in streams(&guest.daemon.dir.0) {
        fs::write(prepared.join(name), [bytes, vec![0; 1024]].concat()).unwrap();
    }
    // A file without an end, and what is no tar.
    let mut endless = entry("endless", b'0', 0o644, "", b"");
    endless[124..135].copy_from_slice(b"77777777777");
    endless[148..156].copy_from_slice(b"        ");
    let sum: u32 = endless.iter().map(|b| u32::from(*b)).sum();
    endless[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    fs::write(prepared.join("endless"), endless).unwrap();
    fs::write(prepared.join("noise"), vec![b'n'; 5000]).unwrap();
    let to = format!("{}:/root", guest.id);
    guest.daemon.ok(&["cp", prepared.to_str().unwrap(), &to]);
    guest.sh("rm /sbin/vmcache-agent; cat > /sbin/vmcache-agent <<'END'
#!/bin/sh
name=${2##*/}
cat /root/streams/$name
case $name in
endless) exec cat /dev/zero ;;
after) cat /dev/zero ;;
words) printf 'said \\033[2J\\342\\200\\256 so\\n' >&2; exit 3 ;;
esac
END
chmod +x /sbin/vmcache-agent");
}

#[test]
fn what_is_copied_out_of_a_guest_is_files_directories_and_links() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let guest = Guest::claim(&daemon, "out");
    trees_of_the_guest(&guest);
    replace_agent(&guest);
    streams_of_the_guest(&guest);
    streams_passed_on(&guest);
    daemon.ok(&["stop", &guest.id]);
    assert_nothing_left(&daemon.quit().0);
}

/// What the guest's root makes with the programs that it has.
fn trees_of_the_guest(guest: &Guest<'_>) {
    guest.sh("mkdir -p /root/tree/dir /root/special && cd /root/tree && echo data > file
         ln file twin; chmod 6777 file; ln -s /etc/shadow link; chown 1000:1000 dir
         truncate -s 40M holes; printf end | dd of=holes bs=1 seek=30000000 conv=notrunc 2>/dev/null
         touch \"$(printf '\\033[2J\\342\\200\\256x')\"
         ln -s /dev/zero /root/zero; mkfifo /root/fifo; mknod /root/null c 1 3
         mknod /root/disk b 8 0; mknod /root/special/null c 1 3
         truncate -s 20G /root/huge; (nc -l -U /root/socket >/dev/null 2>&1 &) ; true");
    let before = Instant::now();
    guest.copied("/root/tree", &[]);
    assert!(before.elapsed() < Duration::from_secs(20), "holes were carried as bytes");
    let file = guest.meta("tree/file").unwrap();
    let twin = guest.meta("tree/twin").unwrap();
    assert_eq!((file.mode() & 0o7777, file.uid(), file.ino()), (0o777, 0, twin.ino()));
    assert_eq!(guest.meta("tree/dir").unwrap().uid(), 0);
    assert_eq!(fs::read_link(guest.out.join("tree/link")).unwrap(), Path::new("/etc/shadow"));
    let holes = guest.meta("tree/holes").unwrap();
    let there = guest.sh("stat -c '%b %s %T' /root/tree/holes");
    assert!(holes.len() == 40 << 20, "{} bytes; in the guest {there}", holes.len());
    assert!(holes.blocks() < 1000, "{} blocks; in the guest {there}", holes.blocks());
    let bytes = fs::read(guest.out.join("tree/holes")).unwrap();
    assert_eq!((&bytes[30_000_000..30_000_003], bytes[29_999_999]), (&b"end"[..], 0));
    assert!(guest.meta("tree/\x1b[2J\u{202e}x").is_some());

    guest.copied("/root/zero", &[]);
    assert!(guest.meta("zero").unwrap().file_type().is_symlink());
    guest.refused("/root/fifo", &[], "fifo: it is a FIFO");
    guest.refused("/root/null", &[], "null: it is a character device");
    guest.refused("/root/disk", &[], "disk: it is a block device");
    guest.refused("/root/special", &[], "special/null: it is a character device");
    if guest.sh("[ -S /root/socket ] && echo yes || true") == "yes\n" {
        guest.refused("/root/socket", &[], "socket: it is a socket");
    }
    guest.refused("/root/huge", &[], "over 16.0 GiB");
    guest.refused("/root/tree", &["--max-size", "1M"], "over 1.0 MiB");
    guest.refused("/root/tree", &["--max-entries", "2"], "one of over 2");
    assert!(guest.meta("huge").is_none() && guest.meta("null").is_none());
    // A file that has no size, of the guest's kernel: whole.
    guest.copied("/proc/version", &[]);
    assert!(fs::read_to_string(guest.out.join("version")).unwrap().starts_with("Linux version"));

    // A guest that is trusted.
    guest.copied("/root/special", &["--archive"]);
    assert!(guest.meta("special/null").unwrap().file_type().is_char_device());
    guest.copied("/root/tree", &["--archive"]);
    let file = guest.meta("tree/file").unwrap();
    assert_eq!((file.mode() & 0o7777, guest.meta("tree/dir").unwrap().uid()), (0o6777, 1000));
    guest.clear();
}

/// What only a program makes that writes tar streams by itself.
fn streams_of_the_guest(guest: &Guest<'_>) {
    let outside = guest.daemon.dir.0.join("escaped");
    guest.copied("/x/suid", &[]);
    assert_eq!(guest.meta("suid").unwrap().mode() & 0o7777, 0o755);
    guest.copied("/x/capable", &[]);
    let capability = |name: &str| {
        let mut getcap = Command::new("/usr/bin/python3");
        getcap.args(["-c", "import os,sys; print(os.listxattr(sys.argv[1]))"]);
        text(&getcap.arg(guest.out.join(name)).output().unwrap().stdout)
    };
    assert!(!capability("capable").contains("security.capability"));
    guest.refused("/x/device", &[], "device/null: it is a character device");
    assert_eq!(guest.meta("device/before").unwrap().len(), 4, "what came before stays");
    guest.refused("/x/block", &[], "block: it is a block device");
    guest.refused("/x/fifo", &[], "fifo: it is a FIFO");
    guest.refused("/x/other", &[], "authorized_keys: the guest was asked for \"other\" alone");
    guest.refused("/x/up", &[], "the name leaves the target");
    guest.refused("/x/absolute", &[], "the name leaves the target");
    guest.refused("/x/middle", &[], "\"l\" in its name is a link");
    guest.refused("/x/hard", &[], "a hard link to \"/etc/passwd\"");
    guest.copied("/x/hard-link", &[]);
    assert!(guest.meta("hard-link/h").unwrap().file_type().is_symlink());
    guest.refused("/x/large", &["--max-size", "100K"], "over 100.0 KiB");
    guest.refused("/x/endless", &["--max-size", "1G"], "endless: with it, the files");
    guest.refused("/x/noise", &[], "no tar stream that is understood");
    guest.refused("/x/named", &[], "named/\\x1b[2J\\u{202e}evil\\n\\x9b31m-device: it is a");
    guest.refused("/x/words", &[], "said \\x1b[2J\\u{202e} so");
    let escapes = ["large", "endless", "block", "fifo", "authorized_keys", "hard"];
    assert!(escapes.iter().all(|name| guest.meta(name).is_none()));
    assert!(!outside.exists());
    guest.clear();

    // The same without the wall: what a guest could do.
    for name in ["suid", "capable", "device", "fifo", "other", "large"] {
        let option = ["--max-size", "100K"];
        let out = without(&mut guest.cp(&format!("/x/{name}"), &option), "copies");
        assert!(out.status.success(), "{name}: {}", text(&out.stderr));
    }
    assert_eq!(guest.meta("suid").unwrap().mode() & 0o7777, 0o6755);
    assert!(capability("capable").contains("security.capability"));
    assert!(guest.meta("device/null").unwrap().file_type().is_char_device());
    assert!(guest.meta("fifo").unwrap().file_type().is_fifo());
    assert!(guest.meta("authorized_keys").is_some());
    assert_eq!(guest.meta("large").unwrap().len(), 200_000);
}

/// The same streams on `-`: what is passed on to who unpacks it.
fn streams_passed_on(guest: &Guest<'_>) {
    let passed = |name: &str, wall: &str| {
        let mut cp = guest.daemon.command(&["cp", &format!("{}:/x/{name}", guest.id), "-"]);
        let out = without(&mut cp, wall);
        assert_harmless(&Output { stdout: Vec::new(), ..out.clone() });
        out
    };
    let mode = |out: &Output| text(&out.stdout[100..107]);
    let suid = passed("suid", "");
    assert!(suid.status.success() && mode(&suid) == "0000755", "{}", mode(&suid));
    let capable = passed("capable", "");
    assert!(capable.status.success() && !text(&capable.stdout).contains("security.capability"));
    for (name, why) in [
        // The file before it has no directory.
        ("device", "no directory"),
        ("block", "block device"),
        ("fifo", "FIFO"),
        ("other", "asked for \"other\" alone"),
        ("up", "leaves the target"),
        ("absolute", "leaves the target"),
        // Nothing has said that it is a directory.
        ("middle", "no directory"),
        ("hard", "a hard link to"),
        ("noise", "no tar stream"),
    ] {
        let out = passed(name, "");
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(1) && err.contains(why), "{name}: {err}");
        let (end, down) = ([0; 1024], passed(name, "copies"));
        assert!(!out.stdout.ends_with(&end), "{name}: it looks as if it were whole");
        assert!(down.status.success() && !down.stdout.is_empty(), "{name}");
    }
    assert_eq!(mode(&passed("suid", "copies")), "0006755");
}

#[test]
fn texts_of_a_guest_command_no_terminal() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let id = daemon.ok(&["get", "--label", EVIL]).trim().to_string();
    let both = |args: &[&str]| {
        let with = daemon.output(args);
        assert_harmless(&with);
        (with, without(&mut daemon.command(args), "texts"))
    };
    let escape = |out: &Output| [&out.stdout[..], &out.stderr].concat().contains(&0x1b);

    // An agent's error, with the name that it was given.
    let (with, down) = both(&["exec", &id, "--", EVIL]);
    assert_eq!(with.status.code(), Some(127), "{}", text(&with.stderr));
    let err = text(&with.stderr);
    assert!(
        err.contains("\\x1b[2J\\u{202e}evil\\n\\x9b31m") && err.lines().count() == 1,
        "{err:?}"
    );
    assert!(escape(&down));

    // A process with such a name; a command's own bytes come as they are, as with ssh.
    let script = format!("printf '#!/bin/sh\\nsleep 100\\n' > '/tmp/{EVIL}'; chmod +x /tmp/*evil*");
    daemon.ok(&["exec", &id, "--", "sh", "-c", &script]);
    let mut sleeper = daemon.command(&["exec", &id, "--", &format!("/tmp/{EVIL}")]);
    let mut sleeper = sleeper.stdout(Stdio::null()).spawn().unwrap();
    wait_for("the process", || daemon.ok(&["ps", &id]).contains("evil"));
    let (with, down) = both(&["ps", &id]);
    assert!(text(&with.stdout).contains("\\x1b[2J\\u{202e}evil"), "{}", text(&with.stdout));
    assert!(escape(&down));
    let raw = daemon.output(&["exec", &id, "--", "printf", "\\033[1mraw"]);
    assert_eq!(raw.stdout, b"\x1b[1mraw");
    let pids: Value = serde_json::from_str(&daemon.ok(&["ps", &id, "--json"])).unwrap();
    assert!(pids.as_array().is_some_and(|all| !all.is_empty()));
    sleeper.kill().unwrap();
    wait_child(&mut sleeper);

    // JSON keeps its value; the log has one line for it.
    let (with, _) = both(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&with.stdout).unwrap();
    let labelled = status["vms"].as_array().unwrap().iter().any(|vm| vm["label"] == EVIL);
    assert!(labelled, "{}", text(&with.stdout));
    let log = daemon.log();
    assert!(!log.contains('\x1b') && !log.contains('\u{202e}'), "{log:?}");

    // Whoever does not read, and a disk that is full.
    for args in [&["status"][..], &["status", "--json"], &["list"], &["config", "show"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = daemon.command(args).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {err}");
        assert!(err.contains("write to standard output: No space left"), "{args:?}: {err}");
        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        let out = daemon.command(args).stdout(write).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(0), ""), "{args:?}");
    }
    daemon.ok(&["stop", &id]);
    assert_nothing_left(&daemon.quit().0);
}

/// A command that has said its first word.
fn start(daemon: &Daemon, args: &[&str]) -> Child {
    let mut command = daemon.command(args);
    // Its input stays open.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    assert_eq!(&up, b"up\n");
    child
}

/// Its exit code, and what it said on stderr; it ends within the bound.
fn ended(mut child: Child, since: Instant) -> (Option<i32>, String) {
    let status = wait_child(&mut child);
    assert!(since.elapsed() < Duration::from_secs(70), "after {:?}", since.elapsed());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (status.code(), err)
}

/// Says something to a QEMU behind everybody's back.
fn monitor(path: &Path, command: &str) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for command in ["qmp_capabilities", command] {
        let _ = stream.read(&mut [0; 4096]).unwrap();
        writeln!(stream, "{{\"execute\": \"{command}\"}}").unwrap();
    }
    let _ = stream.read(&mut [0; 4096]).unwrap();
}

#[test]
fn a_guest_that_answers_nothing_holds_nobody() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 3));
    let claim = || -> Value { serde_json::from_str(&daemon.ok(&["get", "--json"])).unwrap() };
    let (hung, stood, well) = (claim(), claim(), claim());
    // No others: they would only take time.
    daemon.ok(&["resize", "0"]);
    let id = |vm: &Value| vm["id"].as_str().unwrap().to_string();
    let (dead, paused, well) = (id(&hung), id(&stood), id(&well));
    let sh = |id: &str, script: &str| daemon.ok(&["exec", id, "--", "sh", "-c", script]);
    sh(&dead, "dd if=/dev/zero of=/root/big bs=1M count=20 2>/dev/null");

    // What waits already: for output, for an end, for a file.
    let waits = "echo up; sleep 1000";
    let quiet = start(&daemon, &["exec", &well, "--", "sh", "-c", "echo up; sleep 30; exit 7"]);
    let waiting = start(&daemon, &["exec", &dead, "--", "sh", "-c", waits]);
    let reading = start(&daemon, &["exec", &dead, "--", "sh", "-c", "echo up; cat"]);
    let out = daemon.dir.0.join("out");
    let copying = daemon
        .command(&["cp", &format!("{dead}:/root/big"), out.to_str().unwrap()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("half a file", || fs::metadata(&out).is_ok_and(|m| m.len() > 100_000));
    let qemu = Pid::from_raw(hung["pid"].as_i64().unwrap() as i32);
    kill(qemu, Signal::SIGSTOP).unwrap();
    let since = Instant::now();
    // What comes afterwards.
    let spawn = |args: &[&str]| {
        let mut command = daemon.command(args);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let later = [
        spawn(&["exec", &dead, "--", "true"]),
        spawn(&["ps", &dead]),
        spawn(&["stats", &dead]),
        spawn(&["cp", &format!("{dead}:/root/big"), "/dev/shm"]),
    ];

    let mut sleeps =
        start(&daemon, &["exec", &paused, "--", "sh", "-c", "echo up; sleep 2; echo well"]);
    monitor(Path::new(stood["qmp"].as_str().unwrap()), "stop");
    let stopped = Instant::now();
    for (args, code) in [
        (vec!["exec", &paused, "--", "true"], 125),
        (vec!["ps", &paused], 1),
        (vec!["stats", &paused], 1),
    ] {
        let out = daemon.output(&args);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{err}");
        let want = format!("vmcache: VM {paused} is paused: `vmcache resume {paused}`\n");
        assert_eq!(err, want);
    }
    assert!(stopped.elapsed() < Duration::from_secs(10), "at once");

    let silent = format!("the guest of VM {dead} has not answered for");
    let remedy = format!("`vmcache stop {dead}`");
    for (child, code) in [(waiting, 125), (reading, 125), (copying, 1)] {
        let (found, err) = ended(child, since);
        assert_eq!(found, Some(code), "{err}");
        assert!(err.contains(&silent) && err.contains(&remedy), "{err}");
        assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    }
    assert!(!out.exists(), "half a file is left");
    for (child, code) in later.into_iter().zip([125, 1, 1, 1]) {
        let (found, err) = ended(child, since);
        assert_eq!(found, Some(code), "{err}");
        // There are four connections at a time; who gets none says so.
        assert!(err.contains(&remedy) || err.contains("all 4 agent connections"), "{err}");
    }
    daemon.ok(&["stop", &dead]);
    // A command that says nothing for longer than until its guest is asked is not disturbed.
    assert_eq!(ended(quiet, since).0, Some(7));

    // Whoever was paused longer than a silent guest may be goes on.
    wait_for("a time longer than silence", || stopped.elapsed() > Duration::from_secs(40));
    daemon.ok(&["resume", &paused]);
    let mut rest = String::new();
    sleeps.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    let (code, err) = ended(sleeps, Instant::now());
    assert_eq!((code, rest.as_str()), (Some(0), "well\n"), "{err}");
    daemon.ok(&["stop", &paused, &well]);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_copy_that_is_interrupted_leaves_no_half_file() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let guest = Guest::claim(&daemon, "out");
    guest.sh("dd if=/dev/zero of=/root/big bs=1M count=60 2>/dev/null; echo 1 > /root/small");
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut copying = guest.cp("/root/big", &[]).spawn().unwrap();
        wait_for("half a file", || guest.meta("big").is_some_and(|m| m.len() > 100_000));
        kill(Pid::from_raw(copying.id() as i32), signal).unwrap();
        assert_eq!(wait_child(&mut copying).code(), Some(128 + signal as i32));
        assert_eq!(fs::read_dir(&guest.out).unwrap().count(), 0);
    }
    // The guest's side has gone, too.
    wait_for("the guest's side", || !daemon.ok(&["ps", &guest.id]).contains("pack /root/big"));
    guest.copied("/root/small", &[]);
    assert_eq!(fs::read(guest.out.join("small")).unwrap(), b"1\n");
    daemon.ok(&["stop", &guest.id]);
    assert_nothing_left(&daemon.quit().0);
}
