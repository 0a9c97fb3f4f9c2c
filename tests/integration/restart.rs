//! Servers that are killed, restarted in place, or started with another configuration:
//! what becomes of their VMs.

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use vmcache::factory::grpccache::{Error, GrpcCache};

use crate::confinement::{command_as, pool};
use crate::daemon::{assert_nothing_left, qemus, text, wait_child, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

/// Ids and pids of the VMs that stand ready.
pub fn ready(daemon: &Daemon) -> Vec<(String, i64)> {
    let status = daemon.status();
    let vms = status["vms"].as_array().unwrap().iter().filter(|v| v["state"] == "ready");
    let pair =
        |v: &serde_json::Value| (v["id"].as_str().unwrap().into(), v["pid"].as_i64().unwrap());
    vms.map(pair).collect()
}

#[test]
fn a_killed_server_is_followed_by_one_that_takes_over() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 2);
    let daemon = Daemon::start(&options);
    let kept = daemon.ok(&["get"]).trim().to_string();
    daemon.wait_ready(2);
    let leased = || {
        let sleep = ["run", "--", "sh", "-c", "echo up; sleep 1000"];
        let mut child = daemon.command(&sleep).stdout(Stdio::piped()).spawn().unwrap();
        let mut up = [0; 3];
        child.stdout.take().unwrap().read_exact(&mut up).unwrap();
        daemon.wait_ready(2);
        child
    };
    let (mut dies_with_it, mut outlives_it) = (leased(), leased());
    daemon.wait_rest(2);
    let before = ready(&daemon);
    let mut daemon = daemon;
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert!(daemon.socket().exists(), "a killed server leaves its socket");
    assert_eq!(qemus(&daemon.dir.0).len(), 5);
    for pid in qemus(&daemon.dir.0) {
        // QEMU blocks some itself, but none that the server blocks.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let blocked = status.split_once("SigBlk:\t").unwrap().1.lines().next().unwrap();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        let bit = |s: Signal| 1 << (s as i32 - 1);
        assert_eq!(blocked & (bit(Signal::SIGTERM) | bit(Signal::SIGINT)), 0, "{blocked:x}");
    }
    dies_with_it.kill().unwrap();
    wait_child(&mut dies_with_it);

    let next = Daemon::launch(&options, daemon.forsake());
    // The one whose owner had gone.
    next.wait_log("swept", 1);
    assert_eq!(ready(&next), before);
    let status = next.status();
    let adopted = status["vms"].as_array().unwrap().iter().filter(|v| v["adopted"] == true);
    assert_eq!(adopted.count(), 2, "{status}");
    assert_eq!(status["counters"]["adopted"], 2, "{status}");
    assert_eq!(status["counters"]["boots"], 0, "{status}");
    assert_eq!(qemus(&next.dir.0).len(), 4);
    // They are as good as new ones.
    for _ in 0..2 {
        assert_eq!(next.ok(&["run", "--", "echo", "adopted"]), "adopted\n");
    }
    next.wait_ready(2);
    assert!(ready(&next).iter().all(|vm| !before.contains(vm)));
    assert_eq!(next.ok(&["exec", &kept, "--", "echo", "still here"]), "still here\n");
    outlives_it.kill().unwrap();
    wait_child(&mut outlives_it);
    next.wait_log("reclaimed", 1);
    next.wait_log("vm-ended", 3);
    assert_eq!(qemus(&next.dir.0).len(), 3);
    next.ok(&["stop", &kept]);
    next.wait_log("vm-ended", 4);
    assert_nothing_left(&next.quit().0);
}

