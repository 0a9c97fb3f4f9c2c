//! Streams of `run` and `exec`: a test for each cell of the table in vmcache(1).
//!
//! What is compared is what a local process has: all bytes, in order, or 125.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::pty::openpty;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2};

use crate::daemon::{assert_nothing_left, feed, text, wait_child, wait_for, Daemon, Options, LONG};
use crate::require_qemu;

/// The two commands that have streams.
#[derive(Clone, Copy)]
enum How<'a> {
    Run,
    Exec(&'a str),
}

impl How<'_> {
    fn command(self, d: &Daemon, script: &str) -> Command {
        self.with(d, &[], script)
    }

    fn with(self, d: &Daemon, options: &[&str], script: &str) -> Command {
        let mut all = match self {
            How::Run => vec!["run"],
            How::Exec(id) => vec!["exec", id],
        };
        all.extend(options);
        all.extend(["--", "sh", "-c", script]);
        d.command(&all)
    }
}

/// Starts it by a shell that first does `redirections`, such as `>&-`.
fn redirected(command: &Command, redirections: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$0\" \"$@\" {redirections}")]);
    shell.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        shell.env(key, value.unwrap());
    }
    shell
}

fn code(out: &Output) -> i32 {
    out.status.code().unwrap()
}

/// Not inherited by what other tests start meanwhile.
fn pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC)
}

fn nonblocking(fd: impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

/// A megabyte whose every line is another.
const NUMBERS: &str = "seq 1 150000";

fn numbers() -> Vec<u8> {
    (1..=150_000).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

fn one_line(out: &Output, says: &str) {
    let err = text(&out.stderr);
    assert!(err.contains(says) && err.trim().lines().count() == 1, "{says}: {err:?}");
}

/// Standard output, cell by cell.
fn outputs(d: &Daemon, how: How<'_>) {
    // A file.
    let path = d.dir.0.join("out");
    let status = how.command(d, NUMBERS).stdout(File::create(&path).unwrap()).status().unwrap();
    assert!(status.success() && fs::read(&path).unwrap() == numbers());

    // A full one, a closed one; nothing to write to either is no fault.
    for (redirection, why) in
        [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
    {
        let out = redirected(&how.command(d, "echo x"), redirection).output().unwrap();
        assert_eq!(code(&out), 125, "{redirection}");
        one_line(&out, why);
        let out = redirected(&how.command(d, "exit 3"), redirection).output().unwrap();
        assert_eq!((code(&out), text(&out.stderr).as_str()), (3, ""), "{redirection}");
    }
    // A full one ends a command that would write for ever.
    let out = redirected(&how.command(d, "yes"), ">/dev/full").output().unwrap();
    assert_eq!(code(&out), 125);

    // A pipe whose writes do not block, and whose reader stops for a while.
    let (ours, theirs) = pipe().unwrap();
    nonblocking(&theirs);
    let mut child = how.command(d, NUMBERS).stdout(theirs).spawn().unwrap();
    let mut reader = File::from(ours);
    let mut all = vec![0; 4096];
    reader.read_exact(&mut all).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    reader.read_to_end(&mut all).unwrap();
    assert!(wait_child(&mut child).success() && all == numbers(), "{} bytes", all.len());

    // A socket; then one whose peer has gone.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut child = how.command(d, NUMBERS).stdout(OwnedFd::from(theirs)).spawn().unwrap();
    let mut all = Vec::new();
    ours.read_to_end(&mut all).unwrap();
    assert!(wait_child(&mut child).success() && all == numbers());
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let status = how.command(d, "yes").stdout(OwnedFd::from(theirs)).status().unwrap();
    assert_eq!(status.code(), Some(141), "as a pipe without a reader");

    // A FIFO that nobody reads takes what fits.
    let fifo = d.dir.0.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let both = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let status = how.command(d, "echo in the pipe").stdout(both.try_clone().unwrap()).status();
    assert!(status.unwrap().success());
    let mut all = vec![0; 12];
    (&both).read_exact(&mut all).unwrap();
    assert_eq!(all, b"in the pipe\n");
    fs::remove_file(&fifo).unwrap();

    // A terminal, without --tty.
    let pty = openpty(None, None).unwrap();
    let mut child = how.command(d, "echo to a terminal").stdout(pty.slave).spawn().unwrap();
    let mut seen = [0; 15];
    File::from(pty.master).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"to a terminal\r\n");
    assert!(wait_child(&mut child).success());

    // Its reader goes: a command that dies of it, one that ignores the signal, and one
    // that does not care.
    for (script, ends) in [
        ("yes", 141),
        ("trap '' PIPE; while echo y 2>/dev/null; do :; done; exit 5", 5),
        ("echo y; sleep 0.5; echo y 2>/dev/null; exit 6", 141),
    ] {
        let mut child = how.command(d, script).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 2];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        assert_eq!(wait_child(&mut child).code(), Some(ends), "{script}");
    }
}

/// Standard error, where it differs from standard output.
fn errors(d: &Daemon, how: How<'_>) {
    let script = "seq 1 150000 >&2";
    let out = how.command(d, script).output().unwrap();
    assert!(out.status.success() && out.stderr == numbers() && out.stdout.is_empty());
    for redirection in ["2>/dev/full", "2>&-"] {
        let out = redirected(&how.command(d, "echo x >&2; echo y"), redirection).output().unwrap();
        assert_eq!((code(&out), text(&out.stdout).as_str()), (125, "y\n"), "{redirection}");
    }
    let mut child = how.command(d, "yes >&2").stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 2];
    child.stderr.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(wait_child(&mut child).code(), Some(141));
}

