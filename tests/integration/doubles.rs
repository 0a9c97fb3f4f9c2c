//! Guests with a double of Kata's agents: our own agent with the habits of 1.13, 3.20 and
//! 4.1 (src/guest/habits.rs), which close a process's pipes when its end is told. Real
//! agents of Kata walk in `interop`.

mod bridge;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc::{SIGRTMAX, SIGRTMIN};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use vmcache::config::Config;
use vmcache::factory::{direct, Wanted};
use vmcache::report::chain;
use vmcache::vm::attach::Image;
use vmcache::workload::{Command, Error, Guest, Place, Running};

use crate::conformance::{assert_walked, walk};
use crate::daemon::{assert_nothing_left, feed, prepared, text, wait_child, Daemon, Dir, Options};
use crate::require_qemu;

/// The initramfs with the double, which `tests/run` makes.
const INITRD: &str = "double.img";
/// One line of what guests write, 16 bytes.
const LINE: &str = "0123456789abcde";
/// What busybox is called in the root.
const APPLETS: [&str; 12] =
    ["sh", "cat", "head", "yes", "md5sum", "sleep", "echo", "true", "kill", "stty", "tee", "wc"];

/// Whose habits, as the guest's command line has them.
#[derive(Clone, Copy, PartialEq)]
enum Kata {
    V1,
    V3,
    V4,
}

impl Kata {
    fn options(self, dir: &Dir) -> Options {
        let prepared = prepared().unwrap();
        let mut options = Options::pool(&prepared, 1);
        let initrd = prepared.join(INITRD);
        assert!(initrd.exists(), "{} is missing: see tests/run", initrd.display());
        options.initrd = initrd.display().to_string();
        let (habits, more) = match self {
            Kata::V1 => {
                let bridge = bridge::program(&dir.0);
                let proxy = format!("[proxy.kata]\npath = {bridge:?}\n");
                ("kata1.13", format!("[agent.kata]\nprotocol = \"grpc\"\n{proxy}"))
            }
            Kata::V3 => ("kata3.20", String::new()),
            Kata::V4 => ("kata4.1", String::new()),
        };
        options.more_qemu = format!("kernel_params = \"vmcache.habits={habits}\"\n{more}");
        options
    }

    /// What is told of a process that signal n ended.
    fn killed(self, n: i32) -> i32 {
        if self == Kata::V3 {
            n
        } else {
            128 + n
        }
    }
}

/// An ext4 image with busybox and a file that is no program.
fn image(dir: &Dir) -> PathBuf {
    let root = dir.0.join("root");
    for name in ["bin", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let plain = root.join("plain");
    fs::write(&plain, "no program\n").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let image = dir.0.join("root.img");
    let made = Program::new("mkfs.ext4")
        .args(["-q", "-d"])
        .args([&root, &image])
        .arg("16M")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .status();
    assert!(made.unwrap().success());
    image
}

/// A VM of the test's own whose root is that image, with a container that stays.
fn boot(kata: Kata, dir: &Dir) -> Guest {
    let text = kata.options(dir).text(&dir.0);
    let config = Config::parse(Path::new("test.toml"), &text).unwrap();
    let (vm, agent) = direct::cold(&config, &Wanted::default(), true, &|_| {}).unwrap();
    assert!(!vm.own_agent(), "it tells that it is ours");
    let mut guest = Guest::new(vm, agent);
    let disk = Image::new(image(dir)).open().unwrap();
    guest.attach_disk(&disk, Place::Root).unwrap();
    let stays = Command::new("sleep").arg("100000");
    guest.spawn_in_root(&stays).unwrap_or_else(|e| panic!("{}", chain(&e)));
    guest
}

fn shell(script: &str) -> Command {
    Command::new("sh").arg("-c").arg(script)
}

fn exec(guest: &Guest, script: &str) -> Running {
    guest.exec(&shell(script)).unwrap_or_else(|e| panic!("{script}: {}", chain(&e)))
}

/// Both streams and the exit code, all at once, as `vmcache exec` has them.
fn all(running: &Running) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut stdout, mut stderr) = (running.stdout(), running.stderr());
    let waiting = running.clone();
    let end = thread::spawn(move || waiting.wait());
    let errors = thread::spawn(move || {
        let mut all = Vec::new();
        stderr.read_to_end(&mut all).map(|_| all)
    });
    let mut out = Vec::new();
    stdout.read_to_end(&mut out).unwrap();
    (out, errors.join().unwrap().unwrap(), end.join().unwrap().unwrap())
}