/// SIGUSR2 executes the program anew: the pid stays, and so does all else.
#[test]
fn a_restart_in_place_loses_no_vm_and_no_claim() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 2));
    daemon.wait_rest(2);
    let before = ready(&daemon);
    daemon.signal(Signal::SIGUSR2);
    daemon.wait_log("server-restarting", 1);
    // Whoever asks meanwhile waits in the socket's queue.
    let id = daemon.ok(&["get"]).trim().to_string();
    assert!(before.iter().any(|(vm, _)| *vm == id), "{id}{}", daemon.log());
    daemon.wait_log("adopted: VM", 2);
    daemon.wait_ready(2);
    assert_eq!(daemon.status()["pid"], daemon.pid());
    // Its QEMUs are still its children: one that dies leaves no zombie.
    let (_, pid) = before.iter().find(|(vm, _)| *vm == id).unwrap();
    kill(Pid::from_raw(*pid as i32), Signal::SIGKILL).unwrap();
    daemon.wait_log("vm-ended", 1);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());

    // A claim that waits is served after the restart, by whom it is asked again.
    let mut taken: Vec<String> = ready(&daemon).into_iter().map(|(id, _)| id).collect();
    for _ in 0..2 {
        daemon.ok(&["get"]);
    }
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let waiting = daemon.command(&["get"]).stdout(Stdio::piped()).spawn().unwrap();
    wait_for("a claim in line", || daemon.status()["pool"]["waiting"] == 1);
    daemon.signal(Signal::SIGUSR2);
    daemon.wait_log("server-started", 3);
    daemon.ok(&["resize", "2"]);
    let out = waiting.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", daemon.log());
    taken.push(text(&out.stdout).trim().to_string());
    daemon.wait_ready(2);
    assert_eq!(daemon.log_lines("server-restarting").len(), 2);
    daemon.ok(&["stop", &taken[0], &taken[1], &taken[2]]);
    daemon.wait_log("vm-ended", 4);
    assert_nothing_left(&daemon.quit().0);
}

/// A call that reaches a server in the moment of its end is asked again of the next one.
#[test]
fn calls_made_while_a_server_restarts_are_all_answered() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let (socket, done) = (daemon.socket(), AtomicBool::new(false));
    let answered = AtomicUsize::new(0);
    let asked = std::thread::scope(|scope| {
        let asks = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                GrpcCache::connect(&socket).and_then(|s| s.fetch_details())?;
                answered.fetch_add(1, Ordering::SeqCst);
            }
            Ok::<(), Error>(())
        });
        for n in 2..10 {
            // Calls go on again, and the next restart comes into one of them.
            let before = answered.load(Ordering::SeqCst);
            wait_for("answers", || {
                asks.is_finished() || answered.load(Ordering::SeqCst) > before + 5
            });
            daemon.signal(Signal::SIGUSR2);
            daemon.wait_log("server-started", n);
        }
        done.store(true, Ordering::SeqCst);
        asks.join().unwrap()
    });
    assert!(asked.is_ok(), "{asked:?}, after {answered:?}{}", daemon.log());
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_restart_that_would_fail_is_refused() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let before = ready(&daemon);
    let good = fs::read_to_string(&daemon.config).unwrap();
    for (bad, why) in [
        (good.replace("default_memory = 256", "default_memory = \"much\""), "default_memory"),
        (good.replace("vm_cache_number = 1", "vm_cache_number = 0"), "vm_cache_number is 0"),
        (good.replace("kernel = \"", "kernel = \"/none"), "/none"),
        // Its VMs and clients would not be found there.
        (good.replace("/s\"", "/t\""), "vm_cache_endpoint"),
        (good.replace("/vm\"", "/other\""), "vm_store_path"),
    ] {
        assert_ne!(bad, good);
        fs::write(&daemon.config, bad).unwrap();
        let refused = daemon.log_lines("restart-refused").len();
        daemon.signal(Signal::SIGUSR2);
        daemon.wait_log("restart-refused", refused + 1);
        let line = daemon.log_lines("restart-refused").pop().unwrap();
        assert!(line.contains(why), "{line}");
        if why == "default_memory" {
            // Whoever broke it can still see the server that runs.
            assert!(daemon.ok(&["status"]).contains("1 ready of 1"));
        }
    }
    fs::write(&daemon.config, good).unwrap();
    assert_eq!(ready(&daemon), before);
    assert_nothing_left(&daemon.quit().0);
}

/// Whoever wants the server to end while it restarts is not forgotten.
#[test]
fn a_stop_during_a_restart_is_a_stop() {
    let prepared = require_qemu!();
    let mut dir = Dir::new();
    for pause in [0, 1, 5, 20, 60] {
        let mut daemon = Daemon::launch(&Options::pool(&prepared, 1), dir);
        daemon.wait_ready(1);
        daemon.signal(Signal::SIGUSR2);
        std::thread::sleep(Duration::from_millis(pause));
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait();
        assert!(status.success(), "{pause} ms: {status}{}", daemon.log());
        assert_nothing_left(&daemon.dir.0);
        assert!(!daemon.socket().exists(), "{pause} ms{}", daemon.log());
        dir = daemon.forsake();
    }
}

