//! The stranger: a user who may connect, and not claim. Floods of it from up to four processes
//! that are one user or two hundred, while root asks for the status and another user waits for
//! a VM; and a claimer who uses all that it may.
//!
//! Bounds, in each: the daemon has at most [`STRANGERS_MIB`] of memory (with a claimer at all
//! of its limits [`CLAIMER_MIB`]), and within [`BACK_WITHIN`] as much as before and
//! [`BACK_MIB`]; root's status takes [`STATUS`] at most, or twice what it takes beside as many
//! processes that are busy; the claim that waits is served in the end.
//!
//! What shows that the relay is what stops it, when it is taken down (`Wall::Relay`):
//!
//! | flood                              | without the relay |
//! |------------------------------------|-------------------|
//! | calls that stay open, acknowledged or not | memory     |
//! | calls reset at once                | memory |
//! | refused claims                     | all of them answered, a line of the log for each |
//! | connects                           | memory: all of them served |
//! | slow and half-open connections     | as many files as there may be |
//! | largest frames                     | memory |
//! | SETTINGS, PING, other control frames | no memory: gRPC stops reading; but it takes ten times as many and more |
//! | CONTINUATION                       | no memory: gRPC skips them; but it takes them without end |
//! | answers that are not read          | memory |
//! | headers that become large          | memory |
//!
//! `VMCACHE_SOAK=SECONDS` makes each flood last as long (`tests/soak`).

mod floods;
mod http2;

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use vmcache::factory::grpccache::{environment, GrpcCache};
use vmcache::sys::rpc::connect_as;

use crate::daemon::{assert_nothing_left, text, wait_for, Daemon, Dir, Options};
use crate::require_qemu;
use floods::{begin, Flood, Users, ALL};
use http2::{call, frame, headers, Http, CONFIG, END_HEADERS, GET_BASE_VM, HEADERS};

/// Memory of the daemon in a stranger's flood, MiB.
const STRANGERS_MIB: u64 = 32;
/// And with a claimer who uses all that it may.
const CLAIMER_MIB: u64 = 64;
/// How much more than before it may keep.
const BACK_MIB: u64 = 4;
/// When it has to be back.
const BACK_WITHIN: Duration = Duration::from_secs(30);
/// Longest that root's status may take.
const STATUS: Duration = Duration::from_secs(1);
/// How often it is asked for in a flood.
const STATUSES: usize = 20;
/// How long a flood lasts here.
const SHORT: Duration = Duration::from_millis(1600);
/// Processes that flood.
const PROCESSES: u64 = 4;
/// Connections of strangers that are open at the end: those that may be, those that were told
/// why they may not and are about to end, and those in the kernel's queue.
const STAY: u64 = 64 + 32 + 100;
/// Files that the daemon may have open in a flood of one user: of connections that are let in (8),
/// linger (32) or wait for the relay (64), two for each that gRPC has or lets go of (128), and its
/// own.
const FILES: u64 = 400;
/// And of two hundred, of whom 64 are let in and 256 wait.
const FILES_OF_MANY: u64 = 800;
/// Who may claim.
const CLAIMER: u32 = 232_000;
/// Another who may.
const OTHER: u32 = 232_001;
/// A stranger who means no harm.
const HONEST: u32 = 731_000;
/// One stranger, and a range of them.
const ONE: Users = Users { first: 732_000, number: 1 };
const MANY: Users = Users { first: 733_000, number: 200 };

/// Floods share a machine's processors with nobody: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// What a process of a flood runs.
#[test]
#[ignore = "no test, but what floods start as a process of their own"]
fn a_process_that_floods() {
    floods::flood_as_told(&std::env::var(floods::VARIABLE).unwrap());
}

fn lasts() -> Duration {
    let seconds = std::env::var("VMCACHE_SOAK").ok().map(|s| s.parse().unwrap());
    seconds.map_or(SHORT, Duration::from_secs)
}