/// What `yes` writes, that many bytes of it.
fn lines(n: usize) -> Vec<u8> {
    LINE.bytes().chain([b'\n']).cycle().take(n).collect()
}

/// Compares without printing megabytes.
fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert!(got == want, "{what}: {} bytes came of {}", got.len(), want.len());
}

/// Many rounds of much output, whoever reads it and when.
fn output_arrives_whole(guest: &Guest, rounds: usize) {
    let (megabyte, few) = (lines(1_000_000), lines(70_000));
    for round in 0..rounds {
        let running = exec(guest, &format!("yes {LINE} | head -c 1000000; exit 3"));
        let (out, err, code) = all(&running);
        assert_same(&out, &megabyte, &format!("round {round}"));
        assert_eq!((err.len(), code), (0, 3));
        assert_eq!(running.wait().unwrap(), 3, "asked twice");
    }
    // Both streams, of which one is more than a pipe holds.
    let both = format!("yes {LINE} | head -c 70000 | tee /dev/fd/2; exit 1");
    let (out, err, code) = all(&exec(guest, &both));
    assert_same(&out, &few, "stdout");
    assert_same(&err, &few, "stderr");
    assert_eq!(code, 1);

    // Nobody reads, or somebody reads half.
    assert_eq!(exec(guest, &both).wait().unwrap(), 1);
    let running = exec(guest, &both);
    let mut half = vec![0; 30_000];
    running.stdout().read_exact(&mut half).unwrap();
    assert_eq!(running.wait().unwrap(), 1);
    // Readers that are taken before and read after.
    let running = exec(guest, &both);
    let (mut out, mut err) = (running.stdout(), running.stderr());
    assert_eq!(running.wait().unwrap(), 1);
    let mut texts = (Vec::new(), Vec::new());
    out.read_to_end(&mut texts.0).unwrap();
    err.read_to_end(&mut texts.1).unwrap();
    assert_same(&texts.0, &few, "stdout, late");
    assert_same(&texts.1, &few, "stderr, late");
}

fn input_arrives_whole(guest: &Guest) {
    let running = exec(guest, "cat | md5sum");
    let mut stdin = running.stdin();
    let bytes = lines(10_000_000);
    let writing = thread::spawn(move || stdin.write_all(&bytes));
    let (out, _, code) = all(&running);
    writing.join().unwrap().unwrap();
    assert_eq!((text(&out), code), ("7e95405e8c543cb6d7e19ba9aed6bd1b  -\n".into(), 0));
}

fn codes_and_signals(kata: Kata, guest: &Guest) {
    for code in [0, 1, 255] {
        assert_eq!(exec(guest, &format!("exit {code}")).wait().unwrap(), code);
    }
    let running = exec(guest, "echo up; sleep 1000");
    let mut said = [0; 3];
    running.stdout().read_exact(&mut said).unwrap();
    running.signal(Signal::SIGKILL as i32).unwrap();
    assert_eq!(running.wait().unwrap(), kata.killed(9));
    // The shell waits for its own child before it looks at signals.
    let running =
        exec(guest, "trap 'echo usr1; exit 9' USR1; echo up; while :; do sleep 0.1; done");
    let mut stdout = running.stdout();
    stdout.read_exact(&mut said).unwrap();
    running.signal(Signal::SIGUSR1 as i32).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), running.wait().unwrap()), ("usr1\n", 9));
}

