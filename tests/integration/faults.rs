//! What can be wrong: each with its error and exit code, and nothing left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::daemon::{
    assert_nothing_left, directories, qemus, text, vmcache, wait_for, Daemon, Dir, Options,
};
use crate::require_qemu;

/// Runs a server that must refuse to start.
fn refused(dir: &Dir, options: &Options) -> Output {
    let config = dir.0.join("c.toml");
    fs::write(&config, options.text(&dir.0)).unwrap();
    serve(&config, &[])
}

fn serve(config: &Path, more: &[&str]) -> Output {
    vmcache(config).args(["serve", "--log", "stderr"]).args(more).output().unwrap()
}

/// Puts the real QEMU behind a switch: until that file is there, each does this before all
/// else.
fn switched(options: &mut Options, dir: &Dir, first: &str) -> PathBuf {
    let (switch, script) = (dir.0.join("on"), dir.0.join("qemu"));
    let body = format!(
        "#!/bin/sh\nuntil [ -e {} ]; do {first}; done\nexec {} \"$@\"\n",
        switch.display(),
        options.qemu
    );
    fs::write(&script, body).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    options.qemu = script.display().to_string();
    switch
}

/// QEMUs wait until this file is there: what is to come before the first VM does.
pub fn held(options: &mut Options, dir: &Dir) -> PathBuf {
    switched(options, dir, "sleep 0.1")
}

fn assert_error(out: &Output, code: i32, words: &[&str]) {
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{err}");
    for word in words {
        assert!(err.contains(word), "{word:?} in {err}");
    }
}

#[test]
fn a_server_that_can_not_work_says_why_before_it_starts() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let fresh = || Options::pool(&prepared, 1);

    let mut o = fresh();
    o.qemu = "/nonexistent/qemu".into();
    assert_error(&refused(&dir, &o), 5, &["c.toml:2", "/nonexistent/qemu", "install QEMU"]);
    let mut o = fresh();
    o.kernel = "/nonexistent/vmlinuz".into();
    assert_error(&refused(&dir, &o), 5, &["c.toml:3", "/nonexistent/vmlinuz"]);
    let mut o = fresh();
    o.kernel = "/etc/passwd".into();
    assert_error(&refused(&dir, &o), 5, &["is no Linux kernel"]);
    let mut o = fresh();
    o.initrd = "/etc/passwd".into();
    assert_error(&refused(&dir, &o), 5, &["c.toml:4", "is no initramfs", "mkinitrd"]);
    let mut o = fresh();
    o.memory = 8;
    assert_error(&refused(&dir, &o), 2, &["c.toml:5", "default_memory = 8", "at least 64 MiB"]);

    let config = dir.0.join("c.toml");
    fs::write(&config, fresh().text(&dir.0)).unwrap();
    let long = format!("/{}", "x".repeat(199));
    let out = serve(&config, &["--endpoint", &long]);
    assert_error(&out, 2, &["200 bytes", "107"]);
    let out = serve(&config, &["--endpoint", "/nonexistent/dir/s"]);
    assert_error(&out, 2, &["the directory of /nonexistent/dir/s does not exist"]);
    let file = dir.0.join("file");
    fs::write(&file, "").unwrap();
    let out = serve(&config, &["--endpoint", file.to_str().unwrap()]);
    assert_error(&out, 1, &["exists and is no socket"]);
    let out = vmcache(&config).args(["status"]).output().unwrap();
    assert_error(&out, 3, &["is it running?", "vmcache serve"]);
    let out = vmcache(&config).args(["run", "--", "true"]).output().unwrap();
    assert_error(&out, 125, &["is it running?"]);
    let out = vmcache(Path::new("/nonexistent.toml")).args(["serve"]).output().unwrap();
    assert_error(&out, 2, &["/nonexistent.toml"]);
    let mut o = fresh();
    o.more_ours.push_str("sockett_mode = \"0600\"\n");
    assert_error(&refused(&dir, &o), 2, &["vmcache.sockett_mode is not an option"]);
    let _ = fs::remove_file(dir.0.join("file.lock"));
    assert_nothing_left(&dir.0);
}