/// A daemon of which the users [`CLAIMER`] and [`OTHER`] may have VMs, and all others look.
fn daemon(prepared: &Path, walls_down: &str) -> Daemon {
    let dir = Dir::new();
    let mut options = Options::pool(prepared, 1);
    for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
        let copy = dir.0.join(name);
        fs::copy(&image, &copy).unwrap();
        *image = copy.display().to_string();
    }
    options.more_ours += &format!(
        "user = \"231000-231063\"\nsocket_mode = \"0666\"\nclaim_users = [\"{CLAIMER}\", \
         \"{OTHER}\"]\nuser_max_vms = 0\nuser_max_memory = 4000000\n"
    );
    let memory = format!("memory:{}", dir.0.join("memory").display());
    fs::write(dir.0.join("memory"), "100000").unwrap();
    let environment = [("VMCACHE_WALLS_DOWN", walls_down), ("VMCACHE_FAULT", &memory)];
    Daemon::launch_with(&options, dir, &environment)
}

fn rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The most that the daemon has at any time.
#[derive(Clone, Copy)]
struct Peak {
    kib: u64,
    /// Files, connections among them.
    fds: u64,
}

/// The most that the daemon has while `during` runs.
fn peak<T>(daemon: &Daemon, during: impl FnOnce() -> T) -> (Peak, T) {
    let (kib, fds, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let pid = daemon.pid();
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                kib.fetch_max(rss_kib(pid), Ordering::SeqCst);
                if n % 8 == 0 {
                    let now = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
                    fds.fetch_max(now as u64, Ordering::SeqCst);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        // Also when it fails: else it would be waited for without end.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(during));
        over.store(true, Ordering::SeqCst);
        done.unwrap_or_else(|e| std::panic::resume_unwind(e))
    });
    (Peak { kib: kib.into_inner(), fds: fds.into_inner() }, done)
}

/// How long root's status takes, on a connection of its own: the longest of so many.
fn statuses(daemon: &Daemon, n: usize, pause: Duration) -> Duration {
    let socket = daemon.socket();
    let one = || {
        let start = Instant::now();
        let status = GrpcCache::connect(&socket).and_then(|s| s.fetch_details());
        assert!(status.is_ok(), "{:?}{}", status.err(), daemon.log());
        let took = start.elapsed();
        std::thread::sleep(pause);
        took
    };
    (0..n).map(|_| one()).max().unwrap()
}

