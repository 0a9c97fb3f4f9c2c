//! Where templates live: mounts, room, and a creation that is cut short.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::daemon::{
    assert_nothing_left, mounts, qemus, text, vmcache, wait_for, Daemon, Dir, Options,
};
use crate::require_qemu;

fn at(mut options: Options, path: &Path) -> Options {
    options.more_factory = format!("enable_template = true\ntemplate_path = {path:?}\n");
    options
}

/// The test needs root, as what it shows does.
#[test]
fn a_path_on_a_disk_gets_one_tmpfs_which_goes_while_clones_stay() {
    let prepared = require_qemu!();
    let disk = Dir::on_disk();
    let path = disk.0.join("template");
    let d = Daemon::start(&at(Options::pool(&prepared, 1), &path));
    assert_eq!(mounts(&path).len(), 1);
    let id = d.ok(&["get"]).trim().to_string();
    d.wait_ready(1);
    assert_eq!(d.ok(&["template", "create", "--json"]).matches("\"made\":false").count(), 1);
    assert_eq!(mounts(&path).len(), 1, "a second tmpfs over a busy one");
    d.ok(&["template", "destroy"]);
    assert_eq!(mounts(&path).len(), 0);
    assert!(!path.exists());
    // Its memory is still there for those that have it.
    let script = "dd if=/dev/urandom of=/tmp/f bs=1M count=32 2>/dev/null; wc -c < /tmp/f";
    assert_eq!(d.ok(&["exec", &id, "--", "sh", "-c", script]).trim(), (32 << 20).to_string());
    d.ok(&["stop", &id]);
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_ready(1);
    // Made again for the refill, and mounted again, once.
    assert_eq!(mounts(&path).len(), 1);
    d.ok(&["template", "destroy"]);
    assert_nothing_left(&d.quit().0);
    assert_eq!(mounts(&path).len(), 0);
}

#[test]
fn a_tmpfs_that_is_too_small_is_found_before_anything_boots() {
    let prepared = require_qemu!();
    let disk = Dir::on_disk();
    let path = disk.0.join("template");
    fs::create_dir(&path).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=64m,mode=700", "vmct-small"];
    assert!(Command::new("mount").args(mount).arg(&path).status().unwrap().success());
    let dir = Dir::new();
    let config = dir.0.join("c.toml");
    fs::write(&config, at(Options::pool(&prepared, 1), &path).text(&dir.0)).unwrap();
    let out = vmcache(&config).args(["template", "create"]).output().unwrap();
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("has room for 63 MiB, a template needs 272 MiB"), "{error}");
    // A VM that was booted would have left its directory's parent.
    assert!(!dir.0.join("vm").exists());
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "more than the lock");
    assert_eq!(mounts(&path).len(), 1, "one over the administrator's");
    let out = vmcache(&config).args(["template", "destroy"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(mounts(&path).len(), 1, "the administrator's mount is not ours to take away");
    assert_nothing_left(&dir.0);
}

/// What `template create --json` says of a configuration: whether it was made.
fn made(config: &Path) -> bool {
    let out = vmcache(config).args(["template", "create", "--json"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    json["made"].as_bool().unwrap()
}

/// It needs root, too.
#[test]
fn three_at_once_mount_once_and_a_path_may_be_written_in_any_way() {
    let prepared = require_qemu!();
    let (disk, dir) = (Dir::on_disk(), Dir::new());
    let config = dir.0.join("c.toml");
    let path = disk.0.join("template");
    // By way of a link, and with a slash at its end.
    std::os::unix::fs::symlink(&disk.0, disk.0.join("link")).unwrap();
    let written = disk.0.join("link/template/");
    fs::write(&config, at(Options::pool(&prepared, 1), &written).text(&dir.0)).unwrap();
    let results = std::thread::scope(|s| {
        let all: Vec<_> = (0..3).map(|_| s.spawn(|| made(&config))).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(results.iter().filter(|made| **made).count(), 1, "{results:?}");
    assert_eq!(mounts(&path), std::slice::from_ref(&path));
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = table.lines().find(|l| l.contains(path.to_str().unwrap())).unwrap();
    assert!(line.contains("nosuid,nodev,noexec"), "{line}");
    assert!(vmcache(&config).args(["template", "destroy"]).status().unwrap().success());
    assert!(mounts(&path).is_empty() && !path.exists());
    assert_nothing_left(&dir.0);
}

#[test]
fn a_signal_to_a_creation_leaves_nothing() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let path = dir.0.join("template");
    let config = dir.0.join("c.toml");
    fs::write(&config, at(Options::pool(&prepared, 1), &path).text(&dir.0)).unwrap();
    let mut child = vmcache(&config).args(["template", "create"]).spawn().unwrap();
    wait_for("its QEMU", || qemus(&dir.0).len() == 1);
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    let names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["lock"]);
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
    let destroy =
        || assert!(vmcache(&config).args(["template", "destroy"]).status().unwrap().success());
    let start = Instant::now();
    assert!(made(&config));
    let all = start.elapsed();
    destroy();
    // From before QEMU starts to about the end, where the files get their names.
    let early = [1, 30, 300].map(Duration::from_millis);
    let late = (0..8).map(|n| all.mul_f64(0.8 + 0.03 * f64::from(n)));
    for after in early.into_iter().chain(late) {
        let mut child = vmcache(&config).args(["template", "create"]).spawn().unwrap();
        std::thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
        // Its QEMU goes with it.
        wait_for("QEMU's end", || qemus(&dir.0).is_empty());
        if whole() {
            assert!(!made(&config), "a whole one, made again, after {after:?}");
            destroy();
        } else {
            assert!(!path.join("manifest.json").exists(), "killed after {after:?}");
        }
    }
    assert!(made(&config));
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