fn programs_that_are_none(kata: Kata, guest: &Guest) {
    for name in ["nope", "/bin/nope"] {
        let e = guest.exec(&Command::new(name)).err().unwrap();
        assert!(matches!(&e, Error::NotFound { text } if text.contains(name)), "{}", chain(&e));
        assert!(!chain(&e).contains("backtrace"), "{}", chain(&e));
    }
    match (kata, guest.exec(&Command::new("/plain"))) {
        (Kata::V1, Err(e)) => {
            assert!(matches!(&e, Error::NotExecutable { text } if text.contains("/plain")), "{e}");
        }
        // They have answered before execve fails, and then tell its errno.
        (Kata::V3 | Kata::V4, Ok(running)) => assert_eq!(running.wait().unwrap(), 13),
        (_, other) => panic!("{:?}", other.map(|_| "it runs").map_err(|e| chain(&e))),
    }
}

/// A process that was left behind holds the streams; what the command wrote is all there.
fn left_behind(guest: &Guest) {
    let started = Instant::now();
    let (out, _, code) = all(&exec(guest, "sleep 1000 & echo before; exit 4"));
    assert_eq!((text(&out), code), ("before\n".into(), 4));
    let took = started.elapsed();
    assert!(took < Duration::from_secs(40), "{took:?}");
    // One that has closed a stream, and is silent for longer than those are waited for.
    let (out, _, code) = all(&exec(guest, "exec 2>&-; sleep 14; echo late; exit 5"));
    assert_eq!((text(&out), code), ("late\n".into(), 5));
}

/// The end of a terminal's input is a character, and takes no output along.
fn terminals(guest: &Guest) {
    let script = "stty -echo; echo up; cat; echo after; exit 6";
    let running = guest.exec(&shell(script).terminal(24, 80)).unwrap();
    let (mut stdin, mut stdout) = (running.stdin(), running.stdout());
    let mut said = [0; 4];
    stdout.read_exact(&mut said).unwrap();
    stdin.write_all(b"typed\n").unwrap();
    drop(stdin);
    let waiting = running.clone();
    let end = thread::spawn(move || waiting.wait());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest.replace('\r', ""), "typed\nafter\n");
    assert_eq!(end.join().unwrap().unwrap(), 6);
}

fn in_one_vm(kata: Kata, rounds: usize) {
    let dir = Dir::new();
    let guest = boot(kata, &dir);
    let since = Instant::now();
    let say = |what: &str| eprintln!("{:>5} s {what}", since.elapsed().as_secs());
    programs_that_are_none(kata, &guest);
    codes_and_signals(kata, &guest);
    say("codes, signals");
    terminals(&guest);
    left_behind(&guest);
    say("terminals, left behind");
    output_arrives_whole(&guest, rounds);
    say("output");
    input_arrives_whole(&guest);
    say("input");
    drop(guest);
    assert_nothing_left(&dir.0);
}

/// The same from the command line, a VM each.
fn by_run(kata: Kata) {
    let dir = Dir::new();
    let mut options = kata.options(&dir);
    options.pool = 2;
    let image = image(&dir).display().to_string();
    let d = Daemon::start(&options);
    let command = |script: &[&str]| {
        let at: Vec<&str> =
            ["run", "--image", &image, "--"].into_iter().chain(script.iter().copied()).collect();
        d.command(&at)
    };
    let much = format!("yes {LINE} | head -c 10000000");
    for _ in 0..2 {
        let out = command(&["sh", "-c", &much]).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert_same(&out.stdout, &lines(10_000_000), "run");
    }
    let out = feed(command(&["sh", "-c", "md5sum; echo err >&2; exit 255"]), &lines(1_000_000));
    assert_eq!(out.status.code(), Some(255));
    assert_eq!(text(&out.stderr), "err\n");
    assert_eq!(text(&out.stdout), "c49f1270cdad635a91b030a6b4d329d7  -\n");
    let out = command(&["nope"]).output().unwrap();
    assert_eq!(out.status.code(), Some(127), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("nope"), "{}", text(&out.stderr));

    let script = "trap 'echo term; exit 7' TERM; echo up; while :; do sleep 0.1; done";
    let mut running = command(&["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = running.stdout.take().unwrap();
    let mut said = [0; 3];
    stdout.read_exact(&mut said).unwrap();
    kill(Pid::from_raw(running.id() as i32), Signal::SIGTERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), running.wait().unwrap().code()), ("term\n", Some(7)));
    cells_by_run(kata, &d, &image);
    assert_nothing_left(&d.quit().0);
    // The bridge and the image are of this directory.
    drop(dir);
}