/// The same beside as many processes that only compute.
fn beside_busy_loops(daemon: &Daemon) -> Duration {
    let mut busy: Vec<Child> = (0..PROCESSES)
        .map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
        .collect();
    let took = statuses(daemon, STATUSES, Duration::from_millis(50));
    for child in &mut busy {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    took
}

/// A claim of a user's that waits, until memory is there; then the id of its VM.
fn waiting_claim(daemon: &Daemon, uid: u32) -> std::thread::JoinHandle<String> {
    let socket = daemon.socket();
    let claim = std::thread::spawn(move || {
        let stream = connect_as(&socket, uid, uid).unwrap();
        let client = GrpcCache::over(stream, &socket, environment()).unwrap();
        let (vm, _) = client.claim(Some(Duration::from_secs(3000))).unwrap();
        client.confirm_claim(&vm.id).unwrap();
        client.release(&vm.id).unwrap();
        vm.id.clone()
    });
    wait_for("a claim in line", || daemon.status()["pool"]["waiting"] == 1);
    claim
}

/// From here on no VM is made, and another user's claim waits: root's VM, that claim, and the
/// memory of the daemon, KiB.
fn emptied(daemon: &Daemon) -> (String, std::thread::JoinHandle<String>, u64) {
    fs::write(daemon.dir.0.join("memory"), "1").unwrap();
    let taken = daemon.ok(&["get"]).trim().to_string();
    let claim = waiting_claim(daemon, OTHER);
    statuses(daemon, 20, Duration::ZERO);
    (taken, claim, rss_kib(daemon.pid()))
}

/// Waits until its memory is what it was; how long that took.
fn back(daemon: &Daemon, idle: u64) -> (Duration, u64) {
    let since = Instant::now();
    loop {
        let now = rss_kib(daemon.pid());
        if now <= idle + BACK_MIB * 1024 || since.elapsed() > BACK_WITHIN {
            return (since.elapsed(), now);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct Seen {
    peak: Peak,
    status: Duration,
    counts: std::collections::BTreeMap<String, u64>,
    told: Vec<String>,
    lines: usize,
    honest: usize,
}

/// Another stranger, who looks now and then; how often that was answered, and how often not.
fn honest(daemon: &Daemon, over: &Arc<AtomicBool>) -> std::thread::JoinHandle<(usize, usize)> {
    let (socket, over) = (daemon.socket(), Arc::clone(over));
    std::thread::spawn(move || {
        let mut seen = (0, 0);
        while !over.load(Ordering::SeqCst) {
            let socket = socket.clone();
            let look = std::thread::spawn(move || {
                let stream = connect_as(&socket, HONEST, HONEST).ok()?;
                let client = GrpcCache::over(stream, &socket, environment()).ok()?;
                // As another user: what is asked again is root's.
                client.fetch_status().ok()
            });
            match look.join().unwrap() {
                Some(_) => seen.0 += 1,
                None => seen.1 += 1,
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        seen
    })
}

/// A flood, and what is to be seen of it.
fn flood(daemon: &Daemon, flood: Flood, users: Users) -> Seen {
    let before = daemon.log_lines("").len();
    let lasts = lasts();
    let over = Arc::new(AtomicBool::new(false));
    let honest = honest(daemon, &over);
    let (peak, (status, (counts, told))) = peak(daemon, || {
        let flooding = begin(flood, &daemon.socket(), users, lasts, PROCESSES);
        let pause = lasts / (STATUSES as u32 + 4);
        let status = statuses(daemon, STATUSES, pause);
        (status, flooding.end())
    });
    over.store(true, Ordering::SeqCst);
    let honest = honest.join().unwrap();
    let lines = daemon.log_lines("").len() - before;
    let (mib, fds, ms) = (peak.kib / 1024, peak.fds, status.as_millis());
    println!(
        "{flood:?} of {} users: peak {mib} MiB, {fds} fds, status {ms} ms, {lines} lines, an honest \
         stranger's status {} times and {} refused, {counts:?}",
        users.number, honest.0, honest.1
    );
    Seen { peak, status, counts, told, lines, honest: honest.0 }
}

fn count(seen: &Seen, key: &str) -> u64 {
    seen.counts.get(key).copied().unwrap_or(0)
}

/// What must hold of a flood that lasted so long, beside memory and times, where the relay
/// stands.
fn is_bounded(flood: Flood, users: Users, lasts: Duration, seen: &Seen) -> bool {
    let seconds = lasts.as_secs_f64() + 1.0;
    // Connections that can have been let in, by rate and burst, of all users of the flood.
    let opened = (256.0 + 400.0 * seconds) as u64;
    match flood {
        Flood::Refused => count(seen, "answers") <= 500 + (1000.0 * seconds) as u64,
        Flood::Connects | Flood::Slow => {
            let files = if users.number == 1 { FILES } else { FILES_OF_MANY };
            let few = count(seen, "open") <= STAY && seen.peak.fds <= files;
            few && count(seen, "served") <= opened
        }
        // What is sent before a connection's end is known lies in the kernel's buffer.
        Flood::Settings | Flood::Pings | Flood::Continuations | Flood::Control => {
            count(seen, "sent") <= 8_000 * count(seen, "served").max(1)
        }
        Flood::Unacknowledged | Flood::Streams => count(seen, "open") <= STAY,
        _ => true,
    }
}

#[test]
fn no_flood_of_strangers_takes_memory_or_time_from_others() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let daemon = daemon(&prepared, "");
    daemon.wait_ready(1);
    assert_eq!(daemon.ok(&["run", "--", "echo", "served"]), "served\n");
    daemon.wait_ready(1);
    let (taken, claim, idle) = emptied(&daemon);
    println!("idle: {} MiB", idle / 1024);
    let mut slow = Vec::new();
    for kind in ALL {
        for users in [ONE, MANY] {
            let seen = flood(&daemon, kind, users);
            let what = format!("{kind:?} of {} users{}", users.number, daemon.log());
            assert!(seen.peak.kib <= STRANGERS_MIB * 1024, "{} KiB: {what}", seen.peak.kib);
            assert!(
                is_bounded(kind, users, lasts(), &seen),
                "{} fds, {:?}: {what}",
                seen.peak.fds,
                seen.counts
            );
            let lines = lasts().as_secs() as usize + 3;
            // Of each kind of line, and there are three of strangers'.
            assert!(seen.lines <= 3 * 11 * lines, "{} lines: {what}", seen.lines);
            assert!(seen.honest > 0, "an honest stranger was never answered: {what}");
            if seen.status > STATUS {
                slow.push((what, seen.status));
            }
            assert!(!claim.is_finished(), "the claim that waits has ended{}", daemon.log());
            let open: Vec<&String> = seen.told.iter().filter(|t| t.contains("try again")).collect();
            assert!(open.len() < 5, "{open:?}");
        }
        if matches!(kind, Flood::Largest | Flood::Bombs) || lasts() > SHORT {
            let (took, now) = back(&daemon, idle);
            println!("back at {} MiB after {:.1} s", now / 1024, took.as_secs_f64());
            assert!(took <= BACK_WITHIN, "{now} KiB, before {idle} KiB");
        }
    }
    if !slow.is_empty() {
        let busy = beside_busy_loops(&daemon);
        for (what, took) in slow {
            assert!(took <= 2 * busy, "status took {took:?}, beside busy loops {busy:?}: {what}");
        }
    }
    // The claim that waits is served after all.
    fs::write(daemon.dir.0.join("memory"), "100000").unwrap();
    let id = claim.join().unwrap();
    assert!(!id.is_empty());
    daemon.ok(&["stop", &taken]);
    daemon.wait_ready(1);
    // That of `run`, and the one that was given back.
    daemon.wait_log("vm-ended", 3);
    assert_nothing_left(&daemon.quit().0);
}

/// Each flood, without the relay. What a flood does in a second depends on how busy the machine
/// is: one that shows nothing lasts longer.
#[test]
fn without_the_relay_each_flood_goes_too_far() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    for kind in ALL {
        let shows = [1200, 4000, 15_000].into_iter().any(|ms| {
            let daemon = daemon(&prepared, "relay");
            goes_too_far(&daemon, kind, Duration::from_millis(ms))
        });
        assert!(shows, "{kind:?} shows nothing");
    }
}

/// Whether such a flood does what it may not.
fn goes_too_far(daemon: &Daemon, kind: Flood, lasts: Duration) -> bool {
    let before = daemon.log_lines("claim-refused").len();
    let socket = daemon.socket();
    let (peak, (counts, _)) = peak(daemon, || begin(kind, &socket, ONE, lasts, PROCESSES).end());
    let lines = daemon.log_lines("claim-refused").len() - before;
    let (mib, fds) = (peak.kib / 1024, peak.fds);
    println!("{kind:?} without the relay: {mib} MiB, {fds} fds, {lines} lines, {counts:?}");
    let seen = Seen { peak, status: Duration::ZERO, counts, told: Vec::new(), lines, honest: 0 };
    let memory = peak.kib > STRANGERS_MIB * 1024;
    let others =
        !is_bounded(kind, ONE, lasts, &seen) || lines > 11 * (lasts.as_secs() as usize + 3);
    if !memory && !others {
        println!("{kind:?} shows nothing in {lasts:?}{}", daemon.log());
    }
    memory || others
}

/// A claimer with all connections and calls that it may have, headers as large as they may be.
#[test]
fn a_claimer_at_all_of_its_limits_takes_no_more_than_it_may() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let daemon = daemon(&prepared, "");
    daemon.wait_ready(1);
    let (taken, claim, idle) = emptied(&daemon);
    let socket = daemon.socket();
    let open = move || -> Http {
        // A thread that is the claimer from then on.
        let socket = socket.clone();
        let connect = move || connect_as(&socket, CLAIMER, CLAIMER).map(Http::over).unwrap();
        std::thread::spawn(connect).join().unwrap()
    };
    let (most, slowest) = peak(&daemon, || {
        let mut all: Vec<Http> = (0..256).map(|_| open()).collect();
        all.iter_mut().for_each(Http::exchange_settings);
        for (n, http) in all.iter_mut().enumerate() {
            if n >= 8 {
                // Else it would give way to the next.
                http.say(&call(1, CONFIG));
                while http.answers == 0 && !http.ended {
                    http.hear(Duration::from_secs(5));
                }
            }
            // Eight have all calls that a user may have.
            for _ in 0..if n < 8 { 127 } else { 0 } {
                let id = http.id();
                let mut block = http2::block(GET_BASE_VM);
                (0..60).for_each(|n| block.extend(http2::field(0, &format!("x{n}"), "yyyy")));
                http.say(&frame(HEADERS, END_HEADERS, id, &block));
                http.say(&frame(http2::DATA, http2::END_STREAM, id, &[0; 5]));
            }
        }
        let slowest = statuses(&daemon, STATUSES, Duration::from_millis(20));
        wait_for("its claims in line", || {
            daemon.status()["pool"]["waiting"].as_u64() >= Some(8 * 127)
        });
        // And as many of them reset as may be, of which each gives its place to another.
        for http in &mut all[..8] {
            for n in 0..100 {
                http.say(&frame(http2::RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]));
                let id = http.id();
                http.say(&call(id, GET_BASE_VM));
            }
        }
        let slowest = slowest.max(statuses(&daemon, STATUSES, Duration::from_millis(20)));
        let alive =
            all.iter_mut().map(|h| u32::from(!h.ends(Duration::from_millis(1)))).sum::<u32>();
        assert_eq!(alive, 256, "none is shut{}", daemon.log());
        // One more connection, one more call.
        let mut over = open();
        assert!(over.ends(Duration::from_secs(5)));
        let told = over.goaway.unwrap();
        assert!(told.contains("(user_max_connections)"), "{told}");
        let mut told = None;
        for http in &mut all[9..40] {
            for n in 1..100 {
                http.say(&headers(2 * n + 1, CONFIG));
            }
            if http.ends(Duration::from_millis(300)) {
                told = http.goaway.clone();
                break;
            }
        }
        let told = told.expect("none of its calls is too many");
        assert!(told.contains("more than 1024 calls at a time of a user"), "{told}");
        slowest
    });
    let most = most.kib;
    println!("a claimer at its limits: {} MiB, status {slowest:?}", most / 1024);
    assert!(most <= CLAIMER_MIB * 1024, "{most} KiB{}", daemon.log());
    assert!(slowest <= STATUS || slowest <= 2 * beside_busy_loops(&daemon), "{slowest:?}");
    let (took, now) = back(&daemon, idle);
    println!("back at {} MiB after {:.1} s", now / 1024, took.as_secs_f64());
    assert!(took <= BACK_WITHIN, "{now} KiB, before {idle} KiB");
    fs::write(daemon.dir.0.join("memory"), "100000").unwrap();
    claim.join().unwrap();
    daemon.ok(&["stop", &taken]);
    // Given back, it is ended by and by.
    daemon.wait_log("vm-ended", 2);
    assert_nothing_left(&daemon.quit().0);
}

/// A socket that takes long to close: what its peer has not read is waited for.
fn lingering(seconds: i32) -> (TcpListener, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65_536]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    let linger = libc::linger { l_onoff: 1, l_linger: seconds };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    (listener, stream)
}

/// Connections that pass such sockets, whose last opening then is the server's; those that can.
fn pass_files(daemon: &Daemon, user: u32, n: usize) -> Vec<(UnixStream, TcpListener)> {
    let socket = daemon.socket();
    let pass = move |_| {
        let (listener, file) = lingering(4);
        let stream = connect_as(&socket, user, user).unwrap();
        let (fds, bytes) = ([file.as_raw_fd()], [std::io::IoSlice::new(b"PRI * HTTP/2.0")]);
        let rights = [ControlMessage::ScmRights(&fds)];
        // Since Linux 6.16 the kernel refuses it, and it is this process that would wait.
        let flags = MsgFlags::empty();
        if sendmsg::<()>(stream.as_raw_fd(), &bytes, &rights, flags, None).is_err() {
            let off = libc::linger { l_onoff: 0, l_linger: 0 };
            nix::sys::socket::setsockopt(&file, nix::sys::socket::sockopt::Linger, &off).unwrap();
        }
        (stream, listener)
    };
    // Nobody takes it before it is all the server's. As that user from then on.
    daemon.signal(nix::sys::signal::Signal::SIGSTOP);
    let all = std::thread::spawn(move || (0..n).map(pass).collect()).join().unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGCONT);
    all
}

