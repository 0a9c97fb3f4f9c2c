//! Where templates live: mounts, room, and a creation that is cut short.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::daemon::{assert_nothing_left, qemus, text, vmcache, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

/// A directory on a disk, with whatever is mounted in it taken away at the end.
struct OnDisk(Dir);

impl OnDisk {
    fn new(name: &str) -> OnDisk {
        let path = std::env::temp_dir().join(format!("vmct-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        OnDisk(Dir(path))
    }

    fn path(&self) -> &Path {
        &self.0 .0
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        // Not there any more, when the test went well.
        if mounts(&self.path().join("template")) > 0 {
            let _ = Command::new("umount").arg("-l").arg(self.path().join("template")).status();
        }
    }
}

/// How many file systems are mounted at a path.
fn mounts(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let path = path.to_str().unwrap();
    table.lines().filter(|l| l.split(' ').nth(1) == Some(path)).count()
}

fn at(mut options: Options, path: &Path) -> Options {
    options.more_factory = format!("enable_template = true\ntemplate_path = {path:?}\n");
    options
}

/// The test needs root, as what it shows does.
#[test]
fn a_path_on_a_disk_gets_one_tmpfs_which_goes_while_clones_stay() {
    let prepared = require_qemu!();
    let disk = OnDisk::new("mount");
    let path = disk.path().join("template");
    let d = Daemon::start(&at(Options::pool(&prepared, 1), &path));
    assert_eq!(mounts(&path), 1);
    let id = d.ok(&["get"]).trim().to_string();
    d.wait_ready(1);
    assert_eq!(d.ok(&["template", "create", "--json"]).matches("\"made\":false").count(), 1);
    assert_eq!(mounts(&path), 1, "a second tmpfs over a busy one");
    d.ok(&["template", "destroy"]);
    assert_eq!(mounts(&path), 0);
    assert!(!path.exists());
    // Its memory is still there for those that have it.
    let script = "dd if=/dev/urandom of=/tmp/f bs=1M count=32 2>/dev/null; wc -c < /tmp/f";
    assert_eq!(d.ok(&["exec", &id, "--", "sh", "-c", script]).trim(), (32 << 20).to_string());
    d.ok(&["stop", &id]);
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_ready(1);
    // Made again for the refill, and mounted again, once.
    assert_eq!(mounts(&path), 1);
    d.ok(&["template", "destroy"]);
    assert_nothing_left(&d.quit().0);
    assert_eq!(mounts(&path), 0);
}

#[test]
fn a_tmpfs_that_is_too_small_is_found_before_anything_boots() {
    let prepared = require_qemu!();
    let disk = OnDisk::new("small");
    let path = disk.path().join("template");
    fs::create_dir(&path).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=64m,mode=700", "vmct-small"];
    assert!(Command::new("mount").args(mount).arg(&path).status().unwrap().success());
    let dir = Dir::new();
    let config = dir.0.join("c.toml");
    fs::write(&config, at(Options::pool(&prepared, 1), &path).text(&dir.0)).unwrap();
    let before = Instant::now();
    let out = vmcache(&config).args(["template", "create"]).output().unwrap();
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("has room for 64 MiB, a template needs 272 MiB"), "{error}");
    // No VM boots in that time.
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "more than the lock");
    assert_nothing_left(&dir.0);
}

#[test]
fn a_creation_that_is_killed_leaves_none_or_a_whole_one() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let path = dir.0.join("template");
    let config = dir.0.join("c.toml");
    fs::write(&config, at(Options::pool(&prepared, 1), &path).text(&dir.0)).unwrap();
    let whole = || vmcache(&config).args(["template", "status"]).output().unwrap().status.success();
    // Times from before QEMU starts to about its end; one takes three seconds or more.
    for milliseconds in [1, 20, 60, 200, 700, 1500, 2500, 3200, 3400, 3600, 3800] {
        let mut child = vmcache(&config).args(["template", "create"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        // Its QEMU goes with it.
        wait_for("QEMU's end", || qemus(&dir.0).is_empty());
        if whole() {
            break;
        }
        assert!(!path.join("manifest.json").exists(), "killed after {milliseconds} ms");
    }
    assert!(vmcache(&config).args(["template", "create"]).status().unwrap().success());
    assert!(whole());
    // What the killed ones left is gone, but for their VMs' directories: the server's to sweep.
    let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["lock", "manifest.json", "memory", "state"]);
    let d = Daemon::launch(&at(Options::pool(&prepared, 1), &path), dir);
    d.wait_ready(1);
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.ok(&["template", "destroy"]);
    assert_nothing_left(&d.quit().0);
}
