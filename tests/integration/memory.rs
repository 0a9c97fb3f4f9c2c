//! Hosts that run out of memory: refill waits, says so, and goes on by itself.

use std::fs;

use crate::daemon::{assert_nothing_left, text, vmcache, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

/// A VM that may need nearly all that is there, while a file in memory takes some of it.
#[test]
fn refill_waits_for_memory_and_goes_on_when_it_is_there() {
    let prepared = require_qemu!();
    let taken = 4096;
    let available = meminfo("MemAvailable:");
    assert!(available > 8192, "this test takes 4 GiB, and {available} MiB are available");
    let mut options = Options::pool(&prepared, 1);
    options.memory = (available - taken / 2) as u32;
    let dir = Dir::new();
    let ballast = dir.0.join("ballast");
    let file = fs::File::create(&ballast).unwrap();
    let piece = vec![1; 1 << 20];
    for _ in 0..taken {
        std::io::Write::write_all(&mut &file, &piece).unwrap();
    }
    drop(file);
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