/// How long root and a claimer wait for an answer: with one connection that stays, and with many
/// that are turned away.
fn held_up(walls_down: &str, prepared: &Path) -> Duration {
    let daemon = daemon(prepared, walls_down);
    daemon.wait_ready(1);
    let mut longest = Duration::ZERO;
    // Without walls each holds its server up as long again, at its end, too.
    let numbers: &[usize] = if walls_down.contains("files") { &[1] } else { &[1, 90] };
    for &n in numbers {
        let passed = pass_files(&daemon, ONE.first, n);
        longest = longest.max(statuses(&daemon, 2, Duration::from_millis(50)));
        let (socket, since) = (daemon.socket(), Instant::now());
        let claimer = std::thread::spawn(move || {
            let stream = connect_as(&socket, CLAIMER, CLAIMER).unwrap();
            GrpcCache::over(stream, &socket, environment()).unwrap().fetch_status().is_ok()
        });
        assert!(claimer.join().unwrap() || !walls_down.is_empty(), "{}", daemon.log());
        longest = longest.max(since.elapsed());
        drop(passed);
    }
    // And a restart, while the kernel may still wait.
    if !walls_down.contains("files") {
        drop(pass_files(&daemon, ONE.first, 20));
        let before = daemon.log_lines("server-started").len();
        daemon.signal(nix::sys::signal::Signal::SIGUSR2);
        daemon.wait_log("server-started", before + 1);
        daemon.wait_ready(1);
        assert_nothing_left(&daemon.quit().0);
    }
    longest
}