/// What can not be used any more is ended, whatever is wrong with it.
#[test]
fn only_vms_that_fit_and_answer_are_taken_over() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 3);
    let mut daemon = Daemon::start(&options);
    daemon.wait_rest(3);
    let before = ready(&daemon);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    // One hangs, one is dead, one is as it was.
    kill(Pid::from_raw(before[0].1 as i32), Signal::SIGSTOP).unwrap();
    kill(Pid::from_raw(before[1].1 as i32), Signal::SIGKILL).unwrap();
    let next = Daemon::launch(&options, daemon.forsake());
    let status = next.status();
    assert_eq!(status["counters"]["adopted"], 1, "{status}");
    assert!(ready(&next).contains(&before[2]), "{status}");
    assert!(!qemus(&next.dir.0).contains(&(before[0].1 as i32)));
    next.wait_rest(3);

    // A smaller pool takes no more than it has room for.
    let mut daemon = next;
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    options.pool = 2;
    let next = Daemon::launch(&options, daemon.forsake());
    next.wait_log("retired: VM", 1);
    assert_eq!(next.status()["counters"]["adopted"], 2);
    assert_eq!(qemus(&next.dir.0).len(), 2);

    // Another size is another VM.
    let mut daemon = next;
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    options.memory = 320;
    let next = Daemon::launch(&options, daemon.forsake());
    next.wait_log("it is of another size or kind", 2);
    next.wait_ready(2);
    let status = next.status();
    assert_eq!(status["counters"]["adopted"], 0, "{status}");
    let sizes: Vec<_> =
        status["vms"].as_array().unwrap().iter().map(|v| v["memory_mib"].clone()).collect();
    assert_eq!(sizes, [320, 320]);
    assert_nothing_left(&next.quit().0);
}

/// A defect of ours, in whatever thread: named in the log, an exit code that a
/// supervisor sees, and nothing lost.
#[test]
fn a_panic_of_any_thread_ends_the_server_and_no_vm() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 1);
    let mut dir = Dir::new();
    let mut before: Option<Vec<(String, i64)>> = None;
    for (point, thread) in
        [("pool", "vmc-pool"), ("rpc", "vmc-rpc-"), ("accept", "vmc-accept"), ("boot", "vmc-boot-")]
    {
        let file = dir.0.join("fault");
        let fault = format!("{point}:{}", file.display());
        let mut daemon = Daemon::launch_with(&options, dir, &[("VMCACHE_FAULT", &fault)]);
        daemon.wait_rest(1);
        let now = ready(&daemon);
        if let Some(before) = before {
            assert_eq!(now, before, "{point}{}", daemon.log());
        }
        fs::write(&file, "").unwrap();
        // Each of them has something to do for this.
        let _ = daemon.output(&["resize", "2"]);
        let _ = daemon.output(&["status"]);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(101), "{point}{}", daemon.log());
        daemon.wait_log("panic: thread", 1);
        let told = daemon.log_lines("panic: thread");
        assert!(told.len() == 1 && told[0].contains(&format!("thread {thread}")), "{told:?}");
        assert!(qemus(&daemon.dir.0).contains(&(now[0].1 as i32)), "{point}");
        before = Some(now);
        dir = daemon.forsake();
    }
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    assert_eq!(Some(ready(&daemon)), before);
    assert_eq!(qemus(&daemon.dir.0).len(), 1, "what was half made is gone");
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn what_a_pool_was_told_to_be_it_is_after_a_restart() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    daemon.ok(&["resize", "2"]);
    daemon.wait_ready(2);
    daemon.ok(&["restart"]);
    daemon.wait_log("server-started", 2);
    daemon.wait_ready(2);
    assert_eq!(daemon.status()["pool"]["target"], 2);
    daemon.ok(&["drain"]);
    wait_for("an empty pool", || qemus(&daemon.dir.0).is_empty());
    daemon.ok(&["restart"]);
    daemon.wait_log("server-started", 3);
    daemon.wait_log("pool-drained", 2);
    let out = daemon.output(&["get"]);
    assert!(text(&out.stderr).contains("the pool is drained"), "{}", text(&out.stderr));
    assert_nothing_left(&daemon.quit().0);
}

