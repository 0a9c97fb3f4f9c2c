//! The size asked for: more CPUs and memory than the pool's VMs have.

use crate::daemon::{assert_nothing_left, text, Daemon, Options};
use crate::require_qemu;
use crate::templates::{cloning, in_memory};

/// CPUs and MiB of memory as a command in the guest sees them.
const SHOW: [&str; 4] = ["--", "sh", "-c", "nproc; grep MemTotal /proc/meminfo | tr -dc 0-9"];

/// What `run` with these options shows.
fn seen(d: &Daemon, options: &[&str]) -> (u32, u32) {
    let all: Vec<&str> = ["run"].iter().chain(options).chain(&SHOW).copied().collect();
    let out = d.ok(&all);
    let mut lines = out.lines();
    let mut number = || lines.next().unwrap().trim().parse::<u32>().unwrap();
    (number(), number() / 1024)
}

fn grows(machine: &str, clones: bool) {
    let prepared = require_qemu!();
    let dir = in_memory(&format!("grows-{machine}"));
    let mut options = Options::pool(&prepared, 2);
    options.more_qemu = format!("machine_type = \"{machine}\"\n");
    if clones {
        options = cloning(options, &dir);
    }
    let d = Daemon::start(&options);
    let (cpus, before) = seen(&d, &[]);
    assert_eq!(cpus, 1);
    let (cpus, after) = seen(&d, &["--cpus", "3", "--memory", "700"]);
    // 256 MiB and four blocks of 128, of which the kernel keeps some for itself.
    assert_eq!(cpus, 3);
    assert!((480..=512).contains(&(after - before)), "{before} MiB, then {after}");
    // One without the other.
    assert_eq!(seen(&d, &["--cpus", "2"]), (2, before));
    assert_eq!(seen(&d, &["--memory", "256"]), (1, before));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_direct_q35_vm_grows() {
    grows("q35", false);
}

#[test]
fn a_direct_pc_vm_grows() {
    grows("pc", false);
}

#[test]
fn a_q35_clone_grows() {
    grows("q35", true);
}

#[test]
fn a_pc_clone_grows() {
    grows("pc", true);
}

#[test]
fn a_small_vm_becomes_a_large_one_and_its_size_is_known() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let got = d.ok(&["get", "--json", "--cpus", "4", "--memory", "2000"]);
    let got: serde_json::Value = serde_json::from_str(&got).unwrap();
    // 1744 MiB more are 14 blocks.
    assert_eq!((&got["cpus"], &got["memory_mib"]), (&4.into(), &2048.into()));
    let id = got["id"].as_str().unwrap();
    let listed: serde_json::Value = serde_json::from_str(&d.ok(&["list", "--json"])).unwrap();
    let vm = listed.as_array().unwrap().iter().find(|v| v["id"] == id).unwrap().clone();
    assert_eq!((&vm["cpus"], &vm["memory_mib"]), (&4.into(), &2048.into()));
    // Memory that is there can be used: more than the VM was booted with.
    let fill = "mkdir -p /tmp/m && mount -t tmpfs -o size=1g none /tmp/m && \
                head -c 900m /dev/zero > /tmp/m/f && wc -c < /tmp/m/f";
    assert_eq!(d.ok(&["exec", id, "--", "sh", "-c", fill]).trim(), (900u32 << 20).to_string());
    d.ok(&["stop", id]);
    assert_nothing_left(&d.quit().0);
}

/// Proportional memory of a process, MiB.
fn pss(pid: i64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn a_guest_gives_memory_back_before_it_waits_and_has_it_all_again() {
    let prepared = require_qemu!();
    let plain = Options::pool(&prepared, 1);
    let mut giving = Options::pool(&prepared, 1);
    giving.more_qemu = "reclaim_guest_freed_memory = true\n".into();
    let look = |options: &Options| {
        let d = Daemon::start(options);
        d.wait_rest(1);
        let memory = pss(d.status()["vms"][0]["pid"].as_i64().unwrap());
        let guest = seen(&d, &[]).1;
        assert_nothing_left(&d.quit().0);
        (memory, guest)
    };
    let (before, whole) = look(&plain);
    let (mut after, again) = look(&giving);
    assert_eq!(whole, again, "MiB in the guest");
    // A guest that gets no processor for a while is not waited for.
    for _ in 0..2 {
        if after + 20 >= before {
            after = look(&giving).0;
        }
    }
    assert!(after + 20 < before, "{before} MiB, {after} MiB with what was given back");
}

#[test]
fn an_impossible_size_is_refused_and_no_vm_is_lost() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    options.more_qemu = "memory_slots = 0\n".into();
    let d = Daemon::start(&options);
    let before = d.status()["vms"][0]["id"].clone();
    for (asked, words) in [
        (["--cpus", "5"], "5 CPUs asked for, the pool's VMs can grow to 4"),
        (["--cpus", "0"], "never made smaller"),
        (["--memory", "128"], "have 256 and are never made smaller"),
        (["--memory", "512"], "set memory_slots to 1 or more"),
    ] {
        let out = d.output(&["run", asked[0], asked[1], "--", "true"]);
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(2) && err.contains(words), "{:?} {err}", out.status);
    }
    assert_eq!(d.status()["vms"][0]["id"], before);
    assert_nothing_left(&d.quit().0);
}