/// Standard input, cell by cell.
fn inputs(d: &Daemon, how: How<'_>) {
    let count = |mut command: Command| {
        let out = command.stderr(Stdio::inherit()).output().unwrap();
        (code(&out), text(&out.stdout).trim().to_string())
    };
    let all = numbers();
    let sum = text(&feed(Command::new("md5sum"), &all).stdout).trim().to_string();

    // A pipe, a file, a socket.
    let out = feed(how.command(d, "md5sum"), &all);
    assert_eq!(text(&out.stdout).trim(), sum);
    let path = d.dir.0.join("in");
    fs::write(&path, &all).unwrap();
    let mut from_file = how.command(d, "md5sum");
    from_file.stdin(File::open(&path).unwrap());
    assert_eq!(count(from_file), (0, sum.clone()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut from_socket = how.command(d, "md5sum");
    from_socket.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped());
    let mut child = from_socket.spawn().unwrap();
    // The command's own copy would keep the socket from its end.
    drop(from_socket);
    (&ours).write_all(&all).unwrap();
    drop(ours);
    let out = child.stdout.take().unwrap();
    assert_eq!(std::io::read_to_string(out).unwrap().trim(), sum);
    assert!(wait_child(&mut child).success());

    // As nohup leaves it: not open to be read.
    let unreadable = redirected(&how.command(d, "wc -c"), "0>/dev/null");
    assert_eq!(count(unreadable), (0, "0".into()));

    // None, a closed one, and -n: at their end at once.
    let closed = redirected(&how.command(d, "wc -c"), "<&-");
    assert_eq!(count(closed), (0, "0".into()));
    let mut null = how.command(d, "wc -c");
    null.stdin(Stdio::null());
    assert_eq!(count(null), (0, "0".into()));
    let (never, held) = pipe().unwrap();
    let mut unread = how.with(d, &["-n"], "wc -c");
    unread.stdin(never);
    assert_eq!(count(unread), (0, "0".into()));
    drop(held);

    // One that does not block, and has nothing yet; a FIFO whose writer takes its time.
    let (theirs, ours) = pipe().unwrap();
    nonblocking(&theirs);
    let mut later = how.command(d, "echo up; wc -c");
    let mut child = later.stdin(theirs).stdout(Stdio::piped()).spawn().unwrap();
    drop(later);
    let mut out = child.stdout.take().unwrap();
    let mut up = [0; 3];
    out.read_exact(&mut up).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    File::from(ours).write_all(b"late").unwrap();
    assert_eq!(std::io::read_to_string(out).unwrap(), "4\n");
    assert!(wait_child(&mut child).success());

    // What can not be read is no end.
    let mut directory = how.command(d, "wc -c");
    directory.stdin(File::open(&d.dir.0).unwrap());
    let out = directory.output().unwrap();
    assert_eq!((code(&out), text(&out.stdout).as_str()), (125, "0\n"));
    one_line(&out, "Is a directory");
}

#[test]
fn every_cell_of_the_table_for_run() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    outputs(&d, How::Run);
    errors(&d, How::Run);
    inputs(&d, How::Run);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn every_cell_of_the_table_for_exec() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let how = How::Exec(&id);
    outputs(&d, how);
    errors(&d, how);
    inputs(&d, how);
    for _ in 0..30 {
        let out = how.command(&d, NUMBERS).output().unwrap();
        assert!(out.status.success() && out.stdout == numbers(), "{} bytes", out.stdout.len());
    }
    // Ten megabytes, and in tests/soak two hundred times as many.
    let wanted = Command::new("seq").args(["1", "1500000"]).output().unwrap().stdout;
    let rounds = if std::env::var_os("VMCACHE_SOAK").is_some() { 200 } else { 1 };
    for how in [how; 200].into_iter().take(rounds).chain([How::Run]) {
        let out = how.command(&d, "seq 1 1500000").output().unwrap();
        assert!(out.status.success() && out.stdout == wanted, "{} bytes", out.stdout.len());
    }
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn loops_and_jobs_of_a_shell() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let exec = d.command(&["exec", &id]);
    let shell = |script: &str| {
        let mut sh = Command::new("sh");
        sh.arg("-c").arg(script.replace("EXEC", "\"$0\" \"$@\""));
        sh.arg(exec.get_program()).args(exec.get_args());
        for (key, value) in exec.get_envs() {
            sh.env(key, value.unwrap());
        }
        sh
    };
    // README's loop: each line of the file is the loop's, not the command's.
    let out = feed(shell("while read n; do EXEC -n -- echo got $n; done"), b"1\n2\n3\n");
    assert_eq!(text(&out.stdout), "got 1\ngot 2\ngot 3\n", "{}", text(&out.stderr));

    // A job in the background of a terminal is not stopped by what it does not read.
    let pty = openpty(None, None).unwrap();
    let mut job = shell("set -m; EXEC -- sh -c 'sleep 1; exit 7' & wait $!; echo ended $? >&3");
    let (ours, theirs) = pipe().unwrap();
    let slave = || pty.slave.try_clone().unwrap();
    job.stdin(slave()).stdout(slave()).stderr(slave());
    let mut outer = Command::new("setsid");
    outer.args(["--ctty", "sh", "-c", "exec \"$@\" 3>&1 >/dev/null", "-"]);
    outer.arg(job.get_program()).args(job.get_args());
    for (key, value) in exec.get_envs() {
        outer.env(key, value.unwrap());
    }
    outer.stdin(slave()).stdout(theirs).stderr(slave());
    let mut child: Child = outer.spawn().unwrap();
    drop(outer);
    let told = std::io::read_to_string(File::from(ours)).unwrap();
    assert_eq!(told, "ended 7\n");
    wait_child(&mut child);
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_reader_that_stops_for_good_holds_nobody_who_wants_to_end() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let how = How::Exec(&id);
    for (options, signal, ends) in
        [(&["--timeout", "1"][..], None, 124), (&[][..], Some(nix::sys::signal::SIGTERM), 143)]
    {
        let mut child = how.with(&d, options, "yes").stdout(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut first = [0; 2];
        out.read_exact(&mut first).unwrap();
        let started = Instant::now();
        if let Some(signal) = signal {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
        }
        assert_eq!(wait_child(&mut child).code(), Some(ends));
        assert!(started.elapsed() < LONG);
        drop(out);
    }
    // A command that has ended, and whose output nobody takes within its time: it says so.
    let script = "head -c 100000 /dev/zero";
    let mut command = how.with(&d, &["--timeout", "15"], script);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait_child(&mut child).code(), Some(125));
    let err = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(err.contains("was not taken"), "{err}");
    // What nobody reads does not stay in the guest either.
    wait_for("their ends", || !d.ok(&["ps", &id]).contains(" yes"));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}
