//! Hosts that run out of memory: refill waits, says so, and goes on by itself.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use crate::daemon::{assert_nothing_left, text, vmcache, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

/// Only one test at a time reckons with what is available.
static MEMORY: Mutex<()> = Mutex::new(());

/// A file in memory, of so many MiB.
fn take(dir: &Dir, mib: u64) -> PathBuf {
    let ballast = dir.0.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    let piece = vec![1; 1 << 20];
    for _ in 0..mib {
        file.write_all(&piece).unwrap();
    }
    ballast
}

/// Takes up another configuration, by which all VMs that there are become older ones.
fn take_up_parameters(d: &Daemon, mut options: Options) {
    options.more_qemu.push_str("kernel_params = \"newer=1\"\n");
    fs::write(&d.config, options.text(&d.dir.0)).unwrap();
    d.ok(&["restart"]);
}

/// A VM that may need nearly all that is there, while a file in memory takes some of it.
#[test]
fn refill_waits_for_memory_and_goes_on_when_it_is_there() {
    let prepared = require_qemu!();
    let _alone = MEMORY.lock().unwrap_or_else(|e| e.into_inner());
    let taken = 4096;
    let available = meminfo("MemAvailable:");
    assert!(available > 8192, "this test takes 4 GiB, and {available} MiB are available");
    let mut options = Options::pool(&prepared, 1);
    options.memory = (available - taken / 2) as u32;
    let dir = Dir::new();
    let ballast = take(&dir, taken);
    let d = Daemon::launch(&options, dir);
    d.wait_log("memory-short: a VM may need", 1);
    wait_for("what status says", || d.status()["pool"]["held"].is_string());
    let status = d.ok(&["status"]);
    assert!(status.contains("no VM is made: a VM may need"), "{status}");
    let out = d.output(&["get", "--wait", "1"]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out.stderr));
    assert_eq!(d.status()["counters"]["boots_failed"], 0);
    fs::remove_file(&ballast).unwrap();
    d.wait_log("memory-enough", 1);
    d.wait_ready(1);
    assert!(d.status()["pool"]["held"].is_null());
    assert_eq!(d.log_lines("memory-short").len(), 1, "{}", d.log());
    assert_nothing_left(&d.quit().0);
}

#[test]
fn older_vms_stay_where_their_end_would_make_no_room() {
    let prepared = require_qemu!();
    let _alone = MEMORY.lock().unwrap_or_else(|e| e.into_inner());
    let taken = 4096;
    let mut options = Options::pool(&prepared, 1);
    options.memory = (meminfo("MemAvailable:") - taken / 2) as u32;
    let d = Daemon::start(&options);
    d.wait_rest(1);
    let older = d.status()["vms"][0]["id"].clone();
    let ballast = take(&d.dir, taken);
    take_up_parameters(&d, options);
    d.wait_log("memory-short: a VM may need", 1);
    wait_for("what status says", || d.status()["pool"]["held"].is_string());
    // Several looks later it is there, and is handed out.
    std::thread::sleep(Duration::from_secs(4));
    let pool = d.status()["pool"].clone();
    assert!(pool["ready"] == 1 && pool["outdated"] == 1 && pool["held"].is_string(), "{pool}");
    assert!(d.log_lines("retired: VM").is_empty(), "{}", d.log());
    assert_eq!(d.ok(&["get"]).trim(), older.as_str().unwrap());
    d.ok(&["stop", older.as_str().unwrap()]);
    fs::remove_file(&ballast).unwrap();
    d.wait_ready(1);
    assert_eq!(d.status()["pool"]["outdated"], 0);
    assert_nothing_left(&d.quit().0);
}

/// How much is available is a fake here: the machine is not this test's alone.
#[test]
fn older_vms_make_room_for_new_ones() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 2);
    let dir = Dir::new();
    let available = dir.0.join("available");
    fs::write(&available, "100000").unwrap();
    let fault = format!("memory:{}", available.display());
    let d = Daemon::launch_with(&options, dir, &[("VMCACHE_FAULT", &fault)]);
    d.wait_rest(2);
    // A VM may need 320 MiB, and one of them has more than 20 MiB for itself.
    fs::write(&available, "300").unwrap();
    take_up_parameters(&d, options);
    d.wait_log("it is of an older configuration, and gives way", 1);
    fs::write(&available, "100000").unwrap();
    wait_for("two newer ones", || {
        let pool = d.status()["pool"].clone();
        pool["ready"] == 2 && pool["outdated"] == 0
    });
    assert_eq!(d.log_lines("it is of an older configuration, and gives way").len(), 2);
    assert!(d.status()["pool"]["held"].is_null());
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_pool_that_can_never_fit_is_refused_with_the_sum() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 4);
    options.memory = meminfo("MemTotal:") as u32 / 3;
    let config = dir.0.join("c.toml");
    let refused = |options: &Options| {
        fs::write(&config, options.text(&dir.0)).unwrap();
        let out = vmcache(&config).args(["serve", "--log", "stderr"]).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        text(&out.stderr)
    };
    let each = u64::from(options.memory) + 64;
    let said = refused(&options);
    let sum = format!("4 VMs of {each} MiB are {} MiB", 4 * each);
    assert!(said.contains("vm_cache_number = 4: ") && said.contains(&sum), "{said}");
    options.more_qemu = "enable_hugepages = true\n".into();
    options.memory = 256;
    let huge = meminfo("HugePages_Total:") * meminfo("Hugepagesize:");
    if huge < 1024 {
        let said = refused(&options);
        assert!(said.contains("huge pages") && said.contains("vm.nr_hugepages"), "{said}");
    }
    assert_nothing_left(&dir.0);
}
