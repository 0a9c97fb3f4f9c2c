//! Our own calls: claims that are confirmed, VMs that are given back, pools that are
//! drained and resized.

use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use vmcache::factory::grpccache::{Error, GrpcCache};
use vmcache::factory::BaseFactory;
use vmcache::vm::wire::from_wire;

use crate::daemon::{assert_nothing_left, qemus, text, wait_for, Daemon, Dir, Options, LONG};
use crate::require_qemu;

fn handed(daemon: &Daemon) -> Vec<Value> {
    let status = daemon.status();
    let vms = status["vms"].as_array().unwrap();
    vms.iter().filter(|v| v["state"] == "handed").cloned().collect()
}

#[test]
fn a_claim_that_is_not_confirmed_is_ended() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let client = GrpcCache::connect(&d.socket()).unwrap().labelled("nobody's");
    let since = Instant::now();
    let (vm, grace) = client.claim(Some(LONG)).unwrap();
    let (kept, _) = client.claim(Some(LONG)).unwrap();
    client.confirm_claim(&kept.id).unwrap();
    assert!(grace >= Duration::from_secs(5) && grace <= Duration::from_secs(60), "{grace:?}");
    assert_eq!(handed(&d)[0]["label"], "nobody's");
    d.wait_log("was not confirmed", 1);
    assert!(since.elapsed() >= grace, "{:?}", since.elapsed());
    d.wait_log("vm-ended", 1);
    assert_eq!(d.status()["counters"]["claims_unconfirmed"], 1);
    // Who is late is told, and what was confirmed stays.
    match client.confirm_claim(&vm.id) {
        Err(Error::Gone { text, .. }) => assert!(text.contains("no such VM"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(handed(&d).len(), 1);
    assert_eq!(handed(&d)[0]["id"], kept.id);
    // It can be given back by whoever may end it.
    client.release(&kept.id).unwrap();
    d.wait_log("vm-ended", 2);
    assert!(client.release(&kept.id).is_err());
    d.wait_ready(2);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_measure_arrives_although_its_client_goes() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let server = Pid::from_raw(d.pid());
    let count = || d.status()["latency"]["exec_ready"]["count"].as_u64();
    let client = GrpcCache::connect(&d.socket()).unwrap();
    let vm = client.get_base_vm(Some(LONG)).unwrap();
    client.confirm(&vm).unwrap();
    assert_eq!(count(), Some(0));
    // A server that is slow, as one on a busy host is.
    kill(server, Signal::SIGSTOP).unwrap();
    client.used(&vm, Duration::from_millis(5));
    let goes_on = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        kill(server, Signal::SIGCONT).unwrap();
    });
    drop(client);
    goes_on.join().unwrap();
    assert_eq!(count(), Some(1));
    // One that stands still does not hold a client for long.
    let client = GrpcCache::connect(&d.socket()).unwrap();
    kill(server, Signal::SIGSTOP).unwrap();
    client.used(&vm, Duration::from_millis(5));
    let since = Instant::now();
    drop(client);
    let held = since.elapsed();
    kill(server, Signal::SIGCONT).unwrap();
    assert!(held < Duration::from_secs(9), "{held:?}");
    vm.destroy();
    d.wait_log("vm-ended", 1);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn an_unconfirmed_claim_outlives_a_restart() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let client = GrpcCache::connect(&d.socket()).unwrap();
    let (vm, _) = client.claim(Some(LONG)).unwrap();
    d.ok(&["restart"]);
    d.wait_log("kept: VM", 1);
    client.confirm_claim(&vm.id).unwrap();
    let mine = from_wire(&vm, || Err(String::new())).unwrap();
    assert!(mine.alive());
    let ledger = std::fs::read_to_string(mine.dir().join("vm.json")).unwrap();
    assert!(ledger.contains("\"unconfirmed\":false"), "{ledger}");
    mine.destroy();
    d.wait_log("vm-ended", 1);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn what_a_pool_can_not_serve_is_refused_before_a_vm_is_taken() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let long = "x".repeat(65);
    let client = GrpcCache::connect(&d.socket()).unwrap().labelled(&long);
    match client.claim(Some(LONG)) {
        Err(Error::Call { text, .. }) => assert!(text.contains("label of 65 bytes"), "{text}"),
        other => panic!("{:?}", other.map(|(vm, _)| vm.id)),
    }
    assert_eq!(d.status()["pool"]["ready"], 1);
    for name in ["", "nobody", &long] {
        assert!(client.release(name).is_err());
    }
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_pool_is_drained_and_filled_and_resized() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let kept = d.ok(&["get", "--label", "a build"]).trim().to_string();
    assert_eq!(handed(&d)[0]["label"], "a build");
    d.ok(&["resize", "3"]);
    d.wait_ready(3);
    assert_eq!(qemus(&d.dir.0).len(), 4);
    d.ok(&["resize", "2"]);
    d.wait_log("retired: VM", 1);
    wait_for("two VMs and one", || qemus(&d.dir.0).len() == 3);
    let before = Instant::now();
    d.ok(&["drain"]);
    assert_eq!(qemus(&d.dir.0).len(), 1, "{:?}{}", before.elapsed(), d.log());
    let out = d.output(&["get"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("the pool is drained"), "{}", text(&out.stderr));
    assert_eq!(d.ok(&["exec", &kept, "--", "echo", "here"]), "here\n");
    // Also while its VMs are coming to rest, one of them in hands.
    for pause in [0, 40, 150, 400] {
        d.ok(&["resize", "1"]);
        d.wait_ready(1);
        std::thread::sleep(Duration::from_millis(pause));
        d.ok(&["drain"]);
        assert_eq!(qemus(&d.dir.0).len(), 1, "{pause} ms{}", d.log());
    }
    d.ok(&["resize", "1"]);
    assert_eq!(d.ok(&["run", "--", "echo", "again"]), "again\n");
    d.wait_ready(1);
    let out = d.output(&["resize", "5000"]);
    assert!(text(&out.stderr).contains("at most 4096"), "{}", text(&out.stderr));
    d.ok(&["stop", &kept]);
    assert_nothing_left(&d.quit().0);
}

/// Another user's connections, of which there are too many, are ended; others go on.
#[test]
fn a_flood_of_one_user_leaves_room_for_others() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    options.more_ours.push_str("socket_mode = \"0666\"\n");
    let d = Daemon::start(&options);
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&d.dir.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", d.pid())).unwrap().count();
    let before = fds();
    // Opens 700, and tells how many are ended, once these are enough: who may not claim has
    // eight, and those only until they should have said something.
    let script = "use Socket; $| = 1; my @all; for (1..700) { my $s; \
                  socket($s, AF_UNIX, SOCK_STREAM, 0); connect($s, sockaddr_un($ARGV[0])) or die; \
                  push @all, $s } sub ended { my $n = 0; for my $s (@all) { my ($b, $r); \
                  do { $r = recv($s, $b, 4096, MSG_DONTWAIT) } while (defined $r and length($b)); \
                  $n++ if defined $r } $n } \
                  for (1..100) { last if ended() >= 692; select(undef, undef, undef, 0.05) } \
                  print ended(), \"\\n\"; <STDIN>; \
                  for (1..100) { last if ended() >= 700; sleep 1 } print ended(), \"\\n\"; <STDIN>";
    use std::os::unix::process::CommandExt;
    let mut flood = std::process::Command::new("perl")
        .args(["-e", script])
        .arg(d.socket())
        .uid(65534)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(flood.stdout.take().unwrap());
    let mut ended = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        line.trim().parse::<usize>().unwrap()
    };
    let at_once = ended();
    assert!(at_once >= 692, "{at_once}{}", d.log());
    wait_for("their fds' end", || fds() <= before + 8 + 8);
    // Not for each of them.
    let told = d.log_lines("connection-refused").len() + d.log_lines("peer-shut").len();
    assert!((1..40).contains(&told), "{told} times{}", d.log());
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    std::io::Write::write_all(flood.stdin.as_mut().unwrap(), b"\n").unwrap();
    assert_eq!(ended(), 700, "{}", d.log());
    flood.kill().unwrap();
    flood.wait().unwrap();
    wait_for("their end", || fds() <= before + 8);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

/// Our client takes VMs of a server that has none of our calls, as Kata's have not.
#[test]
fn a_server_with_katas_four_calls_only_is_enough() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 1);
    let d = Daemon::launch_with(&options, Dir::new(), &[("VMCACHE_FAULT", "katas-calls-only")]);
    wait_for("a VM", || d.status()["pool"]["ready"] == 1);
    assert!(d.status()["counters"].is_null(), "it has our status");
    let id = d.ok(&["get", "--wait", "60"]).trim().to_string();
    assert_eq!(d.ok(&["exec", &id, "--", "echo", "mine"]), "mine\n");
    assert_eq!(d.ok(&["run", "--wait", "60", "--", "echo", "run"]), "run\n");
    let out = d.output(&["resize", "2"]);
    assert!(text(&out.stderr).contains("it is not vmcache's own"), "{}", text(&out.stderr));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}