/// Files that a stranger passes, with the kernel's refusal, without it, and without any wall.
#[test]
fn files_that_are_passed_hold_up_nobody() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    for walls_down in ["", "rights"] {
        let longest = held_up(walls_down, &prepared);
        assert!(longest < Duration::from_secs(2), "{walls_down:?}: {longest:?}");
    }
    // Which opening is the last is the kernel's to say: one of three is the server's.
    let mut attempts = (0..3).map(|_| held_up("rights,files", &prepared));
    let longest = attempts.find(|longest| *longest > Duration::from_secs(2));
    assert!(longest.is_some(), "without walls nobody is held up");
}

/// Numbers of connections are used again; who is behind one is not confused with who was.
#[test]
fn a_stranger_is_never_taken_for_the_claimer_whose_number_it_has() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let daemon = daemon(&prepared, "");
    let socket = daemon.socket();
    let asks = |uid: u32, times: usize, refused: &'static str| {
        let socket = socket.clone();
        std::thread::spawn(move || {
            for n in 0..times {
                let socket = socket.clone();
                // Each on a thread of its own, which is that user from then on.
                let asked = std::thread::spawn(move || {
                    let stream = connect_as(&socket, uid, uid).unwrap();
                    let client = GrpcCache::over(stream, &socket, environment()).unwrap();
                    client.confirm_claim("no such VM").map(|_| ()).unwrap_err().to_string()
                        + &client.release("nor this").unwrap_err().to_string()
                        + &client.claim(Some(Duration::from_millis(30))).unwrap_err().to_string()
                });
                let why = asked.join().unwrap();
                assert!(why.contains(refused), "{uid} {n}: {why}");
                assert!(!why.contains("is not known"), "{uid} {n}: {why}");
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    // One that is being made would come back for a moment.
    daemon.wait_ready(1);
    fs::write(daemon.dir.0.join("memory"), "1").unwrap();
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let all = [
        asks(ONE.first, 60, "may not claim VMs"),
        asks(CLAIMER, 60, "no VM from"),
        asks(ONE.first + 1, 60, "may not claim VMs"),
        asks(OTHER, 60, "no VM from"),
    ];
    all.into_iter().for_each(|thread| thread.join().unwrap());
    fs::write(daemon.dir.0.join("memory"), "100000").unwrap();
    assert_nothing_left(&daemon.quit().0);
}

/// Who is shut is told why, in words, by the program that people use.
#[test]
fn who_is_shut_is_told_the_limit_and_the_log_has_a_line() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let daemon = daemon(&prepared, "");
    let socket = daemon.socket();
    let program = daemon.dir.0.join("vmcache");
    fs::copy(env!("CARGO_BIN_EXE_vmcache"), &program).unwrap();
    let status = |uid: u32| {
        let mut command = Command::new(&program);
        command.env_clear().env("VMCACHE_CONFIG", &daemon.config).uid(uid).gid(uid);
        command.arg("status").stdin(Stdio::null()).output().unwrap()
    };
    assert!(status(ONE.first).status.success());
    // All connections that it may have, each with a call made.
    let held: Vec<UnixStream> = (0..8)
        .map(|_| {
            let socket = socket.clone();
            let thread = std::thread::spawn(move || {
                let stream = connect_as(&socket, ONE.first, ONE.first).unwrap();
                let mut http = Http::over(stream);
                http.exchange_settings();
                http.say(&call(1, CONFIG));
                while http.answers == 0 {
                    http.hear(Duration::from_secs(10));
                    assert!(!http.ended, "{:?}", http.goaway);
                }
                http.stream
            });
            thread.join().unwrap()
        })
        .collect();
    let out = status(ONE.first);
    let err = text(&out.stderr);
    assert!(!out.status.success() && err.contains("(stranger_max_connections)"), "{err}");
    let line = daemon.log_lines("connection-refused: pid").pop().unwrap();
    assert!(
        line.contains("more than 8 connections of a user (stranger_max_connections)"),
        "{line}"
    );
    drop(held);
    wait_for("its places", || status(ONE.first).status.success());
    assert_nothing_left(&daemon.quit().0);
}

/// How long the daemon's relay has run.
fn relay_ran(daemon: &Daemon) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().flatten();
    let relay = tasks.map(|t| t.path()).find(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == "vmc-relay")
    });
    let text = fs::read_to_string(relay.unwrap().join("schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// What a peer can do to a socket keeps the relay from its rest by nothing that it has not to do.
#[test]
fn no_state_of_a_socket_keeps_the_relay_awake() {
    let prepared = require_qemu!();
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let daemon = daemon(&prepared, "");
    let socket = daemon.socket();
    let open = || {
        let socket = socket.clone();
        let connect = move || {
            let mut http = Http::over(connect_as(&socket, ONE.first, ONE.first).unwrap());
            http.exchange_settings();
            http
        };
        std::thread::spawn(connect).join().unwrap()
    };
    let urgent = |http: &Http, bytes: &[u8]| {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&http.stream);
        let _ = nix::sys::socket::send(fd, bytes, nix::sys::socket::MsgFlags::MSG_OOB);
    };
    let half = |http: &Http, how| http.stream.shutdown(how).unwrap();
    type Does<'a> = &'a dyn Fn(&mut Http);
    let kinds: [(&str, Does<'_>); 6] = [
        ("an urgent byte", &|http| urgent(http, b"x")),
        ("two of them", &|http| {
            urgent(http, b"x");
            urgent(http, b"y");
        }),
        ("one in a frame", &|http| {
            http.say(&frame(http2::PING, 0, 0, &[7; 8])[..12]);
            urgent(http, b"x");
            http.say(&[7; 5]);
        }),
        ("a peer that reads no more", &|http| {
            half(http, std::net::Shutdown::Read);
            http.say(&call(1, CONFIG));
        }),
        ("a peer that writes no more", &|http| {
            http.say(&call(1, CONFIG));
            half(http, std::net::Shutdown::Write);
        }),
        ("a peer that does not read", &|http| {
            for n in 0..15 {
                http.say(&call(2 * n + 1, http2::STATUS));
            }
        }),
    ];
    for (what, does) in kinds {
        let mut http = open();
        does(&mut http);
        // What it has to do, it has done.
        std::thread::sleep(Duration::from_millis(100));
        let before = relay_ran(&daemon);
        std::thread::sleep(Duration::from_millis(400));
        let ran = relay_ran(&daemon) - before;
        assert!(ran < Duration::from_millis(40), "{what}: {ran:?} of 400 ms");
    }
    assert_nothing_left(&daemon.quit().0);
}
