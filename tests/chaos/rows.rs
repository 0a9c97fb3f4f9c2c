//! The faults, one function each: brings it about so many times, and lets all settle.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::count::runs;
use crate::daemon::{qemus, vmcache, Daemon};
use crate::field::{Dice, Field, Row};

fn nothing(_: &mut crate::daemon::Options, _: &Path) {}

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn send(pid: i64, signal: Signal) {
    // It may have ended meanwhile.
    let _ = kill(Pid::from_raw(pid as i32), signal);
}

fn get(daemon: &Daemon) -> Child {
    let mut get = daemon.command(&["get", "--json", "--wait", "60"]);
    get.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// A client that is killed has no VM, or has said which.
pub fn clients(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 4, nothing);
    let mut dice = Dice::new();
    for n in 0..times {
        let mut child = match n % 4 {
            // With a command in the VM, which ends with its client.
            0 => {
                let mut run = field.daemon().command(&["run", "--", "sleep", "100"]);
                run.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
            }
            _ => get(field.daemon()),
        };
        dice.pause(ms(if n % 8 == 7 { 600 } else { 120 }));
        let _ = child.kill();
        let out = child.wait_with_output().unwrap();
        if !out.stdout.is_empty() {
            // Whether it was alive is its own affair: it ends with its client until
            // that has said so and has been heard.
            if let Some((id, _)) = field.got(&out) {
                field.stop(&id);
            }
        }
    }
    field.settle()
}

/// VMs that die in whatever state are replaced, and never handed out dead.
pub fn qemus_killed(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 3, nothing);
    let mut dice = Dice::new();
    let mut killed = Vec::new();
    for n in 0..times {
        if n % 3 == 0 {
            // Claimed while others die; one that was killed in its hands is no loss.
            let child = get(field.daemon());
            dice.pause(ms(40));
            killed.extend(kill_one(&field, &mut dice));
            let out = child.wait_with_output().unwrap();
            if let Some((id, pid)) = field.got(&out) {
                field.row.dead += usize::from(!runs(pid) && !killed.contains(&pid));
                field.stop(&id);
            }
        } else {
            killed.extend(kill_one(&field, &mut dice));
            dice.pause(ms(300));
        }
    }
    field.settle()
}

fn kill_one(field: &Field, dice: &mut Dice) -> Option<i64> {
    let all = qemus(&field.daemon().dir.0);
    let pid = i64::from(*all.get(dice.below(all.len() as u64) as usize)?);
    send(pid, Signal::SIGKILL);
    Some(pid)
}

/// Runs commands in VMs of this configuration until it is told to stop; how many ran,
/// and how many did not.
fn load(config: &Path, stop: &AtomicBool) -> (usize, usize) {
    let (mut done, mut not) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        let mut run = vmcache(config);
        run.args(["run", "--wait", "120", "--", "true"]).stderr(Stdio::null());
        match run.status().unwrap().success() {
            true => done += 1,
            false => not += 1,
        }
        // One that fails at once is no load.
        std::thread::sleep(ms(5));
    }
    (done, not)
}

fn under_load(field: &mut Field, body: impl FnOnce(&mut Field)) {
    let stop = AtomicBool::new(false);
    let config = field.daemon().config.clone();
    let counts = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| load(&config, &stop))).collect();
        body(field);
        stop.store(true, Ordering::SeqCst);
        clients.into_iter().map(|c| c.join().unwrap()).collect::<Vec<_>>()
    });
    for (done, not) in counts {
        field.row.claimed += done;
        field.row.refused += not;
    }
}

/// What a killed server leaves, the next one has.
pub fn servers(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 3, nothing);
    let mut dice = Dice::new();
    under_load(&mut field, |field| {
        for _ in 0..times {
            dice.pause(ms(2500));
            field.kill_server();
        }
    });
    field.settle()
}

/// A restart in place refuses no claim.
pub fn restarts(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 3, nothing);
    let mut dice = Dice::new();
    under_load(&mut field, |field| {
        for _ in 0..times {
            dice.pause(ms(1500));
            field.daemon().ok(&["restart"]);
        }
    });
    let refused = field.row.refused;
    let mut row = field.settle();
    if refused > 0 {
        row.leaked.push(format!("{refused} claims were refused"));
    }
    row
}

/// QEMU is not there for a while.
pub fn unstartable(prepared: &Path, times: u32) -> Row {
    let mut real = String::new();
    let mut field = Field::new(prepared, 2, |options, dir| {
        let link = dir.join("qemu-system-x86_64");
        symlink(&options.qemu, &link).unwrap();
        real = std::mem::replace(&mut options.qemu, link.display().to_string());
    });
    let link = Path::new(&field.options.qemu).to_path_buf();
    for _ in 0..times {
        fs::remove_file(&link).unwrap();
        symlink("/nonexistent", &link).unwrap();
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("1") {
                field.stop(&id);
            }
        }
        fs::remove_file(&link).unwrap();
        symlink(&real, &link).unwrap();
    }
    field.settle()
}

/// The run directory has no room for bytes, or for files.
pub fn no_room(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 2, |_, dir| {
        let store = dir.join("vm");
        fs::create_dir(&store).unwrap();
        let options = "size=1m,nr_inodes=400,mode=700";
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "vmcache-chaos"]).arg(&store);
        assert!(mount.status().unwrap().success(), "mount {}", store.display());
    });
    let store = field.daemon().store();
    for n in 0..times {
        let full = store.join("full");
        fs::create_dir(&full).unwrap();
        match n % 2 {
            0 => drop(fs::write(full.join("bytes"), vec![0; 2 << 20])),
            _ => {
                let mut files = 0..;
                while fs::write(full.join(files.next().unwrap().to_string()), "").is_ok() {}
            }
        }
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("1") {
                field.stop(&id);
            }
        }
        fs::remove_dir_all(&full).unwrap();
    }
    field.settle()
}

/// The server may open no more.
pub fn no_fds(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 2, nothing);
    // The soft one: it may go up again.
    let limit = |pid: i32, n: usize| {
        let limit = format!("--nofile={n}:");
        let status = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
        assert!(status.unwrap().success());
    };
    for _ in 0..times {
        let pid = field.daemon().pid();
        let now = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|l| l.starts_with("Max open files")).unwrap();
        let before = line.split_whitespace().nth(3).unwrap().parse().unwrap();
        limit(pid, now + 2);
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("1") {
                field.stop(&id);
            }
        }
        limit(pid, before);
    }
    field.settle()
}

/// A QEMU that hangs is found by whoever gets it, and nobody else waits for it.
pub fn stopped(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 2, nothing);
    for _ in 0..times {
        // One that stands ready: one that boots has its deadline.
        let status = field.daemon().status();
        let mut vms = status["vms"].as_array().unwrap().iter();
        let Some(vm) = vms.find(|vm| vm["state"] == "ready") else { continue };
        send(vm["pid"].as_i64().unwrap(), Signal::SIGSTOP);
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("30") {
                let echo = field.daemon().output(&["exec", &id, "--", "true"]);
                field.row.dead += usize::from(!echo.status.success());
                field.stop(&id);
            }
        }
    }
    field.settle()
}