/// What streams may be, signals, limits of time and causes of errors, by `run`.
fn cells_by_run(kata: Kata, d: &Daemon, image: &str) {
    let command = |options: &[&str], script: &str| {
        d.wait_ready(2);
        let run = [&["run"], options, &["--image", image, "--", "sh", "-c", script]].concat();
        d.command(&run)
    };
    let piped = |mut command: Program| {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    // A reader that goes, of one that ignores SIGPIPE.
    let mut child = piped(command(&[], "trap '' PIPE; while :; do yes; done"));
    let mut said = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(wait_child(&mut child).code(), Some(kata.killed(9)));
    // Full, and closed.
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let out = command(&[], "echo out; exit 3").stdout(full).output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains("os error 28"), "{err}");
    let closed = command(&[], "echo out; exit 3");
    let mut shell = Program::new("sh");
    shell.args(["-c", "exec \"$@\" >&-", "sh"]).arg(closed.get_program()).args(closed.get_args());
    let given = closed.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let out = shell.envs(given).output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains("standard output"), "{err}");
    // Nobody's input.
    let out = feed(command(&["-n"], "wc -c"), b"input");
    assert_eq!((out.status.code(), text(&out.stdout).trim()), (Some(0), "0"));
    // Non-blocking, and nothing there for a while.
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut waits = command(&[], "wc -c");
    waits.stdin(std::os::fd::OwnedFd::from(ours)).stdout(Stdio::piped());
    let mut child = waits.spawn().unwrap();
    // What it was given stays open in what made it.
    drop(waits);
    thread::sleep(Duration::from_secs(1));
    theirs.write_all(b"late").unwrap();
    drop(theirs);
    let mut count = String::new();
    child.stdout.take().unwrap().read_to_string(&mut count).unwrap();
    assert_eq!((wait_child(&mut child).code(), count.trim()), (Some(0), "4"));
    // All signals that can be caught, two real-time ones.
    let kept = [9, 19, 17, 23, 13, 20, 21, 22];
    let all: Vec<i32> =
        (1..=31).filter(|n| !kept.contains(n)).chain([SIGRTMIN(), SIGRTMAX()]).collect();
    let traps: String = all.iter().map(|n| format!("trap 'echo got {n}' {n}; ")).collect();
    let mut child = piped(command(&[], &format!("{traps} echo up; while :; do sleep 0.05; done")));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "up");
    for n in &all {
        let sent = Program::new("kill").args([format!("-{n}"), child.id().to_string()]).status();
        assert!(sent.unwrap().success());
        assert_eq!(lines.next().unwrap().unwrap(), format!("got {n}"));
    }
    child.kill().unwrap();
    wait_child(&mut child);
    // Time, and a cause.
    let out = command(&["--timeout", "1"], "echo up; sleep 1000").output().unwrap();
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(124), "up\n".into()));
    let out = command(&["-w", "/nowhere"], "true").output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains("/nowhere"), "{err}");
}

#[test]
fn nothing_is_lost_in_a_guest_of_version_1() {
    require_qemu!();
    in_one_vm(Kata::V1, 30);
}

#[test]
fn nothing_is_lost_in_a_guest_of_version_3() {
    require_qemu!();
    in_one_vm(Kata::V3, 5);
}

#[test]
fn nothing_is_lost_in_a_guest_of_version_4() {
    require_qemu!();
    in_one_vm(Kata::V4, 30);
}

#[test]
fn nothing_is_lost_by_run_with_version_1() {
    require_qemu!();
    by_run(Kata::V1);
}

#[test]
fn nothing_is_lost_by_run_with_version_4() {
    require_qemu!();
    by_run(Kata::V4);
}

/// The doubles answer as the real agents do in `interop`.
#[test]
fn doubles_walk_as_katas_agents_do() {
    require_qemu!();
    for (kata, but) in [(Kata::V1, &[][..]), (Kata::V3, &crate::interop::KATA3_DIFFERS[..])] {
        let dir = Dir::new();
        let mut options = kata.options(&dir);
        options.memory = 512;
        assert_walked(&walk(&options, &dir), but);
    }
}
