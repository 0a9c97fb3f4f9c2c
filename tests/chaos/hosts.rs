//! Faults of hosts.

use std::fs;
use std::os::unix::fs::{chown, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::field::{Dice, Field, Row};
use crate::rows::ms;

/// A user of whom nothing else runs: root has no limit of processes.
const SOMEBODY: u32 = 233_000;

/// A pool whose server is nobody in particular.
fn somebodys(prepared: &Path) -> Field {
    Field::new(prepared, 2, |options, dir| {
        let program = dir.join("vmcache");
        fs::copy(env!("CARGO_BIN_EXE_vmcache"), &program).unwrap();
        for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
            let copy = dir.join(name);
            fs::copy(&image, &copy).unwrap();
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
            *image = copy.display().to_string();
        }
        chown(dir, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        options.server = Some((SOMEBODY, program));
        // What only root could do.
        options.more_factory = String::new();
        let lines = options.more_ours.lines().filter(|l| !l.starts_with("cgroup"));
        options.more_ours = lines.map(|l| format!("{l}\n")).collect();
    })
}

/// The server may not write its run directory.
pub fn forbidden(prepared: &Path, times: u32) -> Row {
    let mut field = somebodys(prepared);
    let store = field.daemon().store();
    let chmod = |mode| fs::set_permissions(&store, fs::Permissions::from_mode(mode)).unwrap();
    for _ in 0..times {
        chmod(0o500);
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("1") {
                field.stop(&id);
            }
        }
        chmod(0o711);
    }
    let told = field.daemon().log_lines("Permission denied").len();
    assert!(told > 0, "it wrote there{}", field.daemon().log());
    field.settle()
}

/// The server's user may have no more processes.
pub fn no_processes(prepared: &Path, times: u32) -> Row {
    let mut field = somebodys(prepared);
    let limit = |pid: i32, n: &str| {
        let limit = format!("--nproc={n}:");
        // As that user: root may lack the right in a container.
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &pid.to_string(), &limit]).uid(SOMEBODY).gid(SOMEBODY);
        assert!(prlimit.status().unwrap().success());
    };
    for _ in 0..times {
        let pid = field.daemon().pid();
        limit(pid, "1");
        for _ in 0..3 {
            if let Some((id, _)) = field.claim("1") {
                field.stop(&id);
            }
        }
        limit(pid, "4096");
    }
    let told = field.daemon().log_lines("boot-failed").len();
    assert!(told > 0, "QEMU was started{}", field.daemon().log());
    field.settle()
}

/// The server sees the wall clock jump. The machine's own is everybody's: what the
/// server is told comes from libfaketime, a stand-in for the kernel's clock.
pub fn clock(prepared: &Path, times: u32) -> Row {
    let library = prepared.join("faketime/libfaketimeMT.so.1");
    assert!(library.exists(), "{} is missing: use tests/run", library.display());
    let file = std::env::temp_dir().join(format!("vmcache-clock-{}", std::process::id()));
    let set = |text: &str| {
        let new = file.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, &file).unwrap();
    };
    set("+0");
    let (library, place) = (library.display().to_string(), file.display().to_string());
    let environment = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", place.as_str()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    let mut field = Field::with(prepared, 2, |_, _| {}, &environment);
    let mut dice = Dice::new();
    for n in 0..times {
        set(["+1h", "-1h", "+0"][n as usize % 3]);
        dice.pause(ms(200));
        if n % 2 == 0 {
            if let Some((id, _)) = field.claim("60") {
                let echo = field.daemon().output(&["exec", &id, "--", "true"]);
                field.row.dead += usize::from(!echo.status.success());
                field.stop(&id);
            }
        }
        if n % 20 == 19 {
            // The next one's ledgers are of another time.
            field.kill_server();
        }
    }
    set("+0");
    let row = field.settle();
    fs::remove_file(&file).unwrap();
    row
}