/// A thread that hangs is no fault of the real thing's that could be brought about.
#[test]
fn a_stuck_thread_is_named_while_it_is() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let file = dir.0.join("fault");
    let fault = format!("stuck-accept:{}", file.display());
    let environment = [("VMCACHE_FAULT", fault.as_str())];
    let daemon = Daemon::launch_with(&Options::pool(&prepared, 1), dir, &environment);
    daemon.wait_ready(1);
    fs::write(&file, "").unwrap();
    let since = Instant::now();
    let mut waits = daemon.command(&["status"]).stdout(Stdio::null()).spawn().unwrap();
    daemon.wait_log("stuck: thread vmc-accept has been at admitting a connection for ", 1);
    assert!(since.elapsed() >= Duration::from_secs(5), "{:?}", since.elapsed());
    fs::remove_file(&file).unwrap();
    // Served, or told that it took too long.
    wait_child(&mut waits);
    daemon.wait_log("stuck-no-more: thread vmc-accept", 1);
    wait_for("status to say so", || daemon.status()["stuck"] == serde_json::json!([]));
    assert_nothing_left(&daemon.quit().0);
}

/// A version of this program whose VMs had fewer walls: what clients have of it goes on; what
/// waits is ended and replaced.
#[test]
fn vms_of_a_version_with_fewer_walls_are_kept_where_they_are_claimed_and_else_replaced() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 2);
    let mut daemon = Daemon::start(&options);
    let kept = daemon.ok(&["get"]).trim().to_string();
    daemon.wait_ready(2);
    let waited = ready(&daemon);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    // As that version wrote them, and with what it made beside a claimed VM's sockets.
    for dir in crate::daemon::directories(&daemon.store()) {
        let file = dir.join("vm.json");
        let text = fs::read_to_string(&file).unwrap();
        let mut ledger: serde_json::Value = serde_json::from_str(&text).unwrap();
        (ledger["shape"], ledger["build"]) = ("0".repeat(64).into(), "1".repeat(64).into());
        fs::write(&file, ledger.to_string()).unwrap();
        if dir.ends_with(&kept) {
            fs::create_dir(dir.join("client")).unwrap();
            let note = "{\"container\":\"main\",\"root\":\"/\"}";
            fs::write(dir.join("client/workload.json"), note).unwrap();
        }
    }
    let daemon = Daemon::launch(&options, daemon.forsake());
    daemon.wait_ready(2);
    let now: Vec<String> = ready(&daemon).into_iter().map(|(id, _)| id).collect();
    assert!(waited.iter().all(|(id, _)| !now.contains(id)), "{now:?}");
    assert!(daemon.ok(&["list"]).contains(&kept));
    assert_eq!(daemon.ok(&["exec", &kept, "--", "echo", "as ever"]), "as ever\n");
    daemon.ok(&["stop", &kept]);
    wait_for("its end", || !daemon.store().join(&kept).exists());
    assert_nothing_left(&daemon.quit().0);
}

/// Another user's connections pass the relay: what they are told when the server goes arrives,
/// and a claim that waits is asked again of the next one.
#[test]
fn a_claim_of_another_user_is_served_after_a_restart_and_told_of_the_end() {
    let prepared = require_qemu!();
    let (mut options, dir) = pool(&prepared, 1);
    options.more_ours += "socket_mode = \"0666\"\nclaim_users = [\"232000\"]\n";
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let claim = || {
        let mut get = command_as(&daemon, 232_000, &["get", "--wait", "100"]);
        let get = get.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("a claim in line", || daemon.status()["pool"]["waiting"] == 1);
        get
    };
    let waiting = claim();
    for n in 2..5 {
        daemon.signal(Signal::SIGUSR2);
        daemon.wait_log("server-started", n);
        wait_for("the claim to be there again", || daemon.status()["pool"]["waiting"] == 1);
    }
    daemon.ok(&["resize", "1"]);
    let out = waiting.wait_with_output().unwrap();
    assert!(out.status.success(), "{}{}", text(&out.stderr), daemon.log());
    let id = text(&out.stdout).trim().to_string();
    daemon.wait_ready(1);
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let waiting = claim();
    daemon.ok(&["stop", &id]);
    daemon.wait_log("vm-ended", 1);
    let dir = daemon.quit();
    let out = waiting.wait_with_output().unwrap();
    let err = text(&out.stderr);
    assert!(!out.status.success() && err.contains("the server is stopping"), "{err}");
    assert_nothing_left(&dir.0);
}