#[test]
fn a_second_server_is_refused_and_the_first_is_not_disturbed() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let out = serve(&daemon.config, &[]);
    let pid = format!("pid {}", daemon.pid());
    assert_error(&out, 1, &["another server", &pid, "vmcache quit"]);
    assert_eq!(daemon.ok(&["run", "--", "echo", "fine"]), "fine\n");
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_qemu_that_exits_at_once_is_tried_again_until_it_works() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 1);
    let switch = switched(&mut options, &dir, "echo 'no luck today' >&2; exit 1");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_log("boot-failed", 3);
    let error = daemon.status()["last_error"].as_str().unwrap().to_string();
    assert!(error.contains("QEMU's monitor did not answer"), "{error}");
    assert!(error.contains("QEMU ended by itself, it wrote: no luck today"), "{error}");
    wait_for("the end of a try", || directories(&daemon.store()).is_empty());
    fs::write(&switch, "").unwrap();
    daemon.wait_ready(1);
    assert_eq!(daemon.ok(&["run", "--", "echo", "healed"]), "healed\n");
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_guest_that_never_answers_is_ended_at_its_deadline() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 1);
    // A guest whose init is busybox's: a real system, but no agent.
    let initrd = dir.0.join("silent.img");
    let modules =
        fs::read_dir(prepared.join("kernel/lib/modules")).unwrap().next().unwrap().unwrap();
    let out = vmcache(&prepared.join("configuration.toml"))
        .args(["mkinitrd", "--agent", "/bin/busybox", "--kernel-modules"])
        .arg(modules.path())
        .arg("--output")
        .arg(&initrd)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    options.initrd = initrd.display().to_string();
    options.timeout = 8;
    let daemon = Daemon::launch(&options, dir);
    let out = daemon.output(&["get", "--wait", "2"]);
    assert_error(&out, 4, &["no VM from"]);
    daemon.wait_log("boot-failed", 1);
    let error = daemon.status()["last_error"].as_str().unwrap().to_string();
    assert!(error.contains("the guest's agent did not answer"), "{error}");
    assert!(error.contains("QEMU was still running"), "{error}");
    assert!(error.contains("no agent answered on"), "{error}");
    assert_nothing_left(&daemon.quit().0);
    // The same as a cold run: one error, one exit code.
    let dir = Dir::new();
    let config = dir.0.join("c.toml");
    fs::copy(prepared.join("configuration.toml"), &config).unwrap();
    let out =
        vmcache(&config).args(["run", "--cold", "--memory", "8", "--", "true"]).output().unwrap();
    assert_error(&out, 2, &["at least 64 MiB"]);
}

#[test]
fn a_full_run_directory_fails_boots_and_loses_nothing() {
    let prepared = require_qemu!();
    if !nix::unistd::geteuid().is_root() {
        panic!("this test mounts a small file system: run it as root");
    }
    let dir = Dir::new();
    let store = dir.0.join("vm");
    fs::create_dir(&store).unwrap();
    let options = "size=64k,nr_inodes=40";
    nix::mount::mount(
        Some("t"),
        &store,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some(options),
    )
    .unwrap();
    fs::write(store.join("filler"), vec![0; 64 * 1024]).unwrap();
    let daemon = Daemon::launch(&Options::pool(&prepared, 1), dir);
    daemon.wait_log("boot-failed", 2);
    let error = daemon.status()["last_error"].as_str().unwrap().to_string();
    assert!(error.contains("its directory could not be made"), "{error}");
    assert!(error.contains("No space left"), "{error}");
    assert!(qemus(&daemon.dir.0).is_empty());
    fs::remove_file(daemon.store().join("filler")).unwrap();
    daemon.wait_ready(1);
    assert_eq!(daemon.ok(&["run", "--", "echo", "room"]), "room\n");
    let dir = daemon.quit();
    assert!(qemus(&dir.0).is_empty());
    assert_eq!(directories(&store).len(), 0);
    nix::mount::umount(&store).unwrap();
}
